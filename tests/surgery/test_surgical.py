"""`surgical`: what is off the path stays as it was, to the bit, over families and optimizers; engines are in files beside."""

import copy

import pytest
import torch
from moe_models import BATCH, Regressor, mixtral, tokens
from surgical_checks import OPTIMIZERS, assert_only_path_changed, bits, may_change, steps
from torch import nn

from spectral_router import ExpertPath, surgical, wrap_moe
from studies.gates import CASES

# of other people's modules
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*PEP 585.*"),
]
MODELS = [case for case in CASES if case.expected and case.runs]
# each way that experts can lie: stacked, with biases, in a list, flat by rows, by columns, product keys, in attention, nested
WAYS = (
    "mixtral",
    "gpt_oss",
    "switch_transformers",
    "dbrx",
    "flat_columns",
    "doge",
    "jetmoe",
    "mixture_of_experts_hierarchical",
)


def task(output) -> torch.Tensor:
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else [output]
    return (
        next(v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.requires_grad)
        .float()
        .square()
        .mean()
    )


def check(case, kind: str, warm: int = 2) -> None:
    model, inputs = case.build()
    model.train()
    optimizer = OPTIMIZERS[kind](model.parameters())
    steps(lambda: task(model(**inputs)), optimizer, warm)
    required = [parameter.requires_grad for parameter in model.parameters()]
    before = bits(model, optimizer)
    with surgical(model, inputs, top=1) as path:
        masks = may_change(model, path)
        steps(lambda: task(model(**inputs)), optimizer, 2)
    assert_only_path_changed(before, bits(model, optimizer), masks)
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None for parameter in model.parameters())
    steps(lambda: task(model(**inputs)), optimizer, 1)  # all goes on as before
    after = bits(model)
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("lm_head.weight"))


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_off_the_path_every_bit_stays_in_all_families(case) -> None:
    check(case, "adamw")


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_off_the_path_every_bit_stays_with_every_optimizer(kind: str, name: str) -> None:
    if (kind, name) == ("sgd_fused", "switch_transformers"):
        pytest.skip("torch's fused SGD cannot take parameters with and without a momentum buffer, as of experts not met before")
    check(next(case for case in CASES if case.name == name), kind)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw_fused"])
def test_state_that_is_new_begins_on_the_path_only(kind: str) -> None:
    check(next(case for case in CASES if case.name == "mixtral"), kind, warm=0)


def test_the_path_itself_learns_as_if_nothing_were_there() -> None:
    """Without decay and momentum, gradients off the path set to zero by hand give the same experts."""
    model, twin = mixtral(), mixtral()
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    with surgical(model, BATCH, share=0.5) as path:
        masks = may_change(model, path)
        steps(lambda: model(**BATCH).loss, optimizer, 3)
    for _ in range(3):
        twin(**BATCH).loss.backward()
        for name, parameter in twin.named_parameters():
            parameter.grad *= masks[name]
        other.step()
        other.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_clipping_sees_the_path_only() -> None:
    model = mixtral()
    with surgical(model, BATCH, top=1) as path:
        masks = may_change(model, path)
        model(**BATCH).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    twin = mixtral()
    twin(**BATCH).loss.backward()
    expected = torch.stack([(p.grad * masks[name]).square().sum() for name, p in twin.named_parameters()]).sum().sqrt()
    torch.testing.assert_close(norm, expected)


def test_with_a_handle_nothing_of_its_term_moves_routers() -> None:
    model = mixtral()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for options in ({}, {"optimizer": optimizer}):
        with wrap_moe(model, penalty_coef=1.0, balance_coef=1.0, **options) as handle:
            before = bits(model, optimizer)
            with surgical(handle, BATCH, share=0.4) as path:
                masks = may_change(model, path)
                steps(lambda: model(**BATCH).loss, optimizer, 2)
            assert_only_path_changed(before, bits(model, optimizer), masks)


def test_a_decoupled_penalty_leaves_frozen_routers_alone() -> None:
    model = mixtral()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    handle = wrap_moe(model, penalty_coef=1.0)
    handle.attach(optimizer, decoupled=True)
    steps(lambda: model(**BATCH).loss, optimizer, 1)
    before = bits(model, optimizer)
    with surgical(handle, BATCH, top=1) as path:
        masks = may_change(model, path)
        steps(lambda: model(**BATCH).loss, optimizer, 2)
    assert_only_path_changed(before, bits(model, optimizer), masks)


def test_gradients_from_before_are_neither_used_nor_lost() -> None:
    model = mixtral()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    model(**BATCH).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    before = bits(model, optimizer)
    with surgical(model, BATCH, top=1) as path:
        optimizer.step()
        assert all(torch.equal(a, before[name]) for name, a in model.named_parameters())
        masks = may_change(model, path)
        steps(lambda: model(**BATCH).loss, optimizer, 1)
    assert_only_path_changed(before, bits(model, optimizer), masks)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_without_freezing_gradients_flow_and_nothing_moves() -> None:
    model = mixtral()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    steps(lambda: model(**BATCH).loss, optimizer, 2)
    before = bits(model, optimizer)
    with surgical(model, BATCH, top=1, freeze=False) as path:
        masks = may_change(model, path)
        model(**BATCH).loss.backward()
        assert model.lm_head.weight.grad is not None
        optimizer.step()
    assert_only_path_changed(before, bits(model, optimizer), masks)


