"""Makes each deliberate mistake of the lists in a copy of the project and runs the test that must notice it.

    python -m tests.mutants [WORD ...] [--json FILE] [--jobs N]

Words choose mutants whose change or file contains one of them. Status 1 where a mistake goes unnoticed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tests.mutants.mutants import load
from tests.mutants.running import preload, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants whose change or file contains one of them")
    parser.add_argument("--json", type=Path, help="also write the outcomes to this file")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="tests at a time")
    asked = parser.parse_args()
    chosen = [m for m in load() if not asked.words or any(word in f"{m.change} {m.file}" for word in asked.words)]
    if not chosen:
        print("no mutant has these words", file=sys.stderr)
        return 2
    start = time.perf_counter()
    preload()
    outcomes = run(chosen, asked.jobs)
    width = max(len(m.change) for m in chosen)
    for mutant, outcome in zip(chosen, outcomes, strict=True):
        print(f"{mutant.change:<{width}}  {outcome:<9}  {mutant.noticed_by}")
    noticed = sum(outcome == "noticed" for outcome in outcomes)
    print(f"{noticed} of {len(chosen)} mistakes noticed, in {time.perf_counter() - start:.0f} s")
    if asked.json:
        rows = [{**asdict(m), "outcome": outcome} for m, outcome in zip(chosen, outcomes, strict=True)]
        asked.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return 0 if noticed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
