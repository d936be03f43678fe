"""What SpectralRankPenalty takes in memory: passes over large tensors are what it costs."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_router import SpectralRankPenalty
from spectral_router.functional import stable_rank

SOLVERS = pytest.mark.parametrize("solver", ["exact", "power"])
SHAPES = pytest.mark.parametrize("shape", [(4, 64), (64, 4)], ids=["fat", "tall"])


class LargeResults(TorchDispatchMode):
    """Names of the operations that take new memory of at least some size."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.seen: list[str] = []
        self.known: list[Tensor] = []  # alive, so that no address is given twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self.least:
                inputs = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                if all(tensor.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr() for leaf in inputs):
                    self.seen.append(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
                self.known.append(tensor)
        return result


@SOLVERS
@SHAPES
def test_new_memory_of_the_size_of_the_weights_is_taken_once(solver: str, shape: tuple[int, int]) -> None:
    weights = [nn.Parameter(torch.randn(shape)) for _ in range(8)]
    penalty = SpectralRankPenalty(solver=solver)
    penalty(weights).backward()
    for weight in weights:
        weight.grad = None
    size = sum(weight.nbytes for weight in weights)
    with LargeResults(size) as forward:
        value = penalty(weights)
    with LargeResults(size) as kept:
        value.backward(retain_graph=True)
    with LargeResults(size) as backward:
        value.backward()
    # the batch of all in forward; the gradient takes its place in backward, unless it is needed once more
    assert forward.seen in (["stack"], ["cat"])
    assert kept.seen == ["mul"]
    assert backward.seen == []


@SOLVERS
@SHAPES
def test_one_copy_of_the_weights_is_kept_for_backward(solver: str, shape: tuple[int, int]) -> None:
    weights = [nn.Parameter(torch.randn(shape)) for _ in range(64)]
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = SpectralRankPenalty(solver=solver)(weights)
    assert not saved.keys() & {weight.data_ptr() for weight in weights}
    # u (4,) and v (64,) of each gate, and a few numbers, is the rest
    assert sum(saved.values()) < sum(weight.nbytes for weight in weights) + 64 * 4 * (4 + 64 + 12)
    value.backward()


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("told", [True, False])
def test_a_graph_that_is_kept_gives_the_same_gradient_again(
    shape: tuple[int, int], dtype: torch.dtype, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not told:  # a torch that does not say whether the graph is kept
        monkeypatch.delattr("torch._C._autograd._get_current_graph_task_keep_graph")
    weight = torch.randn(3, *shape, dtype=dtype).requires_grad_()
    value = stable_rank(weight).sum()
    first, second, last = (torch.autograd.grad(value, weight, retain_graph=keep)[0] for keep in (True, True, False))
    assert torch.equal(first, second)
    assert torch.equal(first, last)
    assert first.dtype == dtype
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, weight)


def test_gradients_through_torch_func() -> None:
    weight = torch.randn(4, 8)
    expected = torch.autograd.grad(stable_rank(leaf := weight.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(torch.func.grad(stable_rank)(weight), expected)
    _, pull = torch.func.vjp(stable_rank, weight)
    for _ in range(2):  # a pull-back may be called again
        torch.testing.assert_close(pull(torch.ones(()))[0], expected)


def test_weights_freed_or_changed_before_backward_do_not_matter() -> None:
    # sharded training frees the gathered weight of a layer once its forward is over
    weight = nn.Parameter(torch.randn(4, 8))
    expected = torch.autograd.grad(stable_rank(weight), weight)[0]
    value = stable_rank(weight)
    with torch.no_grad():
        weight.zero_()
    torch.testing.assert_close(torch.autograd.grad(value, weight)[0], expected, rtol=0, atol=0)
