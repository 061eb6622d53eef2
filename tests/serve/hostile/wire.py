"""Requests byte by byte, and what a server makes of them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11
import numpy as np
import soundfile

CHAT = "/v1/chat/completions"
PATIENCE = 120.0
"""Seconds that a client waits for an answer."""


@dataclass(frozen=True)
class Target:
    """A server that is attacked.

    `pid` of its process, whose memory is measured; None measures nothing.
    """

    url: str
    model: str
    pid: int | None = None
    key: str | None = None

    @property
    def host(self) -> tuple[str, int]:
        """Name and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    def head(self, path: str, headers: dict[str, str], method: str = "POST") -> bytes:
        """The first lines of a request; headers without a value are left out."""
        host, port = self.host
        given = {"Host": f"{host}:{port}", "Connection": "close"}
        given |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        lines = [f"{name}: {value}" for name, value in {**given, **headers}.items() if value]
        return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1")


@dataclass
class Outcome:
    """What came back; status 0 where nothing did."""

    status: int = 0
    body: bytes = b""
    seconds: float = 0.0
    failure: str = ""
    """Why nothing came back."""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def shaped(self) -> bool:
        """Whether an error has OpenAI's shape: message, type, param and code."""
        try:
            error = json.loads(self.body)["error"]
            whole = {"message", "type", "param", "code"} <= set(error)
            return whole and isinstance(error["message"], str) and isinstance(error["type"], str)
        except (ValueError, KeyError, TypeError):
            return False

    @property
    def kind(self) -> str:
        """In a word: a status, or how the connection ended."""
        return str(self.status) if self.status else self.failure


async def send(target: Target, request: bytes | Iterable[bytes], patience: float = PATIENCE) -> Outcome:
    """Write a request as it is, and read what comes back while writing; an early answer ends the writing."""
    began, found = time.perf_counter(), Outcome()
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_connection(*target.host)
            pieces = (request,) if isinstance(request, bytes) else request
            writing = asyncio.create_task(_write(writer, pieces))
            try:
                await _read(reader, found)
            finally:
                writing.cancel()
                writer.transport.abort()
                with suppress(asyncio.CancelledError, OSError):
                    await writing
    except TimeoutError:
        found.failure = "timeout"
    except (OSError, h11.RemoteProtocolError) as error:
        found.failure = "no connection" if isinstance(error, ConnectionRefusedError) else "closed"
    if not found.status and not found.failure:
        found.failure = "closed"
    found.seconds = time.perf_counter() - began
    return found


async def _write(writer: asyncio.StreamWriter, pieces: Iterable[bytes]) -> None:
    with suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()


async def _read(reader: asyncio.StreamReader, found: Outcome) -> None:
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    parser.send(h11.EndOfMessage())
    body = bytearray()
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            parser.receive_data(await reader.read(1 << 16))
        elif isinstance(event, h11.Response):
            found.status = event.status_code
            found.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed) or event is h11.PAUSED:
            found.body = bytes(body)
            return


def wav(seconds: float = 0.3, number: int = 0, format: str = "WAV", rate: int = 16_000, **options: Any) -> bytes:
    """A file with a tone and a little noise; each number has its own."""
    draw, at_N = np.random.default_rng(number), np.arange(round(rate * seconds)) / rate
    x_N = 0.3 * np.sin(2 * np.pi * (200 + number % 1_000) * at_N) + 0.02 * draw.standard_normal(len(at_N))
    file = io.BytesIO()
    soundfile.write(file, x_N, rate, format=format, **options)
    return file.getvalue()


def part(data: bytes | str, format: str | None = "wav") -> dict[str, Any]:
    """A clip as a part of a message; text stands as it is."""
    text = data if isinstance(data, str) else base64.b64encode(data).decode()
    return {"type": "input_audio", "input_audio": {"data": text, **({"format": format} if format else {})}}


def chat(model: str, *parts: Any, text: str = "What sound is this?", **more: Any) -> dict[str, Any]:
    """The body of a chat."""
    content = [*parts, {"type": "text", "text": text}]
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}


def posted(target: Target, body: object, path: str = CHAT, **headers: str) -> bytes:
    """A request with a body, as JSON unless it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", "Content-Length": str(len(data))}
    return target.head(path, {**given, **{name.replace("_", "-"): value for name, value in headers.items()}}) + data


async def ask(target: Target, *parts: Any, path: str = CHAT, patience: float = PATIENCE, **more: Any) -> Outcome:
    """A chat about some parts."""
    return await send(target, posted(target, chat(target.model, *parts, **more), path), patience)


async def heard(target: Target, data: bytes) -> tuple[float, Outcome]:
    """How much of a file a server has taken: seconds of an indexed clip, else tokens of a prompt; 0 if it refuses."""
    made = await send(target, posted(target, {"model": target.model, **_input(data)}, "/v1/audio/index"))
    if made.status == 404:
        made = await ask(target, part(data))
    found = json.loads(made.body) if made.status == 200 else {}
    return float(found.get("seconds") or (found.get("usage") or {}).get("prompt_tokens") or 0.0), made


def _input(data: bytes) -> dict[str, Any]:
    return {"input_audio": part(data)["input_audio"]}


@asynccontextmanager
async def listening(content: bytes) -> AsyncIterator[tuple[int, list[str]]]:
    """A web server on a port of this machine that gives a file to everybody; the first lines of who asked."""
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append("a connection")
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            seen[-1] = (await asyncio.wait_for(reader.readline(), 5)).decode("latin-1").strip()
            lines = ["HTTP/1.1 200 OK", "Content-Type: audio/wav", f"Content-Length: {len(content)}"]
            writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode() + content)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], seen
