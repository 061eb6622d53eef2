"""Everything that only a GPU can show, in minutes: `make gpu`, or `python -m pal.bench.gpu --out DIR`.

In this order: the values of every integration beside float32 on the CPU, what a step asks of the host, and the
benchmark `gpu-quick` with its goals. What there is is written after each part of each, so that a run that is cut off
keeps it. It needs no installed package: a source tree on PYTHONPATH, torch and transformers are enough.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pal.bench.checks import RatioCheck, checks
from pal.bench.launches import StepCount, count_steps
from pal.bench.machine import check_device, machine
from pal.bench.presets import PRESETS, Phase, Preset
from pal.bench.report import to_dict, to_markdown
from pal.bench.result import BenchResult, where_it_failed
from pal.bench.run import Bench, opened
from pal.bench.values import LIMITS, TOY, Compared, Size, compare
from pal.errors import PalError
from pal.files import write_text
from pal.lab.tables import markdown_table

SHARES = {"values": 0.25, "counts": 0.2}
"""Of the time, at most; the benchmark has the rest."""
COUNTED: tuple[Phase, ...] = ("train", "decode")


@dataclass
class GpuRun:
    """What there is so far."""

    folder: Path
    preset: Preset
    limit: float
    started: float = field(default_factory=time.monotonic)
    values: list[Compared] = field(default_factory=list)
    counts: list[StepCount] = field(default_factory=list)
    result: BenchResult | None = None
    left_out: list[str] = field(default_factory=list)
    """What there was no time for, or failed as a whole."""
    complete: bool = False
    _written: float = 0.0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{self.seconds:6.1f} s] {text}", file=sys.stderr, flush=True)

    def keep(self, now: bool = True) -> None:
        """Write `gpu.json` and `gpu.md`; not more often than each few seconds unless `now`."""
        if now or time.monotonic() - self._written > 5:
            write_text(self.folder / "gpu.json", json.dumps(self.to_dict(), indent=1) + "\n")
            write_text(self.folder / "gpu.md", self.to_markdown())
            self._written = time.monotonic()

    def goals(self) -> list[RatioCheck]:
        """Of the benchmark."""
        return [] if self.result is None else [check for check in checks(self.result) if check.kind == "goal"]

    @property
    def ok(self) -> bool:
        """Whether everything was looked at and is as it should be."""
        parts: Iterable[Any] = (*self.values, *self.counts, *self.goals())
        return self.complete and not self.left_out and all(part.ok for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "machine": machine(self.preset),
            "seconds": round(self.seconds, 1),
            "complete": self.complete,
            "ok": self.ok,
            "checks": [dict(zip(("name", "value", "target", "ok"), line, strict=True)) for line in self.lines()],
            "values": [one.to_dict() for one in self.values],
            "counts": [one.to_dict() for one in self.counts],
            "bench": None if self.result is None else to_dict(self.result),
            "left_out": self.left_out,
        }

    def lines(self) -> list[tuple[str, float | None, str, bool]]:
        """All checks: what, the number, its bound, and whether it is kept."""
        found: list[tuple[str, float | None, str, bool]] = []
        for dtype, limits in LIMITS.items():
            ours = [one for one in self.values if one.case.dtype == dtype]
            kind = str(dtype).split(".")[1]
            for quantity, limit in limits.items():
                numbers = [value for one in ours if (value := getattr(one, quantity)) is not None]
                if numbers:
                    found.append((f"{kind}: worst {quantity}", max(numbers), f"<= {limit:g}", max(numbers) <= limit))
            written = [one.tokens for one in ours if one.tokens is not None]
            if written:
                found.append((f"{kind}: answers that differ", written.count(False), "0", all(written)))
            failed = sum(one.failed is not None for one in ours)
            if ours:
                found.append((f"{kind}: cases that fail, of {len(ours)}", failed, "0", failed == 0))
        for one in self.counts:
            how = ", compiled" if one.compiled else ""
            place = f"{one.variant}, {one.phase}, {one.audio_tokens}, batch {one.batch}{how}"
            found.append((f"waits for the device: {place}", one.waits, "0" if one.gates else "", one.ok))
        found += [_goal_line(check) for check in self.goals()]
        return found

    def to_markdown(self) -> str:
        """Checks first, then what they are made of."""
        facts = machine(self.preset)
        lines = [
            "# make gpu",
            "",
            f"{facts['device']}; torch {facts['torch']}, transformers {facts['transformers']}, pal {facts['pal']}; "
            f"{facts['date']}; {self.seconds:.0f} s.",
        ]
        if not self.complete:
            lines += ["", "**Incomplete**: the run was interrupted or is still running."]
        rows = [
            (name, "" if value is None else f"{value:.3g}", target, "ok" if ok else "**missed**")
            for name, value, target, ok in self.lines()
        ]
        lines += ["", "## Checks", "", *markdown_table(("check", "value", "target", ""), rows, left=1)]
        if self.left_out:
            lines += ["", "## Left out", "", *(f"- {one}" for one in self.left_out)]
        if self.values:
            lines += ["", "## Values beside float32 on the CPU", "", *_value_table(self.values)]
        if self.counts:
            lines += ["", "## What a step asks of the host", "", *_count_table(self.counts)]
        text = "\n".join(lines) + "\n"
        return text if self.result is None else text + "\n" + "#" + to_markdown(self.result).replace("\n## ", "\n### ")


def _goal_line(check: RatioCheck) -> tuple[str, float | None, str, bool]:
    value, what = check.ratio, "share of"
    bound = f">= {check.at_least:.3g}" if check.at_most is None else f"<= {check.at_most:.3g}"
    if check.quantity == "seconds" and check.at_most is not None and check.at_most <= 1:
        value, bound, what = 1 / value, f">= {1 / check.at_most:.3g}", "times faster than"
    place = f"{check.variant}, {check.phase}, {check.audio_tokens}, batch {check.batch}"
    return f"{place}: {check.quantity}, {what} {check.against}", value, bound, check.ok


def _value_table(values: Sequence[Compared]) -> list[str]:
    """The worst of each integration, family, dtype and way."""
    groups: dict[tuple[str, ...], list[Compared]] = {}
    for one in values:
        case = one.case
        way = f"{'packed' if case.rows == 'none' else 'padded'}{', compiled' if case.compiled else ''}"
        way += ", CUDA graph" if case.graph else ""
        groups.setdefault((case.integration, case.family, str(case.dtype).split(".")[1], way), []).append(one)
    rows = []
    for about, ones in groups.items():
        worst = [
            f"{max(found):.2g}" if (found := [v for one in ones if (v := getattr(one, name)) is not None]) else ""
            for name in ("loss", "gradients", "logits")
        ]
        failed = next((one.failed for one in ones if one.failed is not None), None)
        said = "ok" if all(one.ok for one in ones) else f"**off** {failed or ''}".strip()
        rows.append((*about, *worst, said.replace("|", "/")))
    return markdown_table(("integration", "LLM", "dtype", "rows", "loss", "gradients", "logits", ""), rows, left=4)


def _count_table(counts: Sequence[StepCount]) -> list[str]:
    rows = []
    for one in counts:
        numbers = [one.operations, one.launches, one.kernel_seconds and round(one.kernel_seconds * 1e3, 1), one.waits]
        cells = ["" if number is None else f"{number:,}" for number in numbers]
        how = "compiled" if one.compiled else "as it is"
        said = one.failed or ", ".join(one.where)
        about = (one.variant, one.phase, str(one.audio_tokens), str(one.batch), how)
        rows.append((*about, *cells, said.replace("|", "/")))
    head = ("variant", "phase", "audio tokens", "batch", "", "operations", "launches", "kernel ms", "waits", "where")
    return markdown_table(head, rows, left=5)


def everything(run: GpuRun, size: Size, parts: Sequence[str]) -> None:
    """All parts, each by itself: what fails is said, and the next begins."""
    device = torch.device(run.preset.device)
    if "values" in parts:
        _part(run, "values", lambda: _values(run, device, size))
    if "counts" in parts or "speed" in parts:
        _part(run, "models", lambda: _measured(run, parts))
    run.complete = True
    run.keep()


def _part(run: GpuRun, name: str, work: Callable[[], object]) -> None:
    run.say(name)
    try:
        work()
    except Exception as error:
        run.left_out.append(f"{name}: {where_it_failed(error)}")
        run.say(run.left_out[-1])
    run.keep()


def _values(run: GpuRun, device: torch.device, size: Size) -> None:
    end = run.seconds + SHARES["values"] * run.limit

    def done(one: Compared) -> None:
        run.values.append(one)
        if not one.ok:
            case = one.case
            run.say(f"off: {case} {one.failed or (one.loss, one.gradients, one.worst, one.logits, one.tokens)}")
        run.keep(now=False)

    _, left = compare(device, size, in_time=lambda: run.seconds < end, done=done)
    if left:
        run.left_out.append(f"values: no time for {left} cases")
    run.say(f"values: {len(run.values)} cases, {sum(not one.ok for one in run.values)} off, {left} left out")


def _measured(run: GpuRun, parts: Sequence[str]) -> None:
    preset = run.preset

    def keep(result: BenchResult) -> None:
        run.result = result
        run.keep()
        last = (*result.rows, *result.baselines)[-1:]
        run.say(f"measured: {len(result.rows)} rows, {len(result.left_out)} left out; last {[r.place for r in last]}")

    with opened(preset, keep=keep) as bench:
        run.result = bench.result
        if preset.device == "cpu":  # to try what a GPU runs
            bench.llm.packs = True
        if "counts" in parts:
            _part(run, "counts", lambda: _counts(run, bench))
        if "speed" in parts:
            _part(run, "speed", lambda: _speed(run, bench))


def _counts(run: GpuRun, bench: Bench) -> None:
    end = run.seconds + SHARES["counts"] * run.limit
    preset = bench.preset
    known = [place for place in preset.places() if place.phase in COUNTED and place.batch > 1]
    wanted = [length for length in (1500, "ragged", *preset.audio_tokens) if length in preset.audio_tokens][:2]
    places = [place for phase in COUNTED for place in known if place.phase == phase and place.length in wanted]

    def done(one: StepCount) -> None:
        run.counts.append(one)
        run.keep(now=False)

    _, left = count_steps(bench, bench.subjects(None), places, in_time=lambda: run.seconds < end, done=done)
    if left:
        run.left_out.append(f"counts: no time for {left} steps")
    run.say(f"counts: {len(run.counts)} steps, {sum(not one.ok for one in run.counts)} wait or fail, {left} left out")


def _speed(run: GpuRun, bench: Bench) -> None:
    bench.give(max(0.0, run.limit - run.seconds - 10))
    bench.measure("llm")
    bench.result.complete = True


def toy() -> tuple[Preset, Size]:
    """The same flow in seconds, on a CPU: what is measured says nothing."""
    small, quick = PRESETS["cpu-small"], PRESETS["gpu-quick"]
    changed = {
        "name": quick.name,
        "shape": "toy",
        "variants": ("plits", "lal", "mllama"),
        "audio_tokens": ("ragged",),
        "ragged": ((5, 16), (12, 24)),
        "text_tokens": 16,
        "batch": (2,),
        "phases": quick.phases,
        "prefill_batch": quick.prefill_batch,
        "scopes": quick.scopes,
        "train_tokens": quick.train_tokens,
        "repeats": 1,
        "decode_tokens": 1,
    }
    return small.model_copy(update=changed), TOY


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 where everything is as it should be, 1 where something is not, or there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m pal.bench.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--limit", type=float, default=460.0, help="seconds; what does not fit is left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny models, to try the run itself")
    parser.add_argument("--parts", default="values,counts,speed", help="of these, with commas")
    given = parser.parse_args(arguments)
    preset, size = toy() if given.toy else (PRESETS["gpu-quick"], Size())
    preset = preset.model_copy(update={"device": given.device})
    try:
        check_device(preset)
    except PalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    run = GpuRun(given.out, preset, given.limit)
    everything(run, size, given.parts.split(","))
    print(run.to_markdown())
    run.say(f"written: {run.folder / 'gpu.json'}, {run.folder / 'gpu.md'}; {'all ok' if run.ok else 'not all ok'}")
    return 0 if run.ok else 1


if __name__ == "__main__":
    sys.exit(main())
