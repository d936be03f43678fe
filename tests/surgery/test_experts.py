"""`experts_of` by perturbation: what it names of an expert changes exactly the tokens that the gate sends there."""

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from spectral_router import Gate, experts_of, find_gates
from spectral_router.surgery.usage import Tally, watched
from studies.gates import CASES

# of other people's modules
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*PEP 585.*"),
]
# every expert takes part in every token
SOFT = {"soft_mixture", "multi_gate", "prototypes_soft"}
MODELS = [case for case in CASES if case.expected and case.runs]


def tokens_of(output) -> Tensor:
    """The first tensor of a block's output."""
    tensor = output if isinstance(output, Tensor) else next(part for part in output if isinstance(part, Tensor))
    return tensor.detach().clone()


class EnoughError(Exception):
    """The block has run for the last time: what comes after it is not looked at."""


def run(model: nn.Module, inputs: dict, tally: Tally, calls: int | None = None) -> tuple[Tensor, Tensor, int]:
    """What the gate chooses, (tokens, experts), and the output of the block where its experts are, (tokens, dim); and how
    often that block was called, after which another run may end.
    """
    seen = []
    where = tally.gate.block
    if type(where).__name__ == "JetMoeMoA":  # is not called itself; what follows it mixes tokens
        where = next(module for module in model.modules() if where in module.children())

    def note(module: nn.Module, args: object, output: object) -> None:
        seen.append(tokens_of(output))
        if len(seen) == calls:
            raise EnoughError

    tally.last = None
    with watched([tally]):
        hook = where.register_forward_hook(note)  # after the tally's, as the gate may be the block
        with torch.no_grad(), suppress(EnoughError):
            torch.default_generator.manual_seed(1)
            model(**inputs)
        tally.flush()
        hook.remove()
    if tally.last is None:
        return None, None, 0
    chosen = tally.last.chosen
    if type(where).__name__ == "NllbMoeSparseMLP":
        # transformers 5.23 takes the one-hot mask of the first choice for indices: expert 1 gets every token's first choice,
        # expert 0 its second, whatever the router says
        first = torch.zeros_like(chosen)
        first[:, 1] = True
        first[:, 0] = chosen.sum(-1) > 1
        chosen = first
    return chosen, seen[-1].reshape(len(chosen), -1), len(seen)


@torch.no_grad()
def changed_by(model: nn.Module, inputs: dict, tally: Tally, parts: list, before: Tensor, calls: int) -> Tensor:
    """The tokens, (tokens), whose output a change of these parts changes."""
    saved = [part.tensor.clone() for part in parts]
    generator = torch.Generator().manual_seed(2)
    for part in parts:
        part.tensor.add_(torch.randn(part.tensor.shape, generator=generator))
    after = run(model, inputs, tally, calls)[1]
    for part, value in zip(parts, saved, strict=True):
        part.tensor.copy_(value)
    return (after != before).any(-1)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_what_it_names_changes_exactly_that_experts_tokens(case) -> None:
    model, inputs = case.build()
    model.eval()
    met = 0
    for gate in find_gates(model):
        if gate.index is not None or gate.name.endswith(("gate_outer", "gate_inner")):
            continue  # hierarchical: tokens are in slots there; see below
        experts, tally = experts_of(gate), Tally(gate, decoding=False)
        chosen, before, calls = run(model, inputs, tally)
        if chosen is None:
            continue
        assert len(experts) == chosen.shape[1]
        causal = type(gate.block).__name__ == "JetMoeMoA"
        for number in range(len(experts)) if len(experts) < 20 else chosen.any(0).nonzero().flatten().tolist()[:9]:
            changed = changed_by(model, inputs, tally, experts[number], before, calls)
            expected = chosen[:, number] if experts[number] else torch.zeros_like(changed)
            if causal:  # attention hands a change on to later tokens
                changed, expected = (mask.view(2, -1).long().argmax(-1) for mask in (changed, expected))
            assert torch.equal(changed, expected), (gate.name, number)
            met += bool(expected.any())
        if case.name not in SOFT:
            assert not chosen.all()
    assert met or "hierarchical" in case.name


def test_no_family_is_left_out() -> None:
    left = [case.name for case in CASES if case.expected and not case.runs]
    assert left == ["diffusion_gemma"]  # its experts run in diffusion_gemma_tied


