"""Records to ask a model about, from manifests or synthetic scenes, and their domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pal.data.manifest import Manifest, Record
from pal.data.synth import synthesise
from pal.errors import ManifestError

DOMAINS = ("sound", "music", "speech")
"""The paper's three domains."""

SCENES_SEED = 930_001
"""Seed of scenes, far from those of training scenes."""

_DATASET_DOMAINS = {
    **dict.fromkeys(("fsdd", "librispeech", "speech"), "speech"),
    **dict.fromkeys(("gtzan", "nsynth", "musiccaps", "music"), "music"),
    **dict.fromkeys(("esc50", "vggsound", "fsd50k", "dcase2017", "audiocaps", "clotho", "clothoaqa", "synth"), "sound"),
}


def domain_of(record: Record) -> str:
    """Domain of a record: "sound", "music" or "speech", from its task if that is one, else from its data set.

    Questions about the pitch of synthetic notes are music. An unknown data set is its own domain.
    """
    if record.task in DOMAINS:
        return record.task
    if record.dataset == "synth" and record.task == "pitch":
        return "music"
    return _DATASET_DOMAINS.get(record.dataset.lower(), record.dataset or "unknown")


@contextmanager
def records_to_ask(manifests: Sequence[Path], limit: int, seed: int = SCENES_SEED) -> Iterator[list[Record]]:
    """Records of manifests; synthetic scenes exist as long as the block lasts.

    If some records of a manifest have choices, those without are left out.

    Args:
        manifests: manifest files; none: synthetic scenes.
        limit: maximum number of records of a manifest, spread evenly over it.
        seed: seed of the scenes.

    Raises:
        ManifestError: a manifest is missing, invalid or empty.
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
    """At most `limit` of the records, spread evenly from first to last."""
    count = min(limit, len(records))
    return [records[i * len(records) // count] for i in range(count)]
