"""Settings shared by all tests."""

import gc
import os
import re
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several processes share the cores

import pytest
import torch
from hypothesis import settings

# Derandomised: a red run is a change in the code, never bad luck. No deadline: the first call into torch is slow.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what calls torch's compiler, which says so in its name, as slow. Files with slow tests begin, so that none of them
    is left to one process while the others have nothing to do.
    """
    for item in items:
        if re.search("compile|inductor", item.nodeid):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def _imported_once() -> None:
    """Trainer collects garbage at each start, and would walk all that the libraries define: what is there by now, as some
    are imported by tests, is set aside.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _nothing_aside_at_the_end() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    # without a GPU torch would keep the call, and the stack that it came from, for one that may turn up
    (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, up to pyproject.toml's `--maxprocesses`: some tests wait for processes that they start."""
    return (os.cpu_count() or 1) + 1
