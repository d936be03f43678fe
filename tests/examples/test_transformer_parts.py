"""The parts of `examples.transformer_moe`: text, measures against values computed by hand, summaries."""

import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformer_worker import write_domains

from examples.transformer_moe import data, measure, model, sources, summary
from examples.transformer_moe.config import Config
from examples.transformer_moe.sources import Document
from spectral_router import find_gates

SMALL = Config(sequence=16, validation_windows=4, domain_bytes=4096, batch_size=4)


def _with(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, **changes)


# ------------------------------------------------------------------------------------------------------------------ text


def test_the_embedded_domains_are_disjoint_and_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sources.embedded()
    sources.embedded.cache_clear()
    # as setuptools does with what it brings along, once something imports it
    (tmp_path / "brought-1.dist-info").mkdir()
    (tmp_path / "brought-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.4\nName: brought\nVersion: 1\n")
    (tmp_path / "brought-1.dist-info" / "RECORD").write_text("brought-1.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert first == sources.embedded()
    assert list(first) == ["headers", "python", "reference", "packages"]
    names = [{document.name for document in part} for part in first.values()]
    assert len(set.union(*names)) == sum(map(len, names))
    for part in first.values():
        learned, held_out = data.split(part, 65536)
        assert sum(len(document.text.encode()) for document in learned) == pytest.approx(65536, rel=0.01)
        assert not {_plain(one) for one in learned} & {_plain(one) for one in held_out}


def _plain(document: Document) -> str:
    return "".join(document.text.lower().split())


def test_copies_of_a_document_count_once() -> None:
    unique = [Document(f"{i}", f"text number {i} " * 20) for i in range(60)]
    copies = [Document(f"copy {i}", f"Text  NUMBER {i}\n" * 20) for i in range(60)]
    learned, held_out = data.split(unique + copies, 10**6)
    assert len(learned) + len(held_out) == 60
    assert 1 <= len(held_out) <= 15
    # an installation that lacks one document
    fewer, _ = data.split(copies[1:], 10**6)
    assert {_plain(one) for one in fewer} <= {_plain(one) for one in learned}


def test_a_single_text_is_cut_by_length(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"{number:04} " for number in range(1000)))
    loaded = data.load(_with(SMALL, dataset=str(file), domain_bytes=8192), model.byte_tokenizer())
    assert loaded.domains == ["book"]
    assert int(bytes(loaded.train[0].flatten().tolist()[-21:-1]).split()[0]) < 900
    assert int(bytes(loaded.validation.flatten().tolist()[:10]).split()[0]) >= 900


def test_a_byte_is_a_token() -> None:
    tokenizer = model.byte_tokenizer()
    text = "ä€\x00\n\tA" + "".join(map(chr, range(256)))
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.eos_token_id == model.END == 256
    assert tokenizer.decode(list(text.encode())) == text


def test_windows_go_round_every_domain_alike() -> None:
    rows = [torch.arange(10)[:, None] + 100 * domain for domain in range(2)]
    text = data.Text(["a", "b"], rows, torch.zeros(2, 1, 1), [1.0, 1.0], [0.0, 0.0], 0.0, "")
    drawn = data.draw(text, _with(SMALL, sequence=1), seed=0, steps=100).rows.flatten()
    for domain in range(2):
        mine = drawn[drawn // 100 == domain]
        assert 150 < len(mine) < 250
        assert mine[:10].sort().values.tolist() == rows[domain].flatten().tolist()
    assert (data.draw(text, _with(SMALL, sequence=1), 0, 5, domain=1).rows >= 100).all()


def test_strings_that_are_in_both_parts() -> None:
    learned = torch.arange(200).view(4, 50)
    # two windows of 50 with 3 strings of 48 each: the first is there across two windows of training, of the second one string
    held_out = torch.stack([torch.arange(20, 70), torch.cat([torch.arange(100, 148), torch.tensor([9, 9])])])
    apart = torch.arange(1000, 1100).view(2, 50)
    text = data.Text(["a", "b"], [learned, learned], torch.stack([held_out, apart]), [1.0, 1.0], [0.0, 0.0], 0.0, "")
    assert data.copied(text) == pytest.approx([4 / 6, 0.0])
    short = text._replace(validation=torch.arange(4).view(1, 2, 2), train=[torch.tensor([[0, 1, 3, 2]])])
    assert (data.copied_length(short), data.copied(short)) == (2, [0.5])


def test_unigram_entropy() -> None:
    assert data.unigram_entropy(torch.tensor([3, 3, 5, 7])) == pytest.approx(1.5 * math.log(2))


def test_a_hub_data_set(monkeypatch) -> None:
    rows = [{"text": f"row {number} " * 9, "kind": "ab"[number % 2]} for number in range(100)]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, **options: iter(rows)))
    found = sources.documents(_with(SMALL, dataset="some/set", domain_column="kind", domain_bytes=1024))
    assert {name: len(list(part)) for name, part in found.items()} == {"a": 50, "b": 50}


