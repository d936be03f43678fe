"""What reads the probabilities or logits of a batch of tokens: balance losses, each a scalar for one router.

Those that are not linear in the tokens come in two steps, sums over the tokens and a function of the sums: over several ranks
the sums are added up in between.

Over 250 lines: five losses, and more than half of it their docstrings.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from .._precision import at_least_float32
from .._rules import check_tensor, check_top_k


def load_balance_loss(probs: Tensor, mask: Tensor | None = None, *, unbiased: bool = False) -> Tensor:
    """Squared coefficient of variation of the experts' mean probability.

        L_div = (std(P) / mean(P))²,    P_i = (1/T) Σ_t w_i(t)

    0 when every expert gets the same share, `K - 1` (`K` if `unbiased`) when one expert gets everything. It depends on the
    shares only, so rows need not sum to one. No tokens, or one expert, gives 0.

    NOTE[DIFF]: The paper does not say which std. The default divides by K, which is also what makes K = 1 well defined;
    `unbiased=True` divides by K - 1, as `torch.std` does.

    **Shape**
        - probs: `(*, K)`, the probabilities over ALL experts, at least 0, of any floating dtype; summed in float32 or better.
        - mask: `(*)`, bool or 0/1; True (1) marks the tokens that count. Masked rows are never read, whatever they hold.
        - Output: scalar, float32 or float64, in `[0, K - 1]` (`[0, K]`); NaN if a counted row holds NaN.

    Raises:
        ValueError: no expert dimension, or a mask of another shape than `(*)`.
        TypeError: probs not floating point.

    Source:
        equation 6.

    >>> load_balance_loss(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    tensor(0.)
    >>> load_balance_loss(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor(1.)
    """
    return squared_variation(expert_sums(probs, mask), unbiased)


def importance_kl_loss(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence of the experts' shares from even ones.

        L_KL = Σ_i P_i log(K P_i),    P_i = Σ_t w_i(t) / Σ_j Σ_t w_j(t)

    0 when every expert gets the same share, log K when one expert gets everything; near balance half of
    `load_balance_loss`, near collapse far flatter in K. It depends on the shares only. No tokens, or one expert, gives 0.

    NOTE[DIFF]: The public code divides by the number of tokens, after adding 1e-10; here the shares are normalised, which is
    the same for rows that sum to one.

    **Shape**
        - probs, mask: as `load_balance_loss`.
        - Output: scalar, float32 or float64, in `[0, log K]`; NaN if a counted row holds NaN.

    Raises:
        ValueError, TypeError: as `load_balance_loss`.

    Source:
        Pavlitska et al., arXiv:2204.10598.

    >>> importance_kl_loss(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))  # log 2
    tensor(0.6931)
    """
    return divergence(expert_sums(probs, mask))


def mutual_information_loss(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Minus the mutual information of token and expert: least when each token is sure of its expert and the experts balanced.

        L_MI = mean_t H(w(t)) − H(mean_t w(t)),    H(p) = −Σ_i p_i log p_i

    0 when all tokens are routed alike, balanced or not; −log K when each goes to one expert and all experts get
    the same share. No tokens, or one expert, gives 0. Rows are assumed to sum to one. Those that do not are read as one joint
    distribution of token and expert, w_i(t) / Σ w: a token weighs as much as its row sums to, and the range holds.

    **Shape**
        - probs, mask: as `load_balance_loss`.
        - Output: scalar, float32 or float64, in `[-log K, 0]` up to rounding; NaN if a counted row holds NaN.

    Raises:
        ValueError, TypeError: as `load_balance_loss`.

    Source:
        the "entropy" loss of arXiv:2509.05086; its halves, apart, are the entropy losses of Mustafa et al., arXiv:2206.02770.

    >>> mutual_information_loss(torch.eye(2))  # -log 2
    tensor(-0.6931)
    """
    return minus_information(entropy_sums(probs, mask))


def switch_loss(probs: Tensor, mask: Tensor | None = None, *, top_k: int = 1) -> Tensor:
    """The balance loss of GShard and Switch: K times the products of each expert's load and its mean probability.

        L = K Σ_i f_i P_i,    f_i = share of the assignments that expert i gets,    P_i = (1/T) Σ_t w_i(t)

    1 at balance, `K / top_k` at collapse, below 1 only as far as f and P disagree. f has no gradient; it is counted from the
    `top_k` largest of each row, so it is not the load of a model that chooses in another way, by a bias or in groups. No
    tokens give 0, one expert 1.

    NOTE[DIFF]: Implementations for top_k > 1 differ by a factor. Here f sums to one, as in Megatron-LM and DeepSeek. In
    transformers f sums to `top_k`, so its loss is `top_k` times this one and its coefficient is to be multiplied by `top_k`;
    it also pools the layers. The code of arXiv:2509.05086 subtracts 1.

    **Shape**
        - probs, mask: as `load_balance_loss`; rows sum to one.
        - Output: scalar, float32 or float64, in `[0, K / top_k]`; NaN if a counted row holds NaN.

    Args:
        top_k: how many experts a token is sent to, from 1 to K.

    Raises:
        ValueError, TypeError: as `load_balance_loss`; top_k out of its range, or no whole number.

    Source:
        Fedus et al., arXiv:2101.03961, equation 4; Lepikhin et al., arXiv:2006.16668.

    >>> switch_loss(torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    tensor(1.)
    >>> switch_loss(torch.tensor([[0.75, 0.25], [0.75, 0.25]]))  # 2 x (1 x 0.75 + 0 x 0.25)
    tensor(1.5000)
    """
    return load_times_probability(assignment_sums(probs, mask, top_k), top_k)


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean square of the logsumexp of the logits, which keeps them small.

        L_z = (1/T) Σ_t (log Σ_i exp x_i(t))²

    Zero where the exponentials of a token sum to one, as log-probabilities do; logits of 0 give (log K)². No tokens give 0.
    It has the attribute `reads = "logits"`, so `wrap_moe(model, balance=router_z_loss)` hands it logits.

    Caution: the logits of `PrototypeRouter(metric="euclidean")`, the default, are −distance / τ. There it penalises the
    distance itself, by thousands in each layer at the start with temperature="auto" (4467 at dim=64, K=4), and training
    stands still. Take "sqeuclidean", "dot" or a linear gate with it.

    **Shape**
        - logits: `(*, K)`, over ALL experts, of any floating dtype; computed in float32 or better.
        - mask: as `load_balance_loss`.
        - Output: scalar, float32 or float64, at least 0; NaN if a counted row holds NaN.

    Raises:
        ValueError, TypeError: as `load_balance_loss`.

    Source:
        Zoph et al., arXiv:2202.08906, equation 5.

    >>> router_z_loss(torch.zeros(3, 2))  # (log 2)²
    tensor(0.4805)
    """
    squared = at_least_float32(_rows(logits, mask, "logits")).logsumexp(-1).square()
    if mask is None:
        return squared.sum() / max(1, len(squared))
    counts = mask.reshape(-1).bool()
    return torch.where(counts, squared, 0).sum() / counts.sum().clamp_min(1)


router_z_loss.reads = "logits"  # type: ignore[attr-defined]  # functions have no declared attributes


# sums over the tokens that count, and what is made of them --------------------------------------------------------------


def expert_sums(probs: Tensor, mask: Tensor | None) -> Tensor:
    """Probabilities `(*, K)` summed over the tokens that count, `(K)` in float32 or float64, or a clear error."""
    return _sum(_rows(probs, mask, "probs"))


def squared_variation(importance: Tensor, unbiased: bool) -> Tensor:
    mean = importance.mean()
    share = importance / torch.where(mean == 0, 1, mean)
    return share.var(correction=int(unbiased and len(share) > 1))


def divergence(importance: Tensor) -> Tensor:
    total = importance.sum()
    num_experts = len(importance)
    relative = torch.where(total == 0, 1, importance) * num_experts / torch.where(total == 0, num_experts, total)
    # each term is at least 0, so that little is lost to rounding near balance: Σ_i (K P_i - 1) = 0
    return (_x_log_x(relative) - (relative - 1)).mean()


def entropy_sums(probs: Tensor, mask: Tensor | None) -> Tensor:
    """(K + 1): the sums of each expert, and that of the tokens' entropies, each times what its row sums to."""
    rows = at_least_float32(_rows(probs, mask, "probs"))
    entropy = _x_log_x(rows.sum(-1)).sum() - _x_log_x(rows).sum()
    return torch.cat([rows.sum(0), entropy[None]])


def minus_information(sums: Tensor) -> Tensor:
    importance, entropy = sums[:-1], sums[-1]
    total = importance.sum()
    within = entropy / torch.where(total == 0, 1, total)
    return torch.where(total == 0, 0, within + divergence(importance) - math.log(len(importance)))


def assignment_sums(probs: Tensor, mask: Tensor | None, top_k: int) -> Tensor:
    """(2K): the sums of each expert, and the number of tokens that have it among their `top_k`."""
    rows = _rows(probs, mask, "probs")
    importance, num_experts = _sum(rows), rows.shape[-1]
    check_top_k(top_k, num_experts)
    chosen = torch.zeros_like(rows, dtype=torch.bool).scatter(-1, rows.detach().topk(top_k).indices, True)
    if mask is not None:
        chosen = chosen & mask.reshape(-1, 1).bool()
    return torch.cat([importance, chosen.sum(0, dtype=importance.dtype)])


def load_times_probability(sums: Tensor, top_k: int) -> Tensor:
    importance, assigned = sums.chunk(2)
    tokens = assigned.sum() / top_k
    tokens = torch.where(tokens == 0, 1, tokens)
    return len(importance) * (assigned / (top_k * tokens) * importance / tokens).sum()


def _rows(values: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """(*, K) -> (T, K), zero where the mask is, or a clear error."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}; of a RouterOutput pass .{name}")
    if values.ndim < 1 or values.shape[-1] < 1:
        raise ValueError(f"{name} must have shape (*, experts) with at least one expert, got shape {tuple(values.shape)}")
    if not values.is_floating_point():
        kind = "probabilities" if name == "probs" else "logits"
        raise TypeError(f"{name} must be floating point, got {values.dtype}; pass {kind}, not expert indices")
    if mask is not None:
        check_tensor(mask, "mask")
        if mask.shape != values.shape[:-1]:
            raise ValueError(
                f"mask must have the shape of {name} without its last dimension, {tuple(values.shape[:-1])}, "
                f"got {tuple(mask.shape)}; reshape it to one entry a token"
            )
        values = torch.where(mask.bool()[..., None], values, 0)
    return rearrange(values, "... k -> (...) k")


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(0, dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32)


def _x_log_x(x: Tensor) -> Tensor:
    """With a finite slope at 0, where a softmax may end up."""
    return x * x.clamp_min(torch.finfo(x.dtype).tiny).log()
