"""The example's splits and augmentation."""

import pytest
import torch
from torch import Tensor

from examples.image_classification import data
from examples.image_classification.config import Config

CLASSES = ["a", "b", "c"]


def labels_of(*counts: int) -> Tensor:
    """So many images of each class, in mixed order."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    return labels[torch.randperm(len(labels))]


# --- split


@pytest.mark.parametrize("each", [8, 9, 20, 27, None])
def test_split_takes_70_15_15_percent_of_each_class(each):
    labels = labels_of(30, 40, 50)
    config = Config(novel=3, samples_per_class=each)
    chosen = data.split(labels, CLASSES, config, seed=0)
    each = each or 27  # the smallest class has 30, and 3 are novel
    train, val = round(0.7 * each), round(0.15 * each)
    for part, count in ((chosen.train, train), (chosen.val, val), (chosen.test, each - train - val)):
        assert torch.bincount(labels[part], minlength=3).tolist() == [count] * 3
    assert chosen.novel.shape == (3, 3)
    assert torch.equal(labels[chosen.novel], torch.arange(3)[:, None].expand(3, 3))


def test_no_image_is_in_two_parts():
    # an image in train and novel, say, would make the one-shot test one of memory
    for seed in range(5):
        chosen = data.split(labels_of(30, 40, 50), CLASSES, Config(novel=5), seed)
        everything = torch.cat([part.flatten() for part in chosen])
        assert len(everything.unique()) == len(everything) == 90


def test_split_depends_on_the_seed_only():
    labels, config = labels_of(30, 40, 50), Config(novel=3)
    first, again, other = (data.split(labels, CLASSES, config, seed) for seed in (7, 7, 8))
    for part, same, different in zip(first, again, other, strict=True):
        assert torch.equal(part, same)
        assert not torch.equal(part, different)
        # another order of the same images would be no other split
        assert set(part.flatten().tolist()) != set(different.flatten().tolist())


# --- augment


def shifted(image: Tensor, rows: int, columns: int) -> Tensor:
    """The image moved by whole pixels, its edge repeated: a window into a wider image."""
    reach, side = 4, image.shape[-1]
    wide = torch.nn.functional.pad(image.float(), 4 * [reach], mode="replicate").to(image.dtype)
    return wide[:, reach + rows : reach + rows + side, reach + columns : reach + columns + side]


def found_shifts(images: Tensor, augmented: Tensor, mirror: bool) -> list[list[tuple[int, int]]]:
    """For each image every (rows, columns) within an eighth of the side that makes the augmented image."""
    reach = range(-(images.shape[-1] // 8), images.shape[-1] // 8 + 1)
    results = []
    for before, after in zip(images, augmented, strict=True):
        pairs = [(rows, columns) for rows in reach for columns in reach]
        want = after.flip(-1) if mirror else after
        results.append([pair for pair in pairs if torch.equal(shifted(before, *pair), want)])
    return results


def noise(batch: int, side: int, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8)


def test_none_leaves_images_alone():
    images = noise(4, 16)
    assert torch.equal(data.augment(images, "none", torch.Generator()), images)


def test_shift_moves_each_image_by_up_to_an_eighth():
    images = noise(1, 16).repeat(300, 1, 1, 1)
    kept = images.clone()
    augmented = data.augment(images, "shift", torch.Generator().manual_seed(0))
    assert torch.equal(images, kept)  # the data set itself must not drift from epoch to epoch
    assert augmented.shape == images.shape
    assert augmented.dtype == torch.uint8
    found = found_shifts(images, augmented, mirror=False)
    assert all(len(pairs) == 1 for pairs in found)
    assert len({pairs[0] for pairs in found}) == 25  # every one of 5 x 5 shifts occurs among 300


def test_each_image_of_a_batch_keeps_its_own_pixels():
    images = noise(20, 8, channels=1)
    augmented = data.augment(images, "shift", torch.Generator().manual_seed(0))
    assert all(found_shifts(images, augmented, mirror=False))


def test_flip_shifts_and_mirrors_half():
    images = noise(100, 8)
    augmented = data.augment(images, "flip", torch.Generator().manual_seed(0))
    plain, mirrored = (found_shifts(images, augmented, mirror=mirror) for mirror in (False, True))
    assert all(bool(one) != bool(other) for one, other in zip(plain, mirrored, strict=True))
    assert 30 < sum(map(bool, mirrored)) < 70


@pytest.mark.parametrize("kind", ["shift", "flip"])
def test_augmentation_repeats_with_its_generator(kind):
    images = noise(30, 16)
    first, again, other = (data.augment(images, kind, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_as_float_maps_bytes_to_minus_one_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(data.as_float(images), torch.tensor([-1.0, -0.6, 1.0]))
    assert images.tolist() == [0, 51, 255]
