"""Asked after the results were seen: is what a strong penalty gains at low rates its own, or the gradient clipping's?

The norm of all gradients is clipped at 1 in every run. A penalty at strength 1 fills that norm in the first
steps, so that Adam's second moments of everything else begin small and its later steps are longer: as at a higher rate.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from examples.shared.progress import track
from examples.shared.runs import interval, versions
from examples.shared.storage import read_json, write_json
from studies.reproduction.statistics import paired

from . import train
from .protocol import Protocol, Run
from .study import Texts

RESULTS = Path(__file__).with_name("clipping.json")
MODEL, RATE, SEEDS = "mixtral-8", 5e-4, 3
ARMS = {"none": 0.0, "spread": 1.0}
CLIPS = {"clipped at 1": train.CLIP, "not clipped": math.inf}


def run(protocol: Protocol, out: Path, file: Path = RESULTS) -> Path:
    config, text = Texts(protocol, out).of(MODEL)
    cells = [(clip, arm, seed) for clip in CLIPS for arm in ARMS for seed in range(SEEDS)]
    losses: dict[str, dict[str, list[float]]] = {clip: {arm: [] for arm in ARMS} for clip in CLIPS}
    for clip, arm, seed in track(cells, "clipping", len(cells)):
        found = train.train(config, Run("clipping", MODEL, arm, ARMS[arm], RATE, seed), text, clip=CLIPS[clip])
        losses[clip][arm].append(found["loss"])
    write_json(file, {"losses": losses, "versions": versions("transformers")})
    return file


def said(file: Path = RESULTS) -> str:
    losses: dict[str, Any] = read_json(file)["losses"]
    parts, lower = [], []
    for clip, by_arm in losses.items():
        found = paired(*(dict(enumerate(by_arm[arm])) for arm in ("spread", "none")))
        assert found is not None
        assert found.half is not None
        lower.append(found.mean + found.half < 0)
        level = interval(list(by_arm["none"]))["mean"]
        parts.append(f"{clip} {found.mean:+.3f} ± {found.half:.3f} of {level:.3f}")
    why = "The gradient clipping does not explain it"
    if lower == [True, False]:
        why = "Without gradient clipping the difference is gone, so it is not the router's; probably such a penalty fills the "
        why += "clipped norm at first, which makes later steps longer, as a higher rate would"
    return (
        f"At the lowest rates {MODEL} has lower losses with a penalty at strength 1. {why}. At {RATE:g}, spread less none, "
        f"{SEEDS} seeds: {'; '.join(parts)}. Asked after the results were seen: `python -m studies.learning_rates clipping`."
    )
