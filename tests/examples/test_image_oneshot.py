"""The one-shot test of the example: exactly the intended weights change, and the figures are those of a hand computation."""

import copy
from dataclasses import replace

import pytest
import torch
from oneshot_network import trained
from torch import Tensor, nn

from examples.image_classification import oneshot, train
from examples.image_classification.config import ROUTERS, Config
from examples.image_classification.data import ImageSet, Split, as_float

CONFIG = Config(
    layers=2, experts=3, dim=8, hidden=6, novel=2, anchor=5, batch_size=8, epochs=2, oneshot_lr=0.01, alpha=0.3, beta=0.7
)
LAYERS = range(CONFIG.layers)
EXPERT_PARAMETERS = ("w_in", "b_in", "w_out", "b_out")


@pytest.fixture
def data() -> ImageSet:
    labels = torch.arange(48) % 3
    pixels = torch.randint(0, 256, (48, 1, 16, 16)) // 2 + 60 * labels[:, None, None, None]
    return ImageSet(pixels.to(torch.uint8), labels, ["a", "b", "c"], [], "none")


@pytest.fixture
def split() -> Split:
    order = torch.arange(48)
    return Split(order[:24], order[24:30], order[30:42], order[42:].view(2, 3).T)


def batch(data: ImageSet) -> tuple[Tensor, Tensor]:
    chosen = torch.tensor([42, 0, 4, 8, 11])
    return data.images[chosen], data.labels[chosen]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def winners(model: nn.Module, images: Tensor) -> list[int]:
    """The experts of the first image, asked of the network itself."""
    with torch.no_grad():
        return [int(layer.probs[0].argmax()) for layer in model(as_float(images))[1]]


def changed(before: dict[str, Tensor], after: nn.Module) -> set[str]:
    """Names of what changed; expert parameters once for each expert, as "layers.0.experts.w_in[2]"."""
    names = set()
    for name, value in after.state_dict().items():
        if ".experts." in name:
            names |= {f"{name}[{k}]" for k in range(len(value)) if not torch.equal(value[k], before[name][k])}
        elif not torch.equal(value, before[name]):
            names.add(name)
    return names


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("scope", ["all", "experts", "path"])
@pytest.mark.parametrize("router", ["baseline", "spectral"])
def test_an_update_changes_what_its_scope_says_and_nothing_else(data, split, router, scope, optimizer, steps):
    config = replace(CONFIG, scope=scope, oneshot_optimizer=optimizer, oneshot_steps=steps)
    done = trained(config, router, data, split)
    images, labels = batch(data)
    before, path = snapshot(done.model), winners(done.model, images)
    model = copy.deepcopy(done.model)
    oneshot._update(config, model, copy.deepcopy(done.objective), images, labels)

    every = {f"layers.{i}.experts.{name}[{k}]" for i in LAYERS for name in EXPERT_PARAMETERS for k in range(config.experts)}
    others = {name for name, _ in model.named_parameters() if ".experts." not in name}
    expected = {
        "all": every | others,
        "experts": every,
        "path": {f"layers.{i}.experts.{name}[{path[i]}]" for i in LAYERS for name in EXPERT_PARAMETERS},
    }[scope]
    # batch norm's statistics are no parameters: no scope holds them
    assert changed(before, model) == expected
    assert not changed(before, done.model)


@pytest.mark.parametrize("router", ROUTERS)
def test_an_update_descends_equation_7_and_tells_what_it_did(data, split, router):
    config = replace(CONFIG, oneshot_optimizer="sgd", oneshot_lr=0.05)
    done = trained(config, router, data, split)
    images, labels = batch(data)
    model = copy.deepcopy(done.model)
    record = oneshot._update(config, model, copy.deepcopy(done.objective), images, labels)
    after = dict(model.named_parameters())
    fresh = copy.deepcopy(done.model)
    fresh.zero_grad()
    logits, routed = fresh(as_float(images))
    done.objective(fresh, logits, routed, labels).total.backward()
    for name, value in fresh.named_parameters():
        torch.testing.assert_close(after[name], value - 0.05 * value.grad)

    for layer in LAYERS:
        experts = fresh.moe_layers[layer].experts
        for k in range(config.experts):
            everything = torch.cat([getattr(experts, name).grad[k].flatten() for name in EXPERT_PARAMETERS])
            assert record["gradient"][layer][k] == pytest.approx(float(everything.norm()), rel=1e-5)
    for when, network in (("before", done.model), ("after", model)):
        with torch.no_grad():
            scores = network(as_float(images[:1]))[0][0]
        assert record[f"loss_{when}"] == pytest.approx(float(-scores.log_softmax(0)[labels[0]]), abs=1e-5)
        assert record[f"right_{when}"] is bool(scores.argmax() == labels[0])


