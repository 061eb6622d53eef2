"""What the demo shows: one table for the terminal, one page that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import soundfile
from rich import box
from rich.table import Table

from pal.app import figures
from pal.app.page import FRAME, NOTES
from pal.files import write_text

Row = tuple[str, list[str]]
"""What a row says, and its cell for each integration."""


def rows(results: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """The comparison as text: (section, rows), a cell for each integration in order."""
    each = list(results["integrations"].values())

    def row(label: str, cell: Callable[[dict[str, Any]], str]) -> Row:
        return label, [cell(one) for one in each]

    tasks = list(each[0]["per_task"])
    accuracy = [row("all tasks", lambda one: _interval(one["accuracy"]))]
    accuracy += [(task, [_interval(one["per_task"][task]) for one in each]) for task in tasks]
    accuracy += [
        row("without audio", lambda one: _percent(one["accuracy"]["no_audio_score"])),
        row("gain from audio", lambda one: _difference(one["accuracy"]["gain"], one["accuracy"]["gain_ci95"])),
        row("minus PLITS", lambda one: _difference(one["minus_plits"]["difference"], one["minus_plits"]["ci95"])),
    ]
    reference = each[0]["cost"]

    def cost(label: str, key: str, shown: Callable[[float], str]) -> Row:
        return row(label, lambda one: f"{shown(one['cost'][key])} {_times(one['cost'][key], reference[key])}")

    costs = [
        cost("training step", "step_seconds", _milliseconds),
        cost("peak memory", "peak_bytes", size),
        cost("saved activations", "saved_bytes", size),
        cost("K/V of one clip", "audio_kv_bytes", size),
    ]
    training = [
        row("median step", lambda one: _milliseconds(one["training"]["step_seconds"])),
        row("training in all", lambda one: f"{one['training']['seconds']:.0f} s"),
        row("steps", lambda one: f"{one['training']['steps']:,}"),
        row("parameters", lambda one: f"{one['cost']['parameters']:,}"),
        row("of them trained", lambda one: f"{one['cost']['trained_parameters']:,}"),
    ]
    return [("accuracy in %", accuracy), ("cost of one batch", costs), ("training", training)]


def table(results: Mapping[str, Any]) -> Table:
    """The comparison for the terminal."""
    data = results["data"]
    title = f"{data['held_out_questions']:,} questions on {data['held_out_scenes']:,} held-out scenes"
    out = Table(
        title=title + (" (quick: not to be trusted)" if results["quick"] else ""), box=box.SIMPLE, pad_edge=False
    )
    out.add_column("", no_wrap=True)
    for name in results["integrations"]:
        out.add_column(name.upper(), justify="right", no_wrap=True)
    for section, lines in rows(results):
        out.add_section()
        for number, (label, cells) in enumerate(lines):
            if number == 0:
                out.add_row(f"[bold]{section}[/bold]")
            out.add_row(label, *(cell.replace("[", r"\[") for cell in cells))
    return out


def write_page(path: Path, results: Mapping[str, Any], clip: Path) -> None:
    """Write `report.html`: styles, figures and sound inside, nothing fetched from anywhere.

    Args:
        path: of the page.
        results: as in `results.json`.
        clip: audio file of the fresh scene.
    """
    integrations = results["integrations"]
    curves = {name: [(s, v) for s, v in one["training"]["loss_curve"]] for name, one in integrations.items()}
    tasks = list(next(iter(integrations.values()))["per_task"])
    scores = {task: {name: one["per_task"][task] for name, one in integrations.items()} for task in tasks}
    scores["all"] = {name: one["accuracy"] for name, one in integrations.items()}
    samples_NC, rate = soundfile.read(clip, dtype="float32", always_2d=True)
    fresh = results["fresh_scene"]
    events = [(event["label"], event["start"], event["end"]) for event in fresh["events"]]
    data, machine = results["data"], results["machine"]
    page = FRAME.format(
        title="PLITS, LAL and PAL compared",
        quick=""
        if not results["quick"]
        else '<p class="warning">A quick run: it shows that everything works. '
        "The models are hardly trained, so the scores mean nothing.</p>",
        cards="".join(_card(name, one, integrations["plits"]) for name, one in integrations.items()),
        questions=f"{data['held_out_questions']:,}",
        scenes=f"{data['held_out_scenes']:,}",
        clips=data["measured_batch"]["clips"],
        batch=data["measured_batch"]["questions"],
        table=_html_table(results),
        accuracy=figures.accuracy_intervals(scores),
        losses=figures.loss_curves(curves),
        spectrogram=figures.spectrogram(samples_NC.mean(1), rate, events),
        audio=base64.b64encode(_wav(clip)).decode(),
        answers=_answers(fresh, list(integrations)),
        notes="".join(f"<li>{escape(note)}</li>" for note in NOTES),
        machine=escape(
            f"pal {results['pal_version']}, torch {machine['torch']}, {machine['system']}, "
            f"{machine['gpu'] or str(machine['cpu_cores']) + ' CPU cores'}; seed {results['seed']}; "
            f"{results['seconds'] / 60:.1f} minutes"
        ),
    )
    write_text(path, page)


def size(count: float) -> str:
    """Bytes for a reader."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def _card(name: str, one: Mapping[str, Any], plits: Mapping[str, Any]) -> str:
    low, high = one["accuracy"]["ci95"]
    colour, _ = figures.style_of(name)
    facts = [
        (_times(one["cost"]["step_seconds"], plits["cost"]["step_seconds"]), "time of a training step"),
        (_times(one["cost"]["saved_bytes"], plits["cost"]["saved_bytes"]), "saved activations"),
        (_times(one["cost"]["audio_kv_bytes"], plits["cost"]["audio_kv_bytes"]), "audio keys and values"),
    ]
    lines = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for value, label in facts)
    return (
        f'<article class="card" style="border-top-color:{colour}"><h3>{escape(name.upper())}</h3>'
        f'<p class="big">{_share(one["accuracy"]["score"])}</p>'
        f'<p class="small">accuracy, 95&#8239;% interval {_share(low)} to {_share(high)}</p><dl>{lines}</dl></article>'
    )


