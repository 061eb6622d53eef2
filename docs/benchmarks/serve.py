"""Load on `pal serve`: many clients at once beside the same requests one at a time, in one run.

    python docs/benchmarks/serve.py tiny --clients 64
    python docs/benchmarks/serve.py smol --clients 64 --tokens 32 --clips 8

A server process is started for each pass, so that both begin with an empty cache; a first request, which is not
measured, warms it up. Each client asks one question after the other about the clips, and streams the answers. Printed
are the median time to the first token, the requests of a second, their ratios, and whether the answers are equal. The
clients take time on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


def requests(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The requests of all clients."""
    clips = [clip(number, args.seconds) for number in range(args.clips)]
    return [
        {
            "model": args.model,
            "max_tokens": args.tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "input_audio",
                            "input_audio": {"data": clips[number % len(clips)], "format": "wav"},
                        },
                        {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
                    ],
                }
            ],
        }
        for number in range(args.clients * args.rounds)
    ]


@contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """A server process, warmed up; its address."""
    command = [sys.executable, "-m", "pal", "serve", args.model, "--port", "0", "--batch", str(args.batch)]
    process = subprocess.Popen([*command, "--queue", str(args.clients)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split(" at ")[1].split("/v1")[0]
        warm = {**requests(args)[0], "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        httpx.post(f"{url}/v1/chat/completions", json=warm, timeout=300).raise_for_status()
        yield url
    finally:
        process.terminate()
        process.wait(60)


async def ask(client: httpx.AsyncClient, url: str, body: bytes) -> Heard:
    """Stream one answer."""
    began, first, text, tokens = time.perf_counter(), None, "", 0
    headers = {"Content-Type": "application/json"}
    async with client.stream("POST", f"{url}/v1/chat/completions", content=body, headers=headers) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else tokens
            piece = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            text += piece
            if first is None and chunk["choices"]:
                first = time.perf_counter() - began
    whole = time.perf_counter() - began
    return Heard(text, whole if first is None else first, whole, tokens)


async def measure(url: str, bodies: list[bytes], at_once: int) -> tuple[list[Heard], float]:
    """All answers, with at most so many clients at once, and the seconds for all."""
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        gate = asyncio.Semaphore(at_once)

        async def one(body: bytes) -> Heard:
            async with gate:
                return await ask(client, url, body)

        began = time.perf_counter()
        heard = await asyncio.gather(*(one(body) for body in bodies))
        return list(heard), time.perf_counter() - began


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
    args = parser.parse_args()
    bodies = [json.dumps(body).encode() for body in requests(args)]
    found = {}
    for name, at_once in (("one at a time", 1), (f"{args.clients} at once", args.clients)):
        with server(args) as url:
            found[name] = measured = asyncio.run(measure(url, bodies, at_once))
        heard, seconds = measured
        first = statistics.median(one.first for one in heard)
        tokens = sum(one.tokens for one in heard)
        print(
            f"{name:>14}: first token {first * 1e3:7.0f} ms (median), {len(heard) / seconds:6.1f} requests/s, "
            f"{tokens / seconds:7.1f} tokens/s, {seconds:.1f} s in all",
            flush=True,
        )
    (single, alone), (many, together) = found.values()
    equal = sum(a.text == b.text for a, b in zip(single, many, strict=True))
    slower = statistics.median(one.first for one in many) / statistics.median(one.first for one in single)
    print(f"throughput {alone / together:.1f} times, time to first token {slower:.1f} times")
    print(f"answers equal: {equal} of {len(single)}; load of the machine: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
