"""Several replicas of the server: what `pal serve --replicas` runs, and what Ray Serve deploys on a cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pal import bundle, ray_session, shipped
from pal.app.output import note
from pal.config import parse
from pal.errors import PalError, first_sentence
from pal.serve.server_config import ReplicaConfig, ServerConfig

if TYPE_CHECKING:
    from ray import serve

APPLICATION = "pal"
"""Name of the application in Ray Serve."""
_STORE_BYTES = 200 * 2**20
"""Ray's store of objects at least: bodies of requests and keys and values of clips pass through it."""
_BODIES = 8
"""Largest bodies that the store takes at once."""
_MORE = 10.0
"""Seconds beside those of grace in which the replicas end."""
_LAST_WORDS = 1.0
"""Seconds in which clients are told that their answers were given up."""
_POLL = 0.1
"""Seconds between two looks at whether all answers have ended."""


def application(args: Mapping[str, Any]) -> serve.Application:
    """What `serve deploy` and `serve run` of Ray take, as `pal.app.replicas:application`.

    Args:
        args: fields of `ReplicaConfig`, such as {"models": {"smol": "smol"}, "replicas": 2}.

    Raises:
        ConfigError: an unknown or wrong field.
    """
    from pal.probe.when import attention_by_word
    from pal.serve.replicas import deployment

    return deployment(parse(ReplicaConfig, args, "args of the application"), attention_by_word)


def replica_config(server: ServerConfig, sources: Mapping[str, str | None], more: Mapping[str, Any]) -> ReplicaConfig:
    """Options of replicas on this machine, whose cores and GPUs they share.

    Args:
        server: options of each.
        sources: of models by name; None is the default model.
        more: other fields of `ReplicaConfig`; `gpus` may be None.

    Raises:
        ConfigError: Ray Serve is missing, or a cluster is set; fields that do not fit together.
        BundleError: a folder or Hub id that holds no model.
    """
    ray_session.need("ray.serve", "replicas need", "--replicas and --max-replicas")
    ray_session.refuse_cluster("deploy pal.app.replicas:application (docs/serving.md)")
    models = {}
    for name, source in sources.items():
        path = source or shipped.default()
        if source is None:
            note(shipped.explain(path))
        models[name or path] = str(bundle.find(shipped.FOLDERS.get(path, path)).resolve())
    most = more["max_replicas"] or more["replicas"]
    shares = {"models": models, "cpus": max(1, (os.cpu_count() or 1) // most)}
    shares["gpus"] = ray_session.shared_gpus(most) if more["gpus"] is None else more["gpus"]
    return parse(ReplicaConfig, {**server.model_dump(), **more, **shares}, "pal serve")


def serve_replicas(config: ReplicaConfig, host: str, port: int, ready: Callable[[], None]) -> None:
    """Serve on this machine until SIGTERM or SIGINT; then what runs is answered, up to the time of grace.

    A second signal ends it at once.

    Args:
        config: models and replicas.
        host: address to listen at.
        port: port.
        ready: called once requests are taken.

    Raises:
        ConfigError: Ray cannot be started, or fewer GPUs than the replicas need.
        PalError: a replica does not start.
    """
    most = config.max_replicas or config.replicas
    ray_session.check_gpus(config.gpus * most, "fewer replicas")
    cpus = max(1, round(config.cpus * most)) + 1
    store = max(_STORE_BYTES, round(_BODIES * config.max_body_mb * 1e6))
    remedy = "leave out --replicas to do without it"
    stopped = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with ray_session.ray_session(None, cpus=cpus, store_bytes=store, remedy=remedy, show=True):
        from ray import serve

        for number in before:
            signal.signal(number, lambda *_: _stop(stopped))
        try:
            for name in ("ray.serve", "ray"):
                logging.getLogger(name).setLevel(logging.ERROR)
            serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
            _deploy(config, stopped)
            if not stopped.is_set():
                ready()
            stopped.wait()
            # in a thread, since Ray's calls wait for ever where a signal to all processes has ended Ray's own, too
            draining = threading.Thread(target=_drain, args=[config.grace], daemon=True)
            draining.start()
            draining.join(config.grace + _MORE)
        finally:  # Serve ends with Ray
            for number, handler in before.items():
                signal.signal(number, handler)


def _stop(stopped: threading.Event) -> None:
    """Handle a signal: at the first one answers are finished, at the second all ends."""
    if stopped.is_set():
        raise KeyboardInterrupt
    stopped.set()


def _deploy(config: ReplicaConfig, stopped: threading.Event) -> None:
    """Start the replicas; raises PalError with the reason where one does not start."""
    from ray import serve

    from pal.probe.when import attention_by_word
    from pal.serve.replicas import DEPLOYMENT, deployment

    app = deployment(config, attention_by_word)
    try:
        serve.run(app, name=APPLICATION, route_prefix="/", logging_config={"log_level": "WARNING"})
    except RuntimeError as error:
        found = serve.status().applications.get(APPLICATION)
        message = str(error) if found is None else found.deployments[DEPLOYMENT].message
        raise PalError(f"the replicas do not start: {reason(message)}") from None


def reason(message: str) -> str:
    """The error in Ray's message about a replica that did not start, which holds a traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in reversed(lines):
        kind, colon, said = line.partition(": ")
        if colon and kind.rpartition(".")[2].endswith(("Error", "Exception")):
            return said
    return first_sentence(RuntimeError(lines[0] if lines else "no reason is known"))


def _drain(grace: float) -> None:
    """Let all replicas refuse new requests, and wait for the end of those that they have."""
    from ray import serve

    from pal.serve.replicas import DEPLOYMENT

    until = time.monotonic() + grace
    handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
    handle.broadcast("stop").results(return_exceptions=True)
    while any(one for one in handle.broadcast("unanswered").results(return_exceptions=True) if isinstance(one, int)):
        if time.monotonic() > until:
            handle.broadcast("give_up").results(return_exceptions=True)
            time.sleep(_LAST_WORDS)
            break
        time.sleep(_POLL)
    serve.delete(APPLICATION)
