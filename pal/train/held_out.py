"""Records held out of training for validation."""

from __future__ import annotations

import hashlib

from pal.data.manifest import Record, portable
from pal.data.record_source import RecordSource
from pal.train.recipe import Recipe


def held_out(recipe: Recipe, manifest: RecordSource) -> frozenset[int]:
    """Indices of a source's records with a clip that the recipe's validation holds out; none without a `share`."""
    share = None if recipe.validation is None else recipe.validation.share
    if share is None:
        return frozenset()
    return frozenset(row for row, record in enumerate(manifest) if is_held_out(record, manifest, share))


def is_held_out(record: Record, manifest: RecordSource, share: float) -> bool:
    """True if a clip of the record is in the share by a hash of its path, relative to the source's folder."""
    return any(_place(portable(clip, manifest.base)) < share for clip in record.clips)


def _place(name: str) -> float:
    """Number from 0 to 1, the same for the same name everywhere."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=7).digest()) / 2**56
