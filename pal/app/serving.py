"""`pal serve`: an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pal.app.loading import load_model
from pal.app.options import OtherWeights
from pal.app.output import note
from pal.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MISSING = "pal serve needs packages that are not installed; run: pip install 'pal-audio[serve]'"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Bundle folder, Hub id, 'smol' or 'tiny'; default: as in `pal ask`.", show_default=False),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="NAME=PATH", help="A model and its name for clients; can be repeated."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="PAL_API_KEY", help="Bearer token that clients must send; default: none.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most answers of a model that are generated at once.")] = 64,
    queue: Annotated[int, typer.Option(min=1, help="Most requests that wait; further ones get status 429.")] = 128,
    cache_gb: Annotated[float, typer.Option(min=0.0, help="Gigabytes of audio keys and values kept, a model.")] = 1.0,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Longest clip in seconds.")] = 600.0,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest request in megabytes.")] = 64.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, where a request says nothing.")] = 256,
    grace: Annotated[float, typer.Option(min=1.0, help="Seconds to finish what runs after SIGTERM.")] = 60.0,
    decoders: Annotated[
        int, typer.Option(min=0, help="Processes that decode clips at once; 0 decodes in the server's own.")
    ] = 2,
    other_weights: OtherWeights = False,
) -> None:
    """Serve models by OpenAI's protocol: chat completions with audio, transcriptions, indexed clips; and a page to ask.

    At 127.0.0.1, unless --host says otherwise. / is the page, /docs has the endpoints.
    """
    try:
        from pal.serve.app import create_app
        from pal.serve.process import listen, make_server
    except ImportError:
        raise ConfigError(MISSING) from None
    from pal.audio import Limits
    from pal.probe.when import attention_by_word
    from pal.serve.decode_process import MEMORY_BYTES, SECONDS
    from pal.serve.engine import Engine
    from pal.serve.served import ServeOptions

    if api_key is not None and not api_key.strip():
        raise ConfigError("the API key is empty; give --api-key or PAL_API_KEY a value, or leave it out")
    sources = named(model, models or [])
    body = round(max_body_mb * 1e6)
    options = ServeOptions(
        api_key,
        body,
        Limits(max_seconds=max_seconds, max_bytes=body),
        max_tokens,
        decoders=decoders,
        decoder_memory=max(MEMORY_BYTES, 4 * body),  # decoders copy parts of a file
        decoder_seconds=max(SECONDS, max_seconds / 30),
    )
    with listen(host, port) as socket:  # before minutes of loading
        loaded = {name: load_model(source, other_weights) for name, source in sources.items()}
        if None in sources.values():
            from pal import shipped

            loaded = {shipped.default(): one for one in loaded.values()}
        engines = {
            name: Engine(name, one, batch=batch, queue=queue, cache_bytes=round(cache_gb * 1e9))
            for name, one in loaded.items()
        }
        at, shown = socket.getsockname()[1], f"[{host}]" if ":" in host else host
        if host not in LOOPBACK and api_key is None:
            note(f"everybody who reaches {shown} can ask; --api-key asks for a key")
        url = f"http://{shown}:{at}"
        typer.echo(f"serving {', '.join(engines)} at {url}/v1 ({url} is a page to ask, {url}/docs has the endpoints)")
        make_server(create_app(engines, options, attention_by_word), grace).run(sockets=[socket])


def named(model: str | None, models: list[str]) -> dict[str, str | None]:
    """Sources of models by the names that clients use; None is the default model."""
    found: dict[str, str | None] = {}
    for one in models:
        name, equals, path = one.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--model {one}: write NAME=PATH, such as --model mine=runs/mine")
        if name in found:
            raise ConfigError(f"--model {name}=...: two models of one name; give each its own")
        found[name] = path
    if model is not None:
        name = Path(model).name or model
        if name in found:
            raise ConfigError(f"two models are called {name}; give one another name with --model NAME=PATH")
        found = {name: model, **found}
    return found or {"": None}
