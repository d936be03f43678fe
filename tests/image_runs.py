"""Small runs of the image example, on images made here."""

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from examples.image_classification.__main__ import main

CLASSES = ["bar", "dot", "ring"]
ROUTERS = ["baseline", "clustering", "spectral"]
TINY = "--samples-per-class=20 --novel=2 --epochs=3 --seeds=2 --batch-size=16 --dim=16 --hidden=16 --image-size=16"
# rates at which so few steps learn something, and one update disturbs something: zeros would prove little
FLAGS = f"{TINY} --lr=0.01 --oneshot-lr=0.02"


def make_photos(root: Path, names: list[str]) -> str:
    """22 noisy images for each of up to three classes that can be told apart."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16] - 7.5
    shapes = [np.abs(x) < 3, x**2 + y**2 < 20, np.abs(np.hypot(x, y) - 6) < 1]
    for name, shape in zip(names, shapes, strict=False):
        (root / name).mkdir(parents=True)
        for number in range(22):
            pixels = generator.normal(80 + 90 * shape[..., None], 60, (16, 16, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return str(root)


class Run(NamedTuple):
    arguments: list[str]
    out: Path
    results: dict
    printed: str


def start(out: Path, photos: str, flags: str) -> Run:
    arguments = ["--data", photos, "--out", str(out), *flags.split()]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "200")
        assert main(arguments) == 0
    return Run(arguments, out, json.loads((out / "results.json").read_text()), printed.getvalue())
