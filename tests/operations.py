"""What reaches the device while something runs."""

from collections import Counter

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SYNCHRONISING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique"}
FACTORISING = {"_linalg_eigh", "_linalg_eigvals", "linalg_eig", "_linalg_svd", "linalg_qr", "linalg_cholesky_ex"}


class Operations(TorchDispatchMode):
    """Counts the operations that reach the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def count(penalty: nn.Module, weights: list[nn.Parameter], *, warm: bool = True) -> Counter[str]:
    """Operations of forward and backward, by default of a call that is not the first."""
    if warm:
        penalty(weights).backward()
    for weight in weights:
        weight.grad = None
    with Operations() as operations:
        penalty(weights).backward()
    return operations.count
