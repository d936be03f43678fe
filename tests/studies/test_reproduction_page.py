"""The page of the reproduction: its arithmetic on cases computed by hand, its tables and pictures on made-up records."""

import copy
import re

import pytest
import reproduction_records as made_up

from studies.reproduction import failing, figures, page, saved, stages
from studies.reproduction import statistics as stats
from studies.reproduction.answers import sections as answered
from studies.reproduction.cells import chance, gap, level
from studies.reproduction.tables import PAIRS, PRINTED, differences, main_table
from studies.saved import rounded

RULE = {"name": "a", "scope": "all", "optimizer": "sgd", "rates": [0.1, 0.2], "plasticity": 0.2}


@pytest.fixture(scope="module")
def whole():
    return made_up.results(made_up.plan(3))


@pytest.fixture(scope="module")
def digits():
    return made_up.results(made_up.plan(2), photos=False)


def tiny(*runs: tuple[str, int, float], share: float = 0.3, **more) -> dict:
    """Results of runs (arm, seed, accuracy) in a stage "main"."""
    records = [
        {"stage": "main", "phase": "p", "arm": arm, "seed": seed, "accuracy": accuracy, "oneshot": []}
        | {"routing": {"top_path_share": share}}
        | more
        for arm, seed, accuracy in runs
    ]
    return {"protocol": {"main": {"seeds": [0, 2]}, "failed": {"accuracy_below": 50.0, "one_path": 0.99}}, "runs": records}


def test_a_paired_difference_by_hand():
    # differences 1, 2, 3: mean 2, standard error 1/√3, t(0.975, 2) = 4.302653, t = 2√3 with p = 0.0741799
    found = stats.paired({0: 2.0, 1: 4.0, 2: 6.0, 3: 0.0}, {2: 3.0, 0: 1.0, 1: 2.0, 9: 5.0})
    assert found.n == 3
    assert found.mean == pytest.approx(2.0)
    assert found.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert found.p == pytest.approx(0.0741799, rel=1e-5)
    assert stats.side(found) == 0
    assert stats.paired({0: 1.0}, {1: 1.0}) is None
    assert stats.paired({0: 3.0}, {0: 1.0}) == (2.0, None, None, 1, 0)
    # no spread: the interval is a point
    assert stats.paired({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0}) == (1.0, 0.0, 0.0, 2, 0)
    assert stats.paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}) == (0.0, 0.0, 1.0, 2, 0)


@pytest.mark.parametrize(("mean", "half", "side"), [(2.0, 1.0, 1), (-2.0, 1.0, -1), (2.0, 2.0, 0), (2.0, None, 0)])
def test_what_an_interval_allows_to_say(mean, half, side):
    assert stats.side(stats.Difference(mean, half, 0.5, 3)) == side


@pytest.mark.parametrize(("n", "side"), [(8, 1), (7, 0)])
def test_of_few_pairs_nothing_is_said(n, side):
    assert stats.side(stats.Difference(2.0, 1.0, 0.01, n, 10)) == side


def test_holm_by_hand():
    # ascending .01, .02, .03 times 3, 2, 1 is .03, .04, .03, and no smaller than the one before
    assert stats.holm([0.02, None, 0.01, 0.03]) == pytest.approx([0.04, None, 0.03, 0.04], nan_ok=True)
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_failed_runs_are_counted_and_left_out():
    results = tiny(("a", 0, 90.0), ("a", 1, 25.0), ("b", 0, 80.0), ("b", 1, 81.0))
    assert [stats.has_failed(results, record) for record in results["runs"]] == [False, True, False, False]
    assert stats.has_failed(results, {"accuracy": None})
    assert stats.compare(results, "main", "p", "a", "b", stats.accuracy) == (10.0, None, None, 1, 2)
    both = stats.compare(results, "main", "p", "a", "b", stats.accuracy, failed=True)
    assert both.mean == pytest.approx((10 - 56) / 2)
    assert both.n == 2
    assert failing.count_failed(results, results["runs"]) == 1
    assert failing.count_collapsed(results, results["runs"]) == 0


def test_collapsed_is_nearly_all_images_on_one_path():
    for share, collapsed in ((0.98, False), (0.99, True), (1.0, True)):
        results = tiny(("a", 0, 90.0), share=share)
        assert stats.is_collapsed(results, results["runs"][0]) is collapsed


