"""Options that several commands have."""

from typing import Annotated

import typer

Folds = Annotated[str | None, typer.Option(help="esc50: folds to take, with commas.")]
Speakers = Annotated[str | None, typer.Option(help="fsdd: speakers to take, with commas.")]
Exclude = Annotated[str | None, typer.Option(help="fsdd: speakers to leave out, with commas.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another option of the data set.")
]
AllowUrls = Annotated[bool, typer.Option("--allow-urls", help="Follow http, https and file addresses of clips.")]
ReadToEnd = Annotated[
    bool, typer.Option("--read-to-end", help="Take a clip whose end cannot be known as far as it goes, and say so.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
