"""PrototypeRouter: temperature, copies and checkpoints, k-means++ initialisation, messages."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spectral_router import PrototypeRouter, RouterOutput

METRICS = pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine", "dot"])


def same_output(left: RouterOutput, right: RouterOutput) -> None:
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


# ----------------------------------------------------------------------------------------------------------- temperature


@METRICS
@pytest.mark.parametrize("scale", [1.0, 0.05, 4.0])
def test_auto_temperature_gives_scores_of_unit_spread(metric: str, scale: float) -> None:
    # |z| is far above |mu| for scale 1 and below; at scale 4 they are comparable, and |mu|^2 adds to the spread
    x = nn.LayerNorm(64)(torch.randn(500, 64)).detach()
    router = PrototypeRouter(64, 32, metric=metric, temperature="auto")
    router.init_from(scale * torch.randn(200, 64) / 8)
    assert 0.7 <= router(x).logits.std(-1).mean() <= 1.4
    router.reset_parameters()
    assert 0.7 <= router(x).logits.std(-1).mean() <= 1.4


def test_auto_temperature_of_zero_prototypes_is_one() -> None:
    router = PrototypeRouter(4, 2, temperature="auto", metric="dot").init_from(torch.zeros(2, 4))
    assert router.temperature.item() == 1


@METRICS
def test_temperature_divides_the_scores(metric: str) -> None:
    x, router = torch.randn(5, 8), PrototypeRouter(8, 4, metric=metric, temperature=1)
    halved = PrototypeRouter(8, 4, metric=metric, temperature=0.5)
    halved.prototypes.data = router.prototypes.data
    assert halved.temperature.item() == pytest.approx(0.5)
    torch.testing.assert_close(halved(x).logits, 2 * router(x).logits)


def test_learnable_temperature_is_a_parameter_that_learns() -> None:
    router = PrototypeRouter(8, 4, learnable_temperature=True, temperature=0.7)
    assert {name for name, _ in router.named_parameters()} == {"prototypes", "log_temperature"}
    assert router.temperature.item() == pytest.approx(0.7)
    router(torch.randn(5, 8)).probs[:, 0].sum().backward()
    assert router.log_temperature.grad.abs() > 0
    router.log_temperature.data -= 50  # no step can make it zero or negative
    assert router.temperature > 0


def test_automatic_temperature_is_a_buffer() -> None:
    router = PrototypeRouter(8, 4, temperature="auto")
    assert {name for name, _ in router.named_parameters()} == {"prototypes"}
    assert {name for name, _ in router.named_buffers()} == {"log_temperature"}


def test_fixed_temperature_is_a_number_that_half_precision_cannot_round() -> None:
    router = PrototypeRouter(8, 4, temperature=0.1, metric="dot").bfloat16()
    assert set(router.state_dict()) == {"prototypes"}
    assert router.temperature.item() == 0.1
    x = torch.randn(3, 8).bfloat16()
    torch.testing.assert_close(router(x).logits, x.float() @ router.prototypes.float().T / 0.1)


# ------------------------------------------------------------------------------------------------------ copies and state


@METRICS
@pytest.mark.parametrize("options", [{"temperature": "auto"}, {"temperature": 0.3, "learnable_temperature": True, "top_k": 2}])
def test_state_dict_deepcopy_and_pickle(metric: str, options: dict[str, object]) -> None:
    x, router = torch.randn(5, 8), PrototypeRouter(8, 4, metric=metric, **options)
    router.init_from(torch.randn(50, 8))
    fresh = PrototypeRouter(8, 4, metric=metric, **options)
    fresh.load_state_dict(router.state_dict())
    for twin in (fresh, copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        same_output(twin(x), router(x))
        assert repr(twin) == repr(router)
    output = router(x)
    assert isinstance(output, RouterOutput)
    assert output._fields == ("logits", "probs", "weights", "indices")


@METRICS
def test_reset_parameters_forgets_everything_learned(metric: str) -> None:
    router = PrototypeRouter(400, 50, metric=metric, learnable_temperature=True, temperature=0.5)
    router.prototypes.data.fill_(7)
    router.log_temperature.data.fill_(7)
    router.reset_parameters()
    assert router.temperature.item() == pytest.approx(0.5)
    assert router.prototypes.norm(dim=-1).mean().item() == pytest.approx(1, abs=0.05)
    assert abs(router.prototypes.mean().item()) < 0.01


def test_repr_is_the_call_that_makes_it() -> None:
    router = PrototypeRouter(8, 4, top_k=2, temperature="auto", learnable_temperature=True, metric="cosine")
    assert repr(eval(repr(router))) == repr(router)
    assert "temperature='auto', learnable_temperature=True, metric='cosine'" in repr(router)


# ------------------------------------------------------------------------------------------------------------- init_from


@given(
    points=st.integers(1, 30),
    num_experts=st.integers(1, 8),
    metric=st.sampled_from(["euclidean", "sqeuclidean", "cosine", "dot"]),
    exponent=st.sampled_from([0, -15, 15]),
    seed=st.integers(0, 999),
)
def test_prototypes_are_distinct_rows_of_x(points: int, num_experts: int, metric: str, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 10.0**exponent * torch.randn(max(points, num_experts), 5, generator=generator)
    router = PrototypeRouter(5, num_experts, metric=metric)
    assert router.init_from(x, generator=generator) is router
    rows = [row.tolist() for row in x]
    picked = [rows.index(prototype.tolist()) for prototype in router.prototypes]
    assert len(set(picked)) == num_experts


@METRICS
def test_separated_clusters_get_one_prototype_each(metric: str) -> None:
    # an orthogonal direction each, so that they are apart for the cosine as well
    centres = 100 * torch.eye(6, 8)
    x = (centres[:, None] + 0.01 * torch.randn(6, 40, 8)).reshape(2, 120, 8)
    for _ in range(20):
        router = PrototypeRouter(8, 6, metric=metric).init_from(x)
        assert sorted(router.prototypes.argmax(-1).tolist()) == [0, 1, 2, 3, 4, 5]


def test_cosine_spreads_over_directions_not_lengths() -> None:
    # 50 vectors of one direction and very different lengths, 50 of another
    directions = torch.eye(2, 3).repeat_interleave(50, 0)
    x = directions * torch.logspace(0, 6, 100)[:, None]
    for _ in range(20):
        router = PrototypeRouter(3, 2, metric="cosine").init_from(x)
        assert sorted(router.prototypes.argmax(-1).tolist()) == [0, 1]


def test_init_from_is_repeatable_with_a_generator() -> None:
    x, router = torch.randn(60, 8), PrototypeRouter(8, 6)
    draws = []
    for seed in (0, 0, 1):
        router.init_from(x, generator=torch.Generator().manual_seed(seed))
        draws.append(router.prototypes.detach().clone())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@METRICS
@pytest.mark.parametrize("x", [torch.ones(9, 4), torch.zeros(9, 4), torch.eye(2, 4).repeat(5, 1)])
def test_init_from_copes_with_duplicates(metric: str, x: Tensor) -> None:
    router = PrototypeRouter(4, 3, metric=metric, temperature="auto").init_from(x)
    assert len(router.prototypes.unique(dim=0)) == len(x.unique(dim=0))
    assert router(x).probs.isfinite().all()


def test_init_from_leaves_a_parameter_in_place() -> None:
    router = PrototypeRouter(4, 3, dtype=torch.bfloat16)
    before = router.prototypes
    x = torch.randn(9, 4, requires_grad=True)
    router.init_from(x)
    assert router.prototypes is before  # an optimizer may hold it already
    assert router.prototypes.is_leaf
    assert router.prototypes.dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim and num_experts must be at least 1, got dim=0, num_experts=4"),
        ({"num_experts": -1}, "dim and num_experts must be at least 1, got dim=8, num_experts=-1"),
        ({"top_k": 2.0}, "top_k must be a whole number between 1 and num_experts, got top_k=2.0, num_experts=4"),
        ({"temperature": None}, 'temperature must be a finite number above 0 or "auto", got temperature=None'),
        ({"top_k": True}, "top_k must be a whole number between 1 and num_experts, got top_k=True, num_experts=4"),
        ({"top_k": 0}, "top_k must be a whole number between 1 and num_experts, got top_k=0, num_experts=4"),
        ({"top_k": 5}, "top_k must be a whole number between 1 and num_experts, got top_k=5, num_experts=4"),
        ({"metric": "l1"}, "metric must be one of euclidean, sqeuclidean, cosine, dot, got metric='l1'"),
        ({"temperature": "warm"}, "temperature must be a finite number above 0 or \"auto\", got temperature='warm'"),
        ({"temperature": 0}, 'temperature must be a finite number above 0 or "auto", got temperature=0'),
        ({"temperature": -1.0}, 'temperature must be a finite number above 0 or "auto", got temperature=-1.0'),
        ({"temperature": math.inf}, 'temperature must be a finite number above 0 or "auto", got temperature=inf'),
        ({"temperature": math.nan}, 'temperature must be a finite number above 0 or "auto", got temperature=nan'),
    ],
)
def test_message_constructor(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrototypeRouter(**{"dim": 8, "num_experts": 4, **options})


@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (8, 1)])
def test_message_wrong_last_dimension(shape: tuple[int, ...]) -> None:
    router, x = PrototypeRouter(8, 4), torch.zeros(shape)
    message = rf"the last dimension of the input must be dim=8, got shape \({', '.join(map(str, shape))},?\)"
    for call in (router, router.init_from):
        with pytest.raises(ValueError, match=message):
            call(x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_message_input_not_floating_point(dtype: torch.dtype) -> None:
    # weights in the dtype of the input would all be rounded down to zero
    router, x = PrototypeRouter(8, 4), torch.ones(5, 8, dtype=dtype)
    for call in (router, router.init_from):
        with pytest.raises(TypeError, match=f"input must be floating point, got {dtype}"):
            call(x)


def test_message_too_few_vectors() -> None:
    with pytest.raises(ValueError, match=r"init_from needs at least num_experts=4 vectors, got 3"):
        PrototypeRouter(8, 4).init_from(torch.randn(3, 8))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_message_init_from_not_finite(bad: float) -> None:
    router, x = PrototypeRouter(8, 4), torch.randn(9, 8)
    before = router.prototypes.detach().clone()
    x[3, 1] = bad
    with pytest.raises(ValueError, match="init_from needs finite vectors, got NaN or inf in x; drop those rows first"):
        router.init_from(x)
    assert torch.equal(router.prototypes, before)
