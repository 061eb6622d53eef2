"""Bad clips of a source that its list `skip_clips` names."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from pal.data.clean import read_clips
from pal.data.record_source import RecordSource
from pal.errors import ConfigError, ManifestError
from pal.files import sha256
from pal.train.recipe import Recipe
from pal.train.source_config import Source

logger = logging.getLogger(__name__)


def rows_to_skip(name: str, source: Source, manifest: RecordSource) -> frozenset[int]:
    """Indices of the records whose clips are listed in the source's `skip_clips`; their number is logged.

    Args:
        name: name of the source.
        source: source with `skip_clips`: a file with one path a line, relative as in the manifest.
        manifest: manifest of the source.

    Raises:
        ConfigError: the list names a clip that no record has, or cannot be read.
    """
    path = source.skip_clips
    if path is None:
        return frozenset()
    listed: dict[str, int] = {}
    looks_like_comment: set[int] = set()
    try:
        for number, clip in read_clips(path):
            listed.setdefault(_located(manifest, clip), number)
            if clip.startswith("#"):
                looks_like_comment.add(number)
    except ManifestError as error:
        raise ConfigError(f"data '{name}', skip_clips: {error}") from None
    rows: set[int] = set()
    unmet = dict(listed)
    for row, record in enumerate(manifest):
        for clip in record.clips:
            if clip in listed:
                rows.add(row)
                unmet.pop(clip, None)
    if unmet:
        clip, number = next(iter(unmet.items()))
        if number in looks_like_comment:
            raise ConfigError(
                f"data '{name}', skip_clips: {_shown(path)}, line {number}: the list cannot have comments, and no "
                f"record has the clip '{_shown(clip)}'; remove the line"
            )
        raise ConfigError(
            f"data '{name}', skip_clips: {_shown(path)}, line {number}: no record has the clip '{_shown(clip)}'; "
            "write a new list: pal data check --write-bad"
        )
    logger.info(
        "data '%s': %d of %d records are skipped, since their clips are listed in %s",
        name,
        len(rows),
        len(manifest),
        path,
    )
    return frozenset(rows)


def digests(recipe: Recipe, manifests: Mapping[str, RecordSource]) -> dict[str, str]:
    """SHA-256 of each source's data: its manifest, combined with its `skip_clips` list if it has one.

    A validation with a manifest adds it as "validation.manifest".
    """
    found = {}
    for name, manifest in manifests.items():
        path = recipe.data[name].skip_clips
        found[name] = manifest.digest
        if path is not None:
            found[name] = hashlib.sha256(f"{manifest.digest} without {sha256(path)}".encode()).hexdigest()
    if recipe.validation is not None and recipe.validation.manifest is not None:
        found["validation.manifest"] = sha256(recipe.validation.manifest)
    return found


def _located(manifest: RecordSource, clip: str) -> str:
    try:
        return manifest.locate(clip)
    except ValueError:  # not below the root, so no record has it
        return clip


def _shown(text: str | Path) -> str:
    shown = str(text)
    return shown if len(shown) <= 90 else f"…{shown[-89:]}"
