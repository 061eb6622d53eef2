"""Compares `pal.audio.load` with independent decoders, file by file.

    python -m tests.audio.corpus [FOLDER ...] [--keep FOLDER] [--read-to-end] [--in-process]

Without a folder it makes the corpus with the programs that are installed. "Of what two read" counts files that two
other decoders read without complaint and alike, and leaves out those that are cut or have no length, of which no decoder
can know the end. Status 1 where a file is decoded to something else, raises anything but an AudioError, or where more
than 3 % of what two others read is refused.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from tests.audio.corpus.compare import DIFFERENT, EQUAL, RAISED, REFUSED, UNREAD, Verdict, judge
from tests.audio.corpus.refusals import on_purpose

SUFFIXES = """
    wav wave w64 rf64 bwf aif aiff aifc afc au snd caf mp1 mp2 mp3 mpga ogg oga opus spx flac fla m4a m4b mp4 aac 3gp webm
    mka mkv mov wma asf amr ape wv tta mpc ac3 voc sph nist ircam sf 8svx svx iff paf pvf avr htk sds sd2 xi wve dsf dff
    mat4 mat5 mpc2k
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audio.corpus", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders or files to compare in the corpus' place")
    parser.add_argument("--keep", type=Path, help="write the corpus into this folder and leave it there")
    parser.add_argument("--read-to-end", action="store_true", help="read files whose length cannot be known")
    parser.add_argument("--in-process", action="store_true", help="compare with libsndfile and av alone: fast")
    asked = parser.parse_args()
    if asked.folders:
        return _report(_judge(_found(asked.folders), asked))
    from tests.audio.corpus.generate import generate

    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        return _report(_judge(generate(folder), asked))


def _found(folders: list[Path]) -> list[Path]:
    paths = []
    for folder in folders:
        inside = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
        paths += [
            path
            for path in inside
            if path.is_file() and (path == folder or path.suffix[1:].lower() in SUFFIXES.split())
        ]
    return paths


def _judge(paths: list[Path], asked: argparse.Namespace) -> list[Verdict]:
    return [judge(path, asked.read_to_end, not asked.in_process) for path in tqdm(paths, desc="files", disable=None)]


def _report(verdicts: list[Verdict]) -> int:
    kinds = sorted({verdict.path.suffix.lower() for verdict in verdicts})
    columns = [EQUAL, UNREAD, REFUSED, DIFFERENT, RAISED]
    print(f"{'':10}{'files':>8}" + "".join(f"{column:>11}" for column in columns) + "   refused of what two read")
    for kind in [*kinds, ""]:
        own = [verdict for verdict in verdicts if kind in ("", verdict.path.suffix.lower())]
        counts = Counter(verdict.kind for verdict in own)
        whole = [verdict for verdict in own if verdict.whole >= 2 and not on_purpose(verdict.path.name, verdict.line)]
        refused = sum(verdict.kind == REFUSED for verdict in whole)
        share = f"{refused:>8} of {len(whole)}" + (f" ({100 * refused / len(whole):.1f} %)" if whole else "")
        print(
            f"{kind or 'all':10}{len(own):>8}" + "".join(f"{counts[column]:>11}" for column in columns) + f"  {share}"
        )
    for column in (RAISED, DIFFERENT, REFUSED, UNREAD):
        for verdict in verdicts:
            if verdict.kind == column:
                print(f"{column} ({verdict.whole} read it) {verdict.path}: {verdict.line}")
    whole = [verdict for verdict in verdicts if verdict.whole >= 2 and not on_purpose(verdict.path.name, verdict.line)]
    too_many = sum(verdict.kind == REFUSED for verdict in whole) > 0.03 * len(whole)
    return int(too_many or any(verdict.kind in (DIFFERENT, RAISED) for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
