"""One function for each attack: how often which status came, whether errors had their shape, time and memory."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.serve.hostile import bodies, files
from tests.serve.hostile.memory import MEBI, MemoryWatch, cpu_seconds
from tests.serve.hostile.wire import (
    CHAT,
    PATIENCE,
    Outcome,
    Target,
    ask,
    chat,
    heard,
    listening,
    part,
    posted,
    send,
    wav,
)


@dataclass
class Report:
    """What an attack found."""

    attack: str
    requests: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """How often which status, or how the connection ended."""
    errors: int = 0
    """Answers with an error status."""
    shaped: int = 0
    """Those of them with OpenAI's shape."""
    slowest: float = 0.0
    """Seconds of the slowest answer."""
    peak: float = 0.0
    """MiB of memory beyond those before, at most."""
    kept: float = 0.0
    """MiB beyond those before, at the end."""
    facts: dict[str, Any] = field(default_factory=dict)
    alive: float | None = None
    """Seconds of an ordinary question afterwards; None: it was not answered."""

    def take(self, one: Outcome) -> None:
        """Count an answer."""
        self.requests += 1
        self.kinds[one.kind] = self.kinds.get(one.kind, 0) + 1
        self.slowest = max(self.slowest, one.seconds)
        if one.status >= 400:
            self.errors += 1
            self.shaped += one.shaped

    def describe(self, name: str, one: Outcome, cpu: float) -> None:
        """Count an answer and keep what it was, with the CPU seconds of the server."""
        self.take(one)
        self.facts[name] = f"{one.kind} after {one.seconds:.2f} s, {cpu:.2f} s of CPU"

    def note(self, name: str, text: str) -> None:
        """Keep an example, the first ten of a name."""
        self.facts.setdefault(name, [])
        if len(self.facts[name]) < 10:
            self.facts[name].append(text)

    def json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


Attack = Callable[[Target, Report, int], Awaitable[None]]


async def run(attack: Attack, target: Target, count: int) -> Report:
    """Attack, and ask an ordinary question afterwards."""
    report = Report(attack.__name__)
    with MemoryWatch(target.pid) as watch:
        await attack(target, report, count)
    report.peak, report.kept = round(watch.peak / MEBI, 1), round(watch.kept / MEBI, 1)
    after = await ask(target, part(wav(0.5, 99)))
    report.alive = after.seconds if after.status == 200 else None
    if after.status != 200:
        report.facts["afterwards"] = after.kind
    return report


async def _each(
    report: Report, named: Iterable[tuple[str, bytes]], target: Target, at_once: int = 1, patience: float = PATIENCE
) -> None:
    """Send requests; what is an error of the server, or none of OpenAI's, is noted."""
    gate = asyncio.Semaphore(at_once)

    async def one(name: str, request: bytes) -> None:
        async with gate:
            found = await send(target, request, patience)
        report.take(found)
        if found.status >= 500 or not found.status:
            report.note(f"examples of {found.kind}", name)
        elif found.status >= 400 and not found.shaped:
            report.note("examples of other shapes", f"{name}: {found.status} {found.body[:80]!r}")

    await asyncio.gather(*(one(name, request) for name, request in named))


async def malformed(target: Target, report: Report, count: int) -> None:
    """Bodies, forms and framing that are broken."""
    named = ((f"number {k}", bodies.malformed(target, k)) for k in range(count))
    await _each(report, named, target, at_once=8, patience=40.0)  # some promise more bytes than come


async def bombs(target: Target, report: Report, count: int) -> None:
    """Files of half a megabyte with `count` hours of silence."""
    for name, data in files.bombs(count * files.HOUR):
        cpu = cpu_seconds(target.pid)
        found = await ask(target, part(data, "flac" if "FLAC" in name else "ogg"))
        report.describe(name, found, cpu_seconds(target.pid) - cpu)


async def rates(target: Target, report: Report, count: int) -> None:
    """Headers of 1 Hz and 655,350 Hz."""
    for name, data in files.forged_rates():
        cpu = cpu_seconds(target.pid)
        found = await ask(target, part(data, name.split()[0].lower()))
        report.describe(name, found, cpu_seconds(target.pid) - cpu)
        if found.status == 200:
            report.note("taken", name)


async def large(target: Target, report: Report, count: int) -> None:
    """A body of `count` MiB: with its length, without, and announced only; as JSON and as a form."""
    piece = b" " * MEBI

    def chunks() -> Iterator[bytes]:
        for _ in range(count):
            yield b"%x\r\n" % len(piece) + piece + b"\r\n"
        yield b"0\r\n\r\n"

    for path, kind in ((CHAT, "application/json"), (bodies.TRANSCRIBE, "multipart/form-data; boundary=edge")):
        length = {"Content-Type": kind, "Content-Length": str(count * MEBI)}
        head = target.head(path, length)
        without = target.head(path, {"Content-Type": kind, "Transfer-Encoding": "chunked"})
        start = (
            b"" if path == CHAT else b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        )
        whole = [head, start + piece[len(start) :], *([piece] * (count - 1))]
        first = [without, b"%x\r\n" % len(start) + start + b"\r\n"] if start else [without]
        for name, pieces in (("with its length", whole), ("without length", itertools.chain(first, chunks()))):
            cpu = cpu_seconds(target.pid)
            found = await send(target, pieces)
            report.describe(f"{path}, {name}", found, cpu_seconds(target.pid) - cpu)


