"""Gates by what one real forward computes: readings corrected, gates found under any name, look-alikes left alone."""

import copy
import pickle
import random
import string
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_router import Gate, MoEHandle, find_gates, wrap_moe


def word(seed: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_lowercase.replace("g", "").replace("r", ""), k=6))


class Mixture(nn.Module):
    """Four experts; `style` says how tokens are scored, `name` what the matrix is called. Keeps what routes in `p`."""

    def __init__(self, style: str, name: str, experts: str = "experts") -> None:
        super().__init__()
        self.style, self.name, self.place = style, name, experts
        self.add_module(experts, nn.ModuleList(nn.Linear(16, 16) for _ in range(4)))
        if "linear" in style:
            self.add_module(name, nn.Linear(16, 4))
        else:
            shape = (4, 16) if style == "cosine" else (16, 4)
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        gate = getattr(self, self.name)
        if self.style == "raw":
            logits = x @ gate
        elif self.style == "normed":
            logits = F.layer_norm(x, (16,)) @ gate
        elif self.style == "cosine":
            logits = F.normalize(x, dim=-1) @ F.normalize(gate, dim=-1).mT / 0.1
        elif self.style == "capped":
            logits = 2 * torch.tanh(x @ gate / 2)
        elif self.style == "einsum":
            logits = torch.einsum("nd,de->ne", x, gate)
        elif self.style == "not called, linear":
            logits = F.linear(x.float(), gate.weight.float(), gate.bias)
        elif self.style in ("sigmoid", "relu"):
            scores = (x @ gate).sigmoid() if self.style == "sigmoid" else (x @ gate).relu()
            self.p = scores / scores.sum(-1, keepdim=True).clamp_min(1e-9)
            return self.mix(x)
        else:
            logits = gate(x)
        self.p = logits.softmax(-1)
        return self.mix(x)

    def mix(self, x: Tensor) -> Tensor:
        experts = getattr(self, self.place)
        return sum(self.p[:, i, None] * expert(x) for i, expert in enumerate(experts))


STYLES = ["linear", "raw", "normed", "cosine", "capped", "einsum", "not called, linear", "sigmoid", "relu"]


