"""`pal index`, and questions to an indexed folder."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from pal.app.loading import load_model
from pal.app.options import AllowUrls, AsJson, Model, OtherWeights, ReadToEnd
from pal.app.output import note, print_json, shows_progress
from pal.errors import AudioError, AudioWarning, shortened

_T = TypeVar("_T")


def index(
    audio: Annotated[str, typer.Argument(help="An audio file, or a folder of audio files.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write (.safetensors), or folder (.palidx; default: FOLDER.palidx)."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Of a folder's clips: kv (keys and values), int8 (the same, smaller) or features (of the encoders, "
            "from which keys and values are made when asked)."
        ),
    ] = None,
    model: Model = None,
    allow_urls: AllowUrls = False,
    read_to_end: ReadToEnd = False,
    other_weights: OtherWeights = False,
    as_json: AsJson = False,
) -> None:
    """Precompute the attention keys and values of a clip, or of a folder's clips, to ask many questions about them.

    A folder is indexed again where it stopped: only what is new or has changed. Clips that cannot be read are listed,
    and the exit status is then 1.
    """
    if Path(audio).is_dir():
        _index_folder(Path(audio), out, store, model, read_to_end, other_weights, as_json)
        return
    from pal.audio.urls import is_url

    if not (Path(audio).exists() or is_url(audio)):
        raise AudioError(f"{audio}: there is no such file or folder; check the path")
    if out is None:
        example = Path(audio).with_suffix(".safetensors").name
        raise typer.BadParameter(f"is needed for a single file; give --out {example}", param_hint="--out")
    if out.suffix != ".safetensors":
        raise typer.BadParameter(f"'{out}' must end in .safetensors", param_hint="--out")
    if store is not None:
        raise typer.BadParameter("is for folders; one file holds keys and values", param_hint="--store")
    loaded = load_model(model, other_weights)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AudioWarning)
        clip = loaded.index(audio, allow_urls, read_to_end)
    notes = [str(warning.message) for warning in caught if issubclass(warning.category, AudioWarning)]
    out.parent.mkdir(parents=True, exist_ok=True)
    clip.save(out)
    seconds, tokens, size = clip.seconds, clip.tokens, out.stat().st_size
    if as_json:
        about = {"out": str(out), "audio_seconds": seconds, "audio_tokens": tokens, "bytes": size, "notes": notes}
        print_json(about)
    else:
        for line in notes:
            note(line)
        typer.echo(f"{out}: {seconds:.1f} s of audio, {tokens} tokens, {size:,} bytes")


def _index_folder(
    folder: Path,
    out: Path | None,
    store: str | None,
    model: str | None,
    read_to_end: bool,
    other_weights: bool,
    as_json: bool,
) -> None:
    from pal.folder_index import STORES, SUFFIX, FolderIndex, StoredSizes, describe

    if folder.name.endswith(SUFFIX):
        raise AudioError(f"{folder}: is an index; give the folder of audio files that it was made of")
    folder = folder.resolve()
    out = out or folder.with_name((folder.name or "root") + SUFFIX)
    if out.suffix != SUFFIX:
        raise typer.BadParameter(f"'{out}' must end in {SUFFIX} for a folder", param_hint="--out")
    kind = next((one for one in STORES if one == store), None)
    if store is not None and kind is None:
        raise typer.BadParameter(f"'{store}' is none of {', '.join(STORES)}", param_hint="--store")
    if not out.exists():
        _check_any(folder)
    loaded = load_model(model, other_weights)
    made = FolderIndex.open(out, loaded, kind)
    report = made.update(folder, loaded, read_to_end, progress=_bar)
    clips = made.clips()
    sizes = StoredSizes.of_seconds(loaded, 60.0)
    if as_json:
        print_json(
            {
                "out": str(out),
                "clips": len(clips),
                "added": report.added,
                "unchanged": report.unchanged,
                "removed": report.removed,
                "passed_over": report.passed_over,
                "failed": report.failed,
                "notes": report.notes,
                "audio_seconds": sum(clip.seconds for clip in clips),
                "bytes": sum(clip.file.stat().st_size for clip in clips),
                "bytes_a_minute": {"kv": sizes.kv, "int8": sizes.int8, "features": sizes.features},
            }
        )
    else:
        for line in report.notes:
            note(line)
        for name, why in report.failed.items():
            typer.echo(f"failed: {name}: {why}", err=True)
        typer.echo(f"{out}: {describe(report, clips)}")
        typer.echo(
            f"a minute takes {sizes.kv / 1e6:.2f} MB as kv, {sizes.int8 / 1e6:.2f} MB as int8 (rounded), "
            f"{sizes.features / 1e6:.2f} MB as features (keys and values are then made for each question)"
        )
    if report.failed:
        raise typer.Exit(1)


def _check_any(folder: Path) -> None:
    """Raise AudioError if a folder holds no audio file; nothing is written then."""
    from pal.data.tables import SUFFIXES
    from pal.folder_index import audio_files

    paths, report = audio_files(folder)
    if not paths and not report.failed:
        others = f" of its {report.passed_over} files" if report.passed_over else ""
        raise AudioError(f"{folder}: no name{others} ends as one of an audio file: {', '.join(sorted(SUFFIXES))}")


def ask_folder(
    path: Path, question: str, model: str | None, max_new_tokens: int, other_weights: bool, as_json: bool
) -> None:
    """Ask each clip of an indexed folder a question, and print a table of the answers."""
    from pal.folder_index import FolderIndex

    found = FolderIndex(path)
    loaded = load_model(model, other_weights)
    if loaded.config.notice:
        note(loaded.config.notice)
    answers = found.ask(loaded, question, progress=_bar, max_new_tokens=max_new_tokens)
    if not answers:
        raise AudioError(f"{path}: holds no clip; index a folder with audio files: pal index FOLDER --out {path}")
    if as_json:
        print_json([{"clip": name, "answer": answer} for name, answer in answers.items()])
        return
    rows = [(shortened(name, len(name)), " ".join(answer.split())) for name, answer in answers.items()]
    widths = [max(len(cell) for cell in column) for column in zip(("clip", "answer"), *rows, strict=True)]
    for row in (("clip", "answer"), *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _bar(items: Sequence[_T]) -> Iterator[_T]:
    """The items, with a progress bar with the time left on terminals."""
    from tqdm import tqdm

    return iter(tqdm(items, unit="clip", file=sys.stderr, disable=not shows_progress()))
