"""FSDP2 on three ranks: a gate of two experts leaves one rank without a row."""

import itertools
from functools import partial

from distributed_fsdp import check

CHECKS = {
    f"{wrap}-{mode}-{unit}": partial(check, wrap=wrap, mode=mode, unit=unit, experts=(2, 4))
    for wrap, mode, unit in itertools.product(("before", "after"), ("none", "reentrant"), ("layer", "gate"))
}