@pytest.mark.parametrize("style", STYLES)
def test_a_gate_of_any_name_is_found_with_an_example_and_read_exactly(style: str) -> None:
    torch.manual_seed(0)
    model = Mixture(style, word(STYLES.index(style)), word(100))
    x = torch.randn(32, 16)
    handle = wrap_moe(model, example=x)
    assert len(handle.gates) == 1
    for batch in (x, torch.randn(10, 16)):  # of another size: nothing of the first is kept
        model(batch)
        handle.loss()
        torch.testing.assert_close(handle.shares[0], model.p.mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("style", STYLES)
def test_the_first_training_forward_corrects_how_a_gate_is_read(style: str) -> None:
    torch.manual_seed(0)
    model = Mixture(style, "gate" if "linear" in style else "w_gate")
    handle = wrap_moe(model)
    for size in (32, 10, 7):
        model(torch.randn(size, 16))
        torch.testing.assert_close(handle.shares[0], model.p.mean(0), atol=1e-5, rtol=0)
        handle.loss().backward()


@pytest.mark.parametrize("middle", [nn.BatchNorm1d(4), nn.LayerNorm(4)])
def test_a_layer_between_linear_and_softmax_is_seen(middle: nn.Module) -> None:
    torch.manual_seed(0)
    model = Mixture("linear", "gate")
    model.gate = nn.Sequential(nn.Linear(16, 4), middle)
    handle = wrap_moe(model)
    model(3 * torch.randn(64, 16))
    torch.testing.assert_close(handle.shares[0], model.p.mean(0), atol=1e-5, rtol=0)
    assert ("observed" in repr(handle)) == isinstance(middle, nn.BatchNorm1d)  # the other one shows in the trial on noise


def test_a_corrected_reading_is_copied_and_pickled_with_its_model() -> None:
    model = Mixture("normed", "w_gate")
    wrap_moe(model, penalty=None)
    model(torch.randn(16, 16))
    MoEHandle.of(model).loss()
    model.p = None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.zero_grad()
        twin(torch.randn(8, 16))
        MoEHandle.of(twin).loss().backward()
        assert twin.w_gate.grad.abs().sum() > 0
        assert model.w_gate.grad is None
        torch.testing.assert_close(MoEHandle.of(twin).shares[0], twin.p.mean(0), atol=1e-5, rtol=0)


class Classifier(nn.Module):
    """As many layers as classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(16, 16) for _ in range(4)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x).log_softmax(-1)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.gate = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 4)
        self.inward = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        x = x * self.gate(x).sigmoid()
        return self.layers[0](x).relu()


class Heads(nn.Module):
    """One sigmoid gate a head, in each of as many layers as there are heads."""

    def __init__(self) -> None:
        super().__init__()
        layer = lambda: nn.ModuleDict({"gate": nn.Linear(16, 4), "out": nn.Linear(16, 16)})  # noqa: E731
        self.layers = nn.ModuleList(layer() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["out"]((x.unflatten(-1, (4, 4)) * layer["gate"](x).sigmoid()[..., None]).flatten(-2))
        return x


@pytest.mark.parametrize("kind", [Classifier, Heads, lambda: nn.TransformerEncoderLayer(16, 4, 32)])
def test_what_is_no_gate_is_not_found_with_an_example(kind) -> None:
    torch.manual_seed(0)
    assert find_gates(kind(), example=torch.randn(12, 16)) == []


def test_an_example_leaves_outputs_buffers_and_the_random_state_alone() -> None:
    model = Mixture("linear", "gate")
    model.gate = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4))
    x, state = torch.randn(8, 16), copy.deepcopy(model.state_dict())
    before = torch.random.get_rng_state()
    find_gates(model, example=x)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    plain = copy.deepcopy(model)(x)
    wrap_moe(model)
    assert torch.equal(model(x), plain)  # watched, and bit for bit what it was
    assert not any(hasattr(hook, "trace") for module in model.modules() for hook in module._forward_hooks.values())


SEEN: list[Tensor] = []


class Filing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_g = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(p := self.w_g(x).softmax(-1))
        return p


def test_a_forward_that_files_something_is_not_tried() -> None:
    model = nn.Module()
    model.router, model.experts = Filing(), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    assert len(find_gates(model)) == 1
    assert SEEN == []


def own_probs(module, args, kwargs, output) -> Tensor:
    return (kwargs["scored"] @ module.places.mT).softmax(-1)


class Choose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places, self.l = nn.Parameter(torch.randn(4, 16)), nn.Linear(16, 16)

    def forward(self, x: Tensor, *, scored: Tensor) -> Tensor:
        return self.l(x) * (scored @ self.places.mT).softmax(-1).amax(-1, keepdim=True)


def test_own_function_gets_the_module_that_runs_and_all_arguments() -> None:
    model = Choose()
    wrap_moe(model, penalty=None, gates=Gate("c", model, 4, "places", probs=own_probs))
    twin = pickle.loads(pickle.dumps(model))
    twin(torch.randn(8, 16), scored=torch.randn(8, 16))
    MoEHandle.of(twin).loss().backward()
    assert twin.places.grad.abs().sum() > 0
    assert model.places.grad is None


def test_one_output_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"at least 2 experts, got num_experts=1 for 'router'.*mixture of depths"):
        wrap_moe(nn.ModuleDict({"router": nn.Linear(16, 1)}), gates="router")


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(16, 4, 2))
        self.register_buffer("centroid", torch.randn(4, 16))
        self.chooser = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("chooser", r"has 2 matrices.*name one of chooser\.0\.weight \(16 x 16\), chooser\.2\.weight \(4 x 16\)"),
        ("phi", r"parameter phi of shape \(16, 4, 2\), which is 3-D.*probs=function"),
        ("centroid", r"buffer centroid of shape \(4, 16\).*does not learn"),
    ],
)
def test_a_name_that_exists_is_told_why_it_gives_no_gate(rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap_moe(Many(), gates=rule)


def test_vectors_and_keys_are_one_matrix() -> None:
    block = nn.Module()
    block.keys = nn.Parameter(torch.randn(2, 4, 2, 8))
    block.a, block.b = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))
    assert Gate("k", block, 4, "keys", probs=own_probs).weight.shape == (16, 8)
    vectors = Gate("v", block, 2, ("a", "b"), probs=own_probs)
    assert torch.equal(vectors.weight, torch.stack([block.a, block.b]))
    assert vectors.dim == 16


class Scaled(Mixture):
    """A number that Python took out of this batch: it cannot be had again of another one."""

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.w_gate
        self.p = (logits / logits.abs().max().item()).softmax(-1)
        return self.mix(x)


def test_what_contradicts_and_cannot_be_corrected_is_said() -> None:
    model = Scaled("raw", "w_gate")
    wrap_moe(model)
    with pytest.warns(UserWarning, match=r"gate w_gate: assumed softmax .*seen softmax.*'w_gate'.*write gates=Gate\('w_gate'"):
        model(3 + torch.randn(32, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoEHandle.of(model).loss()
        model(torch.randn(32, 16))


class Annealed(Mixture):
    temperature = 2.0

    def __init__(self, style: str, name: str) -> None:
        super().__init__(style, name)
        self.temperature = 2.0

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.w_gate
        self.p = (logits / self.temperature if self.style == "raw" else logits * (1 / self.temperature)).softmax(-1)
        return self.mix(x)


@pytest.mark.parametrize("style", ["raw", "times"])
def test_a_temperature_that_is_annealed_is_followed(style: str) -> None:
    model = Annealed(style, "w_gate")
    handle = wrap_moe(model, penalty=None)
    for model.temperature in (2.0, 1.5, 0.5):
        model(torch.randn(32, 16))
        torch.testing.assert_close(handle.shares[0], model.p.mean(0), atol=1e-5, rtol=0)
        handle.loss().backward()


class BatchNormed(Mixture):
    """Batch norm as a function, with or without running statistics."""

    def __init__(self, running: bool) -> None:
        super().__init__("raw", "w_gate")
        self.register_buffer("mean", torch.zeros(4) if running else None)
        self.register_buffer("var", torch.ones(4) if running else None)

    def forward(self, x: Tensor) -> Tensor:
        training = self.training or self.mean is None
        self.p = F.batch_norm(x @ self.w_gate, self.mean, self.var, training=training).softmax(-1)
        return self.mix(x)


@pytest.mark.parametrize("running", [True, False])
def test_batch_norm_as_a_function_is_read_and_moves_its_statistics_once(running: bool) -> None:
    torch.manual_seed(0)
    model = BatchNormed(running)
    twin = copy.deepcopy(model)
    handle = wrap_moe(model, penalty=None, balance_coef=1.0)
    for size in (32, 10, 7):
        x = 3 + 2 * torch.randn(size, 16)
        model(x)
        twin(x)
        torch.testing.assert_close(handle.shares[0], model.p.mean(0), atol=1e-5, rtol=0)
        model.zero_grad()
        handle.loss().backward()
        slope = torch.autograd.grad(handle.balance(model.p, None), model.w_gate)[0]
        torch.testing.assert_close(model.w_gate.grad, slope, atol=1e-5, rtol=1e-4)
    if running:
        torch.testing.assert_close(model.mean, twin.mean)
        report = handle.report(x, top_k=1)["w_gate"]
        model.eval()(x)
        torch.testing.assert_close(torch.tensor(report["probability"]), model.p.mean(0), atol=1e-5, rtol=0)


class Centroids(nn.Module):
    """A buffer scores: nothing of it learns, but what lies before it does."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.experts = nn.Linear(16, 16), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("places", torch.randn(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inward(x)
        self.p = (h @ self.places.mT).softmax(-1)
        return sum(self.p[:, i, None] * expert(h) for i, expert in enumerate(self.experts))


@pytest.mark.parametrize("named", [True, False])
def test_a_buffer_is_read_and_not_penalised(named: bool) -> None:
    model, x = Centroids(), torch.randn(32, 16)
    if named:
        handle = wrap_moe(model, balance_coef=1.0, gates=Gate("places", model, 4, "places", reads="input"))
    else:
        handle = wrap_moe(model, balance_coef=1.0, example=x)
    with pytest.warns(UserWarning, match=r"the matrix is a buffer, which is read and does not learn.*: places; make it a"):
        model(x)
    for _ in range(2):
        torch.testing.assert_close(handle.shares[0], model.p.mean(0), atol=1e-5, rtol=0)
        term, balance = handle.loss(), handle.balance(model.p, None)
        torch.testing.assert_close(term, balance)  # nothing else is in it
        slopes = [torch.autograd.grad(value, model.inward.weight, retain_graph=True)[0] for value in (term, balance)]
        torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-4)
        model(x)
    assert handle.metrics()["places"]["penalty"] == 0


