"""Options shared by several commands."""

from typing import Annotated

import typer

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
        help="Bundle folder or Hub id, or a model that ships with the package: 'smol' or 'tiny'. "
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
