"""Options shared by several commands."""

from typing import Annotated

import typer

from pal.errors import ConfigError

Folds = Annotated[str | None, typer.Option(help="esc50: comma-separated folds to include.")]
Speakers = Annotated[str | None, typer.Option(help="fsdd: comma-separated speakers to include.")]
Exclude = Annotated[str | None, typer.Option(help="fsdd: comma-separated speakers to leave out.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Other option of the data set; can be repeated.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Bundle folder or Hub id, or a model that ships with the package: 'smol', 'tiny' or 'tiny-causal'. "
        "Default: smol if `pal models get smol` has been run, else tiny.",
        show_default=False,
    ),
]
AllowUrls = Annotated[bool, typer.Option("--allow-urls", help="Allow clips to be http, https and file URLs.")]
ReadToEnd = Annotated[
    bool,
    typer.Option(
        "--read-to-end",
        help="Read clips of unknown length, such as a streamed WAV, to the end of the file, with a note.",
    ),
]
OtherWeights = Annotated[
    bool,
    typer.Option(
        "--other-weights",
        help="Go on, with a note, where the LLM or encoder found has other weights than the model was made with.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def numbers_by_name(given: list[str], option: str) -> dict[str, int]:
    """Values of an option of the form NAME=N. Raises ConfigError that names a value of another form."""
    found = {}
    for one in given:
        name, equals, number = one.partition("=")
        if not equals or not name or not number.isdigit():
            raise ConfigError(f"{option} '{one}' is not of the form NAME=N; write it such as {option} all=5600000")
        found[name] = int(number)
    return found
