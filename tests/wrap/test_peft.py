"""PEFT on the gates of a wrapped model: what is penalised is what routes, and what learns is the adapter."""

import copy

import pytest
import torch
from moe_models import BATCH, MASK, Stack, assert_same_gradients, gradients, mixtral, primed, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from spectral_router import MoEHandle, wrap_moe
from spectral_router.functional import load_balance_loss, spectral_norm, stable_rank

ALPHA, BETA = 0.5, 0.3
COEFS = {"penalty_coef": ALPHA, "balance_coef": BETA}
MODES = {"none": None, "non-reentrant": False, "reentrant": True}
CHECKPOINTING = pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
ON_GATE = {"target_modules": ["gate"]}
TARGETS = {
    "gate": ON_GATE,
    "all-linear": {"target_modules": "all-linear"},
    "parameter": {"target_modules": [], "target_parameters": ["gate.weight"]},
}
SAVED_GATE = {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}
ELSEWHERE = {"target_modules": ["q_proj"]}

pytestmark = [
    # PEFT's own, under transformers 5.23; and of a pattern that fits other families of models
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


def lora(model: nn.Module, **options) -> PeftModel:
    """With B other than zero, as in the middle of training; equal calls give equal adapters."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **options)).train()


def language(reentrant: bool | None = None, **options) -> PeftModel:
    model = lora(mixtral(use_cache=False), task_type="CAUSAL_LM", **options)
    return checkpointed(model, reentrant)


def checkpointed(model: PeftModel, reentrant: bool | None) -> PeftModel:
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def layers(model: PeftModel) -> list[nn.Module]:
    return list(model.get_base_model().model.layers)


def effective(gate: nn.Module) -> Tensor:
    """W + BA, with a graph."""
    return gate.base_layer.weight + 1.5 * gate.lora_B["default"].weight @ gate.lora_A["default"].weight


def copies(gate: nn.Module) -> Tensor:
    return gate.modules_to_save["default"].weight


def by_hand(model: PeftModel, weight_of) -> dict[str, Tensor]:
    """Gradients of a step with the objective spelled out."""
    weights = [weight_of(layer.mlp.gate) for layer in layers(model)]
    output = model(**BATCH, output_router_logits=True)
    balance = sum(load_balance_loss(logits.softmax(-1), MASK.flatten()) for logits in output.router_logits)
    (output.loss + ALPHA * primed(weights)(weights) + BETA * balance).backward()
    return gradients(model)


def step(model: PeftModel) -> MoEHandle:
    """The handle of the model after a step of it."""
    handle = wrap_moe(model, penalty=primed([torch.empty(8, 16)] * 2), **COEFS)
    model(**BATCH).loss.backward()
    return handle


# ----------------------------------------------------------------------------------------------------------- on the gate


@CHECKPOINTING
@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS)
def test_the_adapter_of_a_router_learns_from_the_effective_weight(reentrant: bool | None, options: dict) -> None:
    expected = by_hand(language(**options), effective)
    model = language(reentrant, **options)
    step(model)
    assert_same_gradients(gradients(model), expected)
    learning = [name for name in gradients(model) if ".mlp.gate." in name]
    assert learning == [f"base_model.model.model.layers.{i}.mlp.gate.lora_{m}.default.weight" for i in (0, 1) for m in "AB"]


@CHECKPOINTING
def test_the_adapter_of_a_linear_gate_learns_from_the_effective_weight(reentrant: bool | None) -> None:
    plain, x = lora(Stack(), **ON_GATE), tokens()
    model = lora(Stack(reentrant=reentrant), **ON_GATE)
    model.load_state_dict(plain.state_dict())
    probs = []
    for layer in plain.get_base_model().layers:
        layer.gate.register_forward_hook(lambda _module, _args, logits: probs.append(logits.softmax(-1)))
    task = plain(x).square().mean()
    weights = [effective(layer.gate) for layer in plain.get_base_model().layers]
    (task + ALPHA * primed(weights)(weights) + BETA * sum(load_balance_loss(p) for p in probs)).backward()

    handle = wrap_moe(model, penalty=primed(weights), **COEFS)
    assert [gate.name for gate in handle.gates] == [f"base_model.model.layers.{i}.gate" for i in (0, 1)]
    (model(x).square().mean() + handle.loss()).backward()
    assert_same_gradients(gradients(model), gradients(plain))


def test_two_adapters_add_up_and_the_active_one_counts() -> None:
    model = lora(Stack(), **ON_GATE)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=3, init_lora_weights=False, **ON_GATE))
    handle = wrap_moe(model)
    gate = model.get_base_model().layers[0].gate
    deltas = {name: gate.get_delta_weight(name) for name in ("default", "other")}
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        expected = gate.base_layer.weight + sum(deltas[name] for name in active)
        torch.testing.assert_close(handle.gates[0].weight, expected)


def test_micro_batches_of_the_trainer_count_by_their_targets() -> None:
    """PEFT's wrapper must not hide that the model shifts its labels."""
    model = language(**ON_GATE)
    targets = (BATCH["labels"][:, 1:] != -100).sum()
    task = model(**BATCH).loss.item()
    wrap_moe(model, **COEFS)
    term = model(**BATCH).loss.item() - task
    assert term > 0.1
    assert model(**BATCH, num_items_in_batch=4 * targets).loss.item() == pytest.approx((task + term) / 4, rel=1e-4)


# ------------------------------------------------------------------------------------------------------- copies, frozen


@CHECKPOINTING
@pytest.mark.parametrize("order", ["wrapped after", "wrapped before"])
def test_modules_to_save_the_copy_is_penalised(reentrant: bool | None, order: str) -> None:
    expected = by_hand(language(**SAVED_GATE), copies)
    if order == "wrapped after":
        model = language(reentrant, **SAVED_GATE)
        step(model)
    else:
        base = mixtral(use_cache=False)
        wrap_moe(base, penalty=primed([torch.empty(8, 16)] * 2), **COEFS)
        model = checkpointed(lora(base, task_type="CAUSAL_LM", **SAVED_GATE), reentrant)
        model(**BATCH).loss.backward()
    assert_same_gradients(gradients(model), expected)
    assert all(layer.mlp.gate.original_module.weight.grad is None for layer in layers(model))


def test_frozen_gates_are_left_alone_and_named_once() -> None:
    expected = language(**ELSEWHERE)(**BATCH).loss
    model = language(**ELSEWHERE)
    handle = wrap_moe(model, **COEFS)
    with pytest.warns(UserWarning, match=r"frozen gates are left alone.*layers\.0\.mlp\.gate, .*layers\.1\.mlp\.gate"):
        loss = model(**BATCH).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert torch.equal(model(**BATCH).loss, expected)  # and no second warning, which would be an error here
    rows = handle.metrics()
    assert [row["penalty"] for row in rows.values()] == [0, 0]
    assert rows["base_model.model.model.layers.0.mlp.gate"]["stable_rank"] > 1


def test_an_adapter_that_does_not_train_is_frozen() -> None:
    model = language(**ON_GATE)
    model.base_model.set_requires_grad("default", False)
    model.enable_input_require_grads()
    expected = copy.deepcopy(model)(**BATCH).loss
    wrap_moe(model, **COEFS)
    with pytest.warns(UserWarning, match="frozen gates are left alone"):
        assert torch.equal(model(**BATCH).loss, expected)


@pytest.mark.parametrize("model", [Stack, mixtral])
def test_adapters_put_on_after_wrapping_are_told(model) -> None:
    handle = wrap_moe(base := model(), **COEFS)
    late = lora(base, **ON_GATE)
    batch = BATCH if model is mixtral else {"x": tokens()}
    with pytest.warns(UserWarning, match="frozen gates are left alone.*where PEFT adapts them, wrap the PEFT model"):
        late(**batch)
    if model is mixtral:  # its output has a loss, which is left as it is
        with pytest.raises(RuntimeError, match="has nothing in it: no gate ran that learns"):
            handle.loss()
    else:
        assert handle.loss() == 0


# ----------------------------------------------------------------------------------------- adapters off, merged, unloaded


@pytest.mark.parametrize("kind", ["router", "linear"])
def test_the_weight_is_the_one_that_routes_now(kind: str) -> None:
    model = language(**ON_GATE) if kind == "router" else lora(Stack(), **ON_GATE)
    layer = layers(model)[0].mlp if kind == "router" else model.get_base_model().layers[0]
    handle = wrap_moe(model)
    (gate, *_), wrapper = handle.gates, layer.gate
    base, both = wrapper.base_layer.weight.clone(), effective(wrapper)
    assert (both - base).norm() > 0.1 * base.norm()
    torch.testing.assert_close(gate.weight, both)
    with model.disable_adapter():
        assert torch.equal(gate.weight, base)
    model.merge_adapter()
    torch.testing.assert_close(gate.weight, both)
    model.unmerge_adapter()
    torch.testing.assert_close(gate.weight, both)
    model.merge_and_unload()
    torch.testing.assert_close(gate.weight, both)
    torch.testing.assert_close(layer.gate.weight, both)


def test_a_forward_without_the_adapter_has_no_term() -> None:
    """As of the reference model of a preference loss, which is the same model with its adapters off."""
    model = language(**ON_GATE)
    with model.disable_adapter():
        plain = model(**BATCH).loss
    wrap_moe(model, **COEFS)
    adapted = model(**BATCH).loss
    with model.disable_adapter():
        assert torch.equal(model(**BATCH).loss, plain)
    assert torch.equal(model(**BATCH).loss, adapted)


# -------------------------------------------------------------------------------------------------- metrics and the table


@pytest.mark.parametrize(
    ("options", "weight_of", "name"),
    [(ON_GATE, effective, "gate.base_layer"), (SAVED_GATE, copies, "gate.modules_to_save.default")],
    ids=["lora", "modules_to_save"],
)
def test_metrics_and_table_show_what_routes(options: dict, weight_of, name: str) -> None:
    model = language(**options)
    if options is SAVED_GATE:  # else a copy holds what its original does
        for layer in layers(model):
            copies(layer.mlp.gate).data.mul_(2)
    handle = step(model)
    expected = [f"base_model.model.model.layers.{i}.mlp.{name}" for i in (0, 1)]
    assert list(handle.metrics()) == expected
    weights = [weight_of(layer.mlp.gate).detach() for layer in layers(model)]
    penalties = [part.item() for part in primed(weights).each(weights)]
    for row, weight, penalty in zip(handle.metrics().values(), weights, penalties, strict=True):
        assert row["sigma_max"] == pytest.approx(spectral_norm(weight).item())
        assert row["stable_rank"] == pytest.approx(stable_rank(weight).item())
        assert row["penalty"] == pytest.approx(penalty, rel=1e-5)
    table = str(handle).splitlines()
    assert table[0].startswith("PeftModelForCausalLM: 0.5 x SpectralRankPenalty(")
    assert [line.split()[:2] for line in table[2:]] == [[name, "MixtralTopKRouter"] for name in expected]
