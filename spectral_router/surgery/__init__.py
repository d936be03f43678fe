"""Changes to ONE PATH: which experts a sample takes, an update of these alone, and what came of it as a file.

In come a model (or its `MoEHandle`) and a batch; out go the experts' parameters, a context in which nothing else can change,
and a delta. Reads what gates choose by hooks of its own, and hooks into optimizer steps while a context is open.
"""

from .delta import Delta, load_delta
from .experts import experts_of
from .path import ExpertPath
from .surgical import surgical

__all__ = ["Delta", "ExpertPath", "experts_of", "load_delta", "surgical"]