async def many_parts(target: Target, report: Report, count: int) -> None:
    """A chat with so many clips, and a form with so many files."""
    clip = part(wav(0.1))
    cpu = cpu_seconds(target.pid)
    found = await ask(target, *([clip] * count))
    report.describe(CHAT, found, cpu_seconds(target.pid) - cpu)
    head = '--edge\r\nContent-Disposition: form-data; name="{}"; filename="a.wav"\r\n\r\n'
    form = "".join(head.format("file") + "RIFF\r\n" for _ in range(count)) + "--edge--\r\n"
    request = posted(target, form.encode(), bodies.TRANSCRIBE, Content_Type="multipart/form-data; boundary=edge")
    cpu = cpu_seconds(target.pid)
    found = await send(target, request)
    report.describe(bodies.TRANSCRIBE, found, cpu_seconds(target.pid) - cpu)


async def ssrf(target: Target, report: Report, count: int) -> None:
    """URLs of a server that listens beside it."""
    async with listening(wav(0.5, 5)) as (port, seen):
        for name, request in bodies.ssrf(target, port)[:count]:
            before = len(seen)
            await _each(report, [(name, request)], target)
            if len(seen) > before:
                report.note("fetched", name)
        report.facts["connections"] = len(seen)


async def traversal(target: Target, report: Report, count: int) -> None:
    """Paths of files on the server's disk."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder).resolve() / "canary.wav"
        file.write_bytes(wav(0.5, 6))
        file.with_suffix(".txt").write_text(bodies.SECRET)
        read = 0
        for name, request in bodies.traversals(target, file)[:count]:
            found = await send(target, request)
            report.take(found)
            if found.status >= 400 and not found.shaped:
                report.note("examples of other shapes", f"{name}: {found.status} {found.body[:80]!r}")
            given = bodies.SECRET.encode() in found.body
            if given or (found.status == 200 and not name.startswith("GET")):
                read += 1
                report.note("read", name)
        report.facts["files read"] = read


async def damaged(target: Target, report: Report, count: int) -> None:
    """So many files of each codec, cut or with flipped bits; none may be taken in part."""
    for codec in files.CODECS:
        expected, made = await heard(target, files.whole(codec))
        if made.status != 200:
            report.facts[codec] = f"the whole file: {made.kind}"
            continue
        seen: Counter[str] = Counter()
        for number in range(count):
            got, found = await heard(target, files.damaged(codec, number))
            report.take(found)
            if found.status != 200:
                seen[f"refused ({found.kind})"] += 1
                if found.status >= 500:
                    report.note(f"examples of {found.kind}", f"{codec} {number}")
            elif got < expected:
                seen["shortened"] += 1
                report.note("shortened", f"{codec} {number}: {got:g} of {expected:g}")
            else:
                seen["whole" if got == expected else "longer"] += 1
        report.facts[codec] = dict(seen)


async def disconnects(target: Target, report: Report, count: int) -> None:
    """Clients that leave after the first piece of a stream (even numbers), or while they wait for it."""

    async def one(number: int) -> None:
        body = chat(target.model, part(wav(0.5, number)), stream=True)
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(120):
                reader, writer = await asyncio.open_connection(*target.host)
                writer.write(posted(target, {**body, "max_tokens": 200}))
                await writer.drain()
                if number % 2:
                    await asyncio.sleep(0.05 * (number % 10))
                    report.take(Outcome(failure="left"))
                else:
                    first = await reader.read(200)
                    report.take(Outcome(int(first.split()[1]) if first else 0, failure="closed"))
                writer.transport.abort()

    for start in range(0, count, 10):
        await asyncio.gather(*(one(number) for number in range(start, min(count, start + 10))))


async def slow(target: Target, report: Report, count: int, seconds: float = 60.0) -> None:
    """So many connections that send a byte a second: nothing at all, a head, or a body; others are served meanwhile."""
    body = json.dumps(chat(target.model)).encode()
    head = target.head(CHAT, {"Content-Type": "application/json", "Content-Length": str(len(body))})
    end, closed = time.monotonic() + seconds, 0

    async def one(number: int) -> None:
        nonlocal closed
        try:
            reader, writer = await asyncio.open_connection(*target.host)
            ended = asyncio.create_task(reader.read())
            sent = b"" if number % 3 == 0 else head[:20] if number % 3 == 1 else head + body[:20]
            rest = b"" if number % 3 == 0 else head[20:] if number % 3 == 1 else body[20:]
            writer.write(sent)
            for at in range(int(seconds)):
                if time.monotonic() > end or ended.done():
                    break
                if rest[at : at + 1]:
                    writer.write(rest[at : at + 1])
                await asyncio.wait([ended], timeout=1.0)
            closed += ended.done()
            ended.cancel()
            writer.transport.abort()
        except OSError as error:
            report.note("refused", type(error).__name__)

    before = [(await ask(target, part(wav(0.5, k)))).seconds for k in range(3)]
    crowd = [asyncio.create_task(one(number)) for number in range(count)]
    await asyncio.sleep(2)
    during = []
    while time.monotonic() < end or not during:
        found = await ask(target, part(wav(0.5, 100 + len(during))))
        report.take(found)
        during.append(found.seconds)
        await asyncio.sleep(0.5)
    await asyncio.gather(*crowd)
    report.facts["median seconds of an answer before"] = round(statistics.median(before), 2)
    report.facts["median seconds of an answer meanwhile"] = round(statistics.median(during), 2)
    report.facts["slow connections that the server ended"] = f"{closed} of {count}, in {seconds:.0f} s"


ATTACKS: dict[str, tuple[Attack, int, int]] = {
    "malformed": (malformed, 1_000, 60),
    "bombs": (bombs, 6, 1),
    "rates": (rates, 1, 1),
    "large": (large, 300, 3),
    "many_parts": (many_parts, 1_000, 40),
    "ssrf": (ssrf, 40, 40),
    "traversal": (traversal, 40, 40),
    "damaged": (damaged, 200, 4),
    "disconnects": (disconnects, 100, 5),
    "slow": (slow, 500, 30),
}
"""Each attack with its full and its reduced count."""
