"""`surgical` on two and on three processes."""

import pytest
from distributed_worker import names, run

MODULES = ["distributed_surgical"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    return run(MODULES, tmp_path_factory.mktemp("surgical"))


@pytest.mark.parametrize("name", names(MODULES[0]))
def test_two_processes(two: dict[str, float | str], name: str) -> None:
    assert two[name] == 0.0, two[name]
