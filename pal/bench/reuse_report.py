"""A run of `pal bench --preset reuse` as JSON and as Markdown, and its goals."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pal.bench.reuse import ReusePhase, ReuseResult
from pal.files import write_text
from pal.lab.numbers import three_digits
from pal.lab.tables import markdown_table


@dataclass(frozen=True)
class ReuseGoal:
    """A goal of the benchmark: the ratio of two rows' numbers."""

    what: str
    ratio: float | None
    """None where a row is missing."""
    bound: float
    at_least: bool

    @property
    def ok(self) -> bool:
        """Whether the goal is reached."""
        assert self.ratio is not None
        return self.ratio >= self.bound if self.at_least else self.ratio <= self.bound


def goals(result: ReuseResult) -> list[ReuseGoal]:
    """What sharing is for; without those that no row is about."""
    most = max(result.preset.questions)
    seconds = result.seconds

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above and below else None

    made = []
    for name in ("lal", "pal"):
        made += [
            ReuseGoal(
                f"{name}: first token of a further question, over that of text alone",
                ratio(seconds(name, True, "again", 1), seconds("text", True, "again", 1)),
                1.2,
                at_least=False,
            ),
            ReuseGoal(
                f"{name}: {most} questions on a clip, speed over {name} without sharing",
                ratio(seconds(name, False, "answers", most), seconds(name, True, "answers", most)),
                4.0,
                at_least=True,
            ),
            ReuseGoal(
                f"{name}: {most} questions on a clip, speed over plits with a shared prefix",
                ratio(seconds("plits", True, "answers", most), seconds(name, True, "answers", most)),
                2.0,
                at_least=True,
            ),
            ReuseGoal(
                f"{name}: a training step of 16 questions on a clip, speed over plits with a shared prefix",
                ratio(seconds("plits", True, "train", 16), seconds(name, True, "train", 16)),
                1.5,
                at_least=True,
            ),
        ]
    return [goal for goal in made if goal.ratio is not None]


def to_dict(result: ReuseResult) -> dict[str, Any]:
    """Plain data: sizes, machine, rows, what was left out and why, and goals."""
    sizes = result.preset.model_dump(mode="json", exclude={"llm"})
    return {
        "machine": {**result.machine, "preset": result.preset.name},
        "sizes": sizes,
        "rows": [asdict(row) for row in result.rows],
        "left_out": result.left_out,
        "goals": [{**asdict(goal), "ok": goal.ok} for goal in goals(result)],
    }


def to_json(result: ReuseResult) -> str:
    """`to_dict` as text."""
    return json.dumps(to_dict(result), indent=1) + "\n"


_PHASES: dict[ReusePhase, str] = {
    "answers": "All answers, from the clip's features",
    "again": "First tokens of further questions, on a clip that has been read",
    "train": "A training step",
}
_HEAD = ("questions", "variant", "shared", "ms", "spread", "questions a second", "GFLOP", "peak MB", "KV MB")


def to_markdown(result: ReuseResult) -> str:
    """Tables, one for each phase, then the goals."""
    preset, facts = result.preset, result.machine
    lines = [
        f"# pal bench --preset {preset.name}",
        "",
        f"{preset.shape}; {preset.dtype}. A clip of {preset.audio_tokens:,} tokens, {preset.before} text tokens before "
        f"it, questions of {preset.question} and answers of {preset.answer} tokens; projectors {preset.width} wide, "
        "training stage `joint`.",
        f"{facts['device']}, {facts['threads']} threads; torch {facts['torch']}, transformers {facts['transformers']},"
        f" pal {facts['pal']}; {facts['date']}.",
    ]
    for phase in dict.fromkeys(row.phase for row in result.rows):
        rows = [row for row in result.rows if row.phase == phase]
        cells = [
            (
                f"{row.questions}",
                row.variant,
                "yes" if row.shared else "no",
                three_digits(row.seconds, 1e3),
                three_digits(row.seconds_spread, 1e3),
                three_digits(row.questions / row.seconds if row.seconds else None),
                three_digits(row.flops, 1e-9),
                three_digits(row.peak_bytes, 1e-6),
                three_digits(row.kv_bytes, 1e-6) if row.kv_bytes else "",
            )
            for row in rows
        ]
        lines += ["", f"## {_PHASES[phase]}", "", *markdown_table(_HEAD, cells, left=3)]
    if made := goals(result):
        of_goals = [
            (
                goal.what,
                f"{goal.ratio:.2f}",
                f"{'>=' if goal.at_least else '<='} {goal.bound:g}",
                "ok" if goal.ok else "missed",
            )
            for goal in made
        ]
        lines += ["", "## Goals", "", *markdown_table(("", "ratio", "bound", ""), of_goals, left=1)]
    if result.left_out:
        lines += ["", "## Left out", ""]
        lines += [
            f"- {one['variant']}, {'shared' if one['shared'] else 'not shared'}, {one['phase']}, "
            f"{one['questions']} questions: {one['why']}"
            for one in result.left_out
        ]
    return "\n".join(lines) + "\n"


def write(result: ReuseResult, folder: Path) -> list[Path]:
    """`reuse.json` and `reuse.md`; each is whole at any moment."""
    files = {folder / "reuse.json": to_json(result), folder / "reuse.md": to_markdown(result)}
    for path, text in files.items():
        write_text(path, text)
    return list(files)
