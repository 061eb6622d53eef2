"""Input limits of a clip, checked before decoding."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pal.audio.pcm import Mixer
from pal.audio.stream_info import CONVERT, DecodeError


@dataclass(frozen=True)
class Limits:
    """Input limits; a clip beyond them is refused before decoding, or during it if its header has no length."""

    max_seconds: float = 3600.0
    max_bytes: int = 1 << 30
    """Size of the encoded source."""
    max_decoded_bytes: int = 1 << 32
    """Size of the samples as float32, of all channels; they are never in memory at once."""
    min_rate: int = 4_000
    max_rate: int = 192_000
    max_channels: int = 8
    block: int = 1 << 16
    """Samples of each channel that are decoded at a time; the result does not depend on it."""

    def check(self, source_rate: int, channels: int, frames: int | None) -> tuple[int, DecodeError]:
        """Check a header; returns the most samples of each channel that may be decoded, and the error for more.

        Raises:
            DecodeError: beyond the limits. `frames` is None if the header has no length.
        """
        if not self.min_rate <= source_rate <= self.max_rate:
            raise DecodeError(f"its rate of {source_rate} Hz is not in {self.min_rate}..{self.max_rate}", CONVERT)
        if not 1 <= channels <= self.max_channels:
            raise DecodeError(f"its {channels} channels are not 1 to {self.max_channels}", CONVERT + " -ac 1")
        seconds = "" if frames is None else f" ({frames / source_rate:.0f} s)"
        too_long = DecodeError(f"it is longer than {self.max_seconds:.0f} s{seconds}", "split it")
        max_frames = int(self.max_seconds * source_rate)
        if self.max_decoded_bytes // (4 * channels) < max_frames:
            max_frames = self.max_decoded_bytes // (4 * channels)
            too_long = DecodeError(
                f"it decodes to more than {self.max_decoded_bytes} bytes", "split it or mix it to mono"
            )
        if frames is not None and frames > max_frames:
            raise too_long
        return max_frames, too_long

    def mixer(
        self, source_rate: int, channels: int, frames: int | None, rate: int, sink: Callable[[np.ndarray], object]
    ) -> Mixer:
        """Mixer for the blocks of a source under these limits. Raises DecodeError as `check` does."""
        return Mixer(source_rate, rate, *self.check(source_rate, channels, frames), sink)
