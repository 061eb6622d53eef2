"""Encoded clips of one model, kept in memory while questions about them are asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pal.clips import read_waveform

if TYPE_CHECKING:
    from pal.model import PalModel
    from pal.types import EncodedClip


class EncodedClipCache:
    """LRU cache of encoded clips; each is encoded alone.

    In a padded batch the same sums are done in another order, so what a clip sounds like would depend on the others.

    Args:
        model: whose encoders are run.
        most_bytes: of encoded clips that are kept; the last one always is.
    """

    def __init__(self, model: PalModel, most_bytes: int = 256 << 20) -> None:
        self.model = model
        self.most_bytes = most_bytes
        self._kept: dict[str, EncodedClip] = {}
        self._bytes = 0

    def __call__(self, path: str) -> EncodedClip:
        """One clip. Raises AudioError for a file that cannot be used."""
        heard = self._kept.pop(path, None)
        if heard is None:
            heard = self.model.encode_clip(read_waveform(path, self.model.sampling_rate).samples_N)
            self._bytes += _bytes(heard)
        self._kept[path] = heard  # the last to go
        while len(self._kept) > 1 and self._bytes > self.most_bytes:
            self._bytes -= _bytes(self._kept.pop(next(iter(self._kept))))
        return heard


def _bytes(heard: EncodedClip) -> int:
    return sum(x_AE.nbytes for x_AE in heard.x_AE)
