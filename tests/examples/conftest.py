"""What several tests of the examples ask for."""

from collections.abc import Iterator

import pytest
from pictures import without_pictures


@pytest.fixture
def no_pictures() -> Iterator[None]:
    with without_pictures():
        yield
