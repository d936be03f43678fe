"""The HOOKS: `wrap_moe` puts penalties and balance losses on the gates of a model, with no change to the model.

In come a model and two callables, out goes a `MoEHandle`: the term in the loss, measurements, the way back. `handle` calls
`gates` once, at wrapping; in training `hooks` call `recorder`, which calls penalty and balance, and nothing else.
"""

from .attach import wrap_moe
from .handle import MoEHandle
from .param_groups import gate_param_groups

__all__ = ["MoEHandle", "gate_param_groups", "wrap_moe"]