def updates(*points: tuple[float, float, float | None]) -> dict:
    """A record of one-shot updates (rate, mean delta, loss after), with loss 2 before."""
    shown = [
        {"scope": "all", "optimizer": "sgd", "lr": rate, "mean_delta": delta, "delta": {"x": 2 * delta}}
        | {"novel_loss_before": 2.0, "novel_loss_after": after}
        for rate, delta, after in points
    ]
    return {"oneshot": [{"scope": "path", "optimizer": "sgd", "lr": 0.1}, *shown]}


def test_what_is_read_of_updates():
    record = updates((0.2, -3.0, 1.2), (0.1, -1.0, 1.8))
    assert stats.point(RULE, 0.1, "learned")(record) == pytest.approx(0.1)
    assert stats.point(RULE, 0.2, "mean_delta")(record) == -3.0
    assert stats.point(RULE, 0.2, "delta/x")(record) == -6.0
    assert stats.point(RULE, 0.3, "mean_delta")(record) is None
    # 20 % is a third of the way from 10 % to 40 %
    assert stats.equal(RULE)(record) == pytest.approx(-1 - 2 / 3)
    # an update that ended in NaN, null in the file, has taught nothing
    assert stats.equal(RULE)(updates((0.1, -1.0, 1.0), (0.2, -9.0, None))) == pytest.approx(-0.4)
    assert stats.equal(RULE)(updates((0.1, -1.0, 1.9), (0.2, -9.0, None))) is None
    assert stats.point(RULE, 0.2, "learned")(updates((0.2, -9.0, None))) is None
    assert stats.middle(RULE | {"rates": [3.0, 1.0, 2.0]}) == 2.0


def test_correlation_is_within_groups():
    # each group falls, together they rise
    assert stats.within([[(0.0, 1.0), (1.0, 0.0)], [(10.0, 11.0), (11.0, 10.0)]]) == pytest.approx(-1)
    assert stats.within([[(0.0, 1.0)]]) is None
    assert stats.within([[(0.0, 1.0), (0.0, 2.0)]]) is None


def test_how_numbers_are_written():
    assert level([1.0, 3.0], "+.2f") == "+2.00 ± 12.71"
    assert level([1.0], ".1f", 2) == "1.0 (1 of 2)"
    assert level([], ".1f", 2) == "– (0 of 2)"
    assert level([-0.001], "+.2f") == "+0.00"
    assert gap(None) == "–"
    assert gap(stats.Difference(-0.5, 0.25, 0.01, 3), of=4) == "-0.50 ± 0.25 (n 3)"
    assert [chance(p) for p in (0.0001, 0.049, 1.0, None)] == ["p < .001", "p .049", "p 1.000", "no p"]


def test_the_printed_means_are_those_of_the_printed_classes():
    for columns in PRINTED.values():
        for _, classes, mean, _ in columns.values():
            assert sum(map(float, classes)) / 4 == pytest.approx(float(mean), abs=0.006)


def test_a_table_holds_what_the_records_say(whole):
    rows = [line.strip("| ").split(" | ") for line in main_table(whole, "photos-2x2").splitlines()]
    head = next(row for row in rows if "spectral" in row)
    by_label = {row[0]: dict(zip(head[-4:], row[-4:], strict=True)) for row in rows if len(row) > 4}
    for router in ("baseline", "spectral"):
        runs = stats.select(whole, "main", "photos-2x2", router)
        lost = sum(run["accuracy"] < 50 for run in runs)
        assert by_label["Failed seeds"][router] == f"{lost} of 3"
        mean = sum(run["accuracy"] for run in runs) / 3
        assert by_label["Accuracy before update, %"][router].startswith(f"{mean:.2f} ± ")
        deltas = [run["oneshot"][1]["mean_delta"] for run in runs if run["accuracy"] >= 50]
        assert by_label["Mean delta, points"][router].startswith(f"{sum(deltas) / len(deltas):+.2f} ± ")
        assert by_label["Mean delta, points"][router].endswith(f"({3 - lost} of 3)") == (lost > 0)


def test_pairs_of_the_deep_phase_and_their_number(whole):
    found = differences(whole, "photos-4x4")
    assert {pair for pair, _ in found} == set(PAIRS)
    text = page.text(whole)
    tests = sum(difference is not None and difference.n == 3 for difference in found.values())
    assert f"photos-4x4, n 3 where no other n is given. {tests} comparisons" in text


