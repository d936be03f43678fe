"""No hot path waits for its device: all of them run on `meta`, where `.item()`, branches on values and `nonzero` raise.

Forward passes also run on pretended CUDA tensors under bfloat16 autocast, where devices and dtypes have to agree.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from examples.image_classification import config, objective, train
from examples.image_classification import model as image_model
from spectral_router import (
    HypersphericalEnergyPenalty,
    ImportanceConstraint,
    ImportanceKLLoss,
    LoadBalanceLoss,
    LossFreeBias,
    MutualInformationLoss,
    OrthogonalityPenalty,
    PrototypeRouter,
    RouterZLoss,
    SpectralNormPenalty,
    SpectralRankPenalty,
    SwitchLoss,
    project_spectral_,
    wrap_moe,
)

PENALTIES = {
    "rank": SpectralRankPenalty,
    "rank, power": lambda: SpectralRankPenalty(solver="power"),
    "rank, initial": lambda: SpectralRankPenalty("initial", relative=True),
    "rank, hold": lambda: SpectralRankPenalty("initial", "initial", relative=True, one_sided=True),
    "rank, centred": lambda: SpectralRankPenalty(center=True),
    "norm": SpectralNormPenalty,
    "energy": HypersphericalEnergyPenalty,
    "energy, random": lambda: HypersphericalEnergyPenalty(half_space=True, projection="random"),
    "energy, angles": lambda: HypersphericalEnergyPenalty(projection="angle_preserving"),
    "energy, adversarial": lambda: HypersphericalEnergyPenalty(projection="adversarial"),
    "so": lambda: OrthogonalityPenalty("so"),
    "simbal": lambda: OrthogonalityPenalty("simbal"),
    "ernie": lambda: OrthogonalityPenalty("ernie"),
}
BALANCES = {
    "cv": LoadBalanceLoss,
    "kl": ImportanceKLLoss,
    "information": MutualInformationLoss,
    "switch": lambda: SwitchLoss(top_k=2),
    "z": RouterZLoss,
}
METRICS = ["euclidean", "sqeuclidean", "cosine", "dot"]
CONTROLLERS = {"none": lambda: None, "bias": lambda: LossFreeBias(4), "constraint": lambda: ImportanceConstraint(4)}


def weights(device: str) -> list[Tensor]:
    return [torch.randn(shape, device=device, requires_grad=True) for shape in ((8, 16), (8, 16), (16, 8))]


def backward(result: Tensor, learning: bool) -> None:
    if learning:
        result.backward()


def penalty(name: str, device: str, learning: bool) -> None:
    made = PENALTIES[name]()
    for _ in range(2):  # buffers are there the second time
        backward(made(weights(device)), learning)


def balance(name: str, device: str, learning: bool) -> None:
    scores = torch.randn(32, 8, device=device, requires_grad=True)
    for mask in (None, torch.ones(32, device=device)):
        backward(BALANCES[name]()(scores.softmax(-1), mask), learning)


def router(metric: str, top_k: int | None, controller: str, device: str, learning: bool) -> None:
    with torch.device(device):
        layer = PrototypeRouter(16, 4, top_k=top_k, metric=metric, controller=CONTROLLERS[controller]())
    backward(layer(torch.randn(3, 5, 16, device=device)).weights.sum(), learning)


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"loss": x.square().mean()}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return sum(p * e(x) for p, e in zip(self.router(x).softmax(-1).split(1, -1), self.experts, strict=True))


def wrapped(how: str, device: str, learning: bool) -> None:
    with torch.device(device):
        model = MoE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)
    handle = wrap_moe(model)
    if how != "in the loss":
        handle.attach(optimizer, decoupled=how == "decoupled")
        for tap in handle.taps:
            tap.plain = True  # whether logits are W x + b is looked at once, in the first forward of all
    for _ in range(2):
        x, mask = torch.randn(3, 5, 16, device=device), torch.ones(3, 5, device=device)
        backward(model(x, attention_mask=mask)["loss"], learning)
        if learning:
            optimizer.step()
            optimizer.zero_grad()


def image_step(device: str, learning: bool) -> None:
    settings = config.Config(image_size=16)
    with torch.device(device):
        net = image_model.SRMoE(settings, "spectral", 3, 4)
        goal = objective.Objective(settings, "spectral", torch.device(device))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, foreach=True)
    images = torch.randn(8, 3, settings.image_size, settings.image_size, device=device)
    labels = torch.zeros(8, dtype=torch.int64, device=device)
    if learning:
        train.train_step(train.forward, net, goal, optimizer, images, labels)
    else:
        train.forward(net, goal, images, labels)


PATHS: dict[str, Callable[[str, bool], None]] = {
    **{f"penalty: {name}": lambda d, b, name=name: penalty(name, d, b) for name in PENALTIES},
    **{f"balance: {name}": lambda d, b, name=name: balance(name, d, b) for name in BALANCES},
    **{
        f"router: {metric}, {top_k}, {controller}": lambda d, b, m=metric, k=top_k, c=controller: router(m, k, c, d, b)
        for metric in METRICS
        for top_k in (None, 2)
        for controller in CONTROLLERS
    },
    **{f"wrapped: {how}": lambda d, b, how=how: wrapped(how, d, b) for how in ("in the loss", "at the step", "decoupled")},
    "project_spectral_": lambda d, b: project_spectral_([weight.detach() for weight in weights(d)]),
    "image example": image_step,
}
ALL = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@ALL
def test_a_step_asks_no_value_of_its_device(path: Callable[[str, bool], None]) -> None:
    path("meta", True)


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Tensors without values that say they are on a GPU, under autocast, on a machine without one."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode():
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])


# these take a gradient on their way forward, which autograd runs in a thread of the device that is not there
INNER_GRADIENT = {"penalty: energy, angles", "penalty: energy, adversarial", "wrapped: at the step", "wrapped: decoupled"}


@pytest.mark.parametrize("name", [name for name in PATHS if name not in INNER_GRADIENT])
def test_devices_and_dtypes_agree_under_autocast(name: str) -> None:
    with pretended_cuda():
        PATHS[name]("cuda", False)


@pytest.mark.parametrize(
    "value", [Tensor.item, bool, lambda t: t.nonzero(), lambda t: t.tolist()], ids=["item", "if", "nonzero", "list"]
)
def test_a_planted_wait_is_found(value: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch) -> None:
    original = LoadBalanceLoss.forward

    def waiting(self: LoadBalanceLoss, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        value(probs.sum() > 0)
        return original(self, probs, mask)

    monkeypatch.setattr(LoadBalanceLoss, "forward", waiting)
    for name in ("balance: cv", "wrapped: in the loss", "wrapped: at the step"):
        with pytest.raises((RuntimeError, NotImplementedError)):
            PATHS[name]("meta", True)


def test_a_planted_mixture_of_devices_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LoadBalanceLoss.forward
    monkeypatch.setattr(
        LoadBalanceLoss, "forward", lambda self, p, m=None: original(self, p, m) + torch.ones(3).sum(0, keepdim=True)
    )
    with pretended_cuda(), pytest.raises(RuntimeError):
        PATHS["balance: cv"]("cuda", False)
