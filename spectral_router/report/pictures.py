"""Pictures of a page, as SVG and PNG in text: no library, no network, and the page's own colours, light or dark."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 210, 46, 10, 10, 34
_LEVELS = 31  # steps of colour to each side of zero


@dataclass(frozen=True)
class Curve:
    """Values at 0, 1, 2, ... of a chart; hue: which colour of the page, or a number in [0, 1] along its ramp."""

    name: str
    values: Sequence[float]
    hue: int | float = 0


def chart(
    title: str,
    curves: Sequence[Curve],
    ticks: Sequence[str],
    *,
    across: str = "gate",
    band: Sequence[tuple[float, float]] | None = None,
    floor: float | None = None,
) -> str:
    """Curves over gates or checkpoints; `band`: what fresh gates have; `floor`: a value that the axis has to show."""
    finite = [v for curve in curves for v in curve.values if math.isfinite(v)]
    finite += [edge for pair in band or () for edge in pair if math.isfinite(edge) and edge < 1e12]
    if not finite:
        return ""
    low, high = min([*finite, *([] if floor is None else [floor])]), max(finite)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    pad = 0.05 * (high - low)
    low, high = (low if floor is not None else low - pad), high + pad
    count = max(len(ticks), 1)
    x = _scale(0, max(count - 1, 1), _LEFT + 6, _WIDTH - _RIGHT - 6)
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in _round_steps(low, high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 5}" y="{y(value) + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    every = max(1, math.ceil(count / 10), math.ceil(max(map(len, ticks), default=1) * count / 60))
    for place in range(0, count, every):
        label = f'<text class="tick" x="{x(place):.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{escape(ticks[place])}</text>'
        parts.append(label)
    parts.append(
        f'<text class="tick" x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(across)}</text>'
    )
    if band:
        edges = [(x(i), y(min(max(v, low), high))) for i, (_, v) in enumerate(band)]
        edges += [(x(i), y(min(max(v, low), high))) for i, (v, _) in reversed(list(enumerate(band)))]
        if len(band) == 1:  # one gate: a bar
            (_, top), (_, bottom) = edges
            edges = [(_LEFT, top), (_WIDTH - _RIGHT, top), (_WIDTH - _RIGHT, bottom), (_LEFT, bottom)]
        parts.append(f'<polygon class="band" points="{_points(edges)}"><title>fresh gates, 5 % to 95 %</title></polygon>')
    for curve in curves:
        parts += _curve(curve, ticks, x, y)
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg></figure>"


def hues(count: int) -> list[float]:
    """Of so many curves, the first to the last, along the ramp."""
    return [place / max(1, count - 1) for place in range(count)]


def ramp(hue: float) -> str:
    """Blue at 0, by purple to orange at 1: never green beside red."""
    return f"hsl({(210 + 170 * hue) % 360:.0f} 70% var(--light))"


def _curve(curve: Curve, ticks: Sequence[str], x: _Scale, y: _Scale) -> list[str]:
    colour = f"var(--c{curve.hue})" if isinstance(curve.hue, int) else ramp(curve.hue)
    pieces: list[list[tuple[float, float]]] = [[]]
    dots = []
    for place, value in enumerate(curve.values):
        if not math.isfinite(value):
            pieces.append([])
            continue
        pieces[-1].append((x(place), y(value)))
        if len(curve.values) <= 80:
            told = escape(f"{curve.name}, {ticks[place]}: {value:.4g}")
            circle = f'<circle cx="{x(place):.1f}" cy="{y(value):.1f}" r="2.6" fill="{colour}">'
            dots.append(f"{circle}<title>{told}</title></circle>")
    lines = [f'<polyline points="{_points(piece)}" style="stroke:{colour}"/>' for piece in pieces if len(piece) > 1]
    return lines + dots


class _Scale:
    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.start, self.factor = low, start, (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.factor


def _scale(low: float, high: float, start: float, end: float) -> _Scale:
    return _Scale(low, high, start, end)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in places)


def _round_steps(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def heat_map(matrix: Tensor, title: str) -> str:
    """A square of cosines in [-1, 1]: red above zero, blue below, clear at zero, so that it is right on any ground."""
    size = len(matrix)
    levels = (matrix.nan_to_num().clamp(-1, 1) * _LEVELS).round().to(torch.int16) + _LEVELS
    rows = b"".join(b"\x00" + bytes(row) for row in levels.tolist())
    palette, alpha = bytearray(), bytearray()
    for level in range(-_LEVELS, _LEVELS + 1):
        palette += bytes((214, 69, 48) if level > 0 else (52, 116, 204))
        alpha.append(round(255 * abs(level) / _LEVELS))
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 3, 0, 0, 0))
    data += _chunk(b"PLTE", bytes(palette)) + _chunk(b"tRNS", bytes(alpha))
    data += _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    source = base64.b64encode(data).decode()
    name = escape(title)
    return (
        f'<figure class="heat"><figcaption>{name}</figcaption><img alt="{name}" src="data:image/png;base64,{source}"></figure>'
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
