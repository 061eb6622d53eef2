"""The command `pal`. Torch and transformers are imported by the commands that need them, so `--help` is quick."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from pal.app import ablating, batching, benching, evaluating, indexing, listening, reporting, running, serving
from pal.app.data import data_app
from pal.app.loading import load_model, stored_clip
from pal.app.models import models_app
from pal.app.options import AllowUrls, AsJson, Model, OtherWeights, ReadToEnd, numbers_by_name
from pal.app.output import note, one_line, print_json
from pal.app.probing import probe_app
from pal.errors import PalError, PromptError

if TYPE_CHECKING:
    from pal.train.recipe import Recipe

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""


_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file",
    errno.EACCES: "allow it, or give another path",
    errno.EPERM: "allow it, or give another path",
    errno.EROFS: "give a path on another disk",
    errno.ENOSPC: "make room, or give a path on another disk",
    errno.EDQUOT: "make room, or give a path on another disk",
    errno.ENAMETOOLONG: "give a shorter name",
}
"""What a user can do about an error of the system that no command explains."""


class _Commands(TyperGroup):
    """Command group that prints errors which the user can fix as one line, and exits with a status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PalError as error:
            _fail(str(error), 1)
        except KeyboardInterrupt as stop:
            _fail(str(stop) or "interrupted", INTERRUPTED)
        except BrokenPipeError:
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            remedy = _REMEDIES.get(error.errno or 0, "")
            _fail(f"{where}{error.strerror or error}{remedy and f'; {remedy}'}", 1)


app = typer.Typer(
    name="pal",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Audio for language models: ask questions about audio, and train and compare ways to attach audio encoders.",
)
app.add_typer(data_app, name="data")
app.add_typer(probe_app, name="probe")
app.add_typer(models_app, name="models")


def main() -> None:
    """Entry point of the command `pal`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app(prog_name="pal")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import pal

        typer.echo(pal.__version__)
        raise typer.Exit


@app.command()
def ask(
    items: Annotated[list[str], typer.Argument(metavar='AUDIO... "QUESTION"', help="Clips, then one question.")],
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of the answer, in tokens.")] = 64,
    allow_urls: AllowUrls = False,
    read_to_end: ReadToEnd = False,
    other_weights: OtherWeights = False,
    when: Annotated[
        bool,
        typer.Option("--when", help="Also print the most attended seconds of the clip; no proof of what was heard."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question about audio files, or about what `pal index` wrote: .safetensors or .palidx.

    All clips belong to one question, but an indexed folder is asked clip by clip.
    """
    *clips, question = items
    if not clips:
        raise PromptError(f"no clip for the question '{question}'; write: pal ask AUDIO... \"QUESTION\"")
    if when and len(clips) > 1:
        raise PromptError("--when shows seconds of one clip; ask about one")
    if Path(question).is_file():
        raise PromptError(f"the last argument is the question, but '{question}' is a file")
    _check_clips(clips)
    if len(clips) == 1 and clips[0].rstrip("/").endswith(".palidx"):
        if when or allow_urls or read_to_end:
            name = "--when" if when else "--allow-urls" if allow_urls else "--read-to-end"
            raise PromptError(f"{name} is for audio files, and this is an indexed folder; leave it out")
        indexing.ask_folder(Path(clips[0]), question, model, max_new_tokens, other_weights, as_json)
        return
    started = time.perf_counter()
    from pal.clips import clip_list, read_clip

    loaded = load_model(model, other_weights)
    if loaded.config.notice:
        note(loaded.config.notice)
    audio = clip_list([stored_clip(clip) for clip in clips])
    if when and len(audio) > 1:
        raise PromptError(f"--when shows seconds of one clip, and {clips[0]} holds {len(audio)}; leave it out")
    if when:  # read once, with the same options
        from pal.probe.when import most_attended

        audio = [read_clip(audio[0], loaded.sampling_rate, allow_urls=allow_urls, read_to_end=read_to_end)]
    if len(audio) > 1 and "<audio>" not in question:
        question = "<audio>" * len(audio) + question
    load_seconds = time.perf_counter() - started
    answer = loaded.ask_detailed(
        audio, question, max_new_tokens=max_new_tokens, allow_urls=allow_urls, read_to_end=read_to_end
    )[0]
    if not as_json:
        for line in answer.notes:
            note(line)
        typer.echo(answer.text)
        if when:
            spans = most_attended(loaded, audio[0], question, answer.text) if answer.text else []
            shown = ", ".join(f"{one.start:.1f} to {one.end:.1f} s ({one.share:.0%})" for one in spans)
            typer.echo(f"attention, which is no proof: {shown or 'an empty answer attends to nothing'}")
        return
    spans = most_attended(loaded, audio[0], question, answer.text) if when and answer.text else []
    print_json(
        {
            "answer": answer.text,
            "model": loaded.source,
            "integration": loaded.config.integration["name"],
            "audio_seconds": answer.audio_seconds,
            "audio_seconds_used": answer.audio_seconds_used,
            "audio_tokens": answer.audio_tokens,
            "seconds": {"load": load_seconds, **answer.seconds},
            "notes": list(answer.notes),
            **({"most_attended": [vars(one) for one in spans]} if when else {}),
        }
    )


