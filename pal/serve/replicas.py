"""Replicas of the server behind one address, by Ray Serve: each holds the models, their engines and the application.

Any replica takes any request. A handle of an indexed clip names a clip that one replica holds; the others ask it for
the clip's keys and values, so that a handle is good at every replica.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import ray
from anyio import to_thread
from fastapi import FastAPI
from ray import serve

from pal import bundle, shipped
from pal.backbone.audio_kv import AudioKV
from pal.serve.app import create_app
from pal.serve.engine import Engine
from pal.serve.page_routes import Attention
from pal.serve.replica import Replica, packed, unpacked
from pal.serve.server_config import ReplicaConfig

DEPLOYMENT = "models"
_LOG = logging.getLogger(__name__)
_PEER_SECONDS = 20.0
"""That other replicas may take to look for a clip."""


class ModelReplica:
    """A whole server: models, engines and the application; Ray Serve makes several.

    Args:
        config: fields of `ReplicaConfig`.
        attention: as for `create_app`.
    """

    def __init__(self, config: Mapping[str, Any], attention: Attention | None = None) -> None:
        self.config = ReplicaConfig(**config)
        self.attention = attention
        self.context = serve.get_replica_context()
        self.name = self.context.replica_tag
        self.engines: dict[str, Engine] = {}
        for name, source in self.config.models.items():
            model = bundle.load(shipped.FOLDERS.get(source, source), other_weights=self.config.other_weights)
            if self.config.gpus:
                model.to("cuda")
            self.engines[name] = self.config.engine(name, model)
        self._made: FastAPI | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Ray Serve begins and ends it with the replica."""
        replica = Replica(self.name, self._elsewhere)
        self._made = create_app(self.engines, self.config.options(), self.attention, replica=replica)
        return self._made

    def check_health(self) -> None:
        """Raise where an engine's thread has ended; Ray Serve then puts another replica in this one's place."""
        for engine in self.engines.values():
            if not engine.ready:
                raise RuntimeError(f"the engine of {engine.name} has ended")

    async def stop(self) -> None:
        """Refuse new requests."""
        assert self._made is not None
        self._made.state.stopping = True

    async def give_up(self) -> None:
        """Fail what is not answered."""
        assert self._made is not None
        self._made.state.give_up()

    async def unanswered(self) -> int:
        """Requests and answers that the engines hold."""
        return sum(engine.waiting + engine.running for engine in self.engines.values())

    async def stored(self, model: str, digest: str, asker: str) -> bytes | None:
        """An `AudioKV` as the bytes of its file, if this replica has it and is not the one that asks."""
        audio = None if asker == self.name else self.engines[model].stored(digest)
        return None if audio is None else await to_thread.run_sync(packed, audio)

    def _elsewhere(self, model: str, digest: str) -> AudioKV | None:
        """Keys and values that another replica holds; not for the event loop's thread."""
        try:
            handle = serve.get_deployment_handle(self.context.deployment, self.context.app_name)
            asked = handle.broadcast("stored", model, digest, self.name)
            found = asked.results(timeout_s=_PEER_SECONDS, return_exceptions=True)
        except (ray.exceptions.RayError, serve.exceptions.RayServeException, TimeoutError) as error:
            _LOG.warning("other replicas were not asked for a clip: %s", error)
            return None
        for one in found:
            if isinstance(one, bytes):
                return unpacked(one, self.engines[model].digest).to(self.engines[model].model.device)
        return None


def deployment(config: ReplicaConfig, attention: Attention | None = None) -> serve.Application:
    """What `ray.serve.run` takes: the application with its replicas.

    Args:
        config: models, replicas and the options of each.
        attention: as for `create_app`; a function of a module.
    """
    made = serve.deployment(name=DEPLOYMENT, **config.deployment())(serve.ingress()(ModelReplica))
    return made.bind(config.model_dump(), attention)
