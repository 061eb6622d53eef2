"""Sections on results of `pal bench`: time, memory and operations of each variant relative to PLITS."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pal.errors import BundleError
from pal.lab.numbers import three_digits
from pal.report.embed import MediaEmbedder
from pal.report.page import Fold, PagePicture, Part, Points, Prose, Section, Table

TITLE = "Cost"
DESCRIPTION = "benchmarks (bench.json)"

_SCOPES = {"llm": "the LLM only", "end_to_end": "end to end"}
_PHASES = {"prefill": "prefill", "decode": "a token of decoding", "train": "a training step"}
_ROW = (
    *("variant", "scope", "phase", "audio_tokens", "batch", "seconds", "seconds_spread"),
    *("peak_bytes", "saved_bytes", "flops", "kv_bytes", "parameters"),
)
_HEADINGS = (
    *("audio tokens", "variant", "ms", "spread", "× PLITS", "peak MB", "saved MB", "% of PLITS"),
    *("GFLOP", "KV MB", "parameters"),
)


@dataclass(frozen=True)
class BenchRun:
    """Validated results of one benchmark run."""

    path: Path
    machine: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    ratios: Sequence[Mapping[str, Any]]
    """Ratios to PLITS, one entry for each of `rows`."""
    missed: Sequence[str]
    """Goals that are not met, in words."""
    goals: int
    """Number of all goals."""
    left_out: Sequence[str]
    """Measurements that were left out, with the reason."""


def find(path: Path) -> list[Path]:
    """Files `bench*.json` in a folder, or the path itself if it is a file of `pal bench --json`."""
    if path.is_dir():
        return sorted(path.glob("bench*.json"))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    return [path] if isinstance(found, dict) and {"machine", "rows", "ratios"} <= set(found) else []


def read(path: Path) -> BenchRun:
    """Read a file of `pal bench`. Raises BundleError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise BundleError(f"{path}: damaged; measure again") from None
    goals = [check for check in found["checks"] if check["kind"] == "goal"]
    rows, ratios = [{key: row[key] for key in _ROW} for row in found["rows"]], found["ratios"]
    if len(rows) != len(ratios):
        raise BundleError(f"{path}: damaged; measure again")
    return BenchRun(
        path=path,
        machine=found["machine"],
        rows=rows,
        ratios=[{"speed": one["speed"], "saved_bytes": one["saved_bytes"]} for one in ratios],
        missed=[_goal(check) for check in goals if not check["ok"]],
        goals=len(goals),
        left_out=[f"{one['variant']}, {one['scope']}, {one['phase']}: {one['why']}" for one in found["left_out"]],
    )


def chapter(found: Sequence[tuple[str, BenchRun]], embed: MediaEmbedder) -> tuple[list[Section], list[dict[str, Any]]]:
    """One section for each run."""
    sections, facts = [], []
    for name, bench in found:
        sections.append(Section(name, _parts(bench, embed)))
        facts.append({"rows": len(bench.rows), "goals": bench.goals, "missed": list(bench.missed)})
    return sections, facts


def _parts(bench: BenchRun, embed: MediaEmbedder) -> list[Part]:
    machine = bench.machine
    parts: list[Part] = [
        Prose(
            f"{machine['shape']}; {machine['dtype']}, training stage “{machine['train']}”. {machine['device']}, "
            f"{machine['threads']} threads; torch {machine['torch']}, transformers {machine['transformers']}, "
            f"pal {machine['pal']}; {machine['date']}. × PLITS is the speed-up over PLITS, % of PLITS the saved "
            "activations relative to PLITS."
        )
    ]
    if bench.goals:
        parts.append(Prose(f"{bench.goals - len(bench.missed)} of {bench.goals} goals are met."))
        parts += [Fold("Goals that are not met", [Points(bench.missed)])] if bench.missed else []
    for scope, batch in dict.fromkeys((row["scope"], row["batch"]) for row in bench.rows):
        picture = bench.path.parent / f"{scope.replace('_', '-')}-batch{batch}.png"
        if picture.is_file():
            alt = f"Time and bytes over the number of audio tokens, {_SCOPES[scope]}, batch {batch}; numbers below"
            source, missing = embed.picture(picture)
            parts.append(PagePicture(alt, source=source, missing=missing))
        for phase in dict.fromkeys(row["phase"] for row in bench.rows):
            cells = [
                _cells(row, ratio)
                for row, ratio in zip(bench.rows, bench.ratios, strict=True)
                if (row["scope"], row["batch"], row["phase"]) == (scope, batch, phase)
            ]
            if cells:
                title = f"{_SCOPES[scope]}: {_PHASES[phase]}, batch {batch}"
                parts.append(Table.of(title[0].upper() + title[1:], _HEADINGS, cells))
    return [*parts, Fold("Left out", [Points(bench.left_out)])] if bench.left_out else parts


def _cells(row: Mapping[str, Any], ratio: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['audio_tokens']:,}",
        row["variant"],
        three_digits(row["seconds"], 1e3),
        three_digits(row["seconds_spread"], 1e3),
        three_digits(ratio["speed"]),
        three_digits(row["peak_bytes"], 1e-6),
        three_digits(row["saved_bytes"] or None, 1e-6),
        three_digits(ratio["saved_bytes"], 100),
        three_digits(row["flops"], 1e-9),
        three_digits(row["kv_bytes"] or None, 1e-6),
        f"{row['parameters']:,}",
    ]


def _goal(check: Mapping[str, Any]) -> str:
    bounds = [f"{sign} {check[key]:g}" for sign, key in (("≥", "at_least"), ("≤", "at_most")) if check[key] is not None]
    place = f"{check['phase']}, {check['audio_tokens']} audio tokens, batch {check['batch']}"
    what = f"{check['variant']} against {check['against']}, {check['quantity']}, {place}"
    return f"{what}: {check['ratio']:.3f}, wanted {' and '.join(bounds)}"
