"""Reports of `pal bench`: files, tables, plots and ratios."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from pal.app.cli import app
from pal.bench.closed_form import ClosedForm
from pal.bench.machine import machine
from pal.bench.presets import PRESETS, preset_of
from pal.bench.report import to_dict, to_markdown, write
from pal.bench.result import BenchResult, Measurement
from pal.bench.run import run


def test_files_of_a_run(tmp_path: Path) -> None:
    """Numbers, tables and one plot a scope and batch size."""
    few = ("--variants", "lal", "--tokens", "20", "--phases", "prefill", "--scopes", "llm")
    out = ("--json", str(tmp_path / "rows.json"), "--out", str(tmp_path / "out"))
    done = CliRunner().invoke(app, ["bench", "--preset", "cpu-small", *few, *out])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "bench.json").read_text() == (tmp_path / "rows.json").read_text()
    assert (tmp_path / "out" / "bench.md").read_text() in done.stdout
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md", "llm-batch1.png"]
    assert (tmp_path / "out" / "llm-batch1.png").read_bytes().startswith(b"\x89PNG")


def test_plots_of_scopes_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rows go into which plot, by hand-made rows: nothing runs and nothing is rendered."""
    drawn: list[list[Measurement]] = []

    def render(draw: Any, size: Any) -> Any:
        drawn.append(draw.keywords["rows"])
        return SimpleNamespace(png=b"\x89PNG")

    monkeypatch.setattr("pal.bench.report.render", render)
    rows = [
        measurement(scope=scope, audio_tokens=tokens, batch=batch)
        for scope in ("llm", "end_to_end")
        for tokens in (20, 40)
        for batch in (1, 2)
    ]
    result = BenchResult(PRESETS["cpu-small"], machine(PRESETS["cpu-small"]), rows)
    result.paper = {(row.variant, row.place): ClosedForm(1, 1, 1) for row in rows}
    files = {file.name for file in write(result, tmp_path)}
    assert files == {"bench.json", "bench.md"} | {
        f"{scope}-batch{batch}.png" for scope in ("llm", "end-to-end") for batch in (1, 2)
    }
    assert [{(row.scope, row.batch) for row in some} for some in drawn] == [
        {("llm", 1)}, {("llm", 2)}, {("end_to_end", 1)}, {("end_to_end", 2)}
    ]  # fmt: skip
    assert all([row.audio_tokens for row in some] == [20, 40] for some in drawn)


def measurement(**changes: Any) -> Measurement:
    """A row of `lal` as if it had been measured."""
    about = {"variant": "lal", "scope": "llm", "phase": "train", "audio_tokens": 20, "text_tokens": 16, "batch": 1}
    numbers = {"seconds": None, "seconds_spread": None, "peak_bytes": 1, "saved_bytes": 1, "flops": 1}
    rest = {"flops_closed_form": 1.0, "kv_bytes": 1, "parameters": 1}
    return Measurement(**{**about, **numbers, **rest, **changes})


def test_ratios_compare_within_one_place() -> None:
    """Scope, phase, batch and length of PLITS' row are those of the row; each has a number of operations of its own."""
    places = list(product(("llm", "end_to_end"), ("prefill", "train"), (64, 300), (1, 2)))
    keys = ("scope", "phase", "audio_tokens", "batch")
    rows = [
        measurement(**dict(zip(keys, place, strict=True)), variant=variant, flops=factor * (number + 1))
        for number, place in enumerate(places)
        for variant, factor in (("plits", 10), ("lal", 1))
    ]
    paper = {(row.variant, row.place): ClosedForm(1, 1, 1) for row in rows}
    result = BenchResult(PRESETS["cpu-small"], machine(PRESETS["cpu-small"]), rows, paper=paper)
    found = [ratio for ratio in to_dict(result)["ratios"] if ratio["variant"] == "lal"]
    assert [tuple(ratio[key] for key in keys) for ratio in found] == places
    assert all(ratio["flops"] == 0.1 for ratio in found)


def test_markdown_marks_what_is_off() -> None:
    preset = preset_of("cpu-small", variants=["lal"], audio_tokens=[20], phases=["prefill"], scopes=["llm"])
    result = run(preset)
    assert "**off**" not in to_markdown(result)
    result.rows[0] = replace(result.rows[0], flops=round(2 * result.rows[0].flops_closed_form))
    assert "2.000 **off**" in to_markdown(result)