def test_what_is_named_changes_too_and_shared_experts_if_asked() -> None:
    (case,) = [case for case in CASES if case.name == "qwen2_moe"]
    model, inputs = case.build()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    start = bits(model)
    for options, extra in (
        ({"shared": True}, [name for name in start if "shared_expert." in name]),
        ({"also": "lm_head"}, ["lm_head.weight"]),
        (
            {"also": ["mlp.gate", "model.norm.weight"]},
            ["model.norm.weight", *(n for n in start if n.endswith("mlp.gate.weight"))],
        ),
    ):
        before = bits(model)
        with surgical(model, inputs, top=1, **options) as path:
            steps(lambda: task(model(**inputs)), optimizer, 2)
        after = bits(model)
        assert extra
        assert all(not torch.equal(before[name], after[name]) for name in extra)
        assert_only_path_changed(before, after, may_change(model, path, extra))


def test_buffers_are_put_back() -> None:
    class WithNorm(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x, target=None):
            return super().forward(self.norm(x.flatten(0, -2)).view_as(x), target)

    model, x = WithNorm(), tokens()
    before = bits(model)
    with surgical(model, x, top=1) as path:
        masks = may_change(model, path)
        steps(lambda: model(x, x.detach() + 1)["loss"], torch.optim.SGD(model.parameters(), lr=0.1), 2)
    assert not torch.equal(before["buffer:norm.running_mean"], torch.ones(16))
    assert_only_path_changed(before, bits(model), masks)


def test_the_guard_comes_down_when_the_loop_fails() -> None:
    model = mixtral()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with pytest.raises(RuntimeError, match="out of data"), surgical(model, BATCH, top=1):
        raise RuntimeError("out of data")
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = bits(model)
    steps(lambda: model(**BATCH).loss, optimizer, 1)
    assert not any(torch.equal(before[name], parameter) for name, parameter in model.named_parameters() if parameter.ndim > 1)


def test_a_path_that_is_known_is_taken_and_a_strange_one_refused() -> None:
    model = mixtral()
    with surgical(model, BATCH, top=1) as path:
        pass
    twin = copy.deepcopy(model)
    before = bits(twin)
    with surgical(twin, path=path) as same:
        steps(lambda: twin(**BATCH).loss, torch.optim.AdamW(twin.parameters()), 1)
    assert same is path
    assert_only_path_changed(before, bits(twin), may_change(twin, path))
    name = path.layers[0].gate
    with surgical(twin, path={name: [3, 5]}) as by_hand:
        assert may_change(twin, by_hand)[f"{name.removesuffix('.gate')}.experts.down_proj"].any(
            (1, 2)
        ).nonzero().flatten().tolist() == [3, 5]
        assert by_hand.layers[0].parameters == 2 * 3 * 16 * 24
    strange = ExpertPath([])
    strange.layers = [path.layers[0].__class__("other.gate", 8, (0,), 1, 1.0, 1.0)]
    with pytest.raises(
        ValueError, match=r"of other gates than the model's: other\.gate; there are model\.layers\.0\.mlp\.gate"
    ):
        surgical(model, path=strange)
    strange.layers = [path.layers[0].__class__("model.layers.0.mlp.gate", 9, (8,), 1, 1.0, 1.0)]
    with pytest.raises(ValueError, match=r"takes expert 8 of the gate 'model.layers.0.mlp.gate', which scores 8 experts"):
        surgical(model, path=strange)


def test_an_optimizer_of_other_parameters_is_told_of() -> None:
    model = mixtral()
    head = torch.optim.SGD([model.lm_head.weight], lr=0.1)
    with pytest.warns(UserWarning, match="no optimizer has stepped a parameter on the path"), surgical(model, BATCH, top=1):
        head.step()


def test_messages() -> None:
    model = mixtral()
    with pytest.raises(ValueError, match="give a batch, whose experts are to change, or a path"):
        surgical(model, top=1)
    with pytest.raises(ValueError, match="no router gate found in Linear; wrap it with gates="):
        surgical(nn.Linear(2, 2), BATCH, top=1)
    with pytest.raises(ValueError, match="also='nonesuch' matches no module and no parameter of MixtralForCausalLM"):
        surgical(model, BATCH, top=1, also="nonesuch")
    handle = wrap_moe(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="freeze=False does not go with a handle that delivers its term at"):
        surgical(model, BATCH, top=1, freeze=False)
    handle.remove()
    model.lm_head.weight.ds_id = 0
    with pytest.raises(RuntimeError, match="does not work under DeepSpeed ZeRO-3"):
        surgical(model, BATCH, top=1)
