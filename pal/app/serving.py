"""`pal serve`: an OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pal.app.loading import load_model
from pal.app.options import OtherWeights
from pal.app.output import note
from pal.config import parse
from pal.errors import ConfigError

if TYPE_CHECKING:
    from pal.serve.server_config import ReplicaConfig

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
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Servers behind the one address, each with all models; needs the extra ray."),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Most of them: their number follows the load, from --replicas on.")
    ] = None,
    num_gpus: Annotated[
        float | None,
        typer.Option(min=0.0, help="GPUs of a replica; a fraction shares one. Default: those there are, shared."),
    ] = None,
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
    from pal.probe.when import attention_by_word
    from pal.serve.server_config import ServerConfig

    if api_key is None and "PAL_API_KEY" in os.environ:
        api_key = ""  # which the command line takes for none
    sources = named(model, models or [])
    given = {
        "api_key": api_key,
        "batch": batch,
        "queue": queue,
        "cache_gb": cache_gb,
        "max_seconds": max_seconds,
        "max_body_mb": max_body_mb,
        "max_tokens": max_tokens,
        "decoders": decoders,
    }
    config = parse(ServerConfig, given, "pal serve")
    shown = f"[{host}]" if ":" in host else host
    if host not in LOOPBACK and api_key is None:
        note(f"everybody who reaches {shown} can ask; --api-key asks for a key")
    if replicas is not None or max_replicas is not None:
        from pal.app.replicas import replica_config

        more = {"replicas": replicas or 1, "max_replicas": max_replicas, "gpus": num_gpus}
        more |= {"other_weights": other_weights, "grace": grace}
        _serve_replicas(replica_config(config, sources, more), host, shown, port)
        return
    if num_gpus is not None:
        raise ConfigError("--num-gpus is of replicas; give --replicas, too")
    with listen(host, port) as socket:  # before minutes of loading
        loaded = {name: load_model(source, other_weights) for name, source in sources.items()}
        if None in sources.values():
            from pal import shipped

            loaded = {shipped.default(): one for one in loaded.values()}
        engines = {name: config.engine(name, one) for name, one in loaded.items()}
        _say(engines, shown, socket.getsockname()[1])
        server = make_server(create_app(engines, config.options(), attention_by_word), grace)
        server.run(sockets=[socket])
        if server.gave_up:
            raise typer.Exit(1)


def _say(models: Iterable[str], host: str, port: int, what: str = "") -> None:
    url = f"http://{host}:{port}"
    typer.echo(f"serving {', '.join(models)} at {url}/v1 ({what}{url} is a page to ask, {url}/docs has the endpoints)")


def _serve_replicas(config: ReplicaConfig, host: str, shown: str, port: int) -> None:
    """Serve by Ray, on this machine."""
    from pal.app.replicas import serve_replicas
    from pal.serve.process import listen

    with listen(host, port) as socket:  # free, before minutes of loading
        at = socket.getsockname()[1]
    what = f"{config.replicas} replicas" + (f", up to {config.max_replicas}; " if config.max_replicas else "; ")
    serve_replicas(config, host, at, lambda: _say(config.models, shown, at, what))


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
