"""The network of the study of convolutional experts: its stages, its gates, and how each arm trains."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet18

from studies.cnn_experts import model, train
from studies.cnn_experts.config import ARMS, Config

MIXTURES = [arm for arm in ARMS if ARMS[arm].moe]


def network(arm: str = "none", seed: int = 0, **settings) -> model.Network:
    torch.manual_seed(seed)
    return model.Network(Config(**{"width": 4, **settings}), arm, 1, 3)


def mixture(of: model.Network) -> model.ConvMoE:
    (found,) = (part for part in of.modules() if isinstance(part, model.ConvMoE))
    return found


def test_the_plain_network_is_torchvisions():
    mine, theirs = model.Network(Config(width=64, stem="imagenet"), "plain", 3, 1000), resnet18()
    theirs.load_state_dict(mine.state_dict())
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(mine(images)[0], theirs(images))
    assert model.parameters(mine) == model.parameters(theirs)


@pytest.mark.parametrize("position", [1, 2, 3, 4])
@pytest.mark.parametrize("experts", [2, 4, 7])
def test_the_experts_have_about_as_many_parameters_as_their_stage(position, experts):
    settings = Config(position=position, experts=experts)
    plain = model.parameters(getattr(model.Network(settings, "plain", 1, 3), f"layer{position}"))

    def off(inner: int) -> int:
        built = model.Network(Config(position=position, experts=experts, inner_planes=inner), "relative", 1, 3)
        return abs(model.parameters(mixture(built).experts) - plain)

    inner = model.inner_planes(settings)
    assert off(inner) <= min(off(inner + 1), off(max(1, inner - 1)))


def test_the_default_mixture_is_as_large_as_the_plain_network():
    sizes = [model.parameters(model.Network(Config(), arm, 1, 10)) for arm in ("plain", "importance")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


@pytest.mark.parametrize("arm", MIXTURES)
@pytest.mark.parametrize("gate", ["gap-fc", "conv"])
@pytest.mark.parametrize("dispatch", ["routed", "all"])
def test_every_arm_learns(arm, gate, dispatch):
    net = network(arm, gate=gate, dispatch=dispatch, position=3)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    images, labels = torch.randn(24, 1, 12, 12), torch.arange(24) % 3
    images += labels.view(-1, 1, 1, 1)
    balance, losses = train.balance_loss(arm), []
    for _ in range(6):
        logits, routed = net(images)
        losses.append(F.cross_entropy(logits, labels))
        optimizer.zero_grad()
        (losses[-1] + (0 if balance is None else balance(routed.weights))).backward()
        assert all(part.grad is None or part.grad.isfinite().all() for part in net.parameters())
        assert net.layer1[0].conv1.weight.grad.any()
        assert mixture(net).gate.fc.weight.grad.any()
        optimizer.step()
    assert logits.shape == (24, 3)
    assert routed.weights.shape == routed.scores.shape == (24, 4)
    torch.testing.assert_close(routed.weights.sum(-1), torch.ones(24))
    assert ((routed.weights > 0).sum(-1) <= 2).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dispatch", ["routed", "all"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@torch.no_grad()
def test_the_output_is_the_weighted_sum_of_the_experts(dispatch, top_k):
    moe = mixture(network(dispatch=dispatch, top_k=top_k)).eval()
    x = torch.randn(5, 16, 4, 4)
    outputs, routed = moe(x)
    scores = moe.gate.fc(x.mean((2, 3)))
    for image in range(5):
        expected = 0
        chosen = scores[image].argsort(descending=True)[:top_k]
        for weight, expert in zip(scores[image][chosen].softmax(-1), chosen, strict=True):
            expected = expected + weight * moe.experts[expert](x[image : image + 1])
            assert routed.weights[image, expert] == pytest.approx(float(weight))
        torch.testing.assert_close(outputs[image : image + 1], expected)


@pytest.mark.parametrize("dispatch", ["routed", "all"])
@pytest.mark.parametrize("gate", ["gap-fc", "conv"])
def test_under_autocast_the_gate_stays_in_float32(dispatch, gate):
    net = network(dispatch=dispatch, gate=gate, position=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits, routed = net(torch.randn(8, 1, 12, 12))
    assert logits.dtype == torch.bfloat16
    assert routed.scores.dtype == routed.weights.dtype == torch.float32
    torch.testing.assert_close(routed.weights.sum(-1), torch.ones(8))
    logits.float().square().sum().backward()
    assert all(part.grad is None or part.grad.isfinite().all() for part in net.parameters())


@pytest.mark.parametrize("dispatch", ["routed", "all"])
def test_weights_that_are_nan_are_passed_on(dispatch):
    net = network("relative", dispatch=dispatch)
    torch.nn.init.constant_(mixture(net).gate.fc.bias, torch.nan)
    assert net(torch.randn(8, 1, 12, 12))[0].isnan().all()


@pytest.mark.parametrize("dispatch", ["routed", "all"])
def test_a_fixed_expert_has_all_the_weight(dispatch):
    net = network(dispatch=dispatch).eval()
    images = torch.randint(256, (6, 1, 12, 12), dtype=torch.uint8)
    for number, expert in enumerate(mixture(net).experts):
        alone = network("plain").eval()
        alone.load_state_dict({key: part for key, part in net.state_dict().items() if "layer4" not in key}, strict=False)
        alone.layer4 = expert
        torch.testing.assert_close(train.predict(net, images, number)[0], train.predict(alone, images)[0])


def test_batch_norm_of_an_expert_sees_its_own_images_only():
    net = network()
    net(torch.randn(6, 1, 12, 12), 1)
    assert [int(expert[0].bn1.num_batches_tracked) for expert in mixture(net).experts] == [0, 1, 0, 0]


@pytest.mark.parametrize("arm", MIXTURES)
def test_noise_is_of_training_and_not_of_hard_arms_and_quiet(arm):
    gate = mixture(network(arm)).gate
    x = torch.randn(3, 16, 4, 4)
    torch.manual_seed(5)
    scores, noisy = gate(x)
    if arm in ("quiet", "relative", "mean"):
        assert gate.noise is None
        assert torch.equal(scores, noisy)
    else:
        torch.manual_seed(5)
        scale = (x.mean((2, 3)) @ gate.noise.weight.T + 0.01).exp().add(1).log()
        torch.testing.assert_close(noisy, scores + torch.randn(3, 4) * scale)
    assert torch.equal(*gate.eval()(x))


def test_a_closed_expert_gets_no_image_in_training_only():
    net = network("relative")
    constraint = mixture(net).constraint
    constraint.importance.copy_(torch.tensor([2.0, -1.0, -1.0, 0.0]))
    images = torch.randn(8, 1, 12, 12)
    _, routed = net(images)
    assert routed.closed.tolist() == [1, 0, 0, 0]
    assert not routed.weights[:, 0].any()
    # the batch is counted: what was given to the others is taken from the first
    assert constraint.importance[0] == pytest.approx(1)
    assert not net.eval()(images)[1].closed.any()


def test_arms_of_one_seed_start_the_same():
    starts = [network(arm, seed=3).state_dict() for arm in ARMS]
    for other in starts:
        shared = [key for key in other if key in starts[1] and not (other is starts[0] and "layer4" in key)]
        assert len(shared) > 50
        assert all(torch.equal(other[key], starts[1][key]) for key in shared)
    assert not torch.equal(starts[1]["fc.weight"], network(seed=4).state_dict()["fc.weight"])


def test_learning_rate_is_that_of_the_paper():
    rates = [train.rate(Config(epochs=150), epoch) for epoch in (0, 79, 80, 119, 120, 149)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


def test_soft_terms_read_the_weights():
    weights = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.6, 0.0, 0.4, 0.0]])
    importance = weights.sum(0)
    assert float(train.balance_loss("importance")(weights)) == pytest.approx(float(importance.var() / importance.mean() ** 2))
    shares = [0.65, 0.15, 0.2]
    assert float(train.balance_loss("kl")(weights)) == pytest.approx(sum(p * math.log(4 * p) for p in shares), rel=1e-5)
    assert all(train.balance_loss(arm) is None for arm in ("plain", "none", "quiet", "relative", "mean"))
