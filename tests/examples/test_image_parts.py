"""The example's network and objective, each against a literal version of itself."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from examples.image_classification import train
from examples.image_classification.config import ROUTERS, Config
from examples.image_classification.data import ImageSet
from examples.image_classification.model import Experts, LinearRouter, SRMoE
from spectral_router import PrototypeRouter, RouterOutput

CONFIG = Config(layers=3, experts=5, dim=12, hidden=10, alpha=0.3, beta=0.7, image_size=16)
# what the loss of each router holds beside the task: alpha * spectral penalty, beta * balance
COUNTED = {
    "baseline": (0.0, 0.0),
    "clustering": (0.0, 0.7),
    "spectral": (0.3, 0.7),
    "baseline+balance": (0.0, 0.7),
    "baseline+spectral": (0.3, 0.0),
    "clustering-balance": (0.0, 0.0),
}


# --- model


def test_experts_equal_separate_mlps():
    experts = Experts(4, 6, 9).double()
    nn.init.normal_(experts.b_in)  # the biases start at zero, which would hide them
    nn.init.normal_(experts.b_out)
    mlps = []
    for index in range(4):
        mlp = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)).double()
        with torch.no_grad():
            mlp[0].weight.copy_(experts.w_in[index].T)
            mlp[0].bias.copy_(experts.b_in[index, 0])
            mlp[2].weight.copy_(experts.w_out[index].T)
            mlp[2].bias.copy_(experts.b_out[index, 0])
        mlps.append(mlp)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 4, dtype=torch.float64, requires_grad=True)
    aim = torch.randn(7, 6, dtype=torch.float64)

    output = experts(x, weights)
    literal = sum(weights[:, index, None] * mlp(x) for index, mlp in enumerate(mlps))
    torch.testing.assert_close(output, literal)

    ours = torch.autograd.grad((output * aim).sum(), [x, weights, *experts.parameters()])
    theirs = torch.autograd.grad((literal * aim).sum(), [x, weights, *(value for mlp in mlps for value in mlp.parameters())])
    torch.testing.assert_close(ours[:2], theirs[:2])
    for index in range(4):
        w_in, b_in, w_out, b_out = theirs[2 + 4 * index : 6 + 4 * index]
        literal_gradient = (w_in.T, b_in[None], w_out.T, b_out[None])
        torch.testing.assert_close(tuple(gradient[index] for gradient in ours[2:]), literal_gradient)


def test_a_residual_adds_what_the_layer_gets():
    plain, residual = (SRMoE(replace(CONFIG, residual=flag), "spectral", 3, 4).moe_layers[0] for flag in (False, True))
    residual.load_state_dict(plain.state_dict())
    z = torch.randn(7, 12)
    torch.testing.assert_close(residual(z)[0], z + plain(z)[0])


def test_prototypes_from_data_are_inputs_of_their_layers():
    model = SRMoE(CONFIG, "spectral", 3, 4).eval()
    images = torch.randn(20, 3, 16, 16)
    model.prototypes_from(images, torch.Generator().manual_seed(1))
    first = model.router_weights()[0].clone()
    z = model.stem(images)
    for layer in model.moe_layers:
        inside = layer.processor(z)
        distances = torch.cdist(layer.router.prototypes, inside)
        assert (distances.amin(1) < 1e-5).all()
        assert len(distances.argmin(1).unique()) == CONFIG.experts
        z, _ = layer(z)
    model.prototypes_from(images, torch.Generator().manual_seed(1))
    assert torch.equal(model.router_weights()[0], first)
    SRMoE(CONFIG, "baseline", 3, 4).prototypes_from(images, torch.Generator())  # no prototypes, nothing to do


def test_experts_start_within_the_bounds_of_linear_layers():
    experts = Experts(8, 16, 64)
    for weight, fan_in in ((experts.w_in, 16), (experts.w_out, 64)):
        assert 0.9 * fan_in**-0.5 < weight.abs().max() <= fan_in**-0.5
    assert not experts.b_in.any()


def test_linear_router_is_a_softmax_of_w_z_plus_b():
    router = LinearRouter(6, 4)
    x = torch.randn(5, 6)
    routed = router(x)
    logits = x @ router.gate.weight.T + router.gate.bias
    odds = logits.exp()
    torch.testing.assert_close(routed.logits, logits)
    torch.testing.assert_close(routed.probs, odds / odds.sum(-1, keepdim=True))
    assert torch.equal(routed.weights, routed.probs)
    assert routed.indices.tolist() == 5 * [[0, 1, 2, 3]]


@pytest.mark.parametrize("router", ROUTERS)
def test_network_shapes(router):
    model = SRMoE(CONFIG, router, channels=3, num_classes=4)
    logits, routed = model(torch.randn(6, 3, 16, 16))
    assert logits.shape == (6, 4)
    assert [layer.probs.shape for layer in routed] == 3 * [(6, 5)]
    kind = LinearRouter if router.startswith("baseline") else PrototypeRouter
    assert all(isinstance(layer.router, kind) for layer in model.moe_layers)
    # the penalty reads the parameters themselves, and each is (K, d) under both gates
    weights = model.router_weights()
    assert [weight.shape for weight in weights] == 3 * [(5, 12)]
    ids = {id(parameter) for parameter in model.parameters()}
    assert all(id(weight) in ids for weight in weights)


def test_a_layer_is_norm_of_relu_then_weighted_experts():
    layer = SRMoE(CONFIG, "spectral", channels=1, num_classes=2).moe_layers[0]
    z = torch.randn(4, 12)
    linear = layer.processor[0]
    inside = (z @ linear.weight.T + linear.bias).clamp_min(0)
    inside = (inside - inside.mean(-1, keepdim=True)) / (inside.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    distance = (inside[:, None] - layer.router.prototypes).norm(dim=-1)
    weights = (-distance / layer.router.temperature).softmax(-1)
    output, routed = layer(z)
    torch.testing.assert_close(routed.probs, weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output, layer.experts(inside, weights), rtol=1e-4, atol=1e-5)  # no residual


def test_stem_norm_and_metric_reach_the_network():
    kinds = {norm: {type(part) for part in SRMoE(Config(stem_norm=norm), "spectral", 1, 2).stem} for norm in ("batch", "none")}
    assert nn.BatchNorm2d in kinds["batch"]
    assert nn.BatchNorm2d not in kinds["none"]
    model = SRMoE(Config(metric="cosine", temperature=0.25), "clustering", 1, 2)
    assert {layer.router.metric for layer in model.moe_layers} == {"cosine"}
    assert model.moe_layers[0].router.temperature.item() == 0.25


def images(number: int = 12) -> ImageSet:
    pixels = torch.randint(0, 256, (number, 1, 16, 16), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(number) % 3, ["a", "b", "c"], [], "none")


def test_one_seed_gives_every_router_the_same_stem():
    # else the comparison of routers would be one of stems too
    def stem(router: str, seed: int) -> Tensor:
        model, _ = train.build(CONFIG, router, seed, images(), torch.device("cpu"))
        return torch.cat([parameter.detach().flatten() for parameter in model.stem.parameters()])

    stems = [stem(router, 5) for router in ROUTERS]
    assert all(torch.equal(stems[0], other) for other in stems[1:])
    assert not torch.equal(stems[0], stem("baseline", 6))


# --- objective


def test_every_router_is_listed_here():
    assert set(COUNTED) == set(ROUTERS)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("relative", [False, True])
def test_objective_is_equation_7(router, relative):
    config = replace(CONFIG, relative=relative, sigma_target=2.0, rank_target=3.0)
    model, objective = train.build(config, router, 0, images(), torch.device("cpu"))
    labels = torch.tensor([0, 2, 1, 1])
    logits, routed = model(torch.randn(4, 1, 16, 16))
    terms = objective(model, logits, routed, labels)

    task = -sum(math.log(row.softmax(-1)[label]) for row, label in zip(logits.detach().double(), labels, strict=True)) / 4
    penalty = balance = 0.0
    for weight, output in zip(model.router_weights(), routed, strict=True):
        singular = torch.linalg.svdvals(weight.detach().double())
        scale = (2.0, 3.0) if relative else (1.0, 1.0)
        rank = float((singular**2).sum() / singular[0] ** 2)
        penalty += ((float(singular[0]) - 2) / scale[0]) ** 2 + ((rank - 3) / scale[1]) ** 2
        load = output.probs.detach().double().mean(0)
        balance += float(load.var(correction=0) / load.mean() ** 2)
    alpha, beta = COUNTED[router]
    expected = torch.tensor([task + alpha * penalty + beta * balance, task, penalty, balance])
    torch.testing.assert_close(torch.stack(terms).detach(), expected, rtol=1e-4, atol=1e-5)

    # the gradient, too, is the one of the terms that count, and of no other
    weights = model.router_weights()
    total = torch.autograd.grad(terms.total, weights, retain_graph=True)
    parts = [torch.autograd.grad(terms.task, weights, retain_graph=True)]
    for coefficient, term in ((alpha, terms.penalty), (beta, terms.balance)):
        assert term.requires_grad == bool(coefficient)
        if coefficient:
            parts.append(torch.autograd.grad(coefficient * term, weights, retain_graph=True))
    torch.testing.assert_close(total, tuple(sum(gradients) for gradients in zip(*parts, strict=True)))


def test_initial_sigma_target_holds_the_first_norm():
    config = replace(CONFIG, sigma_target="initial", rank_target=1.0)
    model, objective = train.build(config, "spectral", 0, images(), torch.device("cpu"))
    logits, labels = torch.zeros(1, 3), torch.tensor([0])
    routed = [RouterOutput(*4 * [torch.full((1, 5), 0.2)])]
    norms = [torch.linalg.svdvals(weight)[0] for weight in model.router_weights()]
    first = objective(model, logits, routed, labels).penalty
    with torch.no_grad():
        for weight in model.router_weights():
            weight *= 3  # the rank stays
    grown = objective(model, logits, routed, labels).penalty - first
    torch.testing.assert_close(grown, sum((2 * norm) ** 2 for norm in norms))


# --- training step


@pytest.mark.parametrize(("device", "mode"), [("cpu", "default"), ("cuda", "reduce-overhead")])
def test_on_a_gpu_the_compiled_step_uses_cuda_graphs(device: str, mode: str, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, mode: asked.append((function, mode)))
    train.compiled(torch.device(device))
    assert asked == [(train.forward, mode)]