class Layers(nn.Module):
    """Two blocks, each checkpointed."""

    def __init__(self, style: str) -> None:
        super().__init__()
        name = "gate" if "linear" in style else "w_gate"
        self.blocks = nn.ModuleList(Mixture(style, name) for _ in range(2))

    def forward(self, x: Tensor, reentrant: bool | None) -> Tensor:
        for block in self.blocks:
            x = block(x) if reentrant is None else torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("style", ["normed", "cosine", "relu", "linear"])
def test_a_corrected_gate_learns_from_the_first_checkpointed_forward_on(style: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    plain = Layers(style)
    model = copy.deepcopy(plain)
    gradients = []
    for one, how in ((plain, None), (model, reentrant)):
        handle = wrap_moe(one, balance_coef=1.0)
        for step in range(3):
            x = torch.randn(24, 16, generator=torch.Generator().manual_seed(step)).requires_grad_()
            one.zero_grad()
            (one(x, how).square().mean() + handle.loss()).backward()
            gradients.append({name: p.grad.clone() for name, p in one.named_parameters()})
    for expected, got in zip(gradients[:3], gradients[3:], strict=True):
        for name, slope in expected.items():
            torch.testing.assert_close(got[name], slope, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("style", ["linear", "normed", "capped", "cosine"])
def test_delivery_at_the_step_goes_on_with_a_corrected_gate(style: str) -> None:
    torch.manual_seed(0)
    model = Mixture(style, "gate" if style == "linear" else "w_gate")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrap_moe(model, optimizer, penalty_coef=1.0, balance_coef=1.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            model(torch.randn(32, 16)).square().mean().backward()
            matrix = next(p for name, p in model.named_parameters() if "gate" in name and p.ndim == 2)
            before = matrix.grad.clone()
            optimizer.step()
            assert (matrix.grad - before).norm() > 0
            optimizer.zero_grad()
    # where logits are not W x + b the weight is penalised, and the balance is told to be left out
    assert any("its balance is not" in str(one.message) for one in told) == (style != "linear")
