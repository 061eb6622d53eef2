"""Conversion of sample blocks to a mono waveform: scaling, checks, downmix, resampling."""

from collections.abc import Callable

import numpy as np
import soxr

from pal.audio.stream_info import DecodeError

_PEAK = 2.0**31
"""Largest accepted magnitude, above any scale in use; beyond it the power spectrum overflows float32."""


def to_float(block: np.ndarray) -> np.ndarray:
    """Convert to float32: integers are scaled by their full scale to -1..1, floats are unchanged."""
    if block.dtype == np.uint8:
        return (block.astype(np.float32) - 128.0) / 128.0
    if np.issubdtype(block.dtype, np.signedinteger):
        return (block / -float(np.iinfo(block.dtype).min)).astype(np.float32)
    if np.issubdtype(block.dtype, np.floating):
        with np.errstate(over="ignore"):  # overflow becomes infinite, which is refused later
            return block.astype(np.float32, copy=False)
    raise DecodeError(f"samples of type {block.dtype} are not supported", "pass float32 in -1..1 or int16")


class Mixer:
    """Downmix and resampling of blocks [n, channels] to mono samples at another rate, with a check of every sample.

    Args:
        source_rate: of the blocks in Hz.
        rate: of the result.
        max_frames: most samples of each channel.
        too_long: error for more.
        sink: takes the result in parts, float32 [n].
    """

    def __init__(
        self, source_rate: int, rate: int, max_frames: int, too_long: DecodeError, sink: Callable[[np.ndarray], object]
    ) -> None:
        self.frames = 0
        """Samples of each channel so far."""
        self._resample = None
        if source_rate != rate:
            self._resample = soxr.ResampleStream(source_rate, rate, 1, dtype="float32")
        self._max_frames, self._too_long = max_frames, too_long
        self._sink = sink
        self._made = 0

    def add(self, block_NC: np.ndarray) -> None:
        """Add a block. Raises DecodeError on samples that are not finite, and past the limit."""
        self.frames += len(block_NC)
        if self.frames > self._max_frames:
            raise self._too_long
        peak = float(np.abs(block_NC).max(initial=0.0))
        if not peak <= _PEAK:
            if not np.isfinite(block_NC).all():
                raise DecodeError("it holds samples that are not finite (NaN or infinity)", "repair what wrote it")
            raise DecodeError(f"its samples reach {peak:.1e}", "scale them to -1..1")
        mono_N = block_NC.mean(axis=1, dtype=np.float32)
        self._give(self._resample.resample_chunk(mono_N) if self._resample else mono_N)

    def finish(self) -> None:
        """Give the last samples. Raises DecodeError if there are none at all."""
        if self.frames == 0:
            raise DecodeError("it holds no samples", "record or export it again")
        if self._resample:
            self._give(self._resample.resample_chunk(np.zeros(0, np.float32), last=True))
        if not self._made:
            raise DecodeError(f"its {self.frames} samples are too short to resample", "give a longer recording")

    def _give(self, mono_N: np.ndarray) -> None:
        self._made += len(mono_N)
        if len(mono_N):
            self._sink(mono_N)
