"""What a server knows of itself where it is one of several behind one address."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pal.backbone.audio_kv import AudioKV

HEADER = "X-Pal-Replica"
"""Of every response: the replica that answered."""


@dataclass(frozen=True)
class Replica:
    """One of several servers that answer for one another."""

    name: str
    elsewhere: Callable[[str, str], AudioKV | None]
    """Keys and values that another replica holds, by the model's name and the clip's digest; called in a thread."""


class ReplicaHeader:
    """Names the replica in every response.

    Args:
        app: the application.
        name: of the replica.
    """

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app, self.name = app, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = self.name
            await send(message)

        await self.app(scope, receive, named)


def packed(audio: AudioKV) -> bytes:
    """The bytes of the file that `save` writes."""
    with tempfile.TemporaryDirectory(prefix="pal-clip-") as folder:
        audio.save(Path(folder, "clip.safetensors"))
        return Path(folder, "clip.safetensors").read_bytes()


def unpacked(data: bytes, digest: str) -> AudioKV:
    """What `packed` made of it. Raises BundleError where it is another model's, or no such file."""
    with tempfile.TemporaryDirectory(prefix="pal-clip-") as folder:
        Path(folder, "clip.safetensors").write_bytes(data)
        return AudioKV.load(Path(folder, "clip.safetensors"), digest)
