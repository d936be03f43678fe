"""Which experts are chosen for a path: counted by hand; and paths as files."""

import json

import pytest
import torch
from moe_models import BATCH, IDS, MASK, Stack, mixtral, mixtral_gates, tokens

from spectral_router import ExpertPath, find_gates, surgical
from spectral_router.surgery.usage import usage_of
from studies.gates import CASES


def by_hand(model, ids, mask=None):
    """For each gate: count of choices and sum of combine weights, (2, experts), of the tokens that count."""
    seen = []
    hooks = [gate.register_forward_hook(lambda _m, _a, out: seen.append(out)) for gate in mixtral_gates(model)]
    model.eval()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    model.train()
    for hook in hooks:
        hook.remove()
    keep = torch.ones(ids.numel(), dtype=torch.bool) if mask is None else mask.flatten() != 0
    found = []
    for _, weights, indices in seen:
        count, weight = torch.zeros(8, dtype=torch.double), torch.zeros(8, dtype=torch.double)
        for some, which in zip(weights[keep].double(), indices[keep], strict=True):
            for value, expert in zip(some, which, strict=True):
                count[expert] += 1
                weight[expert] += value
        found.append(torch.stack([count / count.sum(), weight / weight.sum()]))
    return found


def in_order(model):
    return sorted(find_gates(model), key=lambda gate: gate.name)


def test_counts_are_those_of_the_tokens_that_are_no_padding() -> None:
    model = mixtral()
    for mask in (None, MASK):
        batch = {"input_ids": IDS, "attention_mask": mask}
        for usage, expected in zip(usage_of(model, in_order(model), batch), by_hand(model, IDS, mask), strict=True):
            assert usage.tokens == (40 if mask is None else int(MASK.sum()))
            torch.testing.assert_close(torch.stack([usage.share, usage.weight]), expected)


def test_several_batches_count_as_one() -> None:
    model = mixtral()
    rows = [{"input_ids": row[None]} for row in IDS]
    for one, several in zip(
        usage_of(model, in_order(model), {"input_ids": IDS}), usage_of(model, in_order(model), rows), strict=True
    ):
        assert one.tokens == several.tokens
        torch.testing.assert_close(one.share, several.share)
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in IDS], batch_size=2)
    torch.testing.assert_close(
        usage_of(model, in_order(model), loader)[0].share, one.share * 0 + usage_of(model, in_order(model), rows)[0].share
    )


@pytest.mark.parametrize("by", ["tokens", "weights"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 1.0])
def test_the_least_number_of_experts_that_makes_up_the_share(by: str, share: float) -> None:
    model = mixtral()
    path = surgical(model, BATCH, share=share, by=by).path
    for layer, scores in zip(sorted(path.layers, key=lambda x: x.gate), by_hand(model, IDS, MASK), strict=True):
        score = scores[0 if by == "tokens" else 1]
        assert float(score[list(layer.experts)].sum()) >= share - 1e-9
        assert float(score[list(layer.experts[:-1])].sum()) < share
        assert (
            float(score[list(layer.experts)].min())
            >= float(score[[e for e in range(8) if e not in layer.experts] or [0]].max())
            or share == 1
        )
        assert layer.share == pytest.approx(float(scores[0][list(layer.experts)].sum()))
        assert layer.weight == pytest.approx(float(scores[1][list(layer.experts)].sum()))


def test_the_winning_path_of_one_sample() -> None:
    """The paper's: the expert with the largest weight in each layer, of soft routing."""
    model = Stack()
    x = tokens(1, 1).detach()
    path = surgical(model, x, top=1, by="weights").path
    for layer in model.layers:
        winner = layer.gate(x).softmax(-1).argmax()
        (mine,) = [entry for entry in path.layers if model.get_submodule(entry.gate) is layer.gate]
        assert mine.experts == (int(winner),)
        x = layer(x)


def test_lift_ranks_by_more_than_usual() -> None:
    model = mixtral()
    special, usual = {"input_ids": IDS[:1]}, {"input_ids": IDS}
    path = surgical(model, special, top=2, reference=usual).path
    for layer, mine, all_ in zip(
        sorted(path.layers, key=lambda x: x.gate), by_hand(model, IDS[:1]), by_hand(model, IDS), strict=True
    ):
        lift = (mine[0] / all_[0].clamp_min(1e-12)).tolist()
        assert sorted(layer.experts) == sorted(sorted(range(8), key=lambda e: -lift[e])[:2]) or len(set(lift)) < 8
        assert min(lift[e] for e in layer.experts) >= max(lift[e] for e in range(8) if e not in layer.experts)
    assert path.rule["lift"] is True


def test_selection_leaves_the_model_and_the_random_state_alone() -> None:
    model = mixtral()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    surgical(model, BATCH, top=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_gate_that_no_token_reaches_has_no_expert_on_the_path() -> None:
    (case,) = [case for case in CASES if case.name == "ernie4_5_vl_moe"]
    model, inputs = case.build()
    text = {name: value for name, value in inputs.items() if "mm_token" not in name}
    path = surgical(model, text, top=1).path
    assert [layer.experts for layer in path.layers if "vision_moe" in layer.gate] == [()] * 3
    assert all(len(layer.experts) == 1 for layer in path.layers if "text_moe" in layer.gate)
    assert "none of 8" in repr(path)
    with pytest.raises(ValueError, match=r"no token of the reference sample came by the gate '.*vision_moe.gate'"):
        surgical(model, inputs, top=1, reference=text)


def test_a_path_is_saved_and_loaded(tmp_path) -> None:
    model = mixtral()
    with surgical(model, BATCH, share=0.5) as path:
        pass
    path.save(tmp_path / "path.json")
    loaded = ExpertPath.load(tmp_path / "path.json")
    assert loaded.layers == path.layers
    assert loaded.rule == {"top": None, "share": 0.5, "by": "tokens", "lift": False}
    with surgical(model, path=tmp_path / "path.json") as again:
        assert again.layers == path.layers
    for text in ("{}", "no json", json.dumps({"layers": [{"gate": "x"}]})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"is no path as ExpertPath\.save writes it"):
            ExpertPath.load(tmp_path / "bad.json")


def test_the_table() -> None:
    model = mixtral()
    with surgical(model, BATCH, top=1) as path:
        text = repr(path)
    expert = 3 * 16 * 24
    assert "gate" in text.splitlines()[0]
    assert f"{expert:,}" in text
    total = sum(p.numel() for p in model.parameters())
    assert text.splitlines()[-1] == f"{2 * expert:,} of {total:,} parameters may change ({2 * expert / total:.2%})"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"give either top \(so many experts a layer\) or share \(of the tokens\), got top=None, share=None"),
        ({"top": 1, "share": 0.5}, "got top=1, share=0.5"),
        ({"top": 0}, "top must be a whole number of at least 1, the experts of each layer, got top=0"),
        ({"share": 1.5}, r"share must be in \(0, 1\], the part of the tokens that the experts are to cover, got share=1.5"),
        ({"top": 1, "by": "luck"}, 'by must be "tokens" or "weights", got by=\'luck\''),
    ],
)
def test_messages(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        surgical(mixtral(), BATCH, **options)
