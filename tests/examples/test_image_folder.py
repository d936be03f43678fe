"""Where the example's images come from: folders of photographs, and the embedded digits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from examples.image_classification import data
from examples.image_classification.config import Config
from examples.shared.command import ExperimentError

GREEN = (0, 255, 0)
CLASSES = ["a", "b", "c"]


def paint(path: Path, color: tuple[int, ...] = GREEN, mode: str = "RGB", size: tuple[int, int] = (12, 12), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color if len(color) > 1 else color[0]).save(path, **options)
    return path


def load(root: Path, **settings) -> data.ImageSet:
    return data.load(Config(data=str(root), **({"image_size": 8} | settings)))


def only(root: Path) -> Tensor:
    """The one image of class "a", (3, H, W), beside a class "b" that load asks for."""
    paint(root / "b" / "other.png")
    loaded = load(root)
    assert loaded.unreadable == []
    (image,) = loaded.images[loaded.labels == 0]
    return image.int()


def test_folder_gives_uint8_images_with_three_channels_and_sorted_classes(tmp_path):
    for name, count in (("cat", 2), ("ant", 3)):
        for number in range(count):
            paint(tmp_path / name / f"{number}.png")
    (tmp_path / ".hidden").mkdir()
    loaded = load(tmp_path, image_size=10)
    assert loaded.images.shape == (5, 3, 10, 10)
    assert loaded.images.dtype == torch.uint8
    assert loaded.classes == ["ant", "cat"]
    assert torch.bincount(loaded.labels).tolist() == [3, 2]
    assert loaded.augment == "flip"
    assert load(tmp_path, augment="none").augment == "none"


@pytest.mark.parametrize(
    ("name", "mode", "color", "expected"),
    [
        ("rgb.png", "RGB", (10, 20, 30), (10, 20, 30)),
        ("upper.PNG", "RGB", (10, 20, 30), (10, 20, 30)),
        ("gray.png", "L", (70,), (70, 70, 70)),
        ("bilevel.png", "1", (1,), (255, 255, 255)),
        ("gray_alpha.png", "LA", (70, 255), (70, 70, 70)),
        ("alpha.png", "RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("sixteen_bits.png", "I;16", (0x4600,), (70, 70, 70)),  # 0x46 = 70
        ("photo.jpg", "RGB", (200, 100, 50), (200, 100, 50)),
        ("upper.JPG", "RGB", (200, 100, 50), (200, 100, 50)),
        ("long.jpeg", "L", (90,), (90, 90, 90)),
        ("nested/deep/down.png", "RGB", (1, 2, 3), (1, 2, 3)),
        ("print.jpg", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_every_kind_of_image_keeps_its_colour(tmp_path, name, mode, color, expected):
    paint(tmp_path / "a" / name, color, mode)
    difference = only(tmp_path) - torch.tensor(expected)[:, None, None]
    assert difference.abs().max() <= 3  # JPEG rounds


@pytest.mark.parametrize("options", [{}, {"transparency": bytes([255, 128])}], ids=["opaque", "transparent"])
def test_palette_images_are_read_in_colour(tmp_path, options):
    image = Image.new("P", (12, 12), 0)
    image.putpalette([10, 20, 30, 0, 0, 0])
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "palette.png", **options)
    assert only(tmp_path)[:, 4, 4].tolist() == [10, 20, 30]


def test_images_that_are_not_square_are_cropped_in_the_middle(tmp_path):
    # squeezing instead would leave red and blue at the sides
    pixels = np.zeros((8, 24, 3), np.uint8)
    for place, channel in enumerate((0, 1, 2)):
        pixels[:, 8 * place : 8 * place + 8, channel] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "wide.png")
    assert torch.equal(only(tmp_path), torch.tensor(GREEN)[:, None, None].expand(3, 8, 8))


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 255  # stored: left black, right white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: top black, bottom white
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "turned.jpg", exif=exif, quality=95)
    image = only(tmp_path)
    assert image[:, :3].max() < 30
    assert image[:, 5:].min() > 225


def test_files_that_are_no_images_are_left_out(tmp_path):
    paint(tmp_path / "a" / "one.png")
    paint(tmp_path / "loose.png")  # in no class
    for name in ("notes.txt", "Thumbs.db", "movie.mp4"):
        (tmp_path / "a" / name).write_text("no image")
    only(tmp_path)


def test_classes_selects_and_orders(tmp_path):
    for value, name in enumerate(CLASSES):
        paint(tmp_path / name / "1.png", (value, value, value))
    loaded = load(tmp_path, classes=["c", "a"])
    assert loaded.classes == ["c", "a"]
    assert dict(zip(loaded.labels.tolist(), loaded.images[:, 0, 0, 0].tolist(), strict=True)) == {0: 2, 1: 0}


@pytest.mark.parametrize("content", ["", "text", "cut png", "cut jpg", "bad chunk"])
def test_one_unreadable_image_in_a_hundred_is_skipped_and_named(tmp_path, content):
    for number in range(99):
        paint(tmp_path / "ab"[number % 2] / f"{number}.png", size=(4, 4))
    whole = paint(tmp_path / "whole.jpg" if content == "cut jpg" else tmp_path / "whole.png", size=(64, 64)).read_bytes()
    half = whole[: len(whole) // 2]
    broken = {"": b"", "text": b"no image", "bad chunk": whole.replace(b"IDAT", b"I\x00AT")}.get(content, half)
    (tmp_path / "b" / "sub").mkdir()
    (tmp_path / "b" / "sub" / "broken.png").write_bytes(broken)
    loaded = load(tmp_path)
    assert loaded.unreadable == [str(Path("b/sub/broken.png"))]
    assert torch.bincount(loaded.labels).tolist() == [50, 49]


# --- mnist


def test_mnist_is_four_digits_of_28_pixels_and_can_be_resized(monkeypatch):
    raw = data._mnist()
    assert raw[0].shape == (5000, 1, 28, 28)
    assert torch.bincount(raw[1]).tolist() == [500] * 10
    ink = torch.stack([raw[0][raw[1] == digit].float().mean() for digit in range(10)])
    assert (int(ink.argmax()), int(ink.argmin())) == (0, 1)
    assert not raw[0][..., -1, -1].any()
    monkeypatch.setattr(data, "_mnist", lambda: raw)
    plain, small, chosen = data.load(Config()), data.load(Config(image_size=14)), data.load(Config(classes=["9", "0"]))
    assert plain.classes == ["3", "5", "8", "9"]
    assert plain.images.shape == (2000, 1, 28, 28)
    assert small.images.shape == (2000, 1, 14, 14)
    assert small.images.dtype == torch.uint8
    # halving a side is close to the mean of 2 x 2 pixels
    halved = torch.nn.functional.avg_pool2d(plain.images.float(), 2)
    assert (small.images.float() - halved).abs().mean() < 8
    assert torch.equal(small.labels, plain.labels)
    assert chosen.classes == ["9", "0"]
    assert torch.equal(chosen.images[chosen.labels == 0], raw[0][raw[1] == 9])


# --- formats and transparency


@pytest.mark.parametrize("suffix", ["webp", "WEBP", "gif", "bmp", "tiff", "ppm", "jfif", "avif", "jp2"])
def test_other_formats_are_read(tmp_path, suffix):
    written = {"jfif": "jpeg", "ppm": "ppm", "jp2": "jpeg2000"}.get(suffix.lower(), suffix.lower())
    Image.init()
    if written.upper() not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {written}")
    paint(tmp_path / "a" / f"one.{suffix}", (10, 200, 30), format=written)
    assert (only(tmp_path) - torch.tensor((10, 200, 30))[:, None, None]).abs().max() <= 6


@pytest.mark.parametrize("suffix", ["heic", "jxl", "svg", "NEF"])
def test_formats_that_are_not_read_are_counted_and_named(tmp_path, suffix):
    paint(tmp_path / "b" / "one.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"one.{suffix}").write_bytes(b"ftypheic")
    with pytest.raises(ExperimentError, match=rf"got 1 of 2, the first a.one\.{suffix}; mend them, save them as JPEG or PNG"):
        load(tmp_path)


def test_floating_point_pixels_are_counted_among_the_unreadable(tmp_path):
    paint(tmp_path / "b" / "one.png")
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((12, 12), 0.5, np.float32)).save(tmp_path / "a" / "one.tiff")
    with pytest.raises(ExperimentError, match=r"got 1 of 2, the first a.one\.tiff"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGBA", (200, 10, 10, 0), (255, 255, 255)),  # the colour under it is not seen
        ("RGBA", (200, 0, 100, 51), (244, 204, 224)),  # a fifth of it, four of white
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (0, 102), (153, 153, 153)),
    ],
)
def test_what_is_transparent_lies_on_white(tmp_path, mode, color, expected):
    paint(tmp_path / "a" / "one.png", color, mode)
    assert (only(tmp_path) - torch.tensor(expected)[:, None, None]).abs().max() <= 1


def test_a_palette_or_a_colour_may_be_transparent_too(tmp_path):
    image = Image.new("P", (12, 12), 0)
    image.putpalette([10, 20, 30, 0, 0, 0])
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "one.png", transparency=bytes([0, 255]))
    assert only(tmp_path).unique().tolist() == [255]
    paint(tmp_path / "a" / "one.png", (10, 20, 30), transparency=(10, 20, 30))
    assert only(tmp_path).unique().tolist() == [255]
