"""What --penalty and --balance name reaches the loss, the routers or the weights, and nothing else."""

from dataclasses import replace

import pytest
import torch

from examples.image_classification import terms, train
from examples.image_classification.config import Config
from examples.image_classification.data import ImageSet, Split
from examples.shared.command import ExperimentError
from spectral_router import functional

CONFIG = Config(layers=2, experts=4, dim=12, hidden=10, alpha=0.3, beta=0.7, image_size=16, epochs=3, batch_size=4)
CPU = torch.device("cpu")


def images(number: int = 12) -> ImageSet:
    pixels = torch.randint(0, 256, (number, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, torch.arange(number) % 3, ["a", "b", "c"], [], "none")


def step(config: Config, router: str = "spectral"):
    model, objective = train.build(config, router, 0, images(), CPU)
    model.train()
    logits, routed = model(torch.randn(6, 1, 16, 16))
    return model, routed, objective(model, logits, routed, torch.tensor([0, 2, 1, 1, 0, 2]))


@pytest.mark.parametrize("name", terms.PENALTIES)
def test_a_penalty_enters_with_alpha(name):
    model, _, parts = step(replace(CONFIG, penalty=name))
    assert parts.penalty.requires_grad
    torch.testing.assert_close(parts.total, parts.task + 0.3 * parts.penalty + 0.7 * parts.balance)
    # each call of a stateful one differs, so against a new module, at its first call
    literal = terms.penalty(replace(CONFIG, penalty=name))(model.router_weights())
    torch.testing.assert_close(parts.penalty, literal)


def test_penalties_are_what_their_names_say():
    weights = [torch.randn(4, 12), torch.randn(4, 12)]
    stack = torch.stack(weights)
    literal = {
        "rank": functional.spectral_rank_penalty(stack),
        "norm": functional.spectral_norm(stack).square(),
        "sigma": (functional.spectral_norm(stack) - 1).square(),
        "lewandowski": (functional.spectral_norm(stack) ** 2 - 1).square(),
        "mhe": functional.hyperspherical_energy(stack),
        "mhe-half": functional.hyperspherical_energy(stack, half_space=True),
        "so": functional.orthogonality(stack, "so"),
        "simbal": functional.orthogonality(stack, "simbal"),
        "ernie": functional.orthogonality(stack, "ernie"),
    }
    assert {*literal, "comhe"} == set(terms.PENALTIES)
    for name, values in literal.items():
        # the iteration of the spectral norm is at most a little low on a cold start
        torch.testing.assert_close(terms.PENALTIES[name](CONFIG)(weights), values.sum(), rtol=0.02, atol=1e-5)
    assert terms.PENALTIES["comhe"](CONFIG).projection == "random"


@pytest.mark.parametrize("name", terms.BALANCES)
def test_a_balance_loss_enters_with_beta_summed_over_layers(name):
    _, routed, parts = step(replace(CONFIG, balance=name), "clustering")
    literal = {
        "cv2": lambda output: functional.load_balance_loss(output.probs),
        "kl": lambda output: functional.importance_kl_loss(output.probs),
        "mi": lambda output: functional.mutual_information_loss(output.probs),
        "switch": lambda output: functional.switch_loss(output.probs),
        "z": lambda output: functional.router_z_loss(output.logits),
    }
    torch.testing.assert_close(parts.balance, sum(literal[name](output) for output in routed))
    torch.testing.assert_close(parts.total, parts.task + 0.7 * parts.balance)


@pytest.mark.parametrize("name", terms.CONTROLLERS)
@pytest.mark.parametrize("router", ["clustering", "baseline+balance"])
def test_a_controller_sits_in_every_router_and_adds_no_loss(name, router):
    model, routed, parts = step(replace(CONFIG, balance=name, bound=0.01, bias_rate=0.5), router)
    assert torch.equal(parts.total, parts.task)
    controllers = [layer.router.controller for layer in model.moe_layers]
    assert len({id(controller) for controller in controllers}) == 2
    before = [output.weights.detach().clone() for output in routed]
    _, again = model(torch.randn(6, 1, 16, 16))
    # the first step was counted: the second one routes otherwise
    assert not torch.allclose(before[0].mean(0), again[0].weights.mean(0), atol=1e-3)
    assert any("controller" in key for key in model.state_dict())


@pytest.mark.parametrize("name", terms.CONTROLLERS)
def test_routers_without_balance_have_no_controller(name):
    model, _, _ = step(replace(CONFIG, balance=name), "clustering-balance")
    assert all(layer.router.controller is None for layer in model.moe_layers)


def test_a_prediction_has_the_weights_that_were_used():
    model, _ = train.build(replace(CONFIG, balance="bias"), "clustering", 0, images(), CPU)
    for layer in model.moe_layers:
        layer.router.controller.bias.copy_(torch.tensor([3.0, 0.0, 0.0, 0.0]))
    data = images()
    _, weights = train.predict(model, data.images)
    _, routed = model.eval()(train.to_layout(train.as_float(data.images)))
    torch.testing.assert_close(weights, torch.stack([output.weights for output in routed], 1))
    assert (weights[:, 0].argmax(-1) == 0).all()
    assert not torch.allclose(weights[:, 0], routed[0].probs, atol=0.1)


@pytest.mark.parametrize("name", ["rank", "norm", "lewandowski", "comhe"])
def test_penalties_with_a_memory_resume_exactly(name, tmp_path):
    config = replace(CONFIG, penalty=name, sigma_target="initial")  # the anchor is a memory too
    whole = run(config, "spectral", tmp_path / "whole").model
    run(replace(config, epochs=1), "spectral", tmp_path / "parts")
    resumed = run(config, "spectral", tmp_path / "parts").model
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_bound_and_rate_reach_the_controllers():
    config = replace(CONFIG, bound=0.25, bias_rate=0.125)
    assert terms.controller(replace(config, balance="relative"), True).bound == 0.25
    assert terms.controller(replace(config, balance="mean"), True).kind == "mean"
    assert terms.controller(replace(config, balance="bias"), True).rate == 0.125


def run(config: Config, router: str, tmp_path):
    data = images(24)
    everything = torch.arange(24)
    split = Split(everything, everything, everything, everything[:3].view(3, 1))
    rows = []
    return train.train(config, router, 0, data, split, tmp_path / "model.pt", rows.append)


def test_projection_holds_norm_and_rank_after_every_step(tmp_path):
    trained = run(replace(CONFIG, penalty="project", sigma_target=2.0, lr=0.05), "spectral", tmp_path)
    for row in trained.history:
        assert row["stable_rank"] == pytest.approx([4, 4], rel=1e-4)
        assert row["spectral_norm"] == pytest.approx([2, 2], rel=1e-4)
    free = run(replace(CONFIG, penalty="project", lr=0.05), "clustering", tmp_path / "free")  # has no penalty to replace
    assert free.history[-1]["stable_rank"] != pytest.approx([4, 4], rel=1e-2)


def test_rescue_plants_dead_prototypes_anew(monkeypatch, tmp_path):
    build = train.build

    def collapsed(*arguments):
        model, objective = build(*arguments)
        with torch.no_grad():
            for weight in model.router_weights():
                weight[1:] = weight[0]
        return model, objective

    monkeypatch.setattr(train, "build", collapsed)
    config = replace(CONFIG, lr=1e-5)
    trained = run(replace(config, penalty="rescue"), "spectral", tmp_path)
    assert [row.get("rescued") for row in trained.history] == [6, 0, None]
    assert min(trained.history[0]["stable_rank"]) > 1.5
    left = run(config, "clustering", tmp_path / "left")
    assert max(left.history[-1]["stable_rank"]) < 1.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalty": "l2"}, r"--penalty must be one of rank, norm, .*rescue, got l2"),
        ({"balance": "even"}, r"--balance must be one of cv2, kl, .*bias, got even"),
        ({"bound": -1.0}, r"--bound must be a finite number of at least 0, got -1.0"),
        ({"bias_rate": 0.0}, r"--bias-rate must be a finite number above 0, got 0.0"),
        ({"penalty": "project", "sigma_target": "initial"}, r"--sigma-target must be a number for --penalty project"),
    ],
)
def test_messages(changes, message):
    with pytest.raises(ExperimentError, match=message):
        replace(CONFIG, **changes).validate()


def test_help_names_them_all(capsys):
    from examples.image_classification.config import parse

    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for name in (*terms.PENALTIES, *terms.INPLACE, *terms.BALANCES, *terms.CONTROLLERS):
        assert name in text
