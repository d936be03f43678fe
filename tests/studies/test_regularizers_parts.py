"""The parts of the study of regularizers: arms, splits, measures, and the rule of the verdicts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from examples.image_classification.data import ImageSet, as_float
from spectral_router.functional import hyperspherical_energy
from studies.regularizers import measure
from studies.regularizers.arms import ARMS, penalty, terms
from studies.regularizers.claims import CLAIMS, Claim, judge, paired, sign_test, t_test, verdict
from studies.regularizers.config import parse
from studies.regularizers.data import split
from studies.regularizers.study import best
from studies.regularizers.train import batches, build, coefficient, optimizer_for, train

SMALL = "--train-per-class=6 --val-per-class=4 --epochs=2 --batch-size=6 --widths 4 5 6 --seeds=1 --noise 0.5"


@pytest.fixture(scope="module")
def data() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = torch.randint(0, 256, (40, 1, 13, 13), generator=generator).add(40 * labels[:, None, None, None]).clamp(max=255)
    return ImageSet(images.to(torch.uint8), labels, ["a", "b"], [], "none")


def weights(study: str, arm: str, multiple: float, data: ImageSet) -> torch.Tensor:
    config, _ = parse([study, *SMALL.split()])
    chosen = split(data.labels, data.classes, config, 3)
    network = train(config, arm, multiple, 3, data, chosen.train).network
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


@pytest.mark.parametrize(("study", "arm"), [(study, arm) for study in ARMS for arm in ARMS[study] if arm != "none"])
def test_arms_differ_in_their_penalty_and_nothing_else(study, arm, data):
    alone = weights(study, "none", 1.0, data)
    assert torch.equal(weights(study, arm, 0.0, data), alone)
    assert not torch.equal(weights(study, arm, 1.0, data), alone)
    assert torch.equal(weights(study, arm, 1.0, data), weights(study, arm, 1.0, data))


class Waits(TorchDispatchMode):
    """Counts what makes a GPU wait: a number or a shape that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("study", "arm"), [(study, arm) for study in ARMS for arm in ARMS[study]])
def test_no_step_waits_for_the_device(study, arm, data):
    counts = []
    for batch_size in (3, 6):  # four steps an epoch, or two
        config, _ = parse([study, *SMALL.split(), f"--batch-size={batch_size}"])
        members = split(data.labels, data.classes, config, 3).train
        with Waits() as waits:
            train(config, arm, 1.0, 3, data, members)
        counts.append(waits.count)
    assert counts[0] == counts[1]


def test_weight_decay_is_of_matrices(data):
    config, _ = parse(["energy", *SMALL.split()])
    network = build(config, 0, data)
    decayed, free = optimizer_for(config, network, 0.5).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0)
    assert [tuple(weight.shape) for weight in decayed["params"]] == [(4, 1, 3, 3), (5, 4, 3, 3), (6, 5, 3, 3), (2, 24)]
    assert len(decayed["params"]) + len(free["params"]) == len(list(network.parameters()))


def test_penalties_are_the_papers(data):
    config, _ = parse(["norm", *SMALL.split()])
    network = build(config, 0, data)
    matrices = network.matrices()
    assert [tuple(matrix.shape) for matrix in matrices] == [(4, 9), (5, 36), (6, 45), (2, 24)]
    sigma = torch.stack([torch.linalg.matrix_norm(matrix.double(), 2) for matrix in matrices])
    half = [hyperspherical_energy(matrix, half_space=True) for matrix in matrices[:-1]]
    full = [hyperspherical_energy(matrix) for matrix in matrices]
    expected = {
        "spectral-norm": sigma.square().sum() / 2,
        "spectral-target": (sigma**2 - 1).square().sum(),
        "mhe": torch.stack(full[:-1]).sum() + 10 * full[-1],
        "mhe-half": torch.stack(half).sum() + 10 * full[-1],
    }
    for arm, value in expected.items():
        parts = terms(arm, network.hidden, 0)
        for _ in range(500):  # of one iteration each
            found = penalty(network, parts)
        torch.testing.assert_close(found.double(), value.double(), rtol=1e-4, atol=0)
    # with a projection: the first layer and the output as they are, the energy of the others up by what few dimensions cost
    for arm in ("comhe-random", "comhe-angle", "comhe-adversarial"):
        first, inner, output = terms(arm, network.hidden, 0)
        assert (first.layers, inner.layers, output.layers) == (["conv1"], ["conv2", "conv3"], ["head"])
        torch.testing.assert_close(penalty(network, [first, output]), half[0] + 10 * full[-1])
        assert penalty(network, [inner]) > 0.9 * (half[1] + half[2])
    assert terms("none", network.hidden, 0) == terms("weight-decay", network.hidden, 0) == []


def test_coefficients_are_multiples_of_the_published_ones():
    norm, energy = parse(["norm"])[0], parse(["energy"])[0]
    assert coefficient(norm, "spectral-norm", 10.0) == pytest.approx(0.1)
    assert coefficient(norm, "weight-decay", 0.1) == pytest.approx(1e-5)
    assert coefficient(energy, "comhe-angle", 0.1) == pytest.approx(0.1)
    assert coefficient(norm, "none", 10.0) == 0


def test_splits(data):
    config, _ = parse(["norm", *SMALL.split()])
    first, second = (split(data.labels, data.classes, config, seed) for seed in (0, 1))
    assert torch.equal(first.val, second.val)
    assert not torch.equal(first.train, second.train)
    for chosen in (first, second):
        assert [len(part) for part in chosen] == [12, 8, 20]
        assert sorted(torch.cat(chosen).tolist()) == list(range(40))
        for part in chosen:
            assert data.labels[part].sum() * 2 == len(part)


