"""A survey of the gates in mixture-of-experts models: what a finder of gates must find, and what it must not."""

from .cases import Case, ExpectedGate
from .families import Family
from .family_table import TRANSFORMERS
from .libraries import LIBRARIES
from .lookalikes import LOOKALIKES, NEGATIVES

__all__ = ["CASES", "GROUPS", "LIBRARIES", "LOOKALIKES", "NEGATIVES", "TRANSFORMERS", "Case", "ExpectedGate", "Family"]

GROUPS: dict[str, tuple[Case, ...]] = {
    "transformers": TRANSFORMERS,
    "built like": LOOKALIKES,
    "library": LIBRARIES,
    "no gate": NEGATIVES,
}
CASES: tuple[Case, ...] = tuple(case for cases in GROUPS.values() for case in cases)
