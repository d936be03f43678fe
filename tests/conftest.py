"""Settings shared by all tests."""

import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several processes share the cores

import pytest
import torch
from hypothesis import settings

# Derandomised: a red run is a change in the code, never bad luck. No deadline: the first call into torch is slow.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What calls torch's compiler says so in its name, and takes as long as a process that is started."""
    for item in items:
        if re.search("compile|inductor", item.nodeid):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: some tests wait for processes that they start."""
    return min((os.cpu_count() or 1) + 1, 4)
