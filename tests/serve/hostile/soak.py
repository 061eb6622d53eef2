"""Steady load on a server, and its resident memory every ten seconds.

    python -m tests.serve.hostile.soak http://127.0.0.1:8000 --model tiny --pid PID --minutes 60

Clips that were not sent before, clips sent again, streams, transcriptions, questions without sound, damaged clips and
clients that leave follow one another. The cache grows to its bound first: start the server with a small `--cache-gb`.
The slope is that of a straight line through the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import sys
import time
from collections import Counter
from typing import Any

import httpx
import numpy as np
import soundfile

from tests.serve.hostile.memory import MEBI, resident

EVERY = 10.0
"""Seconds between two looks at the memory."""


def clip(number: int, seconds: float = 2.0) -> bytes:
    """A WAV file of a tone and noise; each number has its own."""
    draw, at_N = np.random.default_rng(number), np.arange(round(16_000 * seconds)) / 16_000
    file = io.BytesIO()
    x_N = 0.3 * np.sin(2 * np.pi * (200 + number % 1_000) * at_N) + 0.02 * draw.standard_normal(len(at_N))
    soundfile.write(file, x_N, 16_000, format="WAV")
    return file.getvalue()


def body(model: str, data: bytes | None, text: str = "What sound is this?", **more: Any) -> dict[str, Any]:
    """A chat about a clip, or about none."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if data is not None:
        audio = {"data": base64.b64encode(data).decode(), "format": "wav"}
        parts.insert(0, {"type": "input_audio", "input_audio": audio})
    return {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 16, **more}


async def send(client: httpx.AsyncClient, model: str, number: int) -> str:
    """One request; what became of it."""
    kind, chat = number % 8, "/v1/chat/completions"
    if kind == 4:
        file = {"file": ("clip.wav", clip(number))}
        answer = await client.post("/v1/audio/transcriptions", data={"model": model}, files=file)
    elif kind == 5:
        answer = await client.post(chat, json=body(model, None))
    elif kind == 6:
        answer = await client.post(chat, json=body(model, clip(number)[:-1_000]))
    elif kind == 7:
        made = client.stream("POST", chat, json=body(model, clip(number), stream=True, max_tokens=200))
        async with made as answer:
            async for _ in answer.aiter_lines():
                return "left"
    else:
        data = clip(number % 5 if kind == 3 else number)
        answer = await client.post(chat, json=body(model, data, stream=kind == 2))
    return str(answer.status_code)


async def soak(url: str, model: str, pid: int, seconds: float, rate: float) -> dict[str, Any]:
    """Send `rate` requests a second for so long; what came back, and the bytes at each look."""
    seen: Counter[str] = Counter()
    looks: list[tuple[float, int]] = []
    running: set[asyncio.Task[None]] = set()
    began = time.monotonic()

    async def one(number: int) -> None:
        try:
            seen[await send(client, model, number)] += 1
        except httpx.HTTPError as error:
            seen[type(error).__name__] += 1

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        number = 0
        while (now := time.monotonic() - began) < seconds:
            if len(running) < 8:  # beyond that the load would not be steady
                task = asyncio.create_task(one(number))
                running.add(task)
                task.add_done_callback(running.discard)
                number += 1
            if now >= len(looks) * EVERY:
                looks.append((now, resident(pid)))
                print(f"{now:.0f} s: {looks[-1][1] / MEBI:.1f} MiB, {dict(seen)}", file=sys.stderr, flush=True)
            await asyncio.sleep(1 / rate)
        await asyncio.gather(*running)
    later = looks[len(looks) // 2 :]
    at_N, bytes_N = np.array([one[0] for one in later]), np.array([one[1] for one in later])
    slope = float(np.polyfit(at_N, bytes_N, 1)[0]) * 3600 / MEBI if len(later) > 2 else 0.0
    return {
        "seconds": time.monotonic() - began,
        "requests": number,
        "seen": dict(sorted(seen.items())),
        "mebibytes": [round(one[1] / MEBI, 1) for one in looks],
        "slope": slope,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.serve.hostile.soak", description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second, unless eight wait already")
    args = parser.parse_args()
    found = asyncio.run(soak(args.url, args.model, args.pid, 60 * args.minutes, args.rate))
    print(json.dumps(found))
    series = found["mebibytes"]
    half = series[len(series) // 2 :]
    print(
        f"{found['requests']} requests in {found['seconds'] / 60:.0f} min; MiB at the start {series[0]}, "
        f"second half {min(half)} to {max(half)}, slope there {found['slope']:+.1f} MiB an hour"
    )


if __name__ == "__main__":
    main()
