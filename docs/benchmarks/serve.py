"""Load on `pal serve`: many clients at once beside the same requests one at a time, in one run.

    python docs/benchmarks/serve.py tiny --clients 64
    python docs/benchmarks/serve.py smol --clients 64 --tokens 32 --clips 8

A server process is started for each pass, so that all begin with an empty cache; a first request about another clip,
which is not measured, warms it up. Each client asks one question after the other about the clips, and streams the
answers. With `--load 0.5` a third pass has requests that arrive at random, half as many a second as the second pass
answered. Printed are the median time to the first token, the requests of a second, their ratios, the CPU seconds, which
tell more than times on a machine that does other work, too, and whether the answers are equal. The clients take time on
the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile

QUESTIONS = (
    "What sound is this?",
    "Is there a high tone?",
    "How many sounds are there?",
    "Is it loud or quiet?",
    "Which sound comes first?",
)


@dataclass
class Heard:
    """What a client got."""

    text: str
    first: float
    """Seconds to the first piece of text."""
    whole: float
    tokens: int


def clip(number: int, seconds: float) -> str:
    """A WAV file of two tones and noise, in base64."""
    draw, at_N = np.random.default_rng(number), np.arange(round(16_000 * seconds)) / 16_000
    low, high = 200 + 40 * (number % 20), 900 + 70 * (number % 13)
    x_N = np.where(at_N < seconds / 2, np.sin(2 * np.pi * low * at_N), np.sin(2 * np.pi * high * at_N))
    file = io.BytesIO()
    soundfile.write(file, 0.3 * x_N + 0.02 * draw.standard_normal(len(at_N)), 16_000, format="WAV")
    return base64.b64encode(file.getvalue()).decode()


def request(args: argparse.Namespace, data: str, question: str) -> dict[str, Any]:
    """A streamed chat of one question about one clip."""
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return {
        "model": Path(args.model).name,
        "max_tokens": args.tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": [audio, {"type": "text", "text": question}]}],
    }


def requests(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The requests of all clients."""
    clips = [clip(number, args.seconds) for number in range(args.clips)]
    questions = QUESTIONS if args.question is None else (args.question,)
    return [
        request(args, clips[number % len(clips)], questions[number % len(questions)])
        for number in range(args.clients * args.rounds)
    ]


@contextmanager
def server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """A server process, warmed up; its address and process id."""
    command = [sys.executable, "-m", "pal", "serve", args.model, "--port", "0", "--batch", str(args.batch)]
    process = subprocess.Popen([*command, "--queue", str(args.clients)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split(" at ")[1].split("/v1")[0]
        warm = request(args, clip(1_000_000, args.seconds), QUESTIONS[0])  # of a clip that is not asked about later
        httpx.post(f"{url}/v1/chat/completions", json=warm, timeout=300).raise_for_status()
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


class Connection:
    """A kept connection of one client, in few lines, so that the clients leave the cores to the server."""

    def __init__(self, url: str) -> None:
        self.host, port = url.removeprefix("http://").rsplit(":", 1)
        self.port = int(port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> Heard:
        """Stream one answer. Raises RuntimeError if the server refuses it."""
        began, first, text, tokens = time.perf_counter(), None, "", 0
        if self._streams is None:
            self._streams = await asyncio.open_connection(self.host, self.port)
        reader, writer = self._streams
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        writer.write(body)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.splitlines()[0].decode())
        while size := int(await reader.readuntil(b"\r\n"), 16):  # chunked
            for line in (await reader.readexactly(size + 2)).splitlines():
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else tokens
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                if first is None and chunk["choices"]:
                    first = time.perf_counter() - began
        await reader.readexactly(2)
        whole = time.perf_counter() - began
        return Heard(text, whole if first is None else first, whole, tokens)

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()


async def measure(url: str, bodies: list[bytes], at_once: int) -> tuple[list[Heard], float]:
    """All answers to so many clients, each of which asks its next question after an answer, and the seconds for all."""
    clients = [Connection(url) for _ in range(at_once)]
    heard: dict[int, Heard] = {}
    waiting = iter(enumerate(bodies))

    async def run(client: Connection) -> None:
        for number, body in waiting:
            heard[number] = await client.ask(body)

    began = time.perf_counter()
    await asyncio.gather(*(run(client) for client in clients))
    seconds = time.perf_counter() - began
    for client in clients:
        client.close()
    return [heard[number] for number in range(len(bodies))], seconds


async def measure_arrivals(url: str, bodies: list[bytes], rate: float) -> tuple[list[Heard], float]:
    """All answers to requests that arrive at random, so many a second, whether earlier ones are answered or not."""
    gaps = np.random.default_rng(0).exponential(1 / rate, len(bodies))

    async def run(at: float, body: bytes) -> Heard:
        await asyncio.sleep(at)
        client = Connection(url)
        heard = await client.ask(body)
        client.close()
        return heard

    began = time.perf_counter()
    heard = await asyncio.gather(*(run(at, body) for at, body in zip(gaps.cumsum(), bodies, strict=True)))
    return list(heard), time.perf_counter() - began


def cpu_seconds(process: int) -> float:
    """CPU seconds of a process, and of those that it started, by /proc; 0 where there is none."""
    found, waiting = 0.0, [process]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            found += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
            waiting += map(int, (folder / "task" / folder.name / "children").read_text().split())
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="questions of a client")
    parser.add_argument("--clips", type=int, default=16, help="different clips")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a clip")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--load", type=float, help="third pass: share of the second pass's requests/s")
    parser.add_argument("--question", help="in place of the five short ones")
    args = parser.parse_args()
    bodies = [json.dumps(body).encode() for body in requests(args)]
    found: dict[str, tuple[list[Heard], float]] = {}

    def measured(name: str, run: Callable[[str], Coroutine[Any, Any, tuple[list[Heard], float]]]) -> None:
        with server(args) as (url, process):
            before, own = cpu_seconds(process), time.process_time()
            found[name] = heard, seconds = asyncio.run(run(url))
            served, own = cpu_seconds(process) - before, time.process_time() - own
        first = statistics.median(one.first for one in heard)
        tokens = sum(one.tokens for one in heard)
        print(
            f"{name:>16}: first token {first * 1e3:7.0f} ms (median), {len(heard) / seconds:6.1f} requests/s, "
            f"{tokens / seconds:7.1f} tokens/s, {seconds:.1f} s in all; CPU of a request: server "
            f"{served / len(heard) * 1e3:.1f} ms, client {own / len(heard) * 1e3:.1f} ms",
            flush=True,
        )

    measured("one at a time", lambda url: measure(url, bodies, 1))
    measured(f"{args.clients} at once", lambda url: measure(url, bodies, args.clients))
    (single, alone), (many, together) = found.values()
    if args.load is not None:
        rate = args.load * len(many) / together
        measured(f"{rate:.1f} a second", lambda url: measure_arrivals(url, bodies, rate))
    one = statistics.median(one.first for one in single)
    for name, (heard, _) in list(found.items())[1:]:
        slower = statistics.median(one.first for one in heard) / one
        equal = sum(a.text == b.text for a, b in zip(single, heard, strict=True))
        print(f"{name:>16}: time to first token {slower:.1f} times, answers equal: {equal} of {len(single)}")
    print(f"throughput {alone / together:.1f} times; load of the machine: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
