"""The figures of the demo's page as SVG text that needs nothing else: no script, no font, no plotting library."""

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

STYLE = {"plits": ("#b3541e", "7 4"), "lal": ("#0b6e99", "none"), "pal": ("#5b3fa0", "2 3")}
"""Colour and dashes of each integration: they differ in hue, in lightness and, printed in grey, in dashes."""
_OTHER = ("#444444", "none")

# viridis, sampled: its lightness rises evenly, so it reads the same to colour-blind eyes
_VIRIDIS = np.array(
    [
        *((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141)),
        *((39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)),
    ],
    dtype=float,
)
_WIDTH = 720


def style_of(name: str) -> tuple[str, str]:
    """Colour and dash pattern of an integration."""
    return STYLE.get(name, _OTHER)


def loss_curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Training loss over steps, one line an integration, thin where raw and bold where smoothed.

    Args:
        curves: name -> [(step, loss), ...].
    """
    height, left, right, top, bottom = 300, 56, 70, 16, 44
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    last_step = max(step for step, _ in points) or 1
    ticks = _ticks(max(loss for _, loss in points))
    top_loss = ticks[-1]

    def x(step: float) -> float:
        return left + (_WIDTH - left - right) * step / last_step

    def y(loss: float) -> float:
        return top + (height - top - bottom) * (1 - loss / top_loss)

    parts = [_open(height, "Training loss of each integration over the steps")]
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{_WIDTH - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:g}", "end"))
    for tick in _ticks(last_step):
        if tick <= last_step:
            parts.append(_text(x(tick), height - bottom + 18, f"{tick:g}", "middle"))
    parts.append(_text((left + _WIDTH - right) / 2, height - 8, "step", "middle"))
    parts.append(_text(4, top + 4, "loss", "start"))
    ends = []
    for name, curve in curves.items():
        colour, dash = style_of(name)
        raw = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
        smooth = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in _smooth(curve))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1" opacity="0.25" points="{raw}"/>')
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2.2" stroke-dasharray="{dash}" points="{smooth}"/>'
        )
        ends.append((y(_smooth(curve)[-1][1]), name, colour))
    for place, name, colour in _spread(ends, 15):
        parts.append(_text(_WIDTH - right + 8, place + 4, name.upper(), "start", colour))
    return "".join([*parts, "</svg>"])


def accuracy_intervals(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Accuracy of each integration on each task: a dot with its interval, and a tick without audio.

    Args:
        scores: task -> integration -> what `Accuracy` holds.
    """
    row, left, right, top = 46, 150, 24, 30
    height = top + row * len(scores) + 26

    def x(score: float) -> float:
        return left + (_WIDTH - left - right) * score

    parts = [_open(height, "Accuracy of each integration on each task, with 95 % intervals")]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top - 8}" y2="{height - 24}"/>')
        parts.append(_text(x(tick), height - 8, f"{tick:.0%}", "middle"))
    for number, (task, by_name) in enumerate(scores.items()):
        middle = top + row * number + row / 2
        if number:
            line = middle - row / 2
            parts.append(f'<line class="grid" x1="0" x2="{_WIDTH - right}" y1="{line:.1f}" y2="{line:.1f}"/>')
        weight = ' font-weight="600"' if task == "all" else ""
        parts.append(f'<text class="label" x="{left - 12}" y="{middle + 4:.1f}" text-anchor="end"{weight}>')
        parts.append(f"{escape(task)}</text>")
        for place, (name, score) in enumerate(by_name.items()):
            colour, _ = style_of(name)
            at = middle + (place - (len(by_name) - 1) / 2) * 12
            low, high = score["ci95"]
            shown = f"{name.upper()} {task}: {score['score']:.3f} ({low:.3f} to {high:.3f})"
            parts.append(
                f"<g><title>{escape(shown)}</title>"
                f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{at:.1f}" y2="{at:.1f}" stroke="{colour}" '
                f'stroke-width="2.4"/>{_mark(place, x(score["score"]), at, colour)}</g>'
            )
            if score.get("no_audio_score") is not None:
                deaf = x(score["no_audio_score"])
                parts.append(
                    f'<line x1="{deaf:.1f}" x2="{deaf:.1f}" y1="{at - 5:.1f}" y2="{at + 5:.1f}" stroke="{colour}" '
                    'stroke-width="1.5" opacity="0.7"/>'
                )
    names = list(next(iter(scores.values()))) if scores else []
    for place, name in enumerate(names):
        colour, _ = style_of(name)
        at_x = left + place * 90
        parts.append(_mark(place, at_x + 5, 12, colour))
        parts.append(_text(at_x + 16, 16, name.upper(), "start", colour))
    parts.append(_text(left + len(names) * 90, 16, "upright tick: the same model without the audio", "start"))
    return "".join([*parts, "</svg>"])


def spectrogram(samples_N: NDArray[np.float32], rate: int, events: Sequence[tuple[str, float, float]]) -> str:
    """Mel-spaced spectrogram of a clip, with what sounds in it marked underneath.

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
    parts = [_open(height, "Spectrogram of the fresh scene, with its events underneath")]
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
    return "".join([*parts, "</svg>"])


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


def _smooth(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
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


def _spread(ends: Sequence[tuple[float, str, str]], gap: float) -> list[tuple[float, str, str]]:
    """Move labels down until none covers another."""
    placed: list[tuple[float, str, str]] = []
    for place, name, colour in sorted(ends):
        if placed and place - placed[-1][0] < gap:
            place = placed[-1][0] + gap
        placed.append((place, name, colour))
    return placed


def _mark(place: int, x: float, y: float, colour: str) -> str:
    """A circle, square or diamond, so that colour is not the only difference."""
    if place % 3 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if place % 3 == 2 else ""
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"{turn}/>'


def _open(height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'


def _text(x: float, y: float, text: str, anchor: str, colour: str | None = None) -> str:
    fill = f' style="fill:{colour};font-weight:600"' if colour else ""
    return f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{fill}>{escape(text)}</text>'
