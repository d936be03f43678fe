"""`MoEHandle.report`: what a batch tells of each gate, the model left as it was."""

import pytest
import torch
from moe_models import BATCH, DIM, EXPERTS, Block, Stack, mixtral, mixtral_gates

from spectral_router import PrototypeRouter, wrap_moe
from spectral_router.functional import choice_radius


def test_report_of_mixtral_is_that_of_its_own_choice() -> None:
    model = mixtral()
    handle = wrap_moe(model)
    seen = {}

    def note(number):
        def hook(_module, args, output) -> None:
            seen[number] = args[0], output

        return hook

    hooks = [gate.register_forward_hook(note(number)) for number, gate in enumerate(mixtral_gates(model))]
    model.eval()
    with torch.no_grad():
        model(**BATCH)
    model.train()
    for hook in hooks:
        hook.remove()
    before = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
    report = handle.report(BATCH)
    assert {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()} == before
    assert list(report) == [gate.name for gate in handle.gates]
    for number, told in enumerate(report.values()):
        tokens, (_, _, indices) = seen[number]
        tokens = tokens.reshape(-1, DIM)
        logits = tokens @ mixtral_gates(model)[number].weight.mT
        load = torch.bincount(indices.flatten(), minlength=8) / indices.numel()
        assert told["tokens"] == 40
        assert told["top_k"] == 2
        assert told["load"] == pytest.approx(load.tolist())
        assert told["probability"] == pytest.approx(logits.softmax(-1).mean(0).tolist(), abs=1e-5)
        both = torch.zeros(8, 8)
        for pair in indices:
            for i in pair:
                for j in pair:
                    both[i, j] += 1 / len(indices)
        assert torch.allclose(torch.tensor(told["coactivation"]), both, atol=1e-5)
        best = logits.topk(3).values
        assert told["margin"]["50%"] == pytest.approx((best[:, 1] - best[:, 2]).quantile(0.5).item(), rel=1e-4)
        radius = choice_radius(tokens, mixtral_gates(model)[number].weight, 2)
        assert told["radius"]["5%"] == pytest.approx(radius.quantile(0.05).item(), rel=1e-4)
        assert told["relative_radius"]["95%"] == pytest.approx((radius / tokens.norm(dim=-1)).quantile(0.95).item(), rel=1e-4)
        assert set(told["flips"]) == {"bf16", "fp8", "int8"}


def test_the_term_is_not_touched() -> None:
    model = mixtral()
    handle = wrap_moe(model, add_to_loss=False)
    model(**BATCH)
    handle.report(BATCH)
    assert handle.loss().item() > 0  # of the forward before


def test_a_linear_gate_by_hand_asks_for_top_k_and_takes_a_tensor() -> None:
    model = Stack(Block())
    handle = wrap_moe(model)
    x = torch.randn(6, DIM)
    with pytest.raises(ValueError, match=r"nothing says to how many experts gate 'layers.0.gate' sends a token; give top_k="):
        handle.report(x)
    (told,) = handle.report(x, top_k=EXPERTS).values()
    assert told["margin"] is None
    assert told["radius"]["50%"] == float("inf")
    (told,) = handle.report((x,), top_k=1).values()
    assert sum(told["load"]) == pytest.approx(1)


def test_prototypes_have_the_radius_of_their_metric() -> None:
    class Soft(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = PrototypeRouter(DIM, EXPERTS, top_k=1)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(DIM, DIM) for _ in range(EXPERTS))

        def forward(self, x):
            return x + self.router(x).probs.sum(-1, keepdim=True) * self.experts[0](x)

    model = Soft()
    x = torch.randn(30, DIM)
    (told,) = wrap_moe(model).report(x).values()
    radius = choice_radius(x, model.router.prototypes, 1, metric="euclidean")
    assert told["radius"]["50%"] == pytest.approx(radius.quantile(0.5).item(), rel=1e-4)


def test_a_batch_that_no_gate_sees_is_told() -> None:
    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Block()

        def forward(self, x):
            return x

    with pytest.raises(RuntimeError, match=r"no gate of Around ran on this batch as far as hooks tell"):
        wrap_moe(Around()).report(torch.randn(2, DIM), top_k=1)


def test_hooks_are_gone_after_an_error() -> None:
    model = mixtral()
    handle = wrap_moe(model)
    counts = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match="input_ids"):
        handle.report({"nonsense": 1})
    assert [len(module._forward_pre_hooks) for module in model.modules()] == counts
    assert model.training
