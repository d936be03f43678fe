"""What CHOOSES: `PrototypeRouter`, the step from logits to weights and experts, new places for dead prototypes.

In come tokens (*, dim), out goes a `RouterOutput`. Knows nothing of other people's models.

`prototypes` is the gate, `route` what follows every gate's scores, `rescue` moves prototypes that no gradient parts.
"""

from .prototypes import PrototypeRouter
from .rescue import rescue_collapsed_
from .route import Controller, RouterOutput, route

__all__ = ["Controller", "PrototypeRouter", "RouterOutput", "rescue_collapsed_", "route"]
