"""Log-mel front-end of Whisper, for networks with windows of fixed length."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pal.transfer import to_device

_AFTER = 3
"""Frames that are kept after the real ones: two whose 25 ms STFT window may still overlap the clip, and one of silence,
which has the value of all further padding."""

_ROUND = 100
"""Windows are padded to a multiple of this many frames: those of similar length share a call of the extractor."""


class WhisperLogMel:
    """Log-mel frames every 10 ms at 16 kHz, equal to those of transformers' extractor on the padded window.

    Only the real frames and `_AFTER` more are kept; `fill` restores the full window.
    """

    def __init__(self, mels: int, frames: int) -> None:
        """Build the extractor.

        Args:
            mels: M, mel bins.
            frames: frames of a full window.
        """
        from transformers import WhisperFeatureExtractor

        # Only the number of mel bins is given: a saved extractor may have lengths that truncate the audio.
        self._extractor = WhisperFeatureExtractor(feature_size=mels)
        self._frames = frames
        self.sampling_rate: int = self._extractor.sampling_rate
        self.hop: int = self._extractor.hop_length
        self.window_seconds = frames * self.hop / self.sampling_rate

    def __call__(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """Windows of samples at 16 kHz [N] -> log-mel frames [F, M] of each, ceil(N / 160) real ones and `_AFTER` more.

        They equal those of transformers' extractor on the clip padded to the window. Windows of similar length share a
        call of the extractor.
        """
        counts = [-(-len(samples_N) // self.hop) + _AFTER for samples_N in windows]
        by_frames: dict[int, list[int]] = {}
        for at, count in enumerate(counts):
            # not padded to 30 s, the extractor's default, which would be mostly silence; and not beyond a full window,
            # at whose end its STFT reflects the samples
            by_frames.setdefault(min(-(-count // _ROUND) * _ROUND, self._frames), []).append(at)
        made: dict[int, Tensor] = {}
        for frames, indices in by_frames.items():
            features = self._extractor(
                [windows[at].cpu().float().numpy() for at in indices],
                sampling_rate=self.sampling_rate,
                padding="max_length",
                max_length=frames * self.hop,
                return_tensors="pt",
            )
            made.update(zip(indices, features.input_features.mT, strict=True))
        return [_filled(made[at], count) for at, count in enumerate(counts)]

    def fill(self, frames_WFM: Tensor, lengths: Sequence[int]) -> Tensor:
        """Zero-padded frames from `__call__` and their number in each window -> full windows.

        Each window is filled with copies of its last frame, which is silence.
        """
        if min(lengths) >= self._frames:
            return frames_WFM[:, : self._frames]
        device = frames_WFM.device
        last_W = to_device(torch.tensor(lengths, dtype=torch.long) - 1, device)
        index_WF = torch.arange(self._frames, device=device).minimum(last_W[:, None])
        return frames_WFM.gather(1, index_WF[:, :, None].expand(-1, -1, frames_WFM.shape[2]))

    def real(self, lengths: Sequence[int]) -> list[int]:
        """Number of real frames of each window, those with their centre in the clip: ceil(N / 160)."""
        return [min(n - _AFTER, self._frames) for n in lengths]


def _filled(frames_FM: Tensor, count: int) -> Tensor:
    """`count` frames: the first ones, or all of them and copies of the last one."""
    return torch.cat([frames_FM[:count], frames_FM[-1:].expand(max(0, count - len(frames_FM)), -1)])
