"""What all pictures share: an arm's colour, and dots that do not hide each other."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from examples.image_classification.config import ROUTERS
from examples.shared.figures import lanes
from examples.shared.palette import ARMS, CLASSES, NEUTRAL, color
from examples.what_it_does.picture import ARMS as SMALL
from studies.cnn_experts.config import ARMS as CNN
from studies.regularizers.arms import ARMS as REGULARIZERS

LANGUAGE = ("none", "own", "penalty", "balance", "both", "ernie")
TUNED = ("none", "spread", "hold", "balance", "both", "hold+balance")


@pytest.mark.parametrize(
    "arms", [ROUTERS, SMALL, CNN, *REGULARIZERS.values(), LANGUAGE, TUNED], ids=lambda arms: "-".join(arms)[:30]
)
def test_arms_of_one_picture_have_colours_of_their_own(arms):
    assert set(arms) <= set(ARMS)
    for one, other in combinations(arms, 2):
        assert color(one) != color(other), (one, other)


def test_arms_that_add_the_same_thing_have_one_colour():
    assert color("none") == color("baseline") == color("no term")
    assert color("balance") == color("baseline+balance")
    assert color("penalty") == color("baseline+spectral") == color("spread")
    assert color("both") == color("spectral")
    assert color("an arm of somebody's own") == NEUTRAL
    assert len(set(CLASSES)) == len(CLASSES)


def test_equal_dots_lie_in_lanes_of_their_own():
    values = [3.0, 1.0, 3.0, 3.0, 2.0, 3.0, 3.0]
    offsets = lanes(values, 0.4)
    assert len({round(float(offset), 6) for value, offset in zip(values, offsets, strict=True) if value == 3.0}) == 5
    assert np.abs(offsets).max() <= 0.2
    by_value = offsets[np.argsort(values, kind="stable")]
    assert all(one != other for one, other in pairwise(by_value))
    assert len(lanes([])) == 0
