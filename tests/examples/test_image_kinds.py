"""Whole runs of the example with the rarer settings and data."""

import re

import numpy as np
import pytest
from image_runs import CLASSES, FLAGS, make_photos, start
from inductor import QUICK_INDUCTOR

from examples.image_classification import config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return make_photos(tmp_path_factory.mktemp("photos"), CLASSES)


def test_all_routers_and_the_rarer_settings(photos, tmp_path):
    settings = "--scope path --oneshot-optimizer sgd --relative --sigma-target initial --temperature 1.0 --metric cosine"
    found = start(tmp_path, photos, f"{FLAGS} {settings} --seeds=1 --epochs=1 --routers {' '.join(config.ROUTERS)}")
    assert set(found.results["runs"]) == set(config.ROUTERS)
    assert "one-shot scope path, seeds 1" in found.printed
    assert all(entry["ci95"] is None for summary in found.results["summary"].values() for entry in summary.values())
    assert "±" not in (tmp_path / "tables.md").read_text(encoding="utf-8")
    losses = {router: runs[0]["history"][0] for router, runs in found.results["runs"].items()}
    for router, row in losses.items():
        spec = config.ROUTERS[router]
        loss = row["task"] + 0.01 * row["penalty"] * spec.spectral + 0.1 * row["balance"] * spec.balance
        assert row["loss"] == pytest.approx(loss, rel=1e-5)


def test_one_layer_of_one_expert(photos, tmp_path):
    # the smallest network there is: one path, nothing to route, and figures all the same
    found = start(tmp_path, photos, f"{FLAGS} --seeds=1 --epochs=1 --layers=1 --experts=1")
    for runs in found.results["runs"].values():
        assert runs[0]["routing"]["path_counts"] == {"1": [3, 3, 3]}
        assert runs[0]["routing"]["mutual_information"] == 0
        assert runs[0]["stable_rank"] == pytest.approx([1])


def test_a_deeper_network_of_the_embedded_digits(tmp_path, no_pictures):
    found = start(tmp_path, "mnist", f"{FLAGS} --layers=4 --experts=4 --seeds=1 --epochs=1 --routers spectral --classes 4 7")
    assert found.results["data"]["classes"] == ["4", "7"]
    assert found.results["data"]["image_shape"] == [1, 16, 16]
    assert "As table 2: 4 layers, 4 experts" in found.printed
    assert np.shape(found.results["runs"]["spectral"][0]["oneshot"]["gradient_norm"]) == (4, 4)


@pytest.mark.parametrize("names", [("ant [red]", "a|b"), (r"$\x$", "50 %")])
def test_classes_may_have_any_name(tmp_path, names):
    # brackets mean a style to the terminal's tables, a bar ends a cell in Markdown, dollars enclose a formula in pictures
    photos = make_photos(tmp_path / "photos", list(names))
    found = start(tmp_path / "out", photos, f"{FLAGS} --seeds=1 --epochs=1 --routers spectral")
    for name in names:
        assert f"Delta {name}, points" in found.printed
    rows = [line for line in (tmp_path / "out" / "tables.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}


@QUICK_INDUCTOR
# raised inside torch while it traces its own decompositions
@pytest.mark.filterwarnings(r"ignore:`torch\._prims_common\.check` is deprecated:FutureWarning:torch")
def test_a_compiled_run_learns_the_same(photos, tmp_path, no_pictures):
    flags = f"{FLAGS} --seeds=1 --epochs=2 --routers spectral"
    plain, compiled = (start(tmp_path / name, photos, flags + f" --{name}") for name in ("no-compile", "compile"))
    for one, other in zip(*(run.results["runs"]["spectral"][0]["history"] for run in (plain, compiled)), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert other["spectral_norm"] == pytest.approx(one["spectral_norm"], rel=1e-3)
