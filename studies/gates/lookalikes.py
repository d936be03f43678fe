"""All hand-written models: the frameworks', the toolkits', the remote code's, people's own, and those without a gate."""

from __future__ import annotations

from .cases import Case
from .frameworks import FRAMEWORKS
from .handwritten import HANDWRITTEN
from .negatives import NEGATIVES
from .remote_code import REMOTE_CODE
from .toolkits import TOOLKITS

__all__ = ["LOOKALIKES", "NEGATIVES"]

LOOKALIKES: tuple[Case, ...] = (*FRAMEWORKS, *TOOLKITS, *REMOTE_CODE, *HANDWRITTEN)
