"""The example's figures of routing and its intervals over seeds, against cases counted by hand."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from examples.image_classification import routing
from examples.shared import runs


def probs_of(winners: list[list[int]], experts: int, top: float = 0.9) -> Tensor:
    """(n, L) winners -> (n, L, K): the winner has `top`, the others share the rest."""
    hot = nn.functional.one_hot(torch.tensor(winners), experts).double()
    return hot * top + (1 - hot) * (1 - top) / (experts - 1)


def test_a_path_of_its_own_for_each_class():
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    paths = [[0, 2], [1, 1], [2, 0]]
    found = routing.measure(probs_of([paths[label] for label in labels], 3), labels, ["a", "b", "c"])
    assert found["mutual_information"] == pytest.approx(1)
    assert (found["paths_used"], found["paths_used_1pct"], found["dominant_paths"]) == (3, 3, 3)
    assert found["path_counts"] == {"1-3": [2, 0, 0], "2-2": [0, 2, 0], "3-1": [0, 0, 3]}  # experts count from 1
    assert found["class_paths"]["c"] == {"path": "3-1", "share": 1.0}
    assert found["top_path_share"] == pytest.approx(3 / 7)


def test_one_path_for_all():
    labels = torch.tensor([0, 1, 1, 0])
    found = routing.measure(probs_of(4 * [[1, 1]], 2), labels, ["a", "b"])
    assert found["mutual_information"] == found["mutual_information_chance"] == 0
    assert (found["paths_used"], found["top_path_share"], found["dominant_paths"]) == (1, 1.0, 1)


def test_figures_of_a_mixed_case_are_those_counted_by_hand():
    # class a: 3 on path 1-1, 1 on 1-2; class b: 2 on 1-2, 4 on 2-2
    winners = 3 * [[0, 0]] + [[0, 1]] + 2 * [[0, 1]] + 4 * [[1, 1]]
    labels = torch.tensor(4 * [0] + 6 * [1])
    probs = probs_of(winners, 2)
    found = routing.measure(probs, labels, ["a", "b"])
    assert found["path_counts"] == {"1-1": [3, 0], "1-2": [1, 2], "2-2": [0, 4]}
    assert found["class_paths"] == {"a": {"path": "1-1", "share": 0.75}, "b": {"path": "2-2", "share": pytest.approx(4 / 6)}}
    # (L, K, classes), shares of a class
    expected = [[[1, 2 / 6], [0, 4 / 6]], [[3 / 4, 0], [1 / 4, 1]]]
    torch.testing.assert_close(torch.tensor(found["expert_share"]), torch.tensor(expected))
    joint = {("a", "1-1"): 0.3, ("a", "1-2"): 0.1, ("b", "1-2"): 0.2, ("b", "2-2"): 0.4}
    one, other = {"a": 0.4, "b": 0.6}, {"1-1": 0.3, "1-2": 0.3, "2-2": 0.4}
    information = sum(p * math.log(p / one[label] / other[path]) for (label, path), p in joint.items())
    entropy = -sum(p * math.log(p) for p in one.values())
    assert found["mutual_information"] == pytest.approx(information / entropy)
    assert 0 < found["mutual_information_chance"] < 0.5 * found["mutual_information"]
    importance = [(6 * 0.9 + 4 * 0.1) / 10, (4 * 0.9 + 6 * 0.1) / 10]
    assert found["importance_cv2"][0] == pytest.approx(((importance[0] - importance[1]) / 2 / 0.5) ** 2)
    assert found["load_cv2"][0] == pytest.approx(((0.6 - 0.4) / 2 / 0.5) ** 2)  # six images to one expert, four to the other
    assert found["entropy"] == pytest.approx(2 * [-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)])


def test_entropy_is_one_for_an_even_mixture_and_zero_for_a_hard_choice():
    labels = torch.tensor([0, 1])
    even = routing.measure(torch.full((2, 1, 4), 0.25), labels, ["a", "b"])
    hard = routing.measure(probs_of([[0], [1]], 4, top=1.0), labels, ["a", "b"])
    assert even["entropy"] == pytest.approx([1])
    assert hard["entropy"] == pytest.approx([0])


def test_paths_below_one_percent_are_told_apart():
    winners = 981 * [[0]] + 10 * [[1]] + 9 * [[2]]
    found = routing.measure(probs_of(winners, 4), torch.arange(1000) % 2, ["a", "b"])
    assert (found["paths_used"], found["paths_used_1pct"]) == (3, 2)


def test_chance_level_is_low_for_few_paths_and_high_for_many():
    def draw(number: int, layers: int, experts: int) -> dict:
        winners = torch.randint(0, experts, (number, layers)).tolist()
        return routing.measure(probs_of(winners, experts), torch.randint(0, 3, (number,)), ["a", "b", "c"])

    few, many = draw(3000, 1, 2), draw(60, 3, 8)
    assert few["mutual_information_chance"] < 0.002
    # paths that know nothing of the class: what looks like information is chance, and the chance level says so
    assert many["mutual_information"] > 0.5
    assert many["mutual_information_chance"] == pytest.approx(many["mutual_information"], abs=0.1)


# --- means over seeds


@pytest.mark.parametrize("values", [[1.0, 2.5], [90.0, 91.5, 88.25, 90.75]])
def test_interval_is_students(values):
    entry = runs.interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    assert entry["n"] == len(values)
    assert entry["mean"] - entry["ci95"] == pytest.approx(low)
    assert entry["mean"] + entry["ci95"] == pytest.approx(high)


def test_one_seed_has_no_interval():
    assert runs.interval([3.5]) == {"mean": 3.5, "ci95": None, "n": 1}
