"""One whole run of the example, a small one: what it leaves, and that it is the truth."""

import copy
import re
from importlib.metadata import version
from statistics import fmean

import pytest
import torch
from image_runs import CLASSES, FLAGS, ROUTERS, Run, make_photos, start
from PIL import Image

from examples.image_classification import config, data, oneshot, report, train

pytestmark = pytest.mark.slow

PICTURES = ["experts", "paths", "gradients", "oneshot", "training"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return make_photos(tmp_path_factory.mktemp("photos"), CLASSES)


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory) -> Run:
    return start(tmp_path_factory.mktemp("run") / "new" / "folder", photos, FLAGS)


def test_every_file_is_there_and_none_too_many(run):
    names = [f"{router}-seed{seed}" for router in ROUTERS for seed in (0, 1)]
    expected = {"config.json", "results.json", "tables.md", ".lock"}
    expected |= {f"models/{name}.pt" for name in names} | {f"parts/{name}.json" for name in names}
    expected |= {f"figures/{name}.png" for name in PICTURES}
    assert {path.relative_to(run.out).as_posix() for path in run.out.rglob("*") if path.is_file()} == expected


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_show_something(run, name):
    with Image.open(run.out / "figures" / f"{name}.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_results_say_what_was_run(run, photos):
    results = run.results
    assert set(results) == {"config", "device", "versions", "seeds", "data", "summary", "runs", "earlier_versions", "sha256"}
    assert config.Config(**results["config"]) == config.parse(run.arguments)[0]
    assert results["versions"]["torch"] == version("torch")
    assert results["versions"]["spectral-router"] == version("spectral-router")
    assert results["seeds"] == [0, 1]
    digest = results["data"].pop("digest")
    assert len(bytes.fromhex(digest)) == 32
    assert results["data"] == {
        "classes": CLASSES,
        "unreadable": [],
        "image_shape": [3, 16, 16],
        "images": {"train": 42, "val": 9, "test": 9, "novel": 6},
    }
    assert list(results["runs"]) == list(results["summary"]) == sorted(ROUTERS)
    for runs in results["runs"].values():
        assert [one["seed"] for one in runs] == [0, 1]
        assert all([row["epoch"] for row in one["history"]] == [1, 2, 3] for one in runs)
        assert all(len(one["adapted"]) == 6 for one in runs)


def figures_of(one: dict) -> dict[str, float]:
    """Every number of one run that is averaged over seeds."""
    found = {"accuracy": one["accuracy"], "mean_delta": one["oneshot"]["mean_delta"]}
    found |= {f"delta/{name}": one["oneshot"]["delta"][name] for name in CLASSES}
    found |= {
        f"novel_{what}_{when}": one["oneshot"][f"novel_{what}_{when}"]
        for what in ("loss", "accuracy")
        for when in ("before", "after")
    }
    of_routing = [
        "paths_used",
        "paths_used_1pct",
        "top_path_share",
        "dominant_paths",
        "mutual_information",
        "mutual_information_chance",
    ]
    found |= {name: one["routing"][name] for name in of_routing}
    for layer in (1, 2):
        found |= {f"{name}/{layer}": one[name][layer - 1] for name in ("spectral_norm", "stable_rank")}
        found |= {f"{name}/{layer}": one["routing"][name][layer - 1] for name in ("importance_cv2", "load_cv2", "entropy")}
    return found


@pytest.mark.parametrize("router", ROUTERS)
def test_summary_is_the_mean_over_seeds(run, router):
    rows = [figures_of(one) for one in run.results["runs"][router]]
    summary = run.results["summary"][router]
    assert set(summary) == set(rows[0])
    for name, entry in summary.items():
        first, second = (row[name] for row in rows)
        assert entry["mean"] == pytest.approx(fmean([first, second]))
        # Student's t for two values: 12.706 times half their distance
        assert entry["ci95"] == pytest.approx(12.7062 * abs(first - second) / 2, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("router", ROUTERS)
def test_saved_models_give_the_figures_told_of_them(run, router):
    settings = config.parse(run.arguments)[0]
    images = data.load(settings)
    for seed, told in enumerate(run.results["runs"][router]):
        split = data.split(images.labels, images.classes, settings, seed)
        model, objective = train.build(settings, router, seed, images, torch.device("cpu"))
        model.load_state_dict(torch.load(run.out / "models" / f"{router}-seed{seed}.pt", weights_only=True)["model"])
        model.eval()
        with torch.no_grad():
            right = model(data.as_float(images.images[split.test]))[0].argmax(-1) == images.labels[split.test]
        assert told["accuracy"] == pytest.approx(100 * int(right.sum()) / 9)
        values = [torch.linalg.svdvals(weight.detach()) for weight in model.router_weights()]
        assert told["spectral_norm"] == pytest.approx([float(value[0]) for value in values], rel=1e-5)
        assert told["stable_rank"] == pytest.approx([float((value**2).sum() / value[0] ** 2) for value in values], rel=1e-5)
        again = []
        oneshot.adapt(settings, seed, train.Trained(model, objective, []), images, split, [], again.append)
        assert again == told["adapted"]
    # else the comparison above was one of zeros
    assert any(record["delta"] for one in run.results["runs"][router] for record in one["adapted"])


# label in the tables, name in the summary, how it is written
ROWS = [
    ("Accuracy before update, %", "accuracy", "{:.2f}"),
    *((f"Delta {name}, points", f"delta/{name}", "{:+.2f}") for name in CLASSES),
    ("Mean delta, points", "mean_delta", "{:+.2f}"),
    *((f"Novel image: loss {when}", f"novel_loss_{when}", "{:.3f}") for when in ("before", "after")),
    *((f"Novel image: right {when}, %", f"novel_accuracy_{when}", "{:.1f}") for when in ("before", "after")),
    ("Paths used", "paths_used", "{:.1f}"),
    ("Paths used by 1 % or more", "paths_used_1pct", "{:.1f}"),
    ("Share of the most used path", "top_path_share", "{:.2f}"),
    ("Different paths that lead a class", "dominant_paths", "{:.1f}"),
    ("I(class; path) / H(class)", "mutual_information", "{:.3f}"),
    ("the same, by chance", "mutual_information_chance", "{:.3f}"),
    *((f"Importance CV², layer {layer}", f"importance_cv2/{layer}", "{:.3f}") for layer in (1, 2)),
    *((f"Load CV², layer {layer}", f"load_cv2/{layer}", "{:.3f}") for layer in (1, 2)),
    *((f"Routing entropy / log K, layer {layer}", f"entropy/{layer}", "{:.3f}") for layer in (1, 2)),
    *((f"Spectral norm, layer {layer}", f"spectral_norm/{layer}", "{:.3f}") for layer in (1, 2)),
    *((f"Stable rank, layer {layer}", f"stable_rank/{layer}", "{:.3f}") for layer in (1, 2)),
]


def expected_cells(results: dict) -> list[list[str]]:
    rows = []
    for label, name, form in ROWS:
        entries = [results["summary"][router][name] for router in ROUTERS]
        cells = [f"{form} ± {form.replace('+', '')}".format(entry["mean"], entry["ci95"]) for entry in entries]
        rows.append([label, *cells])
    for name in CLASSES:
        paths = [results["runs"][router][0]["routing"]["class_paths"][name] for router in ROUTERS]
        rows.append([f"Main path of {name}, seed 0", *(f"{path['path']} ({100 * path['share']:.0f}%)" for path in paths)])
    return rows


def test_tables_show_what_the_results_say(run):
    text = (run.out / "tables.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row[0] == ""] == 2 * [["", *ROUTERS]]
    # "-0.00" is a change of nothing, see below
    shown, expected = (
        [[cell.replace("-0.00", "+0.00") for cell in row] for row in table]
        for table in ([row for row in rows if row[0]], expected_cells(run.results))
    )
    assert shown == expected
    assert "As table 1: 2 layers, 2 experts, 20 images a class, one-shot scope all, seeds 2" in text
    assert "One of the 9 test images is 11.11 points." in text


def test_a_change_that_rounds_to_zero_has_no_minus_sign(run):
    # changes that cancel out over seeds leave -1e-15, and "-0.00" would be read as a loss
    results = copy.deepcopy(run.results)
    results["summary"]["spectral"]["mean_delta"]["mean"] = -1e-15
    (cells,) = [cells for label, cells in report.adaptation_rows(results) if label == "Mean delta, points"]
    assert cells[sorted(ROUTERS).index("spectral")].startswith("+0.00 ±")


def test_the_run_prints_both_tables_and_where_the_files_are(run):
    squeezed = re.sub(r"[\s│┃]+", " ", run.printed)
    assert "As table 1: 2 layers, 2 experts" in squeezed
    assert "Routing and spectra" in squeezed
    for line in (run.out / "tables.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            assert " ".join(line.replace("|", " ").split()) in squeezed
    for name in ("results.json", *(f"figures/{name}.png" for name in PICTURES)):
        assert str(run.out / name) in run.printed
