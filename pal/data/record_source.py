"""`RecordSource`: what training needs of the records of a data source, wherever they are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pal.data.manifest import Record
    from pal.data.record_index import Columns


class RecordSource(Sequence["Record"], ABC):
    """Records that are read on access. A copy in another process opens the same files, unless they have changed."""

    path: Path
    """For messages."""

    @property
    def base(self) -> Path:
        """Folder to which the names of its clips are relative."""
        return self.path.parent

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 that changes with the records, in hexadecimal."""

    @property
    @abstractmethod
    def columns(self) -> Columns:
        """Task, dataset and group of every record, for selecting and grouping records without parsing them.

        Raises:
            ManifestError: a faulty record.
        """

    @abstractmethod
    def where(self, index: int) -> str:
        """Position of a record in words."""

    @abstractmethod
    def locate(self, audio_id: str) -> str:
        """The path of a clip as records have it, from its name in a list of clips."""