def test_the_gradient_told_is_the_one_before_the_first_step(data, split):
    done = trained(CONFIG, "spectral", data, split)
    gradients = [
        oneshot._update(config, copy.deepcopy(done.model), copy.deepcopy(done.objective), *batch(data))["gradient"]
        for config in (CONFIG, replace(CONFIG, oneshot_steps=3), replace(CONFIG, scope="path"))
    ]
    # of every expert, also of those that "path" then leaves alone
    torch.testing.assert_close(torch.tensor(gradients[1:]), torch.tensor(gradients[:1]).expand(2, -1, -1))
    assert (torch.tensor(gradients) > 0).all()


def run(config: Config, done: train.Trained, data: ImageSet, split: Split, before: list | None = None, seed: int = 0) -> list:
    saved = []
    oneshot.adapt(config, seed, done, data, split, before or [], saved.append)
    return saved


def test_every_novel_image_starts_from_the_trained_model(data, split, monkeypatch):
    done = trained(CONFIG, "spectral", data, split)
    before = snapshot(done.model)
    starts, ends = [], []
    update = oneshot._update

    def watched(config, model, *rest):
        starts.append(snapshot(model))
        record = update(config, model, *rest)
        ends.append(model)
        return record

    monkeypatch.setattr(oneshot, "_update", watched)
    records = run(CONFIG, done, data, split)
    assert [(record["class"], record["image"]) for record in records] == [(name, n) for name in "abc" for n in (0, 1)]
    assert all(torch.equal(value, start[name]) for start in starts for name, value in before.items())
    assert not changed(before, done.model)

    # delta: points of accuracy on the whole test set, after minus before
    def right(model: nn.Module) -> int:
        with torch.no_grad():
            return int((model(as_float(data.images[split.test]))[0].argmax(-1) == data.labels[split.test]).sum())

    expected = [100 * (right(model) - right(done.model)) / len(split.test) for model in ends]
    assert [record["delta"] for record in records] == pytest.approx(expected)
    assert any(expected)


def seen_batches(config: Config, router: str, data: ImageSet, split: Split, monkeypatch, seed: int = 0) -> list[list[int]]:
    """Which images each update was given."""
    places = {image.numpy().tobytes(): index for index, image in enumerate(data.images)}
    batches = []
    update = oneshot._update

    def watched(config, model, objective, images, labels):
        batches.append([places[image.contiguous().numpy().tobytes()] for image in images])
        assert torch.equal(labels, data.labels[batches[-1]])
        return update(config, model, objective, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(oneshot, "_update", watched)
        run(config, trained(config, router, data, split), data, split, seed=seed)
    return batches


def test_anchors_are_training_images_and_the_same_for_every_router(data, split, monkeypatch):
    batches = seen_batches(CONFIG, "baseline", data, split, monkeypatch)
    assert [indices[0] for indices in batches] == split.novel.flatten().tolist()
    for _, *anchors in batches:
        assert len(set(anchors)) == CONFIG.anchor
        assert set(anchors) <= set(split.train.tolist())
    assert len({tuple(sorted(anchors)) for _, *anchors in batches}) == len(batches)
    # otherwise routers would be compared on different questions
    assert seen_batches(CONFIG, "spectral", data, split, monkeypatch) == batches
    assert seen_batches(CONFIG, "baseline", data, split, monkeypatch, seed=1) != batches


@pytest.mark.parametrize(("anchor", "size"), [(0, 1), (1000, 25)])
def test_no_anchors_and_more_than_there_are(data, split, monkeypatch, anchor, size):
    batches = seen_batches(replace(CONFIG, anchor=anchor), "spectral", data, split, monkeypatch)
    assert {len(indices) for indices in batches} == {size}


def test_finished_images_are_not_run_again(data, split):
    done = trained(CONFIG, "clustering", data, split)
    records = run(CONFIG, done, data, split)
    assert run(CONFIG, done, data, split, before=records[:2] + records[4:]) == records[2:4]
    assert run(CONFIG, done, data, split, before=records) == []


def test_summary_counted_by_hand():
    def record(name: str, delta: float, losses: tuple, right: tuple, gradient: list) -> oneshot.Record:
        keys = ("loss_before", "loss_after", "right_before", "right_after")
        return {"class": name, "image": 0, "delta": delta, "gradient": gradient, **dict(zip(keys, losses + right, strict=True))}

    records = [
        record("a", -2.0, (1.0, 0.5), (False, True), [[1.0, 2.0]]),
        record("b", 4.0, (3.0, 1.5), (True, True), [[3.0, 6.0]]),
        record("a", -4.0, (2.0, 1.0), (False, False), [[5.0, 1.0]]),
    ]
    assert oneshot.summarize(records, ["b", "a"]) == {
        "delta": {"b": 4.0, "a": -3.0},
        "mean_delta": 0.5,  # each class counts once, however many images it has
        "novel_loss_before": 2.0,
        "novel_loss_after": 1.0,
        "novel_accuracy_before": pytest.approx(100 / 3),
        "novel_accuracy_after": pytest.approx(200 / 3),
        "gradient_norm": [[3.0, 3.0]],
    }
