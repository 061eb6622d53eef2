"""The pages' figures as SVG text that needs nothing else: no font, no plotting library.

Series have numbers, in the order in which they are given. A number is a colour (`--s0` to `--s7` in `look/style.css`),
dashes and a mark, so that neither a colour-blind reader nor a print in grey mixes two of them up.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pal.report.page import TimeAxis

Curve = Sequence[tuple[float, float]]
"""(step, loss), ..."""

COLOURS = 8
_DASHES = ("7 4", "none", "2 3")
_MARKS = 3
_LETTER = 6.5
"""Width of a letter, at most on the average."""
_POINTS = 500
"""Most points of a curve; longer ones are drawn by means."""

# viridis, sampled: its lightness rises evenly, so it reads the same to colour-blind eyes
_VIRIDIS = np.array(
    [
        *((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141)),
        *((39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)),
    ],
    dtype=float,
)
_WIDTH = 720


def loss_curves(curves: Mapping[str, Curve], stages: Mapping[str, Sequence[tuple[float, str]]] | None = None) -> str:
    """Training loss over steps, one line a run, thin where raw and bold where smoothed.

    Args:
        curves: name -> its points.
        stages: name -> (last step before it, stage) of each stage but the first. Those that all runs share are upright
            lines, the others marks on their run's curve.
    """
    curves = {name: _thin(curve) for name, curve in curves.items() if curve}
    if not curves:
        return ""
    right = 14 + _width(max(curves, key=len))
    height, left, top, bottom = max(300, 60 + 15 * len(curves)), 56, 16, 44
    last_step = max(step for curve in curves.values() for step, _ in curve) or 1
    ticks = _ticks(max(loss for curve in curves.values() for _, loss in curve))

    def x(step: float) -> float:
        return left + (_WIDTH - left - right) * step / last_step

    def y(loss: float) -> float:
        return top + (height - top - bottom) * (1 - loss / ticks[-1])

    parts = [_open(height, f"Training loss over the steps: {', '.join(curves)}")]
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{left}" x2="{_WIDTH - right:.1f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:g}", "end"))
    for tick in _ticks(last_step):
        if tick <= last_step:
            parts.append(_text(x(tick), height - bottom + 18, f"{tick:g}", "middle"))
    parts.append(_text((left + _WIDTH - right) / 2, height - 8, "step", "middle"))
    parts.append(_text(4, top + 4, "loss", "start"))
    borders = {name: set((stages or {}).get(name, ())) for name in curves}
    shared = set.intersection(*borders.values())
    for step, stage in sorted(shared):
        parts.append(
            f'<line class="stage-line" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{top}" y2="{height - bottom}"/>'
        )
        parts.append(_text(x(step) + 4, top + 10, stage, "start"))
    ends = []
    for number, (name, curve) in enumerate(curves.items()):
        smooth = _smooth(curve)
        raw, mean = (" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points) for points in (curve, smooth))
        dash = _DASHES[number % len(_DASHES)]
        marks = [
            f"<g><title>{escape(f'{name}: {stage} begins')}</title>"
            f"{_mark(number, x(step), y(min(smooth, key=lambda point: abs(point[0] - step))[1]))}</g>"
            for step, stage in sorted(borders[name] - shared)
        ]
        parts.append(
            f'<g class="{series(number)}"><polyline fill="none" stroke="currentColor" opacity="0.25" points="{raw}"/>'
            f'<polyline fill="none" stroke="currentColor" stroke-width="2.2" stroke-dasharray="{dash}" '
            f'points="{mean}"/>'
            f"{''.join(marks)}</g>"
        )
        ends.append((y(smooth[-1][1]), number, name))
    for place, number, name in _spread(ends, 15, height - bottom):
        parts.append(_text(_WIDTH - right + 8, place + 4, name, "start", number))
    return "".join([*parts, "</svg>"])


def score_intervals(scores: Mapping[str, Mapping[str, Mapping[str, Any]]], label: str, strong: str = "all") -> str:
    """The score of each series in each row: a mark with its interval, and a tick without audio.

    Args:
        scores: row -> series -> {"score", "ci95" or None, "no_audio_score" or None}.
        label: what the figure shows, for those who do not see it.
        strong: the row in bold.
    """
    names = list(dict.fromkeys(name for by_name in scores.values() for name in by_name))
    if not names:
        return ""
    step, right = 12, 24
    row = step * max(len(names) + 1, 2) + 10
    left = min(300.0, max(110, 24 + _width(max(scores, key=len))))
    legend, top = _legend(names)
    height = top + row * len(scores) + 26
    ends = [
        end
        for by_name in scores.values()
        for one in by_name.values()
        for end in (one["score"], one.get("no_audio_score"), *(one["ci95"] or ()))
        if end is not None
    ]
    shares = max(ends) <= 1
    ticks = [0, 0.25, 0.5, 0.75, 1] if shares else _ticks(max(ends))
    least = min(0.0, *ends)

    def x(score: float) -> float:
        return left + (_WIDTH - left - right) * (score - least) / (ticks[-1] - least)

    parts = [_open(height, label), legend]
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top - 8}" y2="{height - 24}"/>')
        parts.append(_text(x(tick), height - 8, f"{tick:.0%}" if shares else f"{tick:g}", "middle"))
    for number, (task, by_name) in enumerate(scores.items()):
        middle = top + row * number + row / 2
        if number:
            line = middle - row / 2
            parts.append(f'<line class="grid" x1="0" x2="{_WIDTH - right}" y1="{line:.1f}" y2="{line:.1f}"/>')
        weight = ' class="strong"' if task == strong else ""
        shown = task if _width(task) <= left - 20 else f"{task[: int((left - 30) / _LETTER)]}…"
        parts.append(f'<text{weight} x="{left - 12:.1f}" y="{middle + 4:.1f}" text-anchor="end">')
        parts.append(f"<title>{escape(task)}</title>{escape(shown)}</text>")
        for place, name in enumerate(names):
            if name not in by_name or by_name[name]["score"] is None:
                continue
            score = by_name[name]
            at = middle + (place - (len(names) - 1) / 2) * step
            told, bar = f"{name}, {task}: {score['score']:.3f}", ""
            if score["ci95"] is not None:
                low, high = score["ci95"]
                told += f" ({low:.3f} to {high:.3f})"
                bar = (
                    f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{at:.1f}" y2="{at:.1f}" stroke="currentColor" '
                    'stroke-width="2.4"/>'
                )
            if score.get("no_audio_score") is not None:
                deaf = x(score["no_audio_score"])
                told += f", without audio {score['no_audio_score']:.3f}"
                bar += (
                    f'<line x1="{deaf:.1f}" x2="{deaf:.1f}" y1="{at - 5:.1f}" y2="{at + 5:.1f}" stroke="currentColor" '
                    'stroke-width="1.5" opacity="0.7"/>'
                )
            mark = _mark(place, x(score["score"]), at)
            parts.append(f'<g class="{series(place)}"><title>{escape(told)}</title>{bar}{mark}</g>')
    return "".join([*parts, "</svg>"])


def series(number: int) -> str:
    """The class of a series, which is its colour."""
    return f"s{number % COLOURS}"


def spectrogram(
    samples_N: NDArray[np.float32], rate: int, events: Sequence[tuple[str, float, float]]
) -> tuple[str, TimeAxis]:
    """Mel-spaced spectrogram of a clip, with what sounds in it marked underneath, and where its seconds are.

    Args:
        samples_N: mono samples [N].
        rate: Hz.
        events: (label, start, end) in seconds.
    """
    left, right, top, picture, lane = 56, 16, 12, 230, 20
    lanes = _lanes(events)
    height = top + picture + 26 + lane * (max(lanes, default=0) + 1) + 24
    seconds = len(samples_N) / rate
    width = _WIDTH - left - right

    def x(second: float) -> float:
        return left + width * second / seconds

    levels_MF = mel_levels(samples_N, rate)
    top_hz = rate / 2
    image = base64.b64encode(png(colours(levels_MF[::-1]))).decode()
    parts = [_open(height, "Spectrogram of the clip, with its events underneath")]
    parts.append(
        f'<image x="{left}" y="{top}" width="{width}" height="{picture}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{image}"/>'
    )
    for hz in (250, 500, 1000, 2000, 4000, 8000):
        if hz <= top_hz:
            at = top + picture * (1 - _mel(hz) / _mel(top_hz))
            parts.append(f'<line class="axis" x1="{left - 4}" x2="{left}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(_text(left - 8, at + 4, f"{hz / 1000:g} kHz" if hz >= 1000 else f"{hz} Hz", "end"))
    for second in range(int(seconds) + 1):
        parts.append(_text(x(second), top + picture + 16, f"{second} s" if second == 0 else f"{second}", "middle"))
    for (label, start, end), row in zip(events, lanes, strict=True):
        at = top + picture + 26 + lane * row
        parts.append(
            f'<rect class="event" x="{x(start):.1f}" y="{at}" width="{max(2.0, x(end) - x(start)):.1f}" '
            f'height="{lane - 5}" rx="3"/>'
        )
        anchor, at_x = ("start", x(start) + 4) if start < seconds * 0.75 else ("end", x(end) - 4)
        parts.append(f'<text class="event-label" x="{at_x:.1f}" y="{at + 11.5}" text-anchor="{anchor}">')
        parts.append(f"{escape(label)}</text>")
    time = TimeAxis(left / _WIDTH, (_WIDTH - right) / _WIDTH, top / height, (top + picture) / height, 0.0, seconds)
    return "".join([*parts, "</svg>"]), time


def mel_levels(samples_N: NDArray[np.float32], rate: int, bins: int = 128, frames: int = 600) -> NDArray[np.float64]:
    """Levels [M, F] in 0..1 over 70 dB below the loudest, on an even mel axis up to half the rate."""
    size = 512
    padded_N = np.pad(np.asarray(samples_N, dtype=float), size // 2)
    starts_F = np.linspace(0, len(padded_N) - size, min(frames, max(1, len(samples_N) // 64))).astype(int)
    windows_FN = padded_N[starts_F[:, None] + np.arange(size)] * np.hanning(size)
    power_FK = np.abs(np.fft.rfft(windows_FN, 2048)) ** 2
    edges = 700 * (10 ** (np.linspace(0, _mel(rate / 2), bins + 1) / 2595) - 1)
    at_K = np.fft.rfftfreq(2048, 1 / rate)
    level_FM = np.stack([power_FK[:, _band(at_K, low, high)].mean(1) for low, high in pairwise(edges)], axis=1)
    decibels_MF = 10 * np.log10(level_FM.T + 1e-12)
    return np.clip((decibels_MF - decibels_MF.max() + 70) / 70, 0, 1)


def colours(levels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Levels [..] in 0..1 -> RGB bytes [.., 3]."""
    at = np.clip(levels, 0, 1) * (len(_VIRIDIS) - 1)
    low = np.minimum(at.astype(int), len(_VIRIDIS) - 2)
    share = (at - low)[..., None]
    return np.rint(_VIRIDIS[low] * (1 - share) + _VIRIDIS[low + 1] * share).astype(np.uint8)


