"""What is taken of a clip, checked before anything is decoded."""

from dataclasses import dataclass

from pal.audio.declared import DecodeError
from pal.audio.pcm import Mixer

_CONVERT = "convert it: ffmpeg -i IN OUT.wav"


@dataclass(frozen=True)
class Limits:
    """What is taken; everything beyond is refused before it is decoded or as soon as it shows."""

    max_seconds: float = 3600.0
    max_bytes: int = 1 << 30
    """Of the source as it is given."""
    max_decoded_bytes: int = 1 << 32
    """Of its samples as float32, all channels; they are never in memory at once."""
    min_rate: int = 4_000
    max_rate: int = 192_000
    max_channels: int = 8
    block: int = 1 << 16
    """Samples a channel that are decoded at a time; the result does not depend on it."""

    def check(self, source_rate: int, channels: int, frames: int | None) -> tuple[int, DecodeError]:
        """The most samples a channel, and the error for more.

        Raises:
            DecodeError: what a header says (`frames` is None where it says nothing) is beyond the limits.
        """
        if not self.min_rate <= source_rate <= self.max_rate:
            raise DecodeError(f"its rate of {source_rate} Hz is not in {self.min_rate}..{self.max_rate}", _CONVERT)
        if not 1 <= channels <= self.max_channels:
            raise DecodeError(f"its {channels} channels are not 1 to {self.max_channels}", _CONVERT + " -ac 1")
        seconds = "" if frames is None else f" ({frames / source_rate:.0f} s)"
        too_long = DecodeError(f"it is longer than {self.max_seconds:.0f} s{seconds}", "split it, or raise max_seconds")
        max_frames = int(self.max_seconds * source_rate)
        if self.max_decoded_bytes // (4 * channels) < max_frames:
            max_frames = self.max_decoded_bytes // (4 * channels)
            too_long = DecodeError(
                f"it decodes to more than {self.max_decoded_bytes} bytes", "split it or mix it to mono"
            )
        if frames is not None and frames > max_frames:
            raise too_long
        return max_frames, too_long

    def mixer(self, source_rate: int, channels: int, frames: int | None, rate: int) -> Mixer:
        """What takes the blocks of a source under these limits. Raises DecodeError as `check` does."""
        return Mixer(source_rate, rate, *self.check(source_rate, channels, frames))
