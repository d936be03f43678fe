"""The effective weight of a gate under every method of PEFT that has one, and under torch's own hooks on weights."""

import copy
import warnings

import peft
import pytest
import torch
from torch import Tensor, nn

from spectral_router import Gate, find_gates, wrap_moe
from spectral_router.functional import spectral_rank_penalty

DIM, EXPERTS = 16, 4


class MoE(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(DIM, EXPERTS, bias=bias)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1)
        return sum(p * expert(x) for p, expert in zip(probs.split(1, -1), self.experts, strict=True))


ON = {"target_modules": ["router"]}
METHODS = {
    "LoRA": peft.LoraConfig(r=2, lora_dropout=0.5, **ON),
    "rsLoRA": peft.LoraConfig(r=2, use_rslora=True, **ON),
    "DoRA": peft.LoraConfig(r=2, use_dora=True, **ON),
    "IA3": peft.IA3Config(feedforward_modules=[], **ON),
    "IA3 of the input": peft.IA3Config(feedforward_modules=["router"], **ON),
    "LoHa": peft.LoHaConfig(r=2, module_dropout=0.0, rank_dropout=0.5, **ON),
    "LoKr": peft.LoKrConfig(r=2, **ON),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, **ON),
    "BOFT": peft.BOFTConfig(boft_block_size=4, **ON),
    "VeRA": peft.VeraConfig(r=4, vera_dropout=0.5, **ON),
    "FourierFT": peft.FourierFTConfig(n_frequency=20, **ON),
    "HRA": peft.HRAConfig(r=2, **ON),
    "AdaLoRA": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, **ON),
}


def adapted(config: peft.PeftConfig, bias: bool = False) -> peft.PeftModel:
    """As in the middle of training: every adapter's parameters moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        model = peft.get_peft_model(MoE(bias), copy.deepcopy(config)).train()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def merged(model: peft.PeftModel) -> Tensor:
    """What PEFT itself makes the weight, in a copy."""
    return copy.deepcopy(model).merge_and_unload().router.weight.detach()


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_the_weight_is_the_one_that_merging_gives(config: peft.PeftConfig, bias: bool) -> None:
    model = adapted(config, bias)
    (gate,) = find_gates(model)
    torch.testing.assert_close(gate.weight.detach(), merged(model), rtol=1e-4, atol=1e-5)
    bare = model.get_base_model().router.base_layer.weight
    assert (gate.weight - bare).norm() > 0.01 * bare.norm()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_the_adapter_learns_from_it(config: peft.PeftConfig) -> None:
    """The directional derivative of a penalty along its own gradient, by finite differences of the merged weight."""
    # no spectral one: methods that turn the weight leave its singular values alone
    direction = torch.randn(EXPERTS, DIM, dtype=torch.float64)
    model = adapted(config).double()
    handle = wrap_moe(model, penalty=lambda weights: (weights[0] * direction).sum(), balance=None, penalty_coef=1.0)
    model(torch.randn(8, DIM, dtype=torch.float64))
    handle.loss().backward()
    learning = {name: p for name, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    assert learning
    assert all("router" in name for name in learning)
    slope = sum(p.grad.square().sum() for p in learning.values())
    values = []
    for step in (1e-3, -1e-3):
        moved = copy.deepcopy(model)
        for name, parameter in moved.named_parameters():
            if name in learning:
                parameter.data.add_(learning[name].grad, alpha=step / slope.sqrt().item())
        values.append((merged(moved) * direction).sum().item())
    # FourierFT transforms in float32; the norm in DoRA is a constant for its gradient, so there it is that of another function
    if not getattr(config, "use_dora", False):
        assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope.sqrt().item(), rel=1e-2)


def test_dora_has_the_gradient_that_its_layer_has() -> None:
    model = adapted(METHODS["DoRA"]).double()
    router = model.get_base_model().router
    weight = find_gates(model)[0].weight
    by_layer = router(torch.eye(DIM, dtype=torch.float64)).mT
    torch.testing.assert_close(weight, by_layer)
    direction = torch.randn_like(weight)
    learning = [p for p in router.parameters() if p.requires_grad]
    one, other = (torch.autograd.grad((w * direction).sum(), learning) for w in (weight, by_layer))
    for got, expected in zip(one, other, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "config", [METHODS[name] for name in ("LoRA", "DoRA", "IA3", "LoHa")], ids=["LoRA", "DoRA", "IA3", "LoHa"]
)
def test_switched_off_and_merged(config: peft.PeftConfig) -> None:
    model = adapted(config)
    (gate,) = find_gates(model)
    bare = model.get_base_model().router.base_layer.weight.detach().clone()
    expected = gate.weight.detach()
    with model.disable_adapter():
        assert torch.equal(gate.weight, bare)
    model.merge_adapter()
    torch.testing.assert_close(gate.weight.detach(), expected)


def test_what_is_no_weight_is_refused_by_name() -> None:
    model = adapted(METHODS["HRA"])
    layer = model.get_base_model().router
    forward = type(layer).forward
    bent = type("BentLayer", (type(layer),), {"forward": lambda self, x: forward(self, x).tanh()})
    bent.__module__ = "peft.tuners.bent.layer"
    layer.__class__ = bent
    with pytest.raises(ValueError, match=r"gate 'base_model\.model\.router': what PEFT's bent makes of it is not W x \+ b"):
        find_gates(model)


def test_adapters_on_some_experts_do_not_hide_the_gate() -> None:
    model = peft.get_peft_model(MoE(), peft.LoraConfig(r=2, target_modules=["router", "experts.0", "experts.2"]))
    (gate,) = find_gates(model)
    assert gate.num_experts == EXPERTS
    assert gate.adapter is not None


# ----------------------------------------------------------------------------------------------- torch's hooks on weights


def pruned(layer: nn.Linear) -> nn.Linear:
    return torch.nn.utils.prune.random_unstructured(layer, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.(spectral|weight)_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [nn.utils.spectral_norm, nn.utils.weight_norm, pruned], ids=["spectral", "weight", "pruned"])
@pytest.mark.parametrize("at_step", [False, True], ids=["in the loss", "at the step"])
def test_weights_made_by_hooks(make, at_step: bool) -> None:
    model = MoE()
    model.router = make(model.router)
    (gate,) = find_gates(model)
    assert isinstance(gate, Gate)
    assert gate.parameter == "weight"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = wrap_moe(
        model,
        optimizer if at_step else None,
        penalty=lambda ws: spectral_rank_penalty(ws[0], 2.0),
        balance=None,
        penalty_coef=1.0,
    )
    x = torch.randn(8, DIM)
    for _ in range(2):  # the second time the graph of the first is gone
        optimizer.zero_grad()
        output = model(x).square().mean()
        used = model.router.weight
        torch.testing.assert_close(handle.gates[0].weight, used)
        sources = list(model.router.parameters())
        expected = torch.autograd.grad(output + spectral_rank_penalty(used, 2.0), sources, retain_graph=True)
        (output if at_step else output + handle.loss()).backward()
        optimizer.step()
    for parameter, gradient in zip(sources, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
