"""Results of an ablation: tables, sentences and plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pal.evaluate import Result
from pal.lab.tables import markdown_table
from pal.plots import colour_of
from pal.probe.axes import GridCell
from pal.probe.crossed_bootstrap import INTERVALS, CrossedBootstrap, Estimate
from pal.probe.probe_result import Plot, TableRow
from pal.train.curves import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CellAnswers:
    """Answers of all runs of the grid to one manifest's questions."""

    name: str
    scores: Sequence[Sequence[Result]]
    """Results by cell and seed."""
    parts: Mapping[str, Sequence[int]]
    """Name of a domain or task -> indices of its questions."""

    @property
    def questions(self) -> int:
        """Number of questions."""
        return len(self.scores[0][0].items)

    @property
    def errors(self) -> int:
        """Number of answers with an error, over all runs."""
        return sum(len(score.errors) for row in self.scores for score in row)

    def draws(self, some: Sequence[int] | None = None) -> CrossedBootstrap:
        """Bootstrap over all questions, or those with the indices `some`."""
        chosen = range(self.questions) if some is None else some
        items = [[[score.items[i] for i in chosen] for score in row] for row in self.scores]
        right_XKI = np.array([[[bool(item.correct) for item in run] for run in row] for row in items], float)
        no_audio_XKI = np.array(
            [[[bool(item.no_audio_correct) for item in run] for run in row] for row in items], float
        )
        return CrossedBootstrap(right_XKI, no_audio_XKI, [item.group for item in items[0][0]])


@dataclass(frozen=True)
class CellCost:
    """Cost of training a cell."""

    trained_parameters: int
    flops: int
    """FLOPs of a training step."""
    saved_bytes: int
    """Bytes of activations that a training step saves for the backward pass."""
    peak_bytes: int
    """Peak memory of a training step."""
    step_seconds: float
    """Median over steps and seeds; includes effects of other load on the machine."""


_KEPT = {"kept": "ci95", "kept_above_no_audio": "kept_above_no_audio ci95"}
"""Heading of a share in the table of frozen networks -> heading of its interval."""

Curve = tuple[list[int], list[float]]
"""Steps and losses."""


