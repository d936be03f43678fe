"""Runs of the examples without their pictures, which take longer than a small run does and are of its results alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def without_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for example in ("image_classification", "transformer_moe"):
            patch.setattr(f"examples.{example}.figures.draw", lambda *_: [])
        yield
