"""The contract of audio encoders: waveforms in, `AudioFeatures` out, nothing cut."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from pal.types import AudioFeatures

_WINDOWS_AT_ONCE = 16


class Encoder(nn.Module, ABC):
    """Turns clips of any length into tokens.

    A concrete encoder says how one window becomes a front-end matrix (`frontend`) and how a batch
    of them becomes tokens (`forward`). `encode` does the rest: clips longer than the encoder's
    window are taken window by window and their tokens joined in order.
    """

    hub_ids: tuple[str, ...] = ()
    """How the Hub ids of its published weights begin: such an id alone names the encoder."""
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
        dtype = next(self.parameters()).dtype
        windows = [self._windows(samples_N) for samples_N in waveforms]
        counts = [len(clip) for clip in windows]
        flat = [window_N for clip in windows for window_N in clip]
        # An hour in windows of 30 s is a batch of 120: more at once would only take more memory.
        most = len(flat) if self.window_seconds is None else _WINDOWS_AT_ONCE
        parts = []
        for first in range(0, len(flat), most):
            with torch.autocast("cpu", enabled=False):  # spectra in half precision are not those of the papers
                frames = [self.frontend(window_N) for window_N in flat[first : first + most]]
            lengths_W = torch.tensor([len(frames_FM) for frames_FM in frames], device=device)
            parts.append(self(pad_sequence(frames, batch_first=True).to(device, dtype), lengths_W))
        return _join_windows(_one_batch(parts), counts)

    def _windows(self, samples_N: Tensor) -> list[Tensor]:
        if self.window_seconds is None:
            return [samples_N]
        return list(samples_N.split(round(self.window_seconds * self.sampling_rate)))


def _one_batch(parts: list[AudioFeatures]) -> AudioFeatures:
    """Features of several forward passes as if they were of one."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.x_BAE.shape[1] for part in parts)
    x_BAE = torch.cat([F.pad(part.x_BAE, (0, 0, 0, longest - part.x_BAE.shape[1])) for part in parts])
    mask_BA = torch.cat([F.pad(part.mask_BA, (0, longest - part.mask_BA.shape[1])) for part in parts])
    return AudioFeatures(x_BAE, mask_BA, parts[0].seconds_per_token)


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
