"""What the page of the reproduction says in words: on made-up records, and where it can be computed by hand."""

import copy
import re
from itertools import pairwise

import pytest
import reproduction_records as made_up

from studies.reproduction import answers, cells, failing, parts, posthoc, printed, routing, sweep, verdict
from studies.reproduction import statistics as stats


@pytest.fixture(scope="module")
def whole():
    return made_up.results(made_up.plan(3))


def of_every(results: dict, arm: str) -> list[dict]:
    return stats.select(results, "main", "photos-4x4", arm)


def test_words_for_few_and_for_several():
    few = stats.Difference(2.0, 1.0, 0.01, 3, 10)
    assert cells.verdict(few) == "not shown, too few (3 of 10)"
    assert cells.said(few).endswith("+2.00 ± 1.00, p .010, n 3")
    assert cells.verdict(None) == "no runs"
    assert cells.together(["not shown", "not shown"]) == "not shown"
    assert cells.together(["not shown", "**refuted**", "not shown"]) == "not shown in 2; **refuted** in 1"
    assert cells.gap(stats.Difference(0.244, 0.2382, 0.047, 3)) == "+0.244 ± 0.238"


def test_too_few_pairs_are_not_counted(whole):
    results = copy.deepcopy(whole)
    for run in of_every(results, "spectral"):
        run["accuracy"] = 90.0
        for entry in run["oneshot"]:
            entry["novel_loss_after"] = entry["novel_loss_before"]
    line = next(line for line in answers.answers(results).splitlines() if "delta than clustering" in line)
    assert "| no runs |" in line  # no pair at all
    key = ("photos-4x4", "accuracy", "baseline")
    assert parts.phases_of(results)[key].n == 3
    counted = {key: stats.Difference(2.0, 1.0, 0.01, n, 10) for key, n in ((("a",), 9), (("b",), 3))}
    said, numbers = parts.certain(counted)
    assert said == "1 of 1 intervals exclude 0"
    assert "left out: 1." in numbers


def test_the_papers_differences(whole):
    found = {(one.phase, one.pair, one.quantity): one for one in printed.beside(whole)}
    one = found["photos-4x4", ("spectral", "baseline"), "accuracy"]
    assert one.paper == pytest.approx(80.44 - 71.61)
    assert found["photos-4x4", ("spectral", "clustering"), "mean delta"].paper == pytest.approx(0.90)
    assert one._replace(ours=stats.Difference(8.0, 1.0, 0.1, 3, 3)).inside
    assert not one._replace(ours=stats.Difference(8.0, 0.5, 0.1, 3, 3)).inside
    (line,) = [line for line in verdict.sections(whole)["verdict"].splitlines() if "more accurate" in line]
    assert re.search(r"over baseline [^;]* \(paper \+8\.83\); over clustering [^;]* \(paper \+3\.68\)\.$", line)


def test_fishers_exact_test_by_hand():
    # all four of one side and none of the other: 2 of the C(8, 4) = 70 tables are as far apart
    assert failing.fisher((0, 4), (4, 4)) == pytest.approx(2 / 70)
    assert failing.fisher((2, 4), (2, 4)) == pytest.approx(1.0)


def test_when_networks_fail(whole):
    results = copy.deepcopy(whole)
    for run in stats.select(results, "failure"):
        run["accuracy"] = 25.0 if "1e-2" in run["arm"] or run["arm"] == "baseline, rate 3e-3" else 90.0
    told, numbers = failing.answer(results)
    assert told == "of 5 conditions, nobody in 3, all in 1, **by router in 1**"
    assert "rate 1e-2: all fail." in numbers
    assert "rate 3e-3 (baseline: 3 of 3, " in numbers
    assert "against baseline p .100" in numbers  # 2 of C(6, 3) = 20


def test_where_updates_do_harm(whole):
    results = copy.deepcopy(whole)
    for run in stats.select(results, "main", "photos-4x4"):
        for entry in run["oneshot"]:
            entry["mean_delta"] = -2.0 - 3.0 * (run["arm"] == "baseline") if entry["lr"] == 1.0 else 0.0
    assert posthoc.harmful(results, "photos-4x4")["name"] == "experts of the path, SGD"
    found = posthoc.largest_of(results, "photos-4x4")
    one = found[("clustering", "clustering-balance"), "experts of the path, SGD", "delta"]
    assert one.mean == 0.0
    kept = [run for run in of_every(results, "baseline") if run["accuracy"] >= 50]
    one = found[("spectral", "baseline"), "experts of the path, SGD", "delta"]
    assert one is None if not kept else one.mean == pytest.approx(3.0)