def png(rgb_HWC: NDArray[np.uint8]) -> bytes:
    """A PNG file of 8-bit RGB pixels [height, width, 3] (W3C PNG specification, filter type 0)."""
    height, width, _ = rgb_HWC.shape
    rows = b"".join(b"\x00" + row.tobytes() for row in np.ascontiguousarray(rgb_HWC))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)


def _band(at_K: NDArray[np.floating[Any]], low: float, high: float) -> NDArray[np.intp]:
    """The bins between two frequencies; the nearest one where they lie closer than the bins."""
    inside = np.flatnonzero((at_K >= low) & (at_K < high))
    return inside if len(inside) else np.array([np.abs(at_K - (low + high) / 2).argmin()])


def _thin(curve: Curve) -> Curve:
    """A curve of at most `_POINTS` points: means of stretches of equal length."""
    size = -(-len(curve) // _POINTS)
    if size == 1:
        return curve
    return [
        (part[-1][0], sum(loss for _, loss in part) / len(part))
        for part in (curve[i : i + size] for i in range(0, len(curve), size))
    ]


def _smooth(curve: Curve) -> list[tuple[float, float]]:
    """Mean over a window of a fortieth of the curve around each point."""
    reach = max(1, len(curve) // 80)
    losses = [loss for _, loss in curve]
    out = []
    for i, (step, _) in enumerate(curve):
        near = losses[max(0, i - reach) : i + reach + 1]
        out.append((step, sum(near) / len(near)))
    return out


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 to at least `most`."""
    if most <= 0:
        return [0.0, 1.0]
    raw = most / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def _lanes(events: Sequence[tuple[str, float, float]]) -> list[int]:
    """The row of each event, so that no two in a row overlap and labels have room."""
    free: list[float] = []
    rows = []
    for _, start, end in events:
        row = next((i for i, until in enumerate(free) if until <= start), len(free))
        free[row : row + 1] = [max(end, start + 1.5)]
        rows.append(row)
    return rows


def _spread(ends: Sequence[tuple[float, int, str]], gap: float, lowest: float) -> list[tuple[float, int, str]]:
    """Move labels down until none covers another, and then up from the lowest place that there is."""
    placed: list[tuple[float, int, str]] = []
    for place, number, name in sorted(ends):
        placed.append((max(place, placed[-1][0] + gap) if placed else place, number, name))
    for i in range(len(placed) - 1, -1, -1):
        limit = lowest if i == len(placed) - 1 else placed[i + 1][0] - gap
        placed[i] = (min(placed[i][0], limit), *placed[i][1:])
    return placed


def _legend(names: Sequence[str]) -> tuple[str, int]:
    """Marks and names of the series in as many lines as they need, and the height of it all."""
    parts, x, y = [], 10.0, 12
    told = "upright tick: the same model without the audio"
    for number, name in [*enumerate(names), (-1, told)]:
        width = 34 + _width(name)
        if x > 10 and x + width > _WIDTH:
            x, y = 10.0, y + 18
        if number < 0:
            parts.append(_text(x, y + 4, name, "start"))
        else:
            parts.append(f'<g class="{series(number)}">{_mark(number, x + 5, y)}</g>')
            parts.append(_text(x + 16, y + 4, name, "start", number))
        x += width
    return "".join(parts), y + 18


def _width(text: str) -> float:
    return _LETTER * len(text)


def _mark(number: int, x: float, y: float) -> str:
    """A circle, square or diamond, so that colour is not the only difference."""
    if number % _MARKS == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="currentColor"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if number % _MARKS == 2 else ""
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="currentColor"{turn}/>'


def _open(height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'


def _text(x: float, y: float, text: str, anchor: str, number: int | None = None) -> str:
    own = "" if number is None else f' class="own {series(number)}"'
    return f'<text{own} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
