"""What the study of convolutional experts says: figures of gate and experts, verdicts on claims, messages."""

import math

import pytest
import torch
import torch.nn.functional as F

from studies.cnn_experts import claims, config, measure, model, report
from studies.cnn_experts.__main__ import main
from studies.cnn_experts.config import Config


def test_figures_of_a_gate():
    weights = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.3, 0.7, 0.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    found = measure.of_gate(weights, labels, ["a", "b"])
    torch.testing.assert_close(torch.tensor(found["class_weights"]), torch.tensor([[0.85, 0.15, 0.0], [0.15, 0.85, 0.0]]))
    assert found["load"] == pytest.approx([0.75, 1.0, 0.0])
    assert found["experts_used"] == 2
    assert found["importance_cv2"] == pytest.approx(0.5)
    assert found["load_cv2"] == pytest.approx((0.75**2 + 1) / 3 / (1.75 / 3) ** 2 - 1)
    assert found["purity"] == pytest.approx(0.85)
    assert found["mutual_information"] == pytest.approx(1)
    logits = F.one_hot(torch.tensor([0, 1, 1, 1]), 2).float()
    assert measure.own_images(logits, weights, labels) == {"share": [0.5, 0.5, 0.0], "accuracy": [50.0, 100.0, None]}
    assert measure.fixed([logits, 1 - logits], labels) == {"each": [75.0, 25.0], "best": 75.0, "mean": 50.0, "worst": 25.0}