@pytest.mark.parametrize("side", [1, -1, 0])
def test_answers_follow_from_the_intervals(whole, side):
    results = copy.deepcopy(whole)
    for run in stats.select(results, "main", "photos-4x4"):
        above = side * (run["arm"] == "spectral")
        run["accuracy"] = 80.0 + 5 * above + 0.1 * (run["seed"] + 1) * (-1) ** (run["seed"] * (run["arm"] == "spectral"))
    (line,) = re.findall(r"^\| Spectral is more accurate than baseline .*$", answered(results)["answers"], re.MULTILINE)
    assert f"| {dict(zip((1, -1, 0), ('**shown**', '**refuted**', 'not shown'), strict=True))[side]} |" in line


@pytest.mark.parametrize("harmless", [True, False])
def test_the_verdict_needs_accuracy_and_interference(whole, harmless):
    results = copy.deepcopy(whole)
    setting = stages.chosen(results)
    for run in stats.select(results, "confirm"):
        best = run["arm"] == setting
        run["accuracy"] = 80 + 5 * best + 0.1 * run["seed"] * best
        for entry in run["oneshot"]:
            entry["novel_loss_before"], entry["novel_loss_after"] = 1.0, 0.5
            entry["mean_delta"] = -1.0 + (best and harmless) * (0.9 - 0.01 * (run["seed"] % 3))
    assert stages.confirmed(results).shown is harmless
    assert ("**Shown.**" in stages.confirm(results)) is harmless


@pytest.mark.parametrize("stage", ["second", "confirm"])
def test_a_stage_that_still_runs_has_no_verdict(whole, stage):
    later = {"second": ("confirm",), "confirm": ()}[stage]
    runs = [run for run in whole["runs"] if run["stage"] not in later]
    last = max(index for index, run in enumerate(runs) if run["stage"] == stage)
    wanted = sum(run["stage"] == stage for run in runs)
    results = whole | {"runs": runs[:last] + runs[last + 1 :]}
    assert f"{wanted - 1} of {wanted} runs, no verdict yet" in getattr(stages, stage)(results)
    assert "**" not in getattr(stages, stage)(results)
    assert stages.confirmed(results) is None
    assert (stages.chosen(results) is None) is (stage == "second")
    (line,) = [line for line in answered(results)["answers"].splitlines() if "best setting" in line]
    assert "shown" not in line
    assert "Shown" not in stages.confirm(results)


def test_a_page_of_digits_alone(digits, tmp_path):
    files = page.write(digits, tmp_path)
    text = files[0].read_text()
    assert files[0] == tmp_path / "reproduction_tables.md"
    assert "digits-4x4" in text
    assert "nan" not in text
    for section in ("table-photos-4x4", "sweep", "confirm", "failure", "factors"):
        assert re.search(rf"\[start:{section}\] -->\n\*The results .*\n<!-- --8<-- \[end:{section}\]", text), section
    shown = set(re.findall(r"images/(\w[\w-]+\.png)", text))
    assert shown == {file.name for file in files[1:]}
    assert all(file.stat().st_size > 10_000 for file in files[1:])


def test_the_file_of_results_loses_nothing_of_the_page(whole, tmp_path):
    saved.write(whole, tmp_path / "results.json")
    assert page.text(saved.read(tmp_path / "results.json")) == page.text(whole | {"runs": rounded(whole["runs"])})


def test_pages_of_less(whole, digits):
    page.text(digits | {"runs": [run for run in digits["runs"] if run["seed"] == 0]})  # one seed: no interval, no p
    page.text(whole | {"runs": [run for run in whole["runs"] if run["stage"] == "sweep"]})
    empty = page.text(digits | {"runs": [], "versions": [], "devices": []})
    assert "|" not in empty


def test_every_picture_can_be_drawn(whole, tmp_path):
    wanted = ["reproduction_sweep", "reproduction_failure", "reproduction_forgetting", "reproduction_paths"]
    makers = figures.pictures(whole)
    assert {"reproduction_accuracy", "reproduction_gradients", *wanted} == set(makers)
    for name in wanted:
        figure = makers[name](whole)
        figure.savefig(tmp_path / "figure.png", dpi=40)
        figures.plt.close(figure)


def test_the_committed_page_is_that_of_the_committed_results():
    docs = saved.RESULTS.parents[2] / "docs"
    text = page.text(saved.read())
    assert (docs / "reproduction_tables.md").read_text(encoding="utf-8") == text
    shown = "".join((docs / f"reproduction{part}.md").read_text(encoding="utf-8") for part in ("", "_method", "_appendix"))
    taken = set(re.findall(r'--8<-- "docs/reproduction_tables.md:([\w-]+)"', shown))
    assert taken == set(re.findall(r"\[start:([\w-]+)\]", text))
    for name in re.findall(r"images/[\w-]+\.png", text):
        assert (docs / name).exists()