def test_batches_follow_from_seed_and_epoch():
    config, _ = parse(["norm", *SMALL.split()])
    members, device = torch.arange(100, 114), torch.device("cpu")
    drawn = {(seed, epoch): batches(config, members, seed, epoch, device) for seed in (0, 1) for epoch in (0, 1)}
    assert all([len(batch) for batch in found] == [6, 6] for found in drawn.values())
    assert len({tuple(torch.cat(found).tolist()) for found in drawn.values()}) == 4
    assert all(torch.equal(a, b) for a, b in zip(drawn[0, 1], batches(config, members, 0, 1, device), strict=True))
    (only,) = batches(config, members[:4], 0, 0, device)
    assert sorted(only.tolist()) == members[:4].tolist()


@pytest.mark.parametrize("study", ARMS)
def test_measures(study, data):
    config, _ = parse([study, *SMALL.split()])
    chosen = split(data.labels, data.classes, config, 0)
    network = train(config, "none", 1.0, 0, data, chosen.train).network
    found = measure.everything(config, network, data, chosen, 0)
    assert measure.everything(config, network, data, chosen, 0) == found
    network.eval()
    norms, losses, right = [], [], []
    for index in chosen.test.tolist():
        image = as_float(data.images[index : index + 1]).requires_grad_()
        logits = network(image)
        loss = F.cross_entropy(logits, data.labels[index : index + 1])
        norms.append(torch.autograd.grad(loss, image)[0].norm().item())
        losses.append(loss.item())
        right.append(logits.argmax().item() == data.labels[index].item())
    assert found["gradient_norm"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert found["test_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["test_accuracy"] == pytest.approx(100 * np.mean(right))
    sigma = [torch.linalg.matrix_norm(matrix, 2).item() for matrix in network.matrices()]
    assert found["sigma"] == pytest.approx(sigma, rel=1e-4)
    assert found["mean_sigma"] == pytest.approx(np.mean(sigma), rel=1e-4)
    score = measure.validation(network, data, chosen)
    assert score == measure.validation(network, data, chosen)
    images = data.images[chosen.test]
    clean, noisy = measure.logits_of(network, images), measure.logits_of(network, images, 0.5, 1)
    assert torch.equal(noisy, measure.logits_of(network, images, 0.5, 1))
    assert not torch.equal(noisy, measure.logits_of(network, images, 0.5, 2))
    assert (noisy - clean).std() > 0


# --- the rule


@pytest.mark.parametrize(
    ("mean", "ci95", "direction", "expected"),
    [
        (2.0, 1.0, "higher", "shown"),
        (2.0, 1.0, "lower", "refuted"),
        (-2.0, 1.0, "lower", "shown"),
        (-2.0, 1.0, "higher", "refuted"),
        (1.0, 1.0, "higher", "not shown: the interval holds 0"),
        (-1.0, 1.0, "higher", "not shown: the interval holds 0"),
        (0.0, 0.0, "lower", "not shown: the interval holds 0"),
        (5.0, None, "higher", "not shown: one seed has no interval"),
        (math.nan, math.nan, "higher", "not shown: a run diverged"),
        (math.inf, math.nan, "higher", "not shown: a run diverged"),
    ],
)
def test_verdict(mean, ci95, direction, expected):
    assert verdict(mean, ci95, direction) == expected


def test_judge():
    runs = {"a": [{"x": value} for value in (3.0, 5.0, 4.5)], "b": [{"x": value} for value in (1.0, 2.0, 2.5)]}
    found = judge(Claim("a", "b", "x", "higher"), runs)
    assert found["differences"] == [2.0, 3.0, 2.0]
    low, high = stats.t.interval(0.95, 2, np.mean([2, 3, 2]), stats.sem([2, 3, 2]))
    assert (found["mean"] - found["ci95"], found["mean"] + found["ci95"]) == pytest.approx((low, high))
    assert found["verdict"] == "shown"
    assert judge(Claim("a", "b", "x", "lower"), runs)["verdict"] == "refuted"
    runs["b"][1]["x"] = None
    assert judge(Claim("a", "b", "x", "higher"), runs)["verdict"] == "not shown: a run diverged"


def test_tests_of_differences():
    values = [0.5, -0.1, 0.7, 0.4, 0.9]
    assert t_test(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert sign_test(values) == pytest.approx(2 * 6 / 32)
    assert sign_test([1.0] * 5) == pytest.approx(2 / 32)
    assert sign_test([1.0, 0.0, 1.0]) == 0.5
    assert sign_test([0.0, 0.0]) == 1.0
    assert (t_test([0.0, 0.0]), t_test([1.0, 1.0]), t_test([1.0])) == (1.0, 0.0, None)
    assert t_test([1.0, None]) is None
    assert sign_test([1.0, None]) is None
    assert sign_test([1.0, math.nan]) is None
    assert paired([{"x": 1.0}, {"x": None}], [{"x": 3.0}, {"x": 1.0}], "x") == [-2.0, None]


def test_claims_are_between_arms_that_exist():
    for study, claims in CLAIMS.items():
        assert len(set(claims)) == len(claims) == 8
        assert {arm for claim in claims for arm in (claim.arm, claim.against)} <= set(ARMS[study])


def test_of_equal_coefficients_the_smaller_is_chosen():
    grid = [{"multiple": multiple, "val_accuracy": score} for multiple, score in ((100.0, 9), (10.0, 9), (0.1, 5), (1.0, 9))]
    assert best(grid) == 1.0
