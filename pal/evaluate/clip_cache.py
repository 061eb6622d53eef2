"""In-memory cache of encoded clips during an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pal.clips import read_waveform

if TYPE_CHECKING:
    from pal.model import PalModel
    from pal.types import EncodedClip


class EncodedClipCache:
    """LRU cache of encoded clips; each clip is encoded alone.

    In a padded batch, the order of summation depends on the other clips, and with it the last bits of the features.

    Args:
        model: model with the encoders.
        max_bytes: size limit of the cache; the most recent clip always stays.
    """

    def __init__(self, model: PalModel, max_bytes: int = 256 << 20) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self._kept: dict[str, EncodedClip] = {}
        self._bytes = 0

    def __call__(self, path: str) -> EncodedClip:
        """Encoded clip of a file. Raises AudioError for an unusable file."""
        encoded = self._kept.pop(path, None)
        if encoded is None:
            encoded = self.model.encode_clip(read_waveform(path, self.model.sampling_rate).samples_N)
            self._bytes += _bytes(encoded)
        self._kept[path] = encoded  # most recently used
        while len(self._kept) > 1 and self._bytes > self.max_bytes:
            self._bytes -= _bytes(self._kept.pop(next(iter(self._kept))))
        return encoded


def _bytes(encoded: EncodedClip) -> int:
    return sum(x_AE.nbytes for x_AE in encoded.x_AE)
