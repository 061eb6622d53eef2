"""`pal batch`: many clips, many questions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pal.app.options import AsJson, Model, OtherWeights, ReadToEnd
from pal.app.output import note, print_json, shows_progress

if TYPE_CHECKING:
    from pal.batch.worker import TaskReport


def batch(
    audio: Annotated[Path, typer.Argument(metavar="INPUT", help="A manifest, or a folder of audio files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .jsonl or .parquet.")],
    ask: Annotated[
        list[str] | None,
        typer.Option("--ask", metavar="QUESTION", help="Question about each clip; can be repeated."),
    ] = None,
    questions: Annotated[
        Path | None, typer.Option("--questions", metavar="FILE", help="Text file of questions, one a line.")
    ] = None,
    model: Model = None,
    root: Annotated[Path | None, typer.Option("--root", help="Folder of the manifest's audio.")] = None,
    workers: Annotated[
        int, typer.Option("--workers", "-w", min=1, help="Models that ask at once; more than one needs the extra ray.")
    ] = 1,
    num_gpus: Annotated[
        float | None,
        typer.Option(min=0.0, help="GPUs of a worker; a fraction shares one. Default: those there are, shared."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to use, such as ray://HOST:10001 or auto. Default: this machine alone."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 64,
    read_to_end: ReadToEnd = False,
    other_weights: OtherWeights = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Ask all anew, and replace the output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask questions about every clip of a manifest or of a folder; without questions, the manifest's own.

    A run that was stopped goes on where it stopped when the command is given again. Clips that cannot be used are
    listed in a file beside the output, and the exit status is then 1.
    """
    from pal import ray_session, shipped
    from pal.batch import ray_workers, read_input, run
    from pal.data.tables import lines_of

    asked = [*(ask or ()), *(line for line in (lines_of(questions) if questions else ()) if line.strip())]
    if questions is not None and not asked:
        raise typer.BadParameter(f"'{questions}' holds no question", param_hint="--questions")
    given = read_input(audio, asked, root)
    several = workers > 1 or address is not None
    if several:
        ray_workers.check(address)
    if num_gpus is None:
        num_gpus = ray_session.shared_gpus(workers) if address is None else 0.0
    name = model or shipped.default()
    if model is None:
        note(shipped.explain(name))
    try:
        report = run(
            given,
            out,
            str(shipped.FOLDERS.get(name, name)),
            other_weights=other_weights,
            max_new_tokens=max_new_tokens,
            read_to_end=read_to_end,
            workers=workers,
            gpus=num_gpus,
            address=address,
            overwrite=overwrite,
            progress=_bar,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; give the same command again to go on") from None
    for line in report.notes:
        note(line)
    if as_json:
        print_json(
            {
                "out": str(report.out),
                "clips": report.clips,
                "answers": report.answers,
                "asked": report.asked,
                "resumed": report.resumed,
                "audio_seconds": report.audio_seconds,
                "seconds": report.seconds,
                "failed": report.failed,
                "failed_list": None if report.failed_list is None else str(report.failed_list),
                "notes": report.notes,
            }
        )
    else:
        kept = f", {report.resumed} of them before" if report.resumed else ""
        typer.echo(
            f"{report.out}: {report.answers} answers about {report.clips - len(report.failed)} clips{kept}, "
            f"{report.audio_seconds / 60:.1f} minutes of audio, {report.seconds:.1f} s"
        )
        for clip, why in report.failed.items():
            typer.echo(f"failed: {clip}: {why}", err=True)
    if report.failed:
        clips = "1 bad clip is" if len(report.failed) == 1 else f"{len(report.failed)} bad clips are"
        note(f"{clips} listed in {report.failed_list}; mend and give the same command again: nothing else is asked")
        raise typer.Exit(1)


def _bar(reports: Iterator[TaskReport], done: int, total: int) -> Iterator[TaskReport]:
    """The reports, with a progress bar with the time left: on a terminal, else as a line every half minute."""
    from tqdm import tqdm

    bar = tqdm(
        reports,
        initial=done,
        total=total,
        unit="clip",
        file=sys.stderr,
        mininterval=0.5 if shows_progress() else 30.0,
        delay=0.0 if shows_progress() else 30.0,
    )
    return iter(bar)
