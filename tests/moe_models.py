"""Tiny mixture-of-experts models for the tests of `wrap_moe`: a Mixtral, and two written by hand."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM

from spectral_router import SpectralRankPenalty, wrap_moe
from spectral_router.functional import load_balance_loss

# of each gate, in the order of `MoEHandle.metrics`
METRICS = (
    *("sigma_max", "stable_rank", "penalty", "sigma_drift", "rank_drift"),
    *("balance", "entropy", "max_share", "dead", "loss"),
)
EXPERTS, DIM = 4, 16
PENALTY, BALANCE = 0.5, 0.3  # coefficients large enough that an error shows
# a batch for `mixtral`: padding in two rows, and its labels masked
IDS = torch.randint(3, 90, (4, 10), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, 6:], MASK[2, 8:] = 0, 0
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}


def mixtral(**options) -> MixtralForCausalLM:
    """Two layers of eight experts, in training mode; always the same weights."""
    settings = {
        "vocab_size": 96,
        "hidden_size": DIM,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "router_aux_loss_coef": 0.0,
        "attn_implementation": "eager",
    }
    model = MixtralForCausalLM(MixtralConfig(**{**settings, **options})).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # larger than transformers makes them, so that routing is not even
                parameter.normal_(0, 0.2, generator=generator)
    return model


def mixtral_gates(model: MixtralForCausalLM) -> list[nn.Module]:
    return [layer.mlp.gate for layer in model.model.layers]


class Block(nn.Module):
    """A mixture layer written by hand: every expert runs, weighted by the probability that the gate gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1).split(1, -1)
        return x + sum(share * expert(x).tanh() for share, expert in zip(shares, self.experts, strict=True))


class Stack(nn.Module):
    """Layers one after the other, by themselves or under activation checkpointing; returns a plain tensor."""

    def __init__(self, *layers: nn.Module, reentrant: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers or (Block(), Block()))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


class Regressor(Stack):
    """The same, returning a dict with the loss."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        prediction = super().forward(x)
        return {"prediction": prediction} if target is None else {"loss": (prediction - target).square().mean()}


def tokens(*shape: int) -> Tensor:
    """Input of the models written by hand; reentrant checkpointing wants it to require a gradient."""
    return torch.randn(*(shape or (3, 5)), DIM, requires_grad=True)


def primed(weights: list[Tensor], **options) -> SpectralRankPenalty:
    """A penalty with anchors of other matrices of these shapes, so that it is far from zero, and so is its gradient."""
    penalty = SpectralRankPenalty("initial", rank_target=2.0, relative=True, **options)
    generator = torch.Generator().manual_seed(2)
    penalty([torch.randn(weight.shape, generator=generator) for weight in weights])
    return penalty


def gradients(model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    return {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Each to `tolerance` of its norm."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: {error:.1e}"


class IndexGate(nn.Module):
    """Hands out the chosen expert only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.mT).argmax(-1)


class IndexBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gate = IndexGate()

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x)[..., None]
        return x + sum((chosen == i) * expert(x) for i, expert in enumerate(self.experts))


def objective(model: Stack, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output of a stack without checkpointing, and its term with every gate's balance, spelled out."""
    weights = {id(layer.gate.weight): layer.gate.weight for layer in model.layers}
    term = PENALTY * primed(list(weights.values()))(weights.values())
    for layer in model.layers:
        term = term + BALANCE * load_balance_loss(layer.gate(x).softmax(-1), mask)
        x = layer(x)
    return x, term


def wrapped_stack(kind: type[Stack] = Stack, *layers: nn.Module, reentrant: bool | None = None):
    """A model, its twin to be differentiated by hand, and the handle of the former."""
    torch.manual_seed(0)
    model = kind(*layers, reentrant=reentrant)
    twin = kind(*layers)
    if not layers:
        twin.load_state_dict(model.state_dict())
    weights = {id(layer.gate.weight): layer.gate.weight for layer in model.layers}
    return model, twin, wrap_moe(model, penalty=primed(weights.values()), penalty_coef=PENALTY, balance_coef=BALANCE)
