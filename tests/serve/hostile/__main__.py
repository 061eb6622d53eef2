"""The hostile programme, against any server of OpenAI's protocol.

    python -m tests.serve.hostile http://127.0.0.1:8000 --model tiny --pid PID [--counts reduced] [--only bombs] [--json FILE]

Each attack prints how often which status came, how many of the errors have OpenAI's shape, the slowest answer, the most
and the lasting growth of the memory of the process and its children, and the seconds of an ordinary question afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from tests.serve.hostile.attacks import ATTACKS, Report, run
from tests.serve.hostile.wire import Target, ask, part, wav


def shown(report: Report) -> str:
    """A report in lines."""
    kinds = ", ".join(f"{kind} x {count}" for kind, count in sorted(report.kinds.items()))
    after = "not answered" if report.alive is None else f"{report.alive:.2f} s"
    lines = [
        f"{report.attack}: {report.requests} requests: {kinds}",
        f"  errors of OpenAI's shape: {report.shaped} of {report.errors}; slowest answer {report.slowest:.2f} s; "
        f"memory {report.peak:+.0f} MiB at most, {report.kept:+.0f} at the end; a question afterwards: {after}",
    ]
    return "\n".join([*lines, *(f"  {name}: {fact}" for name, fact in report.facts.items())])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.serve.hostile", description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", required=True, help="name of a model that takes sound")
    parser.add_argument("--pid", type=int, help="of the server, to measure its memory")
    parser.add_argument("--key", help="bearer token")
    parser.add_argument("--counts", choices=("full", "reduced"), default="full")
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    args = parser.parse_args()
    if urlsplit(args.url).scheme != "http":
        parser.error(f"{args.url}: give the address of a server with http://")
    target = Target(args.url, args.model, args.pid, args.key)
    first = asyncio.run(ask(target, part(wav(0.5))))
    if first.status != 200:
        parser.error(f"an ordinary question has no answer: {first.kind} {first.body[:200].decode(errors='replace')}")
    reports = []
    for name in args.only:
        attack, full, reduced = ATTACKS[name]
        began = time.monotonic()
        report = asyncio.run(run(attack, target, full if args.counts == "full" else reduced))
        print(shown(report), f"  took {time.monotonic() - began:.0f} s", sep="\n", flush=True)
        reports.append(report.json())
        if args.json:
            args.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    return int(any(report["alive"] is None for report in reports))


if __name__ == "__main__":
    sys.exit(main())