def test_parts_of_different_experts_do_not_overlap_and_shared_experts_are_in_none() -> None:
    (case,) = [case for case in CASES if case.name == "qwen2_moe"]
    model, _ = case.build()
    gate = find_gates(model)[0]
    covered = torch.zeros_like(gate.block.experts.gate_up_proj)
    named = {id(part.parameter) for parts in experts_of(gate) for part in parts}
    for parts in experts_of(gate):
        for part in parts:
            if part.parameter is gate.block.experts.gate_up_proj:
                covered[part.index] += 1
    assert (covered == 1).all()
    assert named == {id(parameter) for parameter in gate.block.experts.parameters()}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.experts[2].weight = self.experts[1].weight


class FlatSoft(nn.Module):
    """Every token passes every expert, and all lie in one matrix."""

    def __init__(self, runs: bool = True) -> None:
        super().__init__()
        self.num_experts, self.runs = 4, runs
        self.gate = nn.Linear(8, 4)
        self.experts = nn.Module()
        self.experts.w = nn.Parameter(torch.randn(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        assert self.runs
        outputs = x[..., None, None, :] @ self.experts.w.view(4, 8, 8)
        return (outputs.squeeze(-2) * self.gate(x).softmax(-1)[..., None]).sum(-2)


class Numbered(nn.Module):
    """Parameters called weight0, weight1, ... as Transformer Engine has them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.Module()
        self.num_experts = 3
        for number in range(3):
            self.experts.register_parameter(f"weight{number}", nn.Parameter(torch.randn(8, 8)))


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate = nn.Linear(8, 4)


def test_experts_that_cannot_be_told_apart_are_refused_with_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"experts 1 and 2 of the gate 'gate' share a parameter, so they cannot be told apart"):
        experts_of(find_gates(Tied())[0])
    with pytest.raises(ValueError, match="cannot be told apart: every token depends on all of it; keep them in a ModuleList"):
        experts_of(find_gates(FlatSoft())[0])
    with pytest.raises(ValueError, match="cannot be told apart: FlatSoft could not be run"):
        experts_of(find_gates(FlatSoft(runs=False))[0])
    with pytest.raises(ValueError, match="no experts found beside the gate 'gate' in Nothing: neither a list of 4 modules"):
        experts_of(find_gates(Nothing())[0])
    with pytest.raises(ValueError, match=r"does not say where its experts are; .* experts_of\(gate, block=...\)"):
        experts_of(Gate("gate", nn.Linear(8, 4), 4))


def test_numbered_parameters_and_a_block_that_is_given() -> None:
    block = Numbered()
    gate = Gate("router", block.router, 3)
    experts = experts_of(gate, block)
    assert [[part.parameter for part in parts] for parts in experts] == [
        [block.experts.weight0],
        [block.experts.weight1],
        [block.experts.weight2],
    ]


@pytest.mark.parametrize("stacked", [True, False])
def test_lora_belongs_to_the_expert_that_it_adapts(stacked: bool) -> None:
    peft = pytest.importorskip("peft")
    (case,) = [case for case in CASES if case.name == ("mixtral" if stacked else "mixtral_4")]
    model, inputs = case.build()
    model.eval()
    if stacked:
        config = peft.LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], r=2, lora_alpha=8)
    else:
        config = peft.LoraConfig(target_modules=["fc1", "fc2"], r=2, lora_alpha=8)
    model = peft.get_peft_model(model, config) if stacked else peft.inject_adapter_in_model(config, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    for gate in find_gates(model):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        chosen, before, calls = run(model, inputs, tally := Tally(gate, decoding=False))
        for number, parts in enumerate(experts_of(gate)):
            adapters = [part for part in parts if "lora_" in names[id(part.parameter)]]
            assert len(adapters) == 4
            for part in adapters:
                assert torch.equal(changed_by(model, inputs, tally, [part], before, calls), chosen[:, number])


def test_inner_experts_of_a_hierarchy_are_parts_of_the_outer_ones() -> None:
    (case,) = [case for case in CASES if case.name == "mixture_of_experts_hierarchical"]
    model, _ = case.build()
    outer, *inner = find_gates(model)[:4]
    stack = outer.block.experts.w1
    cut = [next(part for part in experts_of(gate)[2] if part.parameter is stack) for gate in inner]
    for number, part in enumerate(cut):
        assert torch.equal(part.tensor, stack[number : number + 1, 2:3])
    assert torch.equal(experts_of(outer)[1][0].tensor, stack[1:2])