@dataclass(frozen=True)
class AblationResult:
    """Answers and costs of all cells of an ablation."""

    cells: Sequence[GridCell]
    answers: Sequence[CellAnswers]
    costs: Sequence[CellCost]
    curves: Sequence[Sequence[Curve]]
    """Loss curves by cell and seed."""

    @cached_property
    def draws(self) -> list[CrossedBootstrap]:
        """Bootstrap for each manifest."""
        return [one.draws() for one in self.answers]

    # Tables

    def tables(self) -> dict[str, list[TableRow]]:
        """Tables of the result."""
        tables = {
            f"{one.name}, {one.questions} questions": self._score_rows(draws)
            for one, draws in zip(self.answers, self.draws, strict=True)
        }
        if self.frozen():
            tables["Score kept with frozen feed-forward networks"] = self._frozen_rows()
        tables["Cost of a training step"] = [
            {
                "cell": cell.label,
                "trained_parameters": cost.trained_parameters,
                "gigaflops": cost.flops / 1e9,
                "saved_megabytes": cost.saved_bytes / 1e6,
                "peak_megabytes": cost.peak_bytes / 1e6,
                "seconds": cost.step_seconds,
            }
            for cell, cost in zip(self.cells, self.costs, strict=True)
        ]
        for one in self.answers:
            if one.parts:
                tables[f"{one.name} by domain and task"] = [
                    {"questions_about": part, "n": len(some)}
                    | dict(zip((cell.label for cell in self.cells), one.draws(some).score_X.tolist(), strict=True))
                    for part, some in one.parts.items()
                ]
        return tables

    def _score_rows(self, draws: CrossedBootstrap) -> list[TableRow]:
        rows: list[TableRow] = []
        for place, cell in enumerate(self.cells):
            score, ci95 = draws.score(place)
            row = {
                "cell": cell.label,
                "score": score,
                "ci95": ci95,
                "lowest_seed": float(draws.by_seed_XK[place].min()),
                "highest_seed": float(draws.by_seed_XK[place].max()),
                "without_audio": float(draws.no_audio_X[place]),
            }
            difference = draws.difference(place, 0) if place else (None, None)
            rows.append({**row, "minus_first": difference[0], "minus_first ci95": difference[1]})
        return rows

    def frozen(self) -> list[tuple[int, int]]:
        """Pairs (frozen, trained) of cells that differ only in axis `ffn`."""
        places = {tuple(sorted(cell.values.items())): place for place, cell in enumerate(self.cells)}
        pairs = []
        for place, cell in enumerate(self.cells):
            trained = places.get(tuple(sorted({**cell.values, "ffn": "trained"}.items())))
            if cell.values.get("ffn") == "frozen" and trained is not None:
                pairs.append((place, trained))
        return pairs

    def _frozen_rows(self) -> list[TableRow]:
        rows: list[TableRow] = []
        for frozen, trained in self.frozen():
            for one, draws in zip(self.answers, self.draws, strict=True):
                kept = draws.kept(frozen, trained) or (None, None)
                gain = draws.gain_kept(frozen, trained) or (None, None)
                rows.append(
                    {
                        "cell": self.cells[frozen].label,
                        "on": one.name,
                        "trained": float(draws.score_X[trained]),
                        "frozen": float(draws.score_X[frozen]),
                        "kept": kept[0],
                        "ci95": kept[1],
                        "kept_above_no_audio": gain[0],
                        "kept_above_no_audio ci95": gain[1],
                    }
                )
        return rows

    def markdown(self) -> str:
        """Tables in Markdown, for documents."""
        first = self.cells[0].label
        headings = ["cell"]
        for one in self.answers:
            headings += [f"{one.name} ({one.questions})", f"less {first}", "no audio"]
        headings += ["parameters trained", "GFLOP a step", "MB saved", "s a step"]
        rows = []
        for place, (cell, cost) in enumerate(zip(self.cells, self.costs, strict=True)):
            row = [cell.label]
            for draws in self.draws:
                low, high = float(draws.by_seed_XK[place].min()), float(draws.by_seed_XK[place].max())
                row.append(f"{_shown(draws.score(place))} ({low:.3f} to {high:.3f})")
                row.append(_shown(draws.difference(place, 0), signed=True) if place else "")
                row.append(f"{draws.no_audio_X[place]:.3f}")
            row += [f"{cost.trained_parameters:,}", f"{cost.flops / 1e9:.3g}", f"{cost.saved_bytes / 1e6:.3g}"]
            rows.append([*row, f"{cost.step_seconds:.3g}"])
        text = _lines(markdown_table(headings, rows, left=len(headings)))
        if self.frozen():
            kept = []
            for pair in self._frozen_rows():
                whole, above = ((pair[key], pair[ends]) for key, ends in _KEPT.items())
                shares = ["" if share[0] is None else _percent(share) for share in (whole, above)]
                kept.append([pair["cell"], pair["on"], f"{pair['trained']:.3f}", f"{pair['frozen']:.3f}", *shares])
            head = ("cell", "on", "trained", "frozen", "kept", "kept above no audio")
            text += "\n" + _lines(markdown_table(head, kept, left=len(head)))
        seeds = len(self.answers[0].scores[0])
        runs = f"{seeds} seeds" if seeds > 1 else "one seed"
        return f"{text}\nExact match: mean of {runs} [95 % interval] (lowest to highest seed). {INTERVALS}\n"

    # Conclusions

    def reading(self) -> list[str]:
        """Conclusions from the numbers, one sentence each."""
        sentences = []
        if len(self.answers[0].scores[0]) == 1:
            sentences.append(
                "There is one seed: intervals cover clips alone, and other seeds may give the opposite result."
            )
        for frozen, trained in self.frozen():
            for one, draws in zip(self.answers, self.draws, strict=True):
                kept = draws.kept(frozen, trained)
                if kept is not None:
                    mine, theirs = self.cells[frozen].label, self.cells[trained].label
                    sentences.append(f"{mine} keeps {_percent(kept)} of the score of {theirs} on {one.name}.")
        for one, draws in zip(self.answers, self.draws, strict=True):
            sentences += self._compared(one.name, draws)
            for place, cell in enumerate(self.cells):
                gain, (low, high) = draws.gain(place)
                if low <= 0:
                    sentences.append(
                        f"On {one.name}, {cell.label} is not significantly better than the same models without audio "
                        f"({_points(gain)}, interval {_points(low)} to {_points(high)})."
                    )
        if len(self.cells) > 1:
            sentences.append(self._cost_sentence())
        failed = sum(one.errors for one in self.answers)
        if failed:
            sentences.append(
                f"{failed} answers raised an error and count as wrong; see the files in the folders 'on' of the runs."
            )
        return sentences

    def _compared(self, name: str, draws: CrossedBootstrap) -> Iterator[str]:
        first = self.cells[0].label
        similar = []
        for place, cell in enumerate(self.cells[1:], 1):
            by, (low, high) = draws.difference(place, 0)
            ends = f"paired interval {_points(low)} to {_points(high)}"
            if low <= 0 <= high:
                similar.append(f"{cell.label} ({_points(by)}, {ends})")
            else:
                side = "above" if by > 0 else "below"
                yield f"{cell.label} is {abs(100 * by):.1f} points {side} {first} on {name} ({ends}), significantly."
        if similar:
            yield f"Not significantly different from {first} on {name}, in points: {', '.join(similar)}."

    def _cost_sentence(self) -> str:
        first = self.costs[0]
        shares = [
            f"{cell.label} {cost.flops / first.flops:.2f} and {cost.saved_bytes / first.saved_bytes:.2f}"
            for cell, cost in zip(self.cells[1:], self.costs[1:], strict=True)
        ]
        return f"FLOPs and saved bytes of a training step relative to {self.cells[0].label}: {', '.join(shares)}."

    # Details

    def details(self) -> dict[str, Any]:
        """Details of each cell, for `probe.json`: scores by seed, intervals of parts, costs."""
        return {
            "cells": [
                {
                    "name": cell.name,
                    "label": cell.label,
                    "values": dict(cell.values),
                    "overrides": list(cell.overrides),
                    "cost": vars(self.costs[place]),
                    "by_seed": {
                        one.name: draws.by_seed_XK[place].tolist()
                        for one, draws in zip(self.answers, self.draws, strict=True)
                    },
                    "gain": {one.name: draws.gain(place) for one, draws in zip(self.answers, self.draws, strict=True)},
                }
                for place, cell in enumerate(self.cells)
            ],
            "parts": {
                one.name: {part: self._score_rows(one.draws(some)) for part, some in one.parts.items()}
                for one in self.answers
            },
            "errors": sum(one.errors for one in self.answers),
            "intervals": INTERVALS,
        }

    # Pictures

    def pictures(self) -> dict[str, Plot]:
        """Plots of scores, costs and losses."""
        rows, columns = len(self.cells), len(self.answers)
        return {
            "score": Plot(
                "Score of each cell",
                "Dot: one seed. Bar: mean of the seeds. Line: its 95 % interval over clips and seeds. Cross: the same "
                "models without audio.",
                self._draw_scores,
                size=(2.0 + 3.2 * columns, 1.6 + 0.4 * rows),
            ),
            "cost": Plot(
                "Score against the cost of a training step",
                "Left is cheaper, up is better; lines are 95 % intervals of the scores.",
                self._draw_costs,
                size=(9.0, 1.0 + 2.8 * columns),
            ),
            "loss": Plot("Training loss", "Thin: one seed, smoothed. Thick: mean of the seeds.", self._draw_losses),
        }

    def _draw_scores(self, figure: Figure) -> None:
        panels: Any = figure.subplots(1, len(self.answers), sharey=True, squeeze=False)[0]
        for axes, one, draws in zip(panels, self.answers, self.draws, strict=True):
            for place in range(len(self.cells)):
                score, ends = draws.score(place)
                axes.plot(ends, [place, place], color=colour_of(place), linewidth=1)
                axes.plot([score], [place], "|", color=colour_of(place), markersize=14, markeredgewidth=2.5)
                by_seed_K = draws.by_seed_XK[place]
                axes.plot(
                    by_seed_K, np.full(len(by_seed_K), place), "o", color=colour_of(place), markersize=4, alpha=0.6
                )
                axes.plot([draws.no_audio_X[place]], [place], "x", color="grey", markersize=5)
            axes.set_title(one.name, fontsize=10)
            axes.set_xlabel("exact match")
            axes.grid(alpha=0.25)
            axes.set_yticks(range(len(self.cells)), [cell.label for cell in self.cells])
        panels[0].invert_yaxis()

    def _draw_costs(self, figure: Figure) -> None:
        panels: Any = figure.subplots(len(self.answers), 2, sharey="row", sharex="col", squeeze=False)
        for row, one, draws in zip(panels, self.answers, self.draws, strict=True):
            for axes, costs in zip(row, (self._gigaflops(), self._saved()), strict=True):
                for place, cell in enumerate(self.cells):
                    score, ends = draws.score(place)
                    axes.plot([costs[place]] * 2, ends, color=colour_of(place), linewidth=1)
                    axes.plot([costs[place]], [score], "o", color=colour_of(place), label=cell.label)
                axes.grid(alpha=0.25)
                axes.set_xlim(0, 1.08 * max(costs))
            row[0].set_ylabel(f"{one.name}, exact match", fontsize=9)
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
        panels[-1][0].set_xlabel("gigaflops of a training step")
        panels[-1][1].set_xlabel("megabytes saved for the backward pass")

    def _gigaflops(self) -> list[float]:
        return [cost.flops / 1e9 for cost in self.costs]

    def _saved(self) -> list[float]:
        return [cost.saved_bytes / 1e6 for cost in self.costs]

    def _draw_losses(self, figure: Figure) -> None:
        axes: Axes = figure.subplots()
        for place, (cell, curves) in enumerate(zip(self.cells, self.curves, strict=True)):
            for steps, losses in curves:
                axes.plot(steps, smooth(losses), color=colour_of(place), linewidth=0.6, alpha=0.5)
            if len({tuple(steps) for steps, _ in curves}) == 1:
                mean = [statistics.mean(at) for at in zip(*(losses for _, losses in curves), strict=True)]
                axes.plot(curves[0][0], smooth(mean), color=colour_of(place), linewidth=1.8, label=cell.label)
            else:
                axes.plot([], [], color=colour_of(place), label=cell.label)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _shown(estimate: Estimate, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    value, (low, high) = estimate
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _percent(estimate: Estimate) -> str:
    value, (low, high) = estimate
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