def _check_clips(clips: Sequence[str]) -> None:
    """Raise PromptError for what is no clip, before a model is loaded."""
    from pal.audio.urls import is_url

    for clip in clips:
        indexed = clip.rstrip("/").endswith(".palidx")
        if indexed and len(clips) > 1:
            raise PromptError(f"{clip} is an indexed folder, which is asked one question, without other clips")
        if Path(clip).is_dir() and not indexed:
            raise PromptError(f"{clip} is a folder; index it with: pal index {clip}, and ask what that writes")
        if len(clips) > 1 and not (is_url(clip) or Path(clip).exists()):
            raise PromptError(f"there is no file '{clip}'; all but the last argument are clips, and it is the question")


app.command()(indexing.index)
app.command()(batching.batch)
app.command()(listening.listen)
app.command()(serving.serve)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see recipes/.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the recipe: stages.0.steps=50."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete another run in the folder.")] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Test the recipe in seconds: small parts, random weights, synthetic audio.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model in stages by a recipe."""
    import logging

    from pal.train import run
    from pal.train.recipe import load_recipe

    parsed = load_recipe(recipe, settings or [])
    if smoke:
        if resume or overwrite:
            raise typer.BadParameter("cannot be combined with --resume or --overwrite", param_hint="--smoke")
        _smoke(parsed, out, as_json)
        return
    folder = out or Path("runs") / recipe.stem
    # log messages of this package go to stderr, those of others do not
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pal").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    model = run(parsed, folder, resume=resume, overwrite=overwrite)
    if os.environ.get("RANK", "0") != "0":  # the first of several processes speaks for all
        return
    facts = {"out": str(folder), "model": str(folder), "integration": model.config.integration["name"]}
    if as_json:
        print_json({**facts, "model_digest": model.digest})
    else:
        typer.echo(f'trained: {folder}; ask it with: pal ask AUDIO "QUESTION" --model {folder}')


def _smoke(recipe: Recipe, out: Path | None, as_json: bool) -> None:
    """Test a recipe at toy size, in `out`, or in a temporary folder."""
    from tempfile import TemporaryDirectory

    from pal.train.smoke import smoke

    started = time.perf_counter()
    checks = []
    with TemporaryDirectory(prefix="pal-smoke-") as temporary:
        for check in smoke(recipe, out or Path(temporary)):
            checks.append({"name": check.name, "found": check.found})
            if not as_json:
                typer.echo(f"ok  {check.name}: {check.found}")
    seconds = time.perf_counter() - started
    if as_json:
        print_json({"ok": True, "seconds": round(seconds, 2), "checks": checks})
    else:
        typer.echo(f"smoke: {len(checks)} checks passed in {seconds:.1f} s")


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see recipes/.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the recipe: stages.0.batch.rows=64."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="GPU to plan for: H100, H200, A100-80, A100-40, L40S, 4090 or T4.")] = "H100",
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a clip in seconds.")] = 10.0,
    text_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a question and its answer.")] = 128,
    turns: Annotated[int, typer.Option(min=1, help="Turns of a conversation, each a clip and a question.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs of one machine, which divide the batch.")] = 1,
    shard: Annotated[bool, typer.Option("--shard", help="Shard the weights (FSDP2), instead of copies (DDP).")] = False,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.001, max=1.0, help="Share of the GPU's peak that a step reaches. Default: 0.4."),
    ] = None,
    records: Annotated[
        list[str] | None,
        typer.Option("--records", metavar="SOURCE=N", help="Records of a data source, for stages set in epochs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate parameters, FLOPs and memory of a recipe, and whether it fits on a GPU; loads no weights."""
    from pal.plan import plan as make_plan
    from pal.plan.estimate import UTILISATION
    from pal.plan.parallel import Parallel
    from pal.plan.report import to_dict, to_text
    from pal.train.recipe import load_recipe

    made = make_plan(
        load_recipe(recipe, settings or []),
        gpu=gpu,
        seconds=seconds,
        text_tokens=text_tokens,
        turns=turns,
        parallel=Parallel(gpus, shard),
        utilisation=UTILISATION if mfu is None else mfu,
        records=numbers_by_name(records or [], "--records"),
    )
    if as_json:
        print_json(to_dict(made))
    else:
        typer.echo(to_text(made))


