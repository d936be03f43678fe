"""Delivery at the optimizer's step: the same update as delivery in the loss, whoever builds and scales that loss."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectral_router import MoEHandle, SpectralRankPenalty, wrap_moe
from spectral_router.functional import load_balance_loss, spectral_rank_penalty
from spectral_router.wrap.optimizer import subtract_

ALPHA, BETA, SIGMA = 0.5, 0.3, 2.0
# dynamo's own, about tensors it looks at
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Block(nn.Module):
    def __init__(self, mode: str, bias: bool) -> None:
        super().__init__()
        self.mode = mode
        self.router = nn.Linear(6, 4, bias=bias)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=self.mode == "reentrant") if "reentrant" in self.mode else self.run(x)

    def run(self, x: Tensor) -> Tensor:
        return sum(
            p * expert(x).tanh() for p, expert in zip(self.router(x).softmax(-1).split(1, -1), self.experts, strict=True)
        )


class Wide(nn.Module):
    """Blocks side by side: nothing that learns lies before a gate, so that both deliveries move the gates alone."""

    def __init__(self, mode: str = "none", dtype: torch.dtype = torch.float64, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Block(mode, bias) for _ in range(3))
        self.to(dtype)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        y = sum(block(x) for block in self.blocks)
        return {"loss": y.square().mean(), "y": y}


def batches(number: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(number):
        mask = torch.ones(2, 5, dtype=torch.int64)
        mask[1, 3:] = 0
        made.append((torch.randn(2, 5, 6, generator=generator, dtype=dtype).requires_grad_(), mask))
    return made


def wrapped(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options) -> MoEHandle:
    options = {"penalty_coef": ALPHA, "balance_coef": BETA, "penalty": SpectralRankPenalty(SIGMA)} | options
    return wrap_moe(model, optimizer, **options)


def train(
    at_step: bool,
    mode: str = "none",
    accumulation: int | tuple[int, ...] = 1,
    scaler: bool = False,
    autocast: bool = False,
    compiled: bool = False,
    steps: int = 3,
    dtype: torch.dtype = torch.float64,
    **options,
) -> dict[str, Tensor]:
    """The parameters after some steps of plain SGD, of each accumulation in turn; `at_step`: a loss built outside the model."""
    torch.compiler.reset()
    model = Wide(mode, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped(model, optimizer if at_step else None, **options)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    scaling = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaler)
    each = accumulation if isinstance(accumulation, tuple) else (accumulation,)
    counts = [count for count in each for _ in range(steps)]
    data = iter(batches(sum(counts), dtype))
    for count in counts:
        for _ in range(count):
            x, mask = next(data)
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                output = call(x, attention_mask=mask)
            loss = output["y"].square().mean() if at_step else output["loss"]
            scaling.scale(loss / count).backward()
        scaling.step(optimizer)
        scaling.update()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(
            other[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("mode", ["none", "nonreentrant", "reentrant"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("scaler", [False, True], ids=["", "scaled"])
def test_as_in_the_loss(mode: str, accumulation: int, scaler: bool) -> None:
    how = {"mode": mode, "accumulation": accumulation, "scaler": scaler}
    expected, got = train(False, **how), train(True, **how)
    assert_equal(expected, got)
    without = train(False, **how, penalty=None, balance=None)
    assert all((without[name] - expected[name]).norm() > 1e-3 for name in without if name.endswith("router.weight"))


@pytest.mark.parametrize("part", ["penalty", "balance"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_each_part_as_in_the_loss(part: str, accumulation: int) -> None:
    how = {"accumulation": accumulation, part: None}
    assert_equal(train(False, **how), train(True, **how))


def test_as_in_the_loss_when_compiled() -> None:
    how = {"accumulation": (1, 4)}  # of one graph
    assert_equal(train(False, **how), train(True, **how, compiled=True))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_penalty_under_autocast(accumulation: int) -> None:
    """One step: at the next, weights that differ in the last digit may be rounded to different bfloat16, on some processors."""
    how = {"accumulation": accumulation, "autocast": True, "dtype": torch.float32, "balance": None, "steps": 1}
    expected, without = train(False, **how), train(False, **how | {"penalty": None})
    assert_equal(expected, train(True, **how), 1e-6)
    assert all((expected[name] - without[name]).abs().max() > 0.1 for name in expected if name.endswith("router.weight"))


def test_the_balance_under_autocast() -> None:
    """Logits are bfloat16; the gradient of the loss form is rounded on its way through them as well."""
    how = {"autocast": True, "dtype": torch.float32, "penalty": None, "steps": 1}
    expected, got, without = train(False, **how), train(True, **how), train(False, **how, balance=None)
    for name in expected:
        if "router" in name:
            torch.testing.assert_close(got[name] - without[name], expected[name] - without[name], rtol=0.02, atol=1e-5)


def test_logits_for_a_loss_that_reads_them() -> None:
    from spectral_router import RouterZLoss

    assert_equal(train(False, balance=RouterZLoss()), train(True, balance=RouterZLoss()))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_loss_is_of_no_concern(scale: float) -> None:
    found = []
    for factor in (1.0, scale):
        model = Wide()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        wrapped(model, optimizer)
        before = copy.deepcopy(model.state_dict())
        (model(batches(1)[0][0])["y"].square().mean() * factor).backward()
        task = [block.router.weight.grad.clone() for block in model.blocks]
        optimizer.step()
        found.append(
            [
                before[f"blocks.{i}.router.weight"] - block.router.weight.detach() - task[i]
                for i, block in enumerate(model.blocks)
            ]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------------- schedule and decoupling


def penalty_gradients(model: Wide) -> list[Tensor]:
    weights = [block.router.weight.detach().requires_grad_() for block in model.blocks]
    return list(torch.autograd.grad(ALPHA * sum(spectral_rank_penalty(w, SIGMA) for w in weights), weights))


def test_every_third_step_three_times() -> None:
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wrapped(model, balance=None).attach(optimizer, every=3)
    x = batches(1)[0][0]
    terms = []
    for _ in range(6):
        optimizer.zero_grad()
        model(x)["y"].mean().backward()
        task = [block.router.weight.grad.clone() for block in model.blocks]
        optimizer.step()
        terms.append([block.router.weight.grad - before for block, before in zip(model.blocks, task, strict=True)])
    expected = [3 * slope for slope in penalty_gradients(model)]
    for number, term in enumerate(terms, 1):
        wanted = expected if number % 3 == 0 else [torch.zeros_like(slope) for slope in expected]
        for got, slope in zip(term, wanted, strict=True):
            torch.testing.assert_close(got, slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [partial(torch.optim.AdamW, weight_decay=0.0), torch.optim.SGD])
def test_decoupled_is_past_the_optimizer(kind) -> None:
    model, plain = Wide(), Wide()
    groups = [
        {"params": [block.router.weight for block in model.blocks], "lr": 0.05},
        {"params": [p for n, p in model.named_parameters() if not n.endswith("router.weight")]},
    ]
    optimizer, other = kind(groups, lr=0.01), kind(plain.parameters(), lr=0.05)
    wrapped(model, balance=None).attach(optimizer, decoupled=True)
    x = batches(1)[0][0]
    for net in (model, plain):
        net(x)["y"].mean().backward()
    optimizer.step()
    other.step()
    for block, bare, slope in zip(model.blocks, plain.blocks, penalty_gradients(plain), strict=True):
        torch.testing.assert_close(block.router.weight, bare.router.weight - 0.05 * slope, rtol=1e-9, atol=1e-12)


def test_decoupled_takes_the_balance_through_the_gradient() -> None:
    found = []
    for decoupled in (False, True):
        model = Wide()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapped(model, penalty=None).attach(optimizer, decoupled=decoupled)
        model(batches(1)[0][0])["y"].mean().backward()
        optimizer.step()
        found.append(dict(model.named_parameters()))
    assert_equal(*found)


def test_bfloat16_weights_move_on_average_by_less_than_their_resolution() -> None:
    start, change = 1.0, 1e-4  # bfloat16 next to 1: steps of 2^-7 above, 2^-8 below
    moved = []
    for seed in range(200):
        weight = torch.full((64,), start, dtype=torch.bfloat16)
        subtract_(weight, torch.full((64,), change), seed)
        assert set(weight.tolist()) <= {1.0, 1 - 2**-8}
        moved.append(start - weight.float().mean().item())
    mean = sum(moved) / len(moved)
    spread = (change * (2**-8 - change) / (200 * 64)) ** 0.5
    assert abs(mean - change) < 4 * spread
    again = torch.full((64,), start, dtype=torch.bfloat16)
    subtract_(again, torch.full((64,), change), 199)
    assert torch.equal(again, weight)  # ranks draw alike


def test_what_is_not_finite_is_not_rounded_into_something_else() -> None:
    weight = torch.ones(4, dtype=torch.bfloat16)
    subtract_(weight, torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0]), 1)
    assert weight.isnan().tolist() == [True, False, False, False]
    assert weight[1:].tolist() == [-torch.inf, torch.inf, 1.0]


# ----------------------------------------------------------------------------------------------------------- the optimizer


def test_a_closure_has_the_term_each_time_it_runs() -> None:
    model = Wide()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    wrapped(model, optimizer, balance=None)
    x = batches(1)[0][0]
    evaluations = 0

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x)["y"].square().mean()
        loss.backward()
        task[:] = [block.router.weight.grad.clone() for block in model.blocks]
        return loss

    def gather() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        with torch.enable_grad():
            expected = penalty_gradients(model)
        for block, before, slope in zip(model.blocks, task, expected, strict=True):
            torch.testing.assert_close(block.router.weight.grad - before, slope, rtol=1e-9, atol=1e-12)
        return original()

    task: list[Tensor] = []
    original = optimizer._gather_flat_grad
    optimizer._gather_flat_grad = gather
    optimizer.step(closure)
    assert evaluations > 1


def test_a_second_optimizer_of_other_parameters_delivers_nothing() -> None:
    model, head = Wide(), nn.Linear(6, 1).double()
    optimizer, other = torch.optim.SGD(model.parameters(), lr=0.0), torch.optim.SGD(head.parameters(), lr=0.0)
    wrapped(model, optimizer)
    head(model(batches(1)[0][0])["y"]).mean().backward()
    task = model.blocks[0].router.weight.grad.clone()
    other.step()
    assert torch.equal(model.blocks[0].router.weight.grad, task)
    optimizer.step()
    assert not torch.equal(model.blocks[0].router.weight.grad, task)


def test_frozen_gates_are_left_alone() -> None:
    model = Wide()
    model.blocks[1].router.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    wrapped(model, optimizer)
    with pytest.warns(UserWarning, match=r"frozen gates are left alone.*blocks\.1\.router"):
        model(batches(1)[0][0])["y"].mean().backward()
    optimizer.step()
    assert model.blocks[1].router.weight.grad is None


@pytest.mark.parametrize("bad", [0, -1, 1.5])
def test_every_is_a_whole_number(bad: float) -> None:
    model = Wide()
    with pytest.raises(ValueError, match="every must be a whole number of at least 1, got every="):
        wrapped(model).attach(torch.optim.SGD(model.parameters()), every=bad)


def test_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer.*got Linear"):
        wrapped(Wide(), nn.Linear(2, 2))


def test_an_optimizer_of_other_parameters() -> None:
    with pytest.raises(ValueError, match=r"holds no parameter of the gates blocks\.0\.router"):
        wrapped(Wide(), torch.optim.SGD(Wide().parameters()))


def test_removed_the_optimizer_is_as_it_was() -> None:
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapped(model, optimizer)
    handle.remove()
    model(batches(1)[0][0])["y"].mean().backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, [p.grad for p in model.parameters()]))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_forward_keeps_nothing_and_the_loss_of_the_model_stays() -> None:
    model, bare = Wide(), Wide()
    handle = wrapped(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = batches(1)[0][0]
    assert torch.equal(model(x)["loss"], bare(x)["loss"])
    assert all(not tap.calls and not tap.deferred for tap in handle.taps)
    assert not any(tap.pull.weight.requires_grad or tap.pull.bias.requires_grad for tap in handle.taps)
    with pytest.raises(RuntimeError, match="goes to the gates' gradients at the optimizer's step"):
        handle.loss()
    rows = handle.metrics()
    assert rows["blocks.0.router"]["balance"] == pytest.approx(
        load_balance_loss(bare.blocks[0].router(x).softmax(-1).flatten(0, -2)).item()
    )


def test_gates_whose_logits_are_something_else_are_told() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Scaled(6, 4).double()
            self.experts = nn.ModuleList(nn.Linear(6, 6).double() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return sum(p * e(x) for p, e in zip(self.gate(x).softmax(-1).split(1, -1), self.experts, strict=True))

    model = Layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped(model, optimizer)
    with pytest.warns(UserWarning, match="its weight is penalised and its balance is not"):
        model(batches(1)[0][0]).mean().backward()
    task = model.gate.weight.grad.clone()
    optimizer.step()
    slope = torch.autograd.grad(ALPHA * spectral_rank_penalty(w := model.gate.weight.detach().requires_grad_(), SIGMA), w)[0]
    assert (model.gate.weight.grad - task).norm() > 0.1 * slope.norm()


class SparseRouter(nn.Module):
    """As Megatron's: it hands out the chosen ones' probabilities and a map; its logits are read as W x of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best, chosen = (x @ self.weight.mT).topk(2, dim=-1)
        probs = torch.zeros(len(x), 4, dtype=x.dtype).scatter(-1, chosen, best.softmax(-1))
        return probs, probs > 0


class SparseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = SparseRouter()
        self.experts = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        probs, _ = self.router(x)
        return sum(p * expert(x) for p, expert in zip(probs.split(1, -1), self.experts, strict=True))


def test_what_is_computed_for_the_step_is_not_taken_for_the_models() -> None:
    """The first forward is watched: our own product with the matrix must not tell how the gate routes."""
    torch.manual_seed(0)
    model = SparseBlock()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = [torch.randn(16, 6, dtype=torch.float64) for _ in range(3)]
    weight = model.router.weight.detach().clone().requires_grad_()
    balance = sum(load_balance_loss((x @ weight.mT).softmax(-1)) for x in batches) / len(batches)
    (expected,) = torch.autograd.grad(BETA * balance, weight)
    handle = wrap_moe(model, optimizer, penalty=None, balance_coef=BETA)
    for x in batches:
        (0 * model(x).sum()).backward()
    optimizer.step()
    assert handle.gates[0].module is model.router
    torch.testing.assert_close(weight.detach() - model.router.weight.detach(), expected)
