"""A run as JSON, as Markdown, and as pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal.bench.checks import RatioCheck, checks
from pal.bench.result import BenchResult, Measurement
from pal.errors import PalError
from pal.files import write_bytes, write_text
from pal.lab.numbers import three_digits
from pal.lab.tables import markdown_table
from pal.plots import MISSING, render, style_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_REFERENCE = "plits"
_RATIOS = ("seconds", "peak_bytes", "saved_bytes", "flops", "kv_bytes")


def to_dict(result: BenchResult) -> dict[str, Any]:
    """Plain data.

    `rows` are the measurements. `ratios` compare each with PLITS at the same point: `speed` is how many times faster,
    the others are shares of PLITS's; `of_product` is its FLOP/s as a share of one large matrix product's. `checks`
    compare with the plain LLM, the cost model and the goals. Without `complete` the run was interrupted or is still
    running.
    """
    return {
        "machine": result.machine,
        "complete": result.complete,
        "rows": [asdict(row) for row in result.rows],
        "ratios": [_ratios(row, result.rows, result.rate) for row in result.rows],
        "baselines": [asdict(row) for row in result.baselines],
        "checks": [{**asdict(check), "ratio": check.ratio, "ok": check.ok} for check in checks(result)],
        "left_out": result.left_out,
    }


def to_json(result: BenchResult) -> str:
    """`to_dict` as text."""
    return json.dumps(to_dict(result), indent=1) + "\n"


def write(result: BenchResult, folder: Path) -> list[Path]:
    """`bench.json`, `bench.md` and a picture for each scope and size of batch, whole or not at all.

    Raises:
        PalError: matplotlib is not installed; JSON and Markdown are written all the same.
    """
    return [*write_numbers(result, folder), *_draw(result, folder)]


def write_numbers(result: BenchResult, folder: Path) -> list[Path]:
    """`bench.json` and `bench.md`, in the place of earlier ones; each is whole at any moment."""
    files = {folder / "bench.json": to_json(result), folder / "bench.md": to_markdown(result)}
    for path, text in files.items():
        write_text(path, text)
    return list(files)


def to_markdown(result: BenchResult) -> str:
    """Tables: one for each scope, phase and size of batch, then the checks."""
    facts = result.machine
    lines = [
        f"# pal bench --preset {facts['preset']}",
        "",
        f"{facts['shape']}; {facts['dtype']}, {result.preset.text_tokens} text tokens, "
        f"projectors {facts['projector_width']} wide, training stage `{facts['train']}`"
        + (f", {steps} training steps in a row." if (steps := result.preset.train_steps) > 1 else "."),
        f"{facts['device']}, {facts['threads']} threads; torch {facts['torch']}, transformers {facts['transformers']},"
        f" pal {facts['pal']}; {facts['date']}.",
    ]
    if result.rate:
        lines.append(f"One large product of random numbers runs at {result.rate / 1e12:.3g} TFLOP/s.")
    if any(row.audio_tokens == "ragged" for row in result.rows):
        parts = ", ".join(f"{clip} + {text}" for clip, text in result.preset.ragged)
        lines.append(f"`ragged` is a batch of rows of different lengths, audio + text tokens: {parts}.")
    if not result.complete:
        lines += ["", "**Incomplete**: the run was interrupted or is still running."]
    for scope, phase, batch in dict.fromkeys((row.scope, row.phase, row.batch) for row in result.rows):
        rows = [row for row in result.rows if (row.scope, row.phase, row.batch) == (scope, phase, batch)]
        lines += ["", f"## {_SCOPES[scope]}: {_PHASES[phase]}, batch {batch}", "", *_table(rows, result.rate)]
    lines += _check_lines(result)
    if result.left_out:
        lines += ["", "## Left out", ""]
        lines += [
            f"- {one['variant']}, {one['scope']}, {one['phase']}, {one['audio_tokens']} audio tokens, "
            f"batch {one['batch']}: {one['why']}"
            for one in result.left_out
        ]
    return "\n".join(lines) + "\n"


_SCOPES = {"llm": "LLM only", "end_to_end": "End to end"}
_PHASES = {
    "prefill": "prefill",
    "decode": "a token of decoding",
    "train": "a training step",
    "decode_graph": "a token of decoding, by a CUDA graph",
}
_HEAD = (
    *("audio tokens", "variant", "ms", "spread", "x PLITS", "peak MB", "saved MB", "% of PLITS"),
    *("GFLOP", "x closed form", "TFLOP/s", "% of a product's", "KV MB", "parameters"),
)


def _table(rows: Sequence[Measurement], rate: float | None) -> list[str]:
    lines = []
    for row in rows:
        ratios = _ratios(row, rows, rate)
        lines.append(
            (
                str(row.audio_tokens),
                row.variant,
                three_digits(row.seconds, 1e3),
                three_digits(row.seconds_spread, 1e3),
                three_digits(ratios["speed"]),
                three_digits(row.peak_bytes, 1e-6),
                three_digits(row.saved_bytes, 1e-6) if row.saved_bytes else "",
                three_digits(ratios["saved_bytes"], 100),
                three_digits(row.flops, 1e-9),
                three_digits(row.flops / row.flops_closed_form),
                three_digits(ratios["flops_per_second"], 1e-12),
                three_digits(ratios["of_product"], 100),
                three_digits(row.kv_bytes, 1e-6) if row.kv_bytes else "",
                f"{row.parameters:,}",
            )
        )
    return markdown_table(_HEAD, lines, left=2)


def _check_lines(result: BenchResult) -> list[str]:
    made = checks(result)
    lines: list[str] = []
    titles = {"goal": "Goals", "baseline": "PLITS and text against the plain LLM on the same rows"}
    for kind, title in titles.items():
        of_kind = [check for check in made if check.kind == kind]
        if of_kind:
            rows = [_check_row(check) for check in of_kind]
            lines += ["", f"## {title}", "", *markdown_table(_CHECK_HEAD, rows, left=5)]
    on_paper = [check for check in made if check.kind == "closed form"]
    off = [check for check in on_paper if not check.ok]
    lines += ["", "## The cost model, counted operations and measured bytes", ""]
    lines += [f"{len(on_paper) - len(off)} of {len(on_paper)} agree; the others are marked.", ""]
    return lines + markdown_table(_PAPER_HEAD, _paper_rows(on_paper), left=3)


_PAPER_HEAD = (
    *("variant", "scope", "phase", "audio tokens", "batch", "GFLOP", "on paper", "ratio"),
    *("saved MB", "on paper", "ratio", "KV MB", "on paper", "ratio"),
)


def _paper_rows(made: Sequence[RatioCheck]) -> list[tuple[str, ...]]:
    """What was measured, what the closed form says, and their ratio, by row of the run."""
    found: dict[tuple[str, ...], dict[str, RatioCheck]] = {}
    for check in made:
        place = (check.variant, check.scope, check.phase, str(check.audio_tokens), str(check.batch))
        found.setdefault(place, {})[check.quantity] = check
    rows: list[tuple[str, ...]] = []
    for row, of_row in found.items():
        cells: list[str] = []
        for quantity, scale in (("flops", 1e-9), ("saved_bytes", 1e-6), ("kv_bytes", 1e-6)):
            if quantity not in of_row:
                cells += ["", "", ""]
                continue
            one = of_row[quantity]
            mark = "" if one.ok else " **off**"
            cells += [three_digits(one.value, scale), three_digits(one.reference, scale), f"{one.ratio:.3f}{mark}"]
        rows.append((*row, *cells))
    return rows


_CHECK_HEAD = ("variant", "against", "scope", "phase", "quantity", "audio tokens", "batch", "ratio", "bound", "")


def _check_row(check: RatioCheck) -> tuple[str, ...]:
    bounds = [f"{sign} {bound:.3g}" for sign, bound in ((">=", check.at_least), ("<=", check.at_most)) if bound]
    return (
        check.variant,
        check.against,
        check.scope,
        check.phase,
        check.quantity,
        str(check.audio_tokens),
        str(check.batch),
        f"{check.ratio:.3f}",
        ", ".join(bounds),
        "ok" if check.ok else "missed" if check.kind == "goal" else "off",
    )


def _ratios(row: Measurement, rows: Iterable[Measurement], rate: float | None) -> dict[str, Any]:
    """A row against PLITS at the same place, and against a product; None where there is nothing to compare with."""
    plits = next((one for one in rows if one.variant == _REFERENCE and one.place == row.place), None)
    found: dict[str, Any] = {
        "variant": row.variant,
        "scope": row.scope,
        "phase": row.phase,
        "audio_tokens": row.audio_tokens,
        "batch": row.batch,
    }
    for quantity in _RATIOS:
        value, reference = getattr(row, quantity), getattr(plits, quantity, None)
        both = value is not None and reference
        if quantity == "seconds":
            found["speed"] = reference / value if both else None
        else:
            found[quantity] = value / reference if both else None
    speed = row.flops / row.seconds if row.seconds else None
    return {**found, "flops_per_second": speed, "of_product": speed / rate if speed and rate else None}


def _draw(result: BenchResult, folder: Path) -> list[Path]:
    paths = []
    timed = any(row.seconds is not None for row in result.rows)
    quantities = {"seconds": "seconds"} if timed else {"flops": "operations"}
    quantities |= {"peak_bytes": "peak bytes", "saved_bytes": "saved bytes", "kv_bytes": "bytes of K and V"}
    for scope, batch in dict.fromkeys((row.scope, row.batch) for row in result.rows):
        rows = [row for row in result.rows if (row.scope, row.batch) == (scope, batch)]
        phases = list(dict.fromkeys(row.phase for row in rows))
        title = f"{_SCOPES[scope]}, batch {batch}: {result.machine['shape']}"
        draw = partial(_draw_rows, rows=rows, phases=phases, quantities=quantities, title=title)
        rendered = render(draw, (4.2 * len(quantities), 3.2 * len(phases)))
        if rendered is None:
            raise PalError(MISSING)
        paths.append(folder / f"{scope.replace('_', '-')}-batch{batch}.png")
        write_bytes(paths[-1], rendered.png)
    return paths


def _draw_rows(
    figure: Figure, rows: Sequence[Measurement], phases: Sequence[str], quantities: Mapping[str, str], title: str
) -> None:
    """A panel for each phase and quantity over the audio tokens of a clip, a line for each variant."""
    grid = figure.subplots(len(phases), len(quantities), squeeze=False)
    variants = list(dict.fromkeys(row.variant for row in rows))
    for axes_of_phase, phase in zip(grid, phases, strict=True):
        for axes, (quantity, name) in zip(axes_of_phase, quantities.items(), strict=True):
            for place, variant in enumerate(variants):
                points = [
                    (row.audio_tokens, getattr(row, quantity))
                    for row in rows
                    if (row.variant, row.phase) == (variant, phase)
                    and getattr(row, quantity)
                    and row.audio_tokens != "ragged"
                ]
                if points:
                    axes.plot(*zip(*sorted(points), strict=True), ms=4, label=variant, **style_of(place))
            axes.set(title=f"{phase}: {name}", xlabel="audio tokens")
            if axes.lines:
                axes.set(xscale="log", yscale="log")
            else:
                axes.set_axis_off()
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(title)