def test_a_gate_that_is_not_finite_is_not_called_even():
    weights = torch.tensor([[0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [math.nan, math.nan, 0.0]])
    for broken in (weights, torch.full((3, 3), math.nan)):
        found = measure.of_gate(broken, torch.tensor([0, 1, 1]), ["a", "b"])
        assert all(math.isnan(value) for value in found.values() if not isinstance(value, list))


def part(each: list[float], load: list[float], own: list[float | None]) -> dict:
    return {
        **dict.fromkeys(("accuracy", "parameters", "multiply_adds"), 1.0),
        "routing": {"load": load},
        "fixed_expert": {"each": each, **dict.fromkeys(("best", "mean", "worst"), 1.0)},
        "own_images": {"accuracy": own},
    }


def test_experts_without_images_do_not_count_as_specialists():
    found = measure.scalars(part([90.0, 70.0, 10.0, 20.0], [1.0, 0.01, 0.009, 0.0], [99.0, 80.0, None, None]))
    assert (found["fixed_used"], found["own_best"], found["own_worst"]) == (80, 99, 80)
    found = measure.scalars(part([10.0, 10.0], [0.0, 0.0], [None, None]))
    assert found["fixed_used"] is found["own_best"] is found["own_worst"] is None


def test_every_comparison_has_its_arms_and_its_row():
    quantities = {"importance_cv2", "load_cv2", "experts_used", "purity", "mutual_information", "fixed_used", "accuracy"}
    judged = claims.judge({arm: [dict.fromkeys(quantities, 1.0)] for arm in config.ARMS})
    assert [len(claim["rows"]) for claim in judged] == [6, 4, 2, 4]
    assert {row["quantity"] for claim in judged for row in claim["rows"]} == quantities <= set(report.LABELS)
    compared = [{row["comparison"] for row in claim["rows"]} for claim in judged]
    assert compared[0] == compared[1] == {"soft - none", "soft - hard"}
    assert compared[2] == {"hard - quiet", "hard - soft"}
    assert compared[3] == {"hard - plain", "hard - quiet", "hard - none", "hard - soft"}


def test_figures_of_a_constraint():
    history = [
        {"closed": [0.5, 0.0], "steps_with_closed": 0.5, "excess": 0.2},
        {"closed": [0.0, 1.0], "steps_with_closed": 1.0, "excess": -0.1},
    ]
    expected = {"closed": 37.5, "steps_with_closed": 75.0, "largest_excess": 0.2}
    assert measure.constrained(history) == pytest.approx(expected)


def test_multiply_adds_are_counted():
    settings = Config(width=4)
    images = torch.randint(256, (8, 1, 16, 16), dtype=torch.uint8)
    plain, routed, every = (
        measure.cost(model.Network(Config(width=4, dispatch=dispatch), arm, 1, 3), images)["multiply_adds"]
        for arm, dispatch in (("plain", "all"), ("none", "routed"), ("none", "all"))
    )
    stem = 9 * 4 * 16**2
    stages = sum(
        (9 * before * after + 27 * after**2 + (before * after if before != after else 0)) * side**2
        for before, after, side in ((4, 4, 16), (4, 8, 8), (8, 16, 4), (16, 32, 2))
    )
    assert plain == stem + stages + 32 * 3
    inner = model.inner_planes(settings)
    expert = (9 * inner * (16 + 32 * 3) + 16 * 32) * 2**2
    assert every - routed == 2 * expert


def rows(**of_arms: list[float]) -> claims.Rows:
    return {arm: [{"accuracy": value, "fixed_used": value} for value in values] for arm, values in of_arms.items()}


def test_claims_are_judged_by_paired_differences():
    # all seeds differ widely, the differences hardly
    seeds = [10.0, 50.0, 90.0]
    judged = claims.judge(
        rows(
            plain=[value + 5 for value in seeds],
            none=[value - 2 for value in seeds],
            quiet=[value - 3 for value in seeds],
            relative=[value + delta for value, delta in zip(seeds, (0.1, 0.0, -0.1), strict=True)],
            mean=seeds,
        )
    )
    *_, general, accuracy = judged
    assert [row["comparison"] for row in general["rows"]] == ["hard - quiet"]
    assert general["verdict"] == "shown"
    found = {row["comparison"]: (row["mean"], row["verdict"]) for row in accuracy["rows"]}
    assert found["hard - plain"] == (pytest.approx(-5), "refuted")
    assert found["hard - quiet"] == (pytest.approx(3), "shown")
    assert found["hard - none"] == (pytest.approx(2), "shown")
    assert "hard - soft" not in found
    assert accuracy["verdict"] == "mixed"
    assert [claim["verdict"] for claim in judged[:2]] == 2 * ["not run"]


@pytest.mark.parametrize(
    ("mean", "half", "sign", "expected"),
    [(1, 0.9, 1, "shown"), (1, 0.9, -1, "refuted"), (1, 1.1, 1, "not shown"), (-1, 0.9, -1, "shown"),
     (1, None, 1, "not shown"), (math.nan, math.nan, 1, "not shown"), (0, 0, 1, "not shown")],
)  # fmt: skip
def test_a_verdict_is_where_the_interval_lies(mean, half, sign, expected):
    assert claims.verdict({"mean": mean, "ci95": half}, sign) == expected


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [(["shown", "shown"], "shown"), (["shown", "not shown"], "partly shown"), (["not shown", "not shown"], "not shown"),
     ([], "not run"), (["refuted", "not shown"], "partly refuted"), (["shown", "not shown", "refuted"], "mixed")],
)  # fmt: skip
def test_a_claim_is_what_its_comparisons_are(verdicts, expected):
    assert claims.overall(verdicts) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--width=0", "--width must be at least 1, got 0"),
        ("--experts=1", "--experts must be at least 2, got 1"),
        ("--seeds=0", "--seeds must be at least 1, got 0"),
        ("--epochs=0", "--epochs must be at least 1, got 0"),
        ("--batch-size=1", "--batch-size must be at least 2, got 1"),
        ("--inner-planes=0", "--inner-planes must be at least 1, got 0"),
        ("--samples-per-class=7", "--samples-per-class must be at least 8, got 7"),
        ("--position=5", "--position must be between 1 and 4, got 5"),
        ("--top-k=5", "--top-k must be between 1 and the number of experts, 4, got 5"),
        ("--augment=turn", "--augment must be one of none, shift, flip, got turn"),
        ("--stem=large", "--stem must be one of small, imagenet, got large"),
        ("--gate=mlp", "--gate must be one of gap-fc, conv, got mlp"),
        ("--dispatch=some", "--dispatch must be one of routed, all, got some"),
        ("--image-size=8", "--image-size must be at least 9 with --stem small, got 8"),
        ("--stem=imagenet", "--image-size must be at least 33 with --stem imagenet, got 16"),
        ("--lr=0", "--lr must be a finite number above 0, got 0.0"),
        ("--mean-bound=-1", "--mean-bound must be a finite number of at least 0, got -1.0"),
        ("--arms none soft", "--arms must be any of plain, none, quiet, importance, kl, relative, mean, got soft"),
        ("--arms none none", "--arms must be each named once, got none none"),
    ],
)
def test_messages(flags, message, tmp_path, capsys):
    assert main([*flags.split(), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    names = (*config.Config.__dataclass_fields__, "out", "resume", "overwrite")
    assert all(f"--{name.replace('_', '-')}" in text for name in names)
