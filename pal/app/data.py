"""The commands `pal data ...`: make manifests of data sets and of synthetic scenes, check manifests, make shards."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pal.app.options import AsJson, Exclude, Folds, ReadToEnd, Settings, Speakers
from pal.app.output import note, print_json, shows_progress
from pal.errors import ConfigError, ManifestError

data_app = typer.Typer(no_args_is_help=True, help="Make and check manifests and shards.")

Root = Annotated[
    Path | None, typer.Option("--root", help="Base folder of relative audio paths; default: the manifest's folder.")
]


@data_app.command("prepare")
def data_prepare(
    name: Annotated[
        str, typer.Argument(help="Name of the data set, such as esc50 or clotho; an unknown name lists all.")
    ],
    root: Annotated[Path, typer.Option("--root", help="Folder of the data set.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Manifest to write (.jsonl).")],
    folds: Folds = None,
    speakers: Speakers = None,
    exclude: Exclude = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Write the manifest of a data set that is already on this machine."""
    from pal.app.benchmarks import options_of
    from pal.data.manifest import Manifest
    from pal.data.prepare import prepare

    options = options_of(settings or [], folds=folds, speakers=speakers, exclude=exclude)
    count = len(Manifest(prepare(name, root, out, **options)))
    if as_json:
        print_json({"out": str(out), "records": count})
    else:
        typer.echo(f"{out}: {count} records")


@data_app.command("synth")
def data_synth(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    scenes: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same scenes.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Generate synthetic scenes, with questions and answers."""
    from pal.data.manifest import Manifest
    from pal.data.synth import synthesise

    manifest = synthesise(out, scenes=scenes, seed=seed)
    count = len(Manifest(manifest))
    if as_json:
        print_json({"manifest": str(manifest), "scenes": scenes, "records": count})
    else:
        typer.echo(f"{manifest}: {scenes} scenes, {count} records")


@data_app.command(
    "curriculum",
    epilog="It needs: apt-get install flite espeak-ng fluidsynth fluid-soundfont-gm timgm6mb-soundfont",
)
def data_curriculum(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    esc10: Annotated[
        Path | None, typer.Option("--esc10", metavar="DIR", help="Folder of ESC-10 in the layout of ESC-50.")
    ] = None,
    fsdd: Annotated[Path | None, typer.Option("--fsdd", metavar="DIR", help="Folder of FSDD.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same curriculum.")] = 0,
    clips: Annotated[int, typer.Option(help="Clips for training.")] = 6000,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one for each core.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a training set of sounds, digits, speech and music, with questions and held-out parts.

    Speech and music are made by flite, eSpeak NG and FluidSynth. Without --esc10 or --fsdd that part is left out.
    A run that was stopped goes on when it is started again.
    """
    from pal.data.curriculum.maker import make

    for folder, flag, part in ((esc10, "--esc10", "environmental sounds"), (fsdd, "--fsdd", "spoken digits")):
        if folder is None:
            note(f"no {flag}: {part} are left out")
    summary = make(out, seed, clips, esc10, fsdd, workers)
    if as_json:
        print_json(summary)
    else:
        training = summary["training"]
        held_out = sum(part["questions"] for part in summary["held_out"].values())
        made = f"{training['clips']} clips, {training['questions']} questions"
        typer.echo(f"{out}: {made}; held out: {held_out} questions")


@data_app.command("shard")
def data_shard(
    file: Annotated[Path | None, typer.Argument(help="Manifest (.jsonl, or LTU's .json).", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.", show_default=False)] = None,
    size: Annotated[str, typer.Option(metavar="SIZE", help="Bytes of a shard, such as 500MB or 1GB.")] = "1GB",
    root: Root = None,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="DIR", help="Check the shards in a folder instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy the clips of a manifest into uncompressed tar files with an index, and write a manifest of their members.

    A run that was stopped goes on when it is started again. With --check, compare every clip of the shards with the
    index; the exit status is 1 if any is damaged.
    """
    from pal.data.sharding import check_shards, shard

    if check is not None:
        if file is not None or out is not None:
            raise typer.BadParameter("cannot be combined with a manifest or --out", param_hint="--check")
        report = check_shards(check, shows_progress())
        if as_json:
            print_json({"ok": report.ok, **asdict(report)})
        else:
            typer.echo(report.to_text())
        if not report.ok:
            raise typer.Exit(1)
        return
    if file is None or out is None:
        raise typer.BadParameter("give a manifest and --out DIR, or --check DIR")
    done = shard(file, out, _bytes(size), root, shows_progress())
    if as_json:
        print_json(asdict(done))
    else:
        typer.echo(done.to_text())


def _bytes(size: str) -> int:
    """Number of bytes in words such as "1GB" or "500 MB" (powers of 1000)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", size.strip(), re.IGNORECASE)
    count = int(float(found[1]) * 1000 ** " kmgt".index(found[2].lower() or " ")) if found else 0
    if not count:
        raise typer.BadParameter(f"'{size}' is no size; write such as 500MB or 1GB", param_hint="--size")
    return count


@data_app.command("check")
def data_check(
    file: Annotated[Path, typer.Argument(help="Manifest (.jsonl, or LTU's .json).")],
    root: Root = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Tokenizer for the example: a bundle, an LLM's folder or Hub id; 'tiny' and 'smol' ship here."
        ),
    ] = "tiny",
    read_to_end: ReadToEnd = False,
    write_clean: Annotated[
        Path | None,
        typer.Option("--write-clean", metavar="FILE", help="Write a manifest without the bad records and clips."),
    ] = None,
    write_bad: Annotated[
        Path | None,
        typer.Option(
            "--write-bad", metavar="FILE", help="Write a list of the bad clips, for the key skip_clips of a recipe."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read every clip of a manifest, list the bad ones, and show a training example as tokens.

    The exit status is 1 if anything is bad, also with --write-clean.
    """
    from pal import shipped, source_tokenizer
    from pal.data import clean
    from pal.data.check import check

    for out in (write_clean, write_bad):
        if out is not None:
            clean.check_out(out, file)
    if write_clean is not None and write_clean == write_bad:
        raise ConfigError(f"{write_bad}: --write-clean and --write-bad name the same file; give two files")
    words = source_tokenizer.find(shipped.FOLDERS.get(tokenizer, tokenizer))
    report = check(file, words, root=root, progress=shows_progress(), read_to_end=read_to_end)
    facts = report.to_dict()
    if not as_json:
        typer.echo(report.to_text())
    fault = None
    if not report.complete and (write_bad or write_clean):
        fault = ManifestError(f"{file}: the check was interrupted and wrote nothing; run it again")
    if write_bad is not None and fault is None:
        count = clean.write_bad(report, write_bad)
        facts["list"] = {"out": str(write_bad), "clips": count}
        if not as_json:
            typer.echo(f"{write_bad}: {count} clips")
    if write_clean is not None and fault is None:
        try:
            cleaned = clean.write_clean(file, report, write_clean, root)
        except ManifestError as error:
            fault = error
        else:
            facts["clean"] = asdict(cleaned)
            if not as_json:
                typer.echo(cleaned.to_text())
    if as_json:
        print_json(facts)
    if fault is not None:
        raise fault
    if not report.ok:
        raise typer.Exit(1)
