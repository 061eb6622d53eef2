"""Whisper's log-mel front-end, for networks that take windows of one length and clips of any."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pal.transfer import to_device

_AFTER = 3
"""Frames that follow the real ones: two that the 25 ms window of the transform still reaches with
its front half, and one of silence, whose value all padding up to the full window has."""

_ROUND = 100
"""Frames to a multiple of which windows are filled up, so that those of like length go through the extractor together.
"""


class WhisperLogMel:
    """Frames of 10 ms at 16 kHz, equal to those of transformers' extractor on the padded window.

    What is kept of a clip are its real frames and a few more; `fill` makes the whole window of them.
    """

    def __init__(self, mels: int, frames: int) -> None:
        """M, the number of mel bins, and the frames of a full window."""
        from transformers import WhisperFeatureExtractor

        # Built from the number of mel bins alone: a saved one may carry lengths that cut the audio.
        self._extractor = WhisperFeatureExtractor(feature_size=mels)
        self._frames = frames
        self.sampling_rate: int = self._extractor.sampling_rate
        self.hop: int = self._extractor.hop_length
        self.window_seconds = frames * self.hop / self.sampling_rate

    def __call__(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """Samples at 16 kHz [N] of some windows -> log-mel frames [F, M] of each: ceil(N / 160) real, `_AFTER` more.

        They equal those of transformers' extractor on the clip padded to the window. Windows of like length go through
        it together.
        """
        counts = [-(-len(samples_N) // self.hop) + _AFTER for samples_N in windows]
        alike: dict[int, list[int]] = {}
        for at, count in enumerate(counts):
            # its default is 30 s, most of it silence; at 30 s it mirrors the end, so no further
            alike.setdefault(min(-(-count // _ROUND) * _ROUND, self._frames), []).append(at)
        made: dict[int, Tensor] = {}
        for frames, places in alike.items():
            features = self._extractor(
                [windows[at].cpu().float().numpy() for at in places],
                sampling_rate=self.sampling_rate,
                padding="max_length",
                max_length=frames * self.hop,
                return_tensors="pt",
            )
            made.update(zip(places, features.input_features.mT, strict=True))
        return [_filled(made[at], count) for at, count in enumerate(counts)]

    def fill(self, frames_WFM: Tensor, lengths: Sequence[int]) -> Tensor:
        """Frames as `__call__` makes them, zero-padded, and how many of each -> full windows.

        Each is continued with its own last frame, which is silence.
        """
        if min(lengths) >= self._frames:
            return frames_WFM[:, : self._frames]
        device = frames_WFM.device
        last_W = to_device(torch.tensor(lengths, dtype=torch.long) - 1, device)
        index_WF = torch.arange(self._frames, device=device).minimum(last_W[:, None])
        return frames_WFM.gather(1, index_WF[:, :, None].expand(-1, -1, frames_WFM.shape[2]))

    def real(self, lengths: Sequence[int]) -> list[int]:
        """How many of the frames are real, those with samples at their centre or after it: ceil(N / 160)."""
        return [min(n - _AFTER, self._frames) for n in lengths]


def _filled(frames_FM: Tensor, count: int) -> Tensor:
    """So many frames: the first ones, or all and copies of the last one."""
    return torch.cat([frames_FM[:count], frames_FM[-1:].expand(max(0, count - len(frames_FM)), -1)])