# -------------------------------------------------------------------------------------------------------------- measures


def test_load_by_hand() -> None:
    experts = torch.tensor([[[0, 1], [2, 3]], [[0, 2], [2, 1]], [[0, 1], [2, 3]]])  # (tokens, layers, k)
    expected = torch.tensor([[3, 2, 1, 0], [0, 1, 3, 2]]).double() / 6
    assert torch.equal(measure.load(experts, 4), expected)


def test_fluctuation_by_hand() -> None:
    before = torch.tensor([[[0, 1]], [[1, 2]], [[3, 0]], [[2, 1]]])
    after = torch.tensor([[[0, 3]], [[2, 1]], [[3, 1]], [[1, 2]]])  # the heaviest of the second and fourth is another one
    assert measure.fluctuation(before, after).tolist() == [0.5]


def test_specialisation_by_hand() -> None:
    # (domains, windows, tokens, layers, k): layer 1 tells the domain, layer 2 nothing, layer 3 in half of the tokens
    told = torch.tensor([[[0, 0], [0, 0]], [[1, 1], [1, 1]]])
    nothing = torch.tensor([[[0, 1], [0, 1]], [[0, 1], [0, 1]]])
    half = torch.tensor([[[0, 2], [0, 2]], [[1, 2], [1, 2]]])
    experts = torch.stack([told, nothing, half], -1)[..., None]
    found, chance = measure.specialisation(experts, 3)
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.5])
    assert 0 < chance[0] < 1
    assert chance[1] == 0
    shares = measure.domain_shares(experts, 3)
    assert shares[2].tolist() == [[0.5, 0.0, 0.5], [0.0, 0.5, 0.5]]


def test_what_tokens_alone_tell_by_hand() -> None:
    apart = torch.tensor([[[0, 0]], [[1, 1]]])  # (domains, windows, tokens): a token tells its domain
    by_chance, at_best = measure.told_by_tokens(apart, 2)
    # a map of the two tokens to one expert tells nothing, one to two tells all
    assert by_chance * measure.MAPS == pytest.approx(round(by_chance * measure.MAPS))
    assert 0 < by_chance < at_best == pytest.approx(1.0)
    assert measure.told_by_tokens(apart, 2) == (by_chance, at_best)
    assert measure.told_by_tokens(torch.zeros(2, 3, 4, dtype=torch.long), 4) == (0.0, 0.0)


@given(st.integers(2, 8), st.integers(2, 12), st.integers(0, 100))
def test_cosine_against_a_loop(experts: int, dim: int, seed: int) -> None:
    weight = torch.randn(experts, dim, generator=torch.Generator().manual_seed(seed)).double()
    pairs = [
        abs(float(weight[i] @ weight[j] / (weight[i].norm() * weight[j].norm())))
        for i in range(experts)
        for j in range(experts)
        if i != j
    ]
    assert float(measure.mean_absolute_cosine(weight)) == pytest.approx(sum(pairs) / len(pairs))


