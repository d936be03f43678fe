"""Controllers where they are made late, on the meta device first, and in graphs: compiled, exported, checkpointed by policy."""

import copy
import importlib
from functools import partial

import pytest
import torch
from test_controllers_state import ALL, MAKERS, Layer, batches, compiling, state, trained
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from spectral_router import ImportanceConstraint, LossFreeBias, PrototypeRouter
from spectral_router.balance import recompute

OPERATION = "spectral_router.first_forward"


def used(kind: str) -> Layer:
    """With a state that is not that of the start."""
    layer = Layer(kind, 2)
    for x in batches():
        layer(x)
    assert not torch.equal(state(layer.router.controller)[0], state(MAKERS[kind]())[0])
    return layer


# -------------------------------------------------------------------------------------------------------- late beginning


@ALL
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=compiling)], ids=["eager", "compiled"])
def test_loaded_into_what_was_made_on_meta(kind: str, compiled: bool) -> None:
    torch.compiler.reset()
    layer = used(kind)
    with torch.device("meta"):
        late = Layer(kind, 2)
    late.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    call = torch.compile(late, fullgraph=True, backend="aot_eager") if compiled else late
    for x in batches()[:3]:
        for one, other in zip(trained(layer, layer, x), trained(late, call, x), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert not any(buffer.is_meta for buffer in late.buffers())
    assert late.state_dict().keys() == layer.state_dict().keys()
    torch.compiler.reset()


@ALL
def test_begins_anew_with_its_router(kind: str) -> None:
    layer = used(kind)
    with torch.device("meta"):
        late = PrototypeRouter(8, 4, controller=MAKERS[kind]())
    late.to_empty(device="cpu")
    for buffer in late.buffers():  # what is in empty memory
        buffer.fill_(77)
    for router in (layer.router, late):
        router.reset_parameters()
        for found, fresh in zip(router.controller.buffers(), MAKERS[kind]().buffers(), strict=True):
            assert torch.equal(found, fresh)


@ALL
def test_a_router_takes_a_controller_with_its_state(kind: str) -> None:
    controller = used(kind).router.controller
    before = state(controller)
    assert all(map(torch.equal, state(PrototypeRouter(8, 4, controller=controller).controller), before))


def test_reset_of_a_controller_that_has_none() -> None:
    class Plain(nn.Module):
        def forward(self, logits):
            return logits

        def observe(self, weights, indices):
            pass

    for controller in (None, Plain()):
        PrototypeRouter(8, 4, controller=controller).reset_parameters()


@pytest.mark.parametrize(
    "maker", [ImportanceConstraint, partial(ImportanceConstraint, kind="mean"), LossFreeBias], ids=["relative", "mean", "bias"]
)
def test_device(maker) -> None:
    assert {buffer.device.type for buffer in maker(4, device="meta").buffers()} == {"meta"}
    with torch.device("meta"):
        assert {buffer.device.type for buffer in maker(4, device="cpu").buffers()} == {"cpu"}
        assert {buffer.device.type for buffer in maker(4).buffers()} == {"meta"}


# ---------------------------------------------------------------------------------------------------------------- graphs


@compiling
@ALL
@pytest.mark.parametrize("training", [True, False])
def test_the_operation_is_in_training_graphs_only(kind: str, training: bool) -> None:
    torch.compiler.reset()
    graphs = []
    layer = Layer(kind, 2).train(training)
    torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)(batches()[0])
    graphs.append(torch.export.export(layer, (batches()[0],)))
    assert [OPERATION in str(graph.graph) for graph in graphs] == [training] * 2
    torch.compiler.reset()


def test_the_operation_outlives_a_reload() -> None:
    for _ in range(2):
        importlib.reload(recompute)
    like = torch.zeros(3, device="meta")
    assert torch.ops.spectral_router.first_forward(like).device.type == "meta"
    assert torch.ops.spectral_router.first_forward(torch.zeros(3)).item() is True


@ALL
def test_selective_checkpointing_that_saves_matmuls(kind: str) -> None:
    saved = []

    def policy(_context, operation, *_, **__):
        matmul = operation in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        saved.append(matmul)
        return CheckpointPolicy.MUST_SAVE if matmul else CheckpointPolicy.PREFER_RECOMPUTE

    plain, spared = Layer(kind, 2), Layer(kind, 2)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    call = partial(checkpoint, spared, use_reentrant=False, context_fn=contexts)
    for x in batches():
        assert all(map(torch.equal, trained(plain, plain, x), trained(spared, call, x)))
    assert any(saved)
