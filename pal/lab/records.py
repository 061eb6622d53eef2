"""Records to ask a model about, of manifests or made-up scenes; and the kind of sound of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pal.data.manifest import Manifest, Record
from pal.data.synth import synthesise
from pal.errors import ManifestError

DOMAINS = ("sound", "music", "speech")
"""The paper's three."""

SCENES_SEED = 930_001
"""Far from the seeds that recipes train on."""

_OF_DATASET = {
    **dict.fromkeys(("fsdd", "librispeech", "speech"), "speech"),
    **dict.fromkeys(("gtzan", "nsynth", "musiccaps", "music"), "music"),
    **dict.fromkeys(("esc50", "vggsound", "fsd50k", "dcase2017", "audiocaps", "clotho", "clothoaqa", "synth"), "sound"),
}


def domain_of(record: Record) -> str:
    """Sound, music or speech: the record's task where it is one, notes of scenes as music, else by its data set.

    The name of the data set itself where that is not known.
    """
    if record.task in DOMAINS:
        return record.task
    if record.dataset == "synth" and record.task == "pitch":
        return "music"
    return _OF_DATASET.get(record.dataset.lower(), record.dataset or "unknown")


@contextmanager
def records_to_ask(manifests: Sequence[Path], limit: int, seed: int = SCENES_SEED) -> Iterator[list[Record]]:
    """Records of some manifests, while the block lasts: only those with allowed answers, where a manifest has any.

    Args:
        manifests: files; made-up scenes where there are none.
        limit: most records of one manifest; they are taken evenly from all of it.
        seed: of the scenes.

    Raises:
        ManifestError: a file that is none, or has nothing to ask.
    """
    with TemporaryDirectory(prefix="pal-") as folder:
        files = list(manifests) or [synthesise(folder, scenes=-(-limit // 4), seed=seed, questions_per_scene=4)]
        found: list[Record] = []
        for path in files:
            if not path.is_file():
                raise ManifestError(f"{path}: no such manifest; make one with: pal data prepare")
            records = list(Manifest(path))
            closed = [record for record in records if record.choices] or records
            if not closed:
                raise ManifestError(f"{path} has no questions")
            found += spread(closed, limit)
        yield found


def spread(records: Sequence[Record], limit: int) -> list[Record]:
    """At most `limit` of them, evenly from first to last."""
    count = min(limit, len(records))
    return [records[i * len(records) // count] for i in range(count)]
