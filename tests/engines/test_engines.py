"""The term arrives once on the engines themselves, where they are installed; `python -m studies.engines` prints the same."""

import warnings

import pytest

from studies.engines.__main__ import ENGINES, installed, run

pytestmark = [pytest.mark.engines, pytest.mark.slow]


@pytest.mark.parametrize("engine", ENGINES)
def test_times_are_one(engine: str) -> None:
    if not installed(engine):
        pytest.skip(f"{ENGINES[engine][1]} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(engine)
    refused = {name for name, result in found.items() if isinstance(result, str) and result.startswith("refused: ")}
    assert all(engine == "deepspeed" and "at the step" in name and "ZeRO 0" not in name for name in refused)
    for name in found.keys() - refused:
        assert isinstance(found[name], dict), (name, found[name])
        for gate, (count, error) in found[name].items():
            assert abs(count - 1) < 1e-3, (name, gate)
            assert error < 1e-3, (name, gate)
