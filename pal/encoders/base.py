"""The contract of audio encoders: waveforms in, `AudioFeatures` out, nothing cut."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pal.types import AudioFeatures


class Encoder(nn.Module, ABC):
    """Turns clips of any length into tokens.

    A concrete encoder says how one window becomes a front-end matrix (`frontend`) and how a batch
    of them becomes tokens (`forward`). `encode` does the rest: clips longer than the encoder's
    window are taken window by window and their tokens joined in order.
    """

    config: Any
    """The checked options it was built from."""
    sampling_rate: int
    """Hz that `frontend` expects."""
    width: int
    """E, the width of a token."""
    seconds_per_token: float
    window_seconds: float | None = None
    """Longest stretch the network takes at once; None when any length goes."""

    def standalone_config(self) -> Any:
        """A configuration that builds this network without reading weights, for bundles that hold them all."""
        return self.config

    @abstractmethod
    def frontend(self, samples_N: Tensor) -> Tensor:
        """Mono samples of at most one window, float32 [N] -> frames [F, M] on the CPU, deterministic."""

    @abstractmethod
    def forward(self, frames_WFM: Tensor, lengths_W: Tensor) -> AudioFeatures:
        """Zero-padded frames and the number of real ones of each window -> tokens [W, A, E] and mask."""

    def encode(self, waveforms: list[Tensor]) -> AudioFeatures:
        """Waveforms [N] at `sampling_rate`, one a clip -> features [B, A, E]; padding is masked out."""
        device = next(self.parameters()).device
        windows = [self._windows(samples_N) for samples_N in waveforms]
        frames = [self.frontend(window_N) for clip in windows for window_N in clip]
        lengths_W = torch.tensor([len(frames_FM) for frames_FM in frames], device=device)
        dtype = next(self.parameters()).dtype
        features = self(pad_sequence(frames, batch_first=True).to(device, dtype), lengths_W)
        return _join_windows(features, [len(clip) for clip in windows])

    def _windows(self, samples_N: Tensor) -> list[Tensor]:
        if self.window_seconds is None:
            return [samples_N]
        return list(samples_N.split(round(self.window_seconds * self.sampling_rate)))


def _join_windows(features: AudioFeatures, counts: list[int]) -> AudioFeatures:
    """Join the real tokens of each clip's windows, in order of time."""
    if all(count == 1 for count in counts):
        return features
    clips = []
    first = 0
    for count in counts:
        mask_WA = features.mask_BA[first : first + count]
        clips.append(features.x_BAE[first : first + count][mask_WA])
        first += count
    lengths = torch.tensor([len(x_AE) for x_AE in clips], device=features.x_BAE.device)
    x_BAE = pad_sequence(clips, batch_first=True)
    mask_BA = torch.arange(x_BAE.shape[1], device=x_BAE.device) < lengths[:, None]
    return AudioFeatures(x_BAE, mask_BA, features.seconds_per_token)
