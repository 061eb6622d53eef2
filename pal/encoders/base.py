"""The contract of audio encoders: waveforms in, `AudioFeatures` out, nothing cut."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from pal.transfer import to_device
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
    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """Zero-padded frames and the number of real ones of each window -> tokens [W, A, E].

        How many tokens are real is worked out from `lengths`: reading a tensor would make the host wait for the device.
        """

    def encode(self, waveforms: list[Tensor]) -> AudioFeatures:
        """Waveforms [N] at `sampling_rate`, one a clip -> features [B, A, E], with padding behind the shorter ones."""
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
            lengths = [len(frames_FM) for frames_FM in frames]
            parts.append(self(to_device(pad_sequence(frames, batch_first=True), device).to(dtype), lengths))
        return join_windows(_one_batch(parts), counts)

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
    lengths = tuple(n for part in parts for n in part.lengths)
    return AudioFeatures(x_BAE, lengths, parts[0].seconds_per_token)


def join_windows(features: AudioFeatures, counts: Sequence[int]) -> AudioFeatures:
    """The real tokens of each clip's windows, in order of time.

    Args:
        features: of all windows, clip after clip.
        counts: windows of each clip.
    """
    if all(count == 1 for count in counts):
        return features
    # taken apart at once: the gradient of each slice alone would be as large as all of them
    windows = [x_AE[:n] for x_AE, n in zip(features.x_BAE.unbind(), features.lengths, strict=True)]
    clips = []
    for count in counts:
        clips.append(torch.cat(windows[:count]))
        del windows[:count]
    lengths = tuple(len(x_AE) for x_AE in clips)
    return AudioFeatures(pad_sequence(clips, batch_first=True), lengths, features.seconds_per_token)