app.command()(benching.bench)
app.command("eval")(evaluating.eval_)
app.command()(evaluating.compare)
app.command()(ablating.ablate)
app.command()(reporting.report)
app.command()(running.runs)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A published checkpoint: .pt, .gguf or model.bin.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, for 'path' of the encoder or LLM.")],
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="Format of the checkpoint: beats, sslam (also for EAT), ct2-whisper (CTranslate2) or gguf (an LLM).",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Convert an encoder's checkpoint, or an LLM in GGUF, to safetensors; no code from the checkpoint is run."""
    from pal.convert import convert as convert_checkpoint

    facts = convert_checkpoint(source, out, layout)
    if as_json:
        print_json(facts)
    else:
        typer.echo(f"{out}: {facts['numbers']:,} numbers; {facts['left_out']} tensors left out")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("runs/demo"),
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Train for minutes instead of a quarter of an hour; the scores mean nothing."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of scenes, weights and order of the data.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train PLITS, LAL and PAL on the same synthetic scenes, compare them and write report.html."""
    from pal.app.demo import run_demo

    results = run_demo(out, quick=quick, seed=seed)
    if as_json:
        print_json(results)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check the installation on this machine, with a remedy for each fault."""
    from pal.app.doctor import examine, report

    diagnoses = examine()
    if as_json:
        print_json({"ok": all(d.ok or not d.required for d in diagnoses), "checks": [d.to_dict() for d in diagnoses]})
    else:
        typer.echo(report(diagnoses))
    if any(d.required and not d.ok for d in diagnoses):
        raise typer.Exit(1)


@app.command()
def card(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or the folder of the run that made it.")],
    scores: Annotated[
        list[Path] | None,
        typer.Option("--scores", metavar="FILE", help="A file or folder that `pal eval` wrote; can be repeated."),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="TEXT", help="Description of training data; can be repeated.")
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="License of the weights, as an identifier of the Hub.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the card into the bundle as README.md.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model card: parts of the model, training data, scores and limits."""
    from pal.card import write_card

    made = write_card(bundle, scores or [], data=data or [], license_name=license_, into_bundle=write)
    if as_json:
        print_json({"out": made.out, "scores": len(scores or []), "card": made.text})
    else:
        typer.echo(made.text if made.out is None else made.out)


@app.command()
def push(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or the folder of the run that made it.")],
    repo: Annotated[str, typer.Argument(help="Hub id, such as me/my-model; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="Commit message.")] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a bundle and upload it to the Hugging Face Hub."""
    from pal.hub import push as upload

    pushed = upload(bundle, repo, private=True if private else None, message=message)
    if as_json:
        print_json(pushed.to_dict())
    else:
        typer.echo(f"{pushed.url}: {len(pushed.files)} files, {pushed.size:,} bytes")


def _fail(text: str, status: int) -> NoReturn:
    typer.echo(f"error: {one_line(text)}", err=True)
    raise typer.Exit(status)
