"""Changes to ONE PATH: which experts a sample takes, an update of these alone, and what came of it as a file.

In come a model (or its `MoEHandle`) and a batch; out go the experts' parameters, a context in which nothing else can change,
and a delta. Reads what gates choose by hooks of its own, and hooks into optimizer steps while a context is open.
"""

from .experts import experts_of

__all__ = ["experts_of"]
