"""PrototypeRouter: a gate that sends each token to the experts whose prototypes are nearest.

Over 250 lines: one class, and more than half of it its docstrings.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .._precision import at_least_float32, full_precision
from .._rules import check_tensor, check_top_k
from .route import Controller, RouterOutput, route

__all__ = ["PrototypeRouter", "RouterOutput"]

Metric = Literal["euclidean", "sqeuclidean", "cosine", "dot"]
_METRICS = ("euclidean", "sqeuclidean", "cosine", "dot")
# Up to this norm a vector has no direction to speak of: its cosines, and their gradients, are zero instead of huge.
_NO_DIRECTION = 1e-6


class PrototypeRouter(nn.Module):
    """Routes by distance to learnable prototypes, one an expert.

        w_i = exp(−‖z − μ_i‖₂ / τ) / Σ_j exp(−‖z − μ_j‖₂ / τ)

    **Shape**
        - Input: `(*, dim)`, floating point.
        - Output: `RouterOutput`. Scores are computed in float32, also under autocast; in float64 if the input or the
          prototypes are. `torch.set_float32_matmul_precision` below "highest" (TF32) makes distances far smaller than the
          vectors inexact; "sqeuclidean" suffers least.
        - No `(tokens, experts, dim)` tensor is ever made.

    Args:
        dim: D, the length of an input vector.
        num_experts: K, the number of prototypes μ_i.
        top_k: None is soft routing, all experts weighted: equation 1 sums over all of them. An integer in `[1, K]` keeps the
            `top_k` best, their weights renormalised to sum to one.
        temperature: τ > 0, in units of the score. The paper prints no value. With inputs from a LayerNorm
            (norm `sqrt(dim)`) and prototypes of norm near 1, distances differ by about `1 / sqrt(dim)`, so that 1.0 routes
            almost evenly. "auto" sets it, whenever the prototypes are initialised, so that the scores of LayerNorm'd
            inputs have a standard deviation near 1: with r the root mean square norm of the prototypes,
            `r / sqrt(dim)` for euclidean, `2 r` for sqeuclidean, `1 / sqrt(dim)` for cosine, `r` for dot.
        learnable_temperature: train the temperature, as `log_temperature`.
        metric: the score that is divided by the temperature,
            "euclidean": −‖z − μ_i‖, the paper;
            "sqeuclidean": 2 z·μ_i − ‖μ_i‖², which is −‖z − μ_i‖² up to ‖z‖², the same for every expert: equal probs,
            cheaper, and more exact near a prototype;
            "cosine": the cosine of the angle; "dot": z·μ_i, the usual linear gate without bias.
        controller: `ImportanceConstraint`, `LossFreeBias` or a module like them, this router's own: it says who may be chosen.

    NOTE[DIFF]: The paper says that bounding the spectral norm bounds the Lipschitz constant of the routing. That holds for
    "sqeuclidean" and "dot". With the unsquared distance of equation 2 each score changes by at most 1/τ per unit
    of input, whatever the prototypes are.

    Attributes:
        prototypes: parameter `(num_experts, dim)`: what `SpectralRankPenalty` takes.
        log_temperature: scalar parameter if `learnable_temperature`, else a buffer if "auto", else None.

    Raises:
        ValueError: an argument out of its range, or an input whose last dimension is not `dim`.
        TypeError: an input that is not floating point.

    Source:
        equation 2 of arXiv:2601.03889.

    >>> router = PrototypeRouter(dim=16, num_experts=4, top_k=2)
    >>> logits, probs, weights, indices = router(torch.randn(8, 10, 16))
    >>> probs.shape, weights.shape, indices.shape
    (torch.Size([8, 10, 4]), torch.Size([8, 10, 2]), torch.Size([8, 10, 2]))
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        temperature: float | Literal["auto"] = 1.0,
        learnable_temperature: bool = False,
        metric: Metric = "euclidean",
        controller: Controller | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_experts < 1:
            raise ValueError(f"dim and num_experts must be at least 1, got {dim=}, {num_experts=}")
        if top_k is not None:
            check_top_k(top_k, num_experts)
        if metric not in _METRICS:
            raise ValueError(f"metric must be one of {', '.join(_METRICS)}, got {metric=}")
        if temperature != "auto" and not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
            raise ValueError(f'temperature must be a finite number above 0 or "auto", got {temperature=}')
        self.dim = dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.metric: Metric = metric
        self.controller: Controller | None = None
        self.initial_temperature = temperature
        self.prototypes = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.log_temperature: Tensor | None
        log_temperature = torch.empty((), device=device, dtype=dtype)
        if learnable_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            # a fixed number needs no tensor, which half precision would round
            self.register_buffer("log_temperature", log_temperature if temperature == "auto" else None)
        self.reset_parameters()
        self.controller = controller  # after the reset: it may come with a state

    @property
    def temperature(self) -> Tensor:
        """τ, a scalar tensor above 0, in float32 or better."""
        if self.log_temperature is None:
            return torch.tensor(self.initial_temperature, dtype=torch.float64)
        return at_least_float32(self.log_temperature).exp()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw prototypes from a normal distribution of standard deviation `1 / sqrt(dim)`: norms near 1, nearly orthogonal,
        so a spectral norm and a stable rank near the targets of `SpectralRankPenalty` for K well below `dim`. The temperature
        and the controller start anew too."""
        nn.init.normal_(self.prototypes, std=self.dim**-0.5)
        self._reset_temperature()
        if reset := getattr(self.controller, "reset_parameters", None):
            reset()

    @torch.no_grad()
    def init_from(self, x: Tensor, *, generator: torch.Generator | None = None) -> PrototypeRouter:
        """Place the prototypes on inputs that lie far apart, by k-means++ seeding, and return the router.

        Each next prototype is one of the inputs, drawn with a probability proportional to its squared distance from the
        nearest prototype so far (for metric "cosine", of the normalised inputs).

        Args:
            x: `(*, dim)` with at least `num_experts` vectors, all finite: typical inputs of this router.
            generator: source of randomness, on the device of `x`; None uses PyTorch's global one.

        Raises:
            ValueError: wrong last dimension, too few vectors, or a vector that is not finite.
            TypeError: vectors that are not floating point.

        Source:
            Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007.
        """
        self._check(x)
        points = at_least_float32(rearrange(x, "... d -> (...) d"))
        if len(points) < self.num_experts:
            raise ValueError(f"init_from needs at least num_experts={self.num_experts} vectors, got {len(points)}")
        if not points.isfinite().all():
            raise ValueError("init_from needs finite vectors, got NaN or inf in x; drop those rows first")
        place = F.normalize(points, dim=-1) if self.metric == "cosine" else points
        odds = torch.ones_like(place[:, 0])
        nearest = torch.full_like(odds, math.inf)
        for expert in range(self.num_experts):
            # with fewer distinct vectors than experts every distance ends at zero: then any vector will do
            odds = torch.where(odds.sum() > 0, odds, 1.0)
            chosen = torch.multinomial(odds, 1, generator=generator)
            self.prototypes[expert] = points[chosen[0]].to(self.prototypes)
            nearest = torch.minimum(nearest, (place - place[chosen]).square().sum(-1))
            odds = nearest / nearest.max().clamp_min(torch.finfo(nearest.dtype).tiny)
        self._reset_temperature()
        return self

    def forward(self, x: Tensor) -> RouterOutput:
        self._check(x)
        with full_precision(x.device):
            dtype = torch.promote_types(torch.promote_types(x.dtype, self.prototypes.dtype), torch.float32)
            logits = self._logits(x.to(dtype), self.prototypes.to(dtype), self.temperature.to(dtype))
        return route(logits, self.top_k, controller=self.controller, dtype=x.dtype)

    def _logits(self, x: Tensor, prototypes: Tensor, temperature: Tensor) -> Tensor:
        # the temperature divides the prototypes where it can: there are far fewer of them than of scores
        if self.metric == "dot":
            return F.linear(x, prototypes / temperature)
        if self.metric == "cosine":
            return F.linear(_directions(x), _directions(prototypes) / temperature)
        if self.metric == "sqeuclidean":
            return F.linear(x, 2 * prototypes / temperature, -prototypes.square().sum(-1) / temperature)
        if torch.compiler.is_compiling():
            # the compiler fuses this itself, forward and backward; the clamp passes no gradient from a distance of zero
            squared = _squared_distances(x, prototypes)
            return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt() / -temperature
        rows = x.reshape(-1, self.dim)
        return _DistanceLogits.apply(rows, prototypes, temperature).reshape(*x.shape[:-1], self.num_experts)

    def _reset_temperature(self) -> None:
        if self.log_temperature is None:
            return
        value = self.initial_temperature
        if isinstance(value, str):
            norm = at_least_float32(self.prototypes).square().sum(-1).mean().sqrt()
            spread = {
                "euclidean": norm / self.dim**0.5,
                "sqeuclidean": 2 * norm,
                "cosine": torch.full_like(norm, self.dim**-0.5),
                "dot": norm,
            }[self.metric]
            self.log_temperature.copy_(torch.where(spread > 0, spread, 1.0).log())
        else:
            self.log_temperature.fill_(math.log(value))

    def _check(self, x: Tensor) -> None:
        check_tensor(x, "input")
        if not x.is_floating_point():
            raise TypeError(f"input must be floating point, got {x.dtype}; embed or convert it first")
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"the last dimension of the input must be dim={self.dim}, got shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        learnable = isinstance(self.log_temperature, nn.Parameter)
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"temperature={self.initial_temperature!r}, learnable_temperature={learnable}, metric={self.metric!r}"
        )


class _DistanceLogits(torch.autograd.Function):
    """The logits of equation 2, l_ij = −‖x_i − μ_j‖ / τ, for x (T, D) and μ (K, D), with the gradient in closed form.

        dl_ij / dx_i = (μ_j − x_i) / (τ² |l_ij|) = −dl_ij / dμ_j        dl_ij / dτ = −l_ij / τ

    The gradient of x is the only tensor of the size of x that is made: at most sizes, new memory is what costs time.
    A token at a prototype gets gradient zero from it instead of 0/0. The backward is itself differentiable.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, prototypes: Tensor, temperature: Tensor) -> Tensor:
        return _squared_distances(x, prototypes).clamp_min_(0).sqrt_().div_(-temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, prototypes, temperature, logits = ctx.saved_tensors
        grad_x = grad_prototypes = grad_temperature = None
        with full_precision(x.device):
            pull, scale = grad / _divisor(logits), temperature**-2
            if ctx.needs_input_grad[0]:
                grad_x = (pull @ (scale * prototypes)).addcmul_(scale * pull.sum(-1, keepdim=True), x, value=-1)
            if ctx.needs_input_grad[1]:
                grad_prototypes = scale * (pull.mT @ x - pull.sum(0)[:, None] * prototypes)
            if ctx.needs_input_grad[2]:
                grad_temperature = -(grad * logits).sum() / temperature
        return grad_x, grad_prototypes, grad_temperature

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, prototypes_dot: Tensor, temperature_dot: Tensor) -> Tensor:
        x, prototypes, temperature, logits = ctx.saved_tensors
        slope = (x * x_dot).sum(-1, keepdim=True) + (prototypes * prototypes_dot).sum(-1)
        slope = x @ prototypes_dot.mT + x_dot @ prototypes.mT - slope
        return slope / (temperature**2 * _divisor(logits)) - logits * temperature_dot / temperature


def _squared_distances(x: Tensor, prototypes: Tensor) -> Tensor:
    """(*, D), (K, D) -> (*, K)"""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # x.square() would be a second x in memory
    return F.linear(x, -2 * prototypes, prototypes.square().sum(-1)).add_(norm.square())


def _divisor(logits: Tensor) -> Tensor:
    """‖x_i − μ_j‖ / τ, or infinity where that is zero: what is divided by it then becomes zero."""
    return F.threshold(-logits, 0.0, math.inf, inplace=True)


def _directions(vectors: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norm.masked_fill(norm <= _NO_DIRECTION, math.inf)
