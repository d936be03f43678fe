"""The study of learning rates: each arm changes what it says, runs are chosen and shared, claims follow their rule."""

import json
import math

import pytest
import torch

from examples.shared.command import ExperimentError
from examples.shared.storage import write_json
from examples.transformer_moe import data, model
from spectral_router import MoEHandle, find_gates
from studies import saved
from studies.learning_rates import arms, claims, clipping, page, protocol, study, train
from studies.learning_rates.__main__ import main
from studies.learning_rates.results import Arms
from studies.verdicts import SHOWN

TINY = """
[settings]
sequence = 16
layers = 1
dim = 16
hidden = 8
batch_size = 4
steps = 3
domain_bytes = 20000
validation_windows = 2
[models.small]
architecture = "mixtral"
experts = 4
top_k = 2
[rates]
all = [1e-3, 2e-3]
tuning = [1e-3]
[seeds]
tuning = [1000, 1]
test = [0, 2]
[arms.none]
says = "nothing"
[arms.slower]
says = "slower"
strengths = [0.1, 0.5]
[arms.spread]
says = "the penalty"
strengths = [0.1, 1.0]
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("protocol") / "study.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def setting(tiny):
    plan = protocol.read(tiny)
    model.quiet()
    config = protocol.config_of(plan, "small")
    return config, data.load(config, model.byte_tokenizer())


@pytest.mark.slow
def test_the_study_runs_resumes_and_makes_its_page(tiny, tmp_path):
    out, docs = tmp_path / "out", tmp_path / "docs"
    command = ["run", "--protocol", str(tiny), "--out", str(out)]
    assert main([*command, "--seeds", "1"]) == 0
    done = {file.name: file.stat().st_mtime_ns for file in (out / "parts").iterdir()}
    assert len(done) == 4 + 6
    assert main(command) == 0
    assert all((out / "parts" / name).stat().st_mtime_ns == stamp for name, stamp in done.items())
    results = saved.read(out / "results.json")
    assert len(results["runs"]) == 4 + 12
    chosen = study.choose(results["protocol"], results["runs"])["small"]
    assert {run["strength"] for run in results["runs"] if run["stage"] == "test" and run["arm"] == "spread"} == {
        chosen["spread"]
    }
    assert main(["page", "--results", str(out / "results.json"), "--docs", str(docs)]) == 0
    text = (docs / "learning_rates.md").read_text()
    assert "2 on small" in text
    assert (docs / "images" / "learning_rates.png").stat().st_size > 10_000
    assert "| slower |" in (docs / "learning_rates_tables.md").read_text()


def test_the_protocol_in_the_repository_is_whole():
    plan = protocol.read()
    every = protocol.tuning(plan)
    assert len({run.name for run in every}) == len(every)
    chosen = {name: {arm: s["strengths"][0] for arm, s in plan["arms"].items() if "strengths" in s} for name in plan["models"]}
    test = protocol.test(plan, chosen)
    assert len(test) == len(plan["models"]) * len(plan["arms"]) * len(plan["rates"]["all"]) * plan["seeds"]["test"][1]
    assert not {run.seed for run in test} & {run.seed for run in every}
    assert set(arms.PENALTIES) | set(arms.BALANCES) <= set(plan["arms"])
    assert set(claims.OURS) <= set(plan["arms"])


@pytest.mark.parametrize("arm", list(protocol.read()["arms"]))
def test_each_arm_changes_what_it_says(arm, setting):
    config, text = setting
    network = model.build(config, 0)
    before = find_gates(network)[0].weight.detach().clone()
    optimizer = arms.prepare(network, arm, 0.5, 1e-2)
    batch = text.train[0][:4]
    gates = next(group for group in optimizer.param_groups if group["name"] == "gates")
    others = next(group for group in optimizer.param_groups if group["name"] == "others")
    assert gates["lr"] == pytest.approx({"slower": 0.5, "frozen": 0.0}.get(arm, 1.0) * others["lr"])
    assert gates["weight_decay"] == {"decay": 0.5, "frozen": 0.0}.get(arm, arms.DECAY)
    network.train()
    out = network(input_ids=batch, labels=batch)
    plain = model.build(config, 0)
    plain.config.output_router_logits = False
    difference = (out.loss - plain.train()(input_ids=batch, labels=batch).loss).item()
    handle = MoEHandle.of(network)
    added = arm == "own" or (handle is not None and arm not in ("decoupled", "norm"))  # at the start the norm is at its target
    assert (difference > 1e-6) == added, (arm, difference)
    out.loss.backward()
    optimizer.step()
    moved = (find_gates(network)[0].weight - before).abs().max().item()
    assert (moved == 0) == (arm == "frozen")


def test_the_bias_changes_who_is_chosen_and_not_the_weights(setting):
    config, _ = setting
    network = model.build(config, 0)
    gate = find_gates(network)[0]
    biased = arms.Biased(gate, 0.002)
    tokens = torch.randn(64, config.dim)
    logits, weights, indices = gate.module.train()(tokens)
    _, same_weights, same = biased(gate.module, (tokens,), (logits, weights, indices))
    assert torch.equal(same, indices)
    torch.testing.assert_close(same_weights, weights)
    for _ in range(50):
        _, after, chosen = biased(gate.module, (tokens,), (logits, weights, indices))
    load = torch.bincount(chosen.flatten(), minlength=4).float()
    assert load.std() < torch.bincount(indices.flatten(), minlength=4).float().std()
    torch.testing.assert_close(after.sum(-1), torch.ones(64))


def test_a_run_that_diverges_counts_as_a_guess(setting):
    config, text = setting
    run = protocol.Run("test", "small", "none", 0.0, 1e9, 0)
    record = train.train(config, run, text)
    assert record["diverged"]
    assert record["loss"] == pytest.approx(math.log(256))


def test_rounding_counts_choices_that_change():
    config = protocol.config_of(protocol.read(), "mixtral-8")
    network = model.build(config, 0)
    gates = find_gates(network)
    with torch.no_grad():
        gates[0].weight.mul_(0).add_(1.0)  # ties: any rounding changes nothing, all scores stay equal
    with train.rounding(gates) as found, torch.no_grad():
        network(input_ids=torch.randint(256, (2, 32)))
    assert float(found[0]) == 0
    assert all(0 <= float(share) <= 1 for share in found)


def made_up(effects, seeds=10):
    """Test runs: losses of `effects[arm]` at the two rates, with a spread that all arms of a seed share."""
    plan = {
        "settings": {"layers": 1},
        "models": {"m": {"experts": 4}},
        "rates": {"all": [1e-3, 2e-3], "tuning": [1e-3]},
        "seeds": {"tuning": [1000, 1], "test": [0, seeds]},
        "arms": {arm: {"says": arm} for arm in effects},
    }
    runs = []
    for number, (arm, levels) in enumerate(effects.items()):
        for rate, level in zip((1e-3, 2e-3), levels, strict=True):
            for seed in range(seeds):
                own = 0.001 * math.sin(7 * seed + 3 * number)
                runs.append(
                    {
                        "stage": "test", "model": "m", "arm": arm, "strength": 0.0, "rate": rate, "seed": seed,
                        "loss": level + 0.1 * seed + own, "dead": 1, "flips": 0.01 + own, "diverged": False,
                    }
                )  # fmt: skip
    return {"protocol": plan, "runs": runs, "versions": {"torch": "2"}}


@pytest.mark.parametrize(
    ("effects", "claim"),
    [
        ({"none": (2.0, 2.2), "spread": (1.8, 1.9), "slower": (1.9, 2.0)}, "spectral control"),
        ({"none": (2.0, 2.2), "spread": (1.9, 2.0), "slower": (1.8, 1.9)}, "any control of the gate"),
        ({"none": (2.0, 2.2), "spread": (2.0, 2.2), "slower": (1.8, 1.9)}, "a rival's"),
        ({"none": (2.0, 2.2), "spread": (2.1, 2.2), "slower": (2.0, 2.2)}, "nothing"),
    ],
)
def test_claims_follow_their_rule(effects, claim):
    found = Arms(made_up(effects), "m")
    assert found.best_rate("none") == 1e-3
    assert claims.survives(found, "best") == claim
    assert claims.survives(found, "twice") == (claim if claim != "nothing" else "nothing")
    tests = claims.against_none(found, "best")
    assert tests["spread"].difference.mean == pytest.approx(effects["spread"][0] - 2.0, abs=2e-3)
    assert claims.against_none(found, "four times")["spread"].verdict == SHOWN[0]  # beyond the rates
    assert ("Claim that survives" in page.answer(found)) == any(
        test.verdict != SHOWN[0] for of in claims.all_tests(found).values() for test in of.values()
    )


@pytest.mark.parametrize(("without", "said"), [(0.0, "the difference is gone"), (-0.1, "clipping does not explain it")])
def test_what_is_said_of_clipping_follows_its_figures(tmp_path, without, said):
    wobble = [0.0, 0.002, -0.002]
    none = [3.0, 3.1, 3.2]
    losses = {
        clip: {"none": none, "spread": [n + gap + w for n, w in zip(none, wobble, strict=True)]}
        for clip, gap in zip(clipping.CLIPS, (-0.1, without), strict=True)
    }
    write_json(tmp_path / "c.json", {"losses": losses})
    assert said in clipping.said(tmp_path / "c.json")


def test_seeds_that_are_not_whole_are_left_out():
    results = made_up({"none": (2.0, 2.1), "spread": (2.0, 2.1)}, seeds=3)
    results["runs"] = results["runs"][:-1]
    assert Arms(results, "m").seeds == [0, 1]


def test_bad_input(tmp_path, capsys):
    bad = tmp_path / "bad.toml"
    bad.write_text("[settings]\nlayers = 1\n")
    assert main(["run", "--protocol", str(bad), "--out", str(tmp_path / "o")]) == 1
    assert "must have the sections of study.toml" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ExperimentError, match="colour is no setting; there are"):
        protocol.config_of({"settings": {"colour": 1}, "models": {"m": {}}}, "m")
    (tmp_path / "r.json").write_text(json.dumps({"protocol": {"models": {}}, "runs": []}))
    assert main(["page", "--results", str(tmp_path / "r.json"), "--docs", str(tmp_path)]) == 1
