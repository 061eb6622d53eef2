"""`pal bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pal.app.output import shows_progress
from pal.errors import ConfigError


def bench(
    preset: Annotated[
        str,
        typer.Option(
            help="Sizes to measure: cpu-small (counts only), cpu, gpu-quick, gpu or gpu-3b; several questions on one "
            "clip: reuse-small (counts only) or reuse; a conversation that grows: stream-small, stream or "
            "stream-window."
        ),
    ] = "cpu",
    variants: Annotated[str | None, typer.Option(help="Comma-separated variants: plits,lal.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Comma-separated numbers of audio tokens: 750,1500,ragged.")
    ] = None,
    phases: Annotated[
        str | None, typer.Option(help="Comma-separated phases, of prefill,decode,train,decode_graph.")
    ] = None,
    scopes: Annotated[str | None, typer.Option(help="Comma-separated scopes, of llm,end_to_end.")] = None,
    batch: Annotated[
        str | None, typer.Option(help="Comma-separated batch sizes, in conversations; of reuse, questions on a clip.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Number of timed rounds; 0 counts operations without timing.")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="Trained parts of a step: joint (with the LLM) or projectors.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="File for the numbers; '-' prints them.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for JSON, tables and pictures.")] = None,
) -> None:
    """Measure time, memory and operations of all integrations and of comparable models, in one run."""
    from pal.bench import reuse, reuse_report, stream
    from pal.bench.presets import preset_of
    from pal.bench.report import to_json, to_markdown, write, write_numbers
    from pal.bench.run import run

    if preset in reuse.PRESETS or preset in stream.PRESETS:
        other: dict[str, Any] = {"--tokens": tokens, "--scopes": scopes, "--train": train}
        if preset in stream.PRESETS:
            other |= {"--phases": phases, "--batch": batch, "--repeats": repeats}
        if given := [name for name, value in other.items() if value is not None]:
            raise ConfigError(f"{given[0]} is no option of the preset '{preset}'; leave it out")
        keep_so_far: Any
        if preset in reuse.PRESETS:
            lists = {"variants": _listed(variants), "phases": _listed(phases), "questions": _listed(batch)}
            sizes = reuse.preset_of(preset, **lists, repeats=repeats)
            keep_so_far = (lambda found: None) if out is None else (lambda found: reuse_report.write(found, out))
            asked = reuse.run(sizes, progress=shows_progress(), keep=keep_so_far)
            _show(json_file, reuse_report.to_json(asked), reuse_report.to_markdown(asked), asked.interrupted)
            return
        conversation = stream.preset_of(preset, variants=_listed(variants))
        keep_so_far = (lambda found: None) if out is None else (lambda found: stream.write(found, out))
        heard = stream.run(conversation, progress=shows_progress(), keep=keep_so_far)
        _show(json_file, stream.to_json(heard), stream.to_markdown(heard), heard.interrupted)
        return
    chosen = preset_of(
        preset,
        variants=_listed(variants),
        audio_tokens=_listed(tokens),
        phases=_listed(phases),
        scopes=_listed(scopes),
        batch=_listed(batch),
        repeats=repeats,
        train=train,
    )
    keep = (lambda found: None) if out is None else (lambda found: write_numbers(found, out))
    result = run(chosen, progress=shows_progress(), keep=keep)
    _show(json_file, to_json(result), to_markdown(result), interrupted=False)
    if out is not None:
        for path in write(result, out):
            typer.echo(f"written: {path}", err=True)
    if result.interrupted:
        raise KeyboardInterrupt("interrupted; the measurements so far are above")


def _show(json_file: Path | None, as_json: str, tables: str, interrupted: bool) -> None:
    """Write the numbers to a file, and print the tables; "-" prints the numbers instead.

    Raises:
        KeyboardInterrupt: the run was interrupted.
    """
    from pal.files import write_text

    if json_file is not None and str(json_file) != "-":
        write_text(json_file, as_json)
    typer.echo(as_json if str(json_file) == "-" else tables, nl=False)
    if interrupted:
        raise KeyboardInterrupt("interrupted; the measurements so far are above")


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
