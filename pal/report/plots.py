"""Plots drawn for pages: scores with intervals, and spectrograms of clips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pal.plots import TIME, colour_of, escape_label, style_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scores = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Row -> series -> {"score", "ci95" or None, "no_audio_score" or None}."""

RANGE_DB = 70
"""Range of levels in a spectrogram, in dB below its maximum."""
_WINDOW, _HOP = 512, 128
"""Window length and hop of a spectrogram, in samples."""
_LONGEST = 36
"""Maximum length of a row's name, in characters; longer names are cut, since the table has them in full."""


def series_of(scores: Scores) -> list[str]:
    """Names of all series, in order of appearance."""
    return list(dict.fromkeys(name for by_name in scores.values() for name in by_name))


def score_size(scores: Scores) -> tuple[float, float]:
    """Width and height in inches of the plot of `draw_scores`."""
    series = len(series_of(scores))
    return 8.0, 0.9 + len(scores) * max(0.3, 0.17 * (series + 1)) + 0.2 * math.ceil((series + 1) / 4)


def draw_scores(figure: Figure, scores: Scores, strong: str = "all") -> None:
    """Plot the score of each series in each row: a mark with its interval, and a vertical tick for the baseline.

    Args:
        figure: an empty one, of the size `score_size`.
        scores: entries without a score are left out.
        strong: name of the row in bold.
    """
    axes: Any = figure.subplots()
    names = series_of(scores)
    step = 0.7 / max(2, len(names))
    for place, name in enumerate(names):
        beside = (place - (len(names) - 1) / 2) * step
        rows = [(y + beside, by_name[name]) for y, by_name in enumerate(scores.values()) if name in by_name]
        rows = [(y, one) for y, one in rows if one["score"] is not None]
        style = style_of(place)
        axes.plot(
            [one["score"] for _, one in rows], [y for y, _ in rows], **{**style, "ls": "none"}, label=escape_label(name)
        )
        for y, one in rows:
            if one["ci95"] is not None:
                axes.plot(one["ci95"], [y, y], color=style["color"], ls=style["ls"], lw=1.8)
        without = [(one["no_audio_score"], y) for y, one in rows if one.get("no_audio_score") is not None]
        if without:
            axes.plot(*zip(*without, strict=True), "|", color=style["color"], ms=9, mew=1.5, alpha=0.7)
    axes.plot([], [], "|", color="0.4", ms=9, mew=1.5, label="the same model without audio")
    drawn = [x for line in axes.lines for x in line.get_xdata()]
    if max(drawn, default=1.0) <= 1:
        axes.set_xlim(right=1.02)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlim(left=min(0.0, *drawn))
    shown = [escape_label(name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…") for name in scores]
    axes.set_yticks(range(len(shown)), shown)
    for label, row in zip(axes.get_yticklabels(), scores, strict=True):
        label.set_weight("bold" if row == strong else "normal")
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, fontsize=9, frameon=False)


def draw_spectrogram(
    figure: Figure, samples_N: NDArray[np.float32], rate: int, events: Sequence[tuple[str, float, float]]
) -> None:
    """Plot the mel spectrogram of a clip, with its sound events below.

    Args:
        figure: the upper axes get the group id `TIME`.
        samples_N: mono samples [N].
        rate: sampling rate in Hz.
        events: (label, start, end) in seconds.
    """
    from matplotlib.mlab import specgram

    seconds = len(samples_N) / rate
    lanes = event_lanes(events)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[10, 1 + max(lanes, default=0)])
    padded_N = np.pad(samples_N, _WINDOW // 2)  # windows are centred, the first and the last one, too
    found: Any = specgram(padded_N, NFFT=_WINDOW, Fs=rate, noverlap=_WINDOW - _HOP)
    power_FX, hz_F, middle_X = found
    level_FX = 10 * np.log10(power_FX + 1e-12)
    seconds_X = middle_X - _WINDOW / 2 / rate
    scale = {"vmin": level_FX.max() - RANGE_DB, "vmax": level_FX.max()}
    upper.pcolormesh(seconds_X, hz_F, level_FX, cmap="viridis", shading="nearest", **scale)
    upper.set_gid(TIME)
    upper.set_yscale("function", functions=(_mel, _hz))
    shown = [hz for hz in (250, 500, 1000, 2000, 4000, 8000) if hz <= rate / 2]
    upper.set_yticks(shown, [f"{hz / 1000:g} kHz" if hz >= 1000 else f"{hz} Hz" for hz in shown])
    upper.set_ylim(0, rate / 2)
    for (label, start, end), lane in zip(events, lanes, strict=True):
        lower.barh(lane, end - start, left=start, height=0.8, color=colour_of(0), alpha=0.25)
        x, side = (end, "right") if start > 0.75 * seconds else (start, "left")
        lower.text(x, lane, f" {escape_label(label)} ", va="center", ha=side, fontsize=9)
    lower.set(xlim=(0, seconds), ylim=(max(lanes, default=0) + 0.5, -0.5), yticks=[], xlabel="seconds")
    lower.spines[["top", "right", "left"]].set_visible(False)


def event_lanes(events: Sequence[tuple[str, float, float]]) -> list[int]:
    """Lane of each event (label, start, end), such that events of a lane do not overlap and labels have room."""
    free: list[float] = []
    found = []
    for _, start, end in events:
        lane = next((i for i, until in enumerate(free) if until <= start), len(free))
        free[lane : lane + 1] = [max(end, start + 1.5)]
        found.append(lane)
    return found


def _mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2595 * np.log10(1 + hz / 700)


def _hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return 700 * (10 ** (mel / 2595) - 1)