def test_the_loss_and_the_choices_are_the_models_own(tmp_path: Path) -> None:
    write_domains(tmp_path / "data")
    config = _with(SMALL, dataset=str(tmp_path / "data"), layers=2, dim=32, hidden=16, experts=4)
    tokenizer = model.tokenizer(config)
    text, network = data.load(config, tokenizer), model.build(config, 0)
    found = measure.evaluate(network, find_gates(network), text, config)
    for domain, windows in enumerate(text.validation):
        output = network.eval()(input_ids=windows, labels=windows, output_router_logits=True, return_dict=True)
        task = (output.loss - network.router_aux_loss_coef * output.aux_loss).detach()
        assert float(found["loss"][domain]) == pytest.approx(float(task) * text.tokens_per_byte[domain], rel=1e-5)
        chosen = torch.stack([logits.topk(2).indices for logits in output.router_logits], 1)
        assert torch.equal(found["experts"][domain].flatten(0, 1).long(), chosen)
    assert 1 < text.tokens_per_byte[0] < 1.01
    assert network.training is False


def test_the_heaviest_expert_is_first() -> None:
    class Gate(nn.Module):
        def forward(self, _: Any) -> tuple[Any, ...]:
            return torch.zeros(2, 4), torch.tensor([[0.2, 0.8], [0.9, 0.1]]), torch.tensor([[3, 1], [2, 0]])

    gate = Gate()
    with measure._choices([SimpleNamespace(name="g", module=gate)]) as seen:  # type: ignore[list-item]
        gate(None)
    assert seen[0][0].tolist() == [[1, 3], [2, 0]]


# --------------------------------------------------------------------------------------------------------------- summary


def test_what_is_lost_at_equal_gain() -> None:
    fast = {"history": [{"domains": {"a": 3.0 - gain, "b": 2.0 + loss}} for gain, loss in ((0, 0), (0.4, 0.1), (0.8, 0.5))]}
    slow = {"history": [{"domains": {"a": 3.0 - gain, "b": 2.0 + loss}} for gain, loss in ((0, 0), (0.1, 0.1), (0.6, 0.2))]}
    rows: list[dict[str, float | None]] = [{}, {}]
    summary.at_equal_gain([fast, slow], rows, "a")
    assert [row["common_gain"] for row in rows] == pytest.approx([0.6, 0.6])
    assert [row["forgetting_at_common_gain"] for row in rows] == pytest.approx([0.3, 0.2])
    backwards = {"history": [{"domains": {"a": 3.0, "b": 2.0}}, {"domains": {"a": 3.5, "b": 2.0}}]}
    summary.at_equal_gain([fast, backwards], rows, "a")
    assert rows[0]["forgetting_at_common_gain"] is None


def test_an_arm_that_diverged_has_no_part_in_the_equal_gain() -> None:
    sound = {"history": [{"domains": {"a": 3.0 - gain, "b": 2.0 + loss}} for gain, loss in ((0, 0), (0.4, 0.1))]}
    gone = {"history": [{"domains": {"a": 3.0, "b": 2.0}}, {"domains": {"a": 2.9, "b": None}}]}
    assert summary.adaptation(gone, "a") == ([0.0, pytest.approx(0.1)], [0.0, None])
    rows: list[dict[str, float | None]] = [{}, {}]
    summary.at_equal_gain([sound, gone], rows, "a")
    assert [row["common_gain"] for row in rows] == [pytest.approx(0.4), None]
    assert [row["forgetting_at_common_gain"] for row in rows] == [pytest.approx(0.1), None]
    summary.at_equal_gain([gone], rows[1:], "a")
    assert rows[1] == {"common_gain": None, "forgetting_at_common_gain": None}


def test_differences_are_paired_by_seed() -> None:
    found = summary.difference([{"x": 1.0}, {"x": 3.0}], [{"x": 0.5}, {"x": 2.5}], "x")
    assert (found["mean"], found["ci95"]) == (0.5, 0.0)
    assert math.isnan(summary.difference([{"x": None}], [{"x": 1.0}], "x")["mean"])


def test_late_fluctuation_is_that_of_the_second_half() -> None:
    history: list[dict[str, Any]] = [{"fluctuation": None}, *({"fluctuation": [value, 0.0]} for value in (0.9, 0.7, 0.3, 0.1))]
    assert summary.late_fluctuation(history) == pytest.approx([0.2, 0.0])