def test_separation_is_beyond_chance(whole):
    record = {"routing": {"mutual_information": 0.8, "mutual_information_chance": 0.05}}
    assert routing.information(record) == pytest.approx(0.75)
    assert routing.answer(whole, ("spectral", "clustering"), routing.SEPARATION)[0]
    assert routing.answer(whole | {"runs": []}, ("spectral", "clustering"), routing.SEPARATION) == ["no runs", ""]


def test_the_last_epochs(whole):
    (first, *_) = of_every(whole, "spectral")
    assert len(first["val_accuracy"]) == 12
    results = copy.deepcopy(whole)
    for run in stats.select(results, "main", "photos-4x4"):
        run["val_accuracy"] = [50.0] * 8 + [80.0 + 2 * (run["arm"] == "spectral")] * 4
    found = posthoc.late_difference(results, "photos-4x4", "spectral", "clustering")
    assert found == (2.0, 0.0, 0.0, 3, 3)


def test_the_sweep_says_which_level_passes(whole):
    results = copy.deepcopy(whole)
    for run in stats.select(results, "sweep"):
        better = run["arm"] == "residual true"
        run["accuracy"] = 80.0 + 5 * better + run["seed"] % 10
        for entry in run["oneshot"]:
            entry["novel_loss_before"], entry["novel_loss_after"] = 1.0, 0.5
            entry["mean_delta"] = -1.0 - better - 0.1 * (run["seed"] % 10)
    text = sweep.sweep(results)
    (line,) = [line for line in text.splitlines() if line.startswith("| residual true |")]
    assert line.endswith("| accuracy yes, delta no |")
    assert "The most accurate setting, residual true (+5.00 ± 0.00): accuracy yes, delta no." in text
    assert "within a setting by -1.00" in text
    factors = [key[0] for key in parts.factors_of(results)]
    assert "router" not in factors
    assert all(one <= other for one, other in pairwise(map(list(dict.fromkeys(factors)).index, factors)))


@pytest.mark.parametrize(("side", "told"), [(1, "Shown: "), (-1, "Refuted: "), (0, "Not shown: ")])
def test_a_line_of_the_verdict_follows_the_differences(whole, side, told):
    results = copy.deepcopy(whole)
    for run in stats.select(results, "main"):
        above = side * (run["arm"] == "spectral")
        run["accuracy"] = 80.0 + 5 * above + 0.001 * (run["seed"] + 1) * (-1) ** (run["seed"] * (run["arm"] == "spectral"))
    text = verdict.sections(results)["verdict"]
    assert f"- **{told}spectral is more accurate than baseline or clustering**, in 6 phases." in text


def test_a_verdict_on_who_trains_needs_more_than_one_small_p(whole):
    # none of 4 against all of 4 is p .029 in one comparison of six, .171 after adjustment
    results = copy.deepcopy(whole)
    results["protocol"]["failure"]["seeds"] = [3000, 4]
    runs = [
        run | {"seed": seed}
        for run in stats.select(results, "failure")
        for seed in ([3000, 3003] if run["seed"] == 3000 else [run["seed"]])
    ]
    for run in runs:
        lost = run["arm"] in ("baseline, rate 3e-3", "clustering, rate 1e-3, no batch norm") and run["seed"] >= 3000 + (
            "clustering" in run["arm"]
        )
        run["accuracy"] = 25.0 if lost else 90.0
    results["runs"] = [run for run in results["runs"] if run["stage"] != "failure"] + runs
    (line,) = [line for line in verdict.sections(results)["verdict"].splitlines() if "other routers fail" in line]
    assert line.startswith("- **Not shown: ")
    assert "against baseline at rate 3e-3: p\u00a0.029 by Fisher's exact test, p\u00a0.171 after adjustment for 6" in line


@pytest.mark.parametrize(("collapsed", "told"), [(0, "Refuted"), (30, "Not shown"), (60, "Shown")])
def test_whether_the_baseline_collapses_is_held_against_one_half(whole, collapsed, told):
    results = copy.deepcopy(whole)
    record = next(run for run in results["runs"] if run["stage"] == "main" and run["arm"] == "baseline")
    results["runs"] = [
        record | {"seed": seed, "routing": record["routing"] | {"top_path_share": float(seed < collapsed)}}
        for seed in range(60)
    ]
    (line,) = [line for line in verdict.sections(results)["verdict"].splitlines() if "collapses" in line]
    assert line.startswith(f"- **{told}: the linear baseline collapses to one path.** {collapsed} of 60")


def test_the_interval_of_a_share_by_hand():
    # none of n: the upper end is 1 - 0.025^(1/n)
    assert failing.share(0, 4) == pytest.approx((0.0, 1 - 0.025 ** (1 / 4)))
    assert failing.share(4, 4) == pytest.approx((0.025 ** (1 / 4), 1.0))