def _html_table(results: Mapping[str, Any]) -> str:
    head = "".join(f'<th scope="col">{escape(name.upper())}</th>' for name in results["integrations"])
    body = []
    for section, lines in rows(results):
        span = len(results["integrations"]) + 1
        body.append(f'<tr class="section"><th colspan="{span}" scope="colgroup">{escape(section)}</th></tr>')
        for label, cells in lines:
            shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            body.append(f'<tr><th scope="row">{escape(label)}</th>{shown}</tr>')
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _answers(fresh: Mapping[str, Any], names: list[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name.upper())}</th>' for name in names)
    body = []
    for question in fresh["questions"]:
        cells = []
        for name in names:
            answer = question["answers"][name]
            right = question["correct"][name]
            mark = "right" if right else "wrong"
            sign = "✓" if right else "✗"
            cells.append(f'<td class="{mark}"><span aria-label="{mark}">{sign}</span> {escape(answer)}</td>')
        body.append(
            f'<tr><th scope="row">{escape(question["question"])}</th><td>{escape(question["truth"])}</td>'
            f"{''.join(cells)}</tr>"
        )
    return (
        f'<table class="answers"><thead><tr><th scope="col">question</th><th scope="col">truth</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _wav(clip: Path) -> bytes:
    """The clip as a 16-bit WAV file, which every browser plays."""
    samples_NC, rate = soundfile.read(clip, dtype="float32", always_2d=True)
    file = io.BytesIO()
    soundfile.write(file, samples_NC, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _interval(accuracy: Mapping[str, Any]) -> str:
    low, high = accuracy["ci95"]
    return f"{accuracy['score'] * 100:.1f} [{low * 100:.1f}, {high * 100:.1f}]"


def _difference(value: float | None, ci95: tuple[float, float] | None) -> str:
    if value is None or ci95 is None:
        return "–"
    return f"{value * 100:+.1f} [{ci95[0] * 100:.1f}, {ci95[1] * 100:.1f}]"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _times(value: float, reference: float) -> str:
    return f"×{value / reference:.2f}" if reference else "–"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"
