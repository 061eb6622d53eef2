"""User's data set: one folder of clips for each label."""

import hashlib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from pal.config import StrictConfig
from pal.data.manifest import Record, Turn
from pal.data.prepare import dataset
from pal.data.tables import SUFFIXES, files_in
from pal.errors import ManifestError
from pal.types import TagSpan


class FolderOptions(StrictConfig):
    """Options: question and split."""

    question: str = "What sound is this?"
    """Question about every clip; its answer is the name of the clip's folder, with spaces for underscores."""
    part: Literal["all", "train", "test"] = "all"
    """Split of a clip, by the digest of its path below the root, so that it never changes."""
    test_share: float = Field(default=0.2, gt=0, lt=1)
    """Approximate share of the clips in `test`."""


@dataset("folder", FolderOptions)
def folder(root: Path, options: FolderOptions) -> Iterator[Record]:
    """One record per clip, labelled by its folder."""
    clips = files_in(root, "*/*", SUFFIXES)
    labels = tuple(sorted({_label(path) for path in clips}))
    if len(labels) < 2:
        raise ManifestError(f"{root}: {len(labels)} folders with audio; give one folder of clips for each label")
    for path in clips:
        # Unicode normalised, so that a copy from another system keeps ids and split
        place = unicodedata.normalize("NFC", path.relative_to(root).as_posix())
        share = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big") / 2**64
        if options.part != "all" and (share < options.test_share) != (options.part == "test"):
            continue
        yield Record(
            id=f"folder/{place}",
            clips=(str(path),),
            turns=(Turn(options.question, _label(path)),),
            task="classification",
            dataset="folder",
            choices=labels,
            tags=(TagSpan(_label(path)),),
        )


def _label(path: Path) -> str:
    return unicodedata.normalize("NFC", path.parent.name).replace("_", " ")
