"""The formulas of benchmarks/cost.py against the counts of a run: who changes the code changes the paper."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost
from spectral_router import LoadBalanceLoss, SpectralRankPenalty

# where the weights outweigh their Gram matrices, as with real gates; gates, experts, dim
SHAPES = [(4, 8, 4096), (3, 4, 2048), (1, 16, 8192)]


class ByteCounter(TorchDispatchMode):
    """Bytes of the tensors that operations read and write, of those that touch a tensor of at least `large` entries."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large = large
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # a matrix and its transpose are read once
        read = {
            tensor.untyped_storage().data_ptr(): tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        written = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        view = not func._schema.is_mutable and any(tensor.untyped_storage().data_ptr() in read for tensor in written)
        touched = [*read.values(), *written]
        if not view and "empty" not in str(func) and any(entries(tensor) >= self.large for tensor in touched):
            self.bytes += sum(entries(tensor) * tensor.element_size() for tensor in touched)
        return result


def entries(tensor: Tensor) -> int:
    """In memory: an expanded dimension has one."""
    return math.prod(size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def run_penalty(solver: str, gates: int, experts: int, dim: int) -> Callable[[], None]:
    """Forward and backward of the real penalty, for gradients that are new."""
    weights = [nn.Parameter(torch.randn(experts, dim)) for _ in range(gates)]

    def run() -> None:
        SpectralRankPenalty(relative=True, solver=solver)(weights).backward()
        for weight in weights:
            weight.grad = None

    return run


def run_balance(gates: int, experts: int, tokens: int) -> Callable[[], None]:
    """The same of the balance loss, from logits that have a gradient from the model."""
    logits = [torch.randn(tokens, experts, requires_grad=True) for _ in range(gates)]
    for part in logits:
        part.grad = torch.zeros_like(part)
    balance = LoadBalanceLoss()
    return lambda: torch.stack([balance(part.softmax(-1)) for part in logits]).sum().backward()


def in_place_product(_: Sequence[int], left: Sequence[int], right: Sequence[int], **__: object) -> int:
    """Operations of `baddbmm_`, which torch's counter does not know; from shapes."""
    return 2 * math.prod(left) * right[-1]


def operations(call: Callable[[], object]) -> int:
    """Of the products of matrices."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place_product}) as counter:
        call()
    return counter.get_total_flops()


def moved_bytes(call: Callable[[], object], large: int) -> int:
    # in a run of its own: torch's counter of operations holds results, and autograd then copies gradients
    with ByteCounter(large) as counter:
        call()
    return counter.bytes


@pytest.mark.parametrize("solver", ["exact", "power"])
@pytest.mark.parametrize(("gates", "experts", "dim"), [*SHAPES, (5, 32, 64), (2, 128, 128)])
def test_the_products_of_matrices_of_the_penalty_are_as_on_paper(solver: str, gates: int, experts: int, dim: int) -> None:
    sizes = {"L": gates, "K": experts, "d": dim}
    assert operations(run_penalty(solver, gates, experts, dim)) == cost.total(cost.PENALTY[solver], sizes, matmul_only=True)[0]


@pytest.mark.parametrize("solver", ["exact", "power"])
@pytest.mark.parametrize(("gates", "experts", "dim"), SHAPES)
def test_the_penalty_moves_the_bytes_on_paper(solver: str, gates: int, experts: int, dim: int) -> None:
    sizes = {"L": gates, "K": experts, "d": dim}
    moved = moved_bytes(run_penalty(solver, gates, experts, dim), large=experts * dim)
    # one pass over the weights more or less would be 8 %
    assert moved == pytest.approx(cost.total(cost.PENALTY[solver], sizes)[1], rel=0.05)


@pytest.mark.parametrize(("gates", "experts", "tokens"), [(1, 8, 512), (3, 64, 256)])
def test_the_balance_loss_moves_the_bytes_on_paper(gates: int, experts: int, tokens: int) -> None:
    call = run_balance(gates, experts, tokens)
    sizes = {"L": gates, "K": experts, "T": tokens}
    assert operations(call) == 0
    assert moved_bytes(call, large=experts * tokens) == pytest.approx(cost.total(cost.BALANCE, sizes)[1], rel=0.01)


def test_the_counters_count() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    assert operations(lambda: a @ b) == 2 * 8 * 16 * 4
    assert moved_bytes(lambda: a @ b, large=128) == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    # read once, whatever its views; a view moves nothing, nor does memory that is only taken
    assert moved_bytes(lambda: a @ a.mT, large=128) == 4 * (8 * 16 + 8 * 8)
    assert moved_bytes(lambda: (a.mT, a.view(-1), a[1:], torch.empty_like(a)), large=1) == 0
    assert moved_bytes(lambda: a.mul_(2), large=128) == 4 * 2 * 8 * 16
    assert moved_bytes(lambda: a.mul_(2), large=129) == 0
    # an expanded matrix is as large as what it repeats
    assert moved_bytes(lambda: a[:1].expand(8, 16).sum(), large=16) == 4 * (16 + 1)


def test_the_estimate_puts_each_term_on_the_roofline() -> None:
    free = {"LKd": 0}
    sizes = {"L": 2, "K": 3, "d": 5}
    copy, product = cost.Term("copy", free, {"LKd": 2}), cost.Term("product", {"LKKd": 10**6}, {"LKd": 1})
    by_hand = 2 * 30 * 4 / cost.BANDWIDTH + 90 * 10**6 / cost.FLOAT32
    assert cost.seconds([copy, product], sizes) == pytest.approx(by_hand)


def test_the_tables_hold_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    cost.main([])
    printed = capsys.readouterr().out
    assert "ESTIMATE" in printed
    for name, model in cost.MODELS.items():
        assert f"{name}: {model.gates} x ({model.experts}, {model.dim}) | training step" in printed
