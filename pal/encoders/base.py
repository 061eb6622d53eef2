"""The contract of audio encoders: waveforms in, `AudioFeatures` out, nothing truncated."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from pal.transfer import to_device
from pal.types import AudioFeatures, Frames

WINDOWS_AT_ONCE = 16
"""Windows in one forward pass of a network. An hour has 120 windows of 30 s; a larger batch only takes more memory."""
SAMPLES_AT_ONCE = 1 << 22
"""Samples in one call of a front-end, whose spectra in double precision need about 60 bytes a sample."""


class Encoder(nn.Module, ABC):
    """Audio encoder: clips of any length to tokens.

    A concrete encoder computes the front-end frames of one window (`frontend`) and the tokens of a batch of windows
    (`forward`). `prepare` and `encode` do the rest: they split clips that are longer than the encoder's window and join
    the tokens of the windows in order. `prepare` needs neither weights nor the device, so that the threads that load
    data can call it ahead.
    """

    hub_ids: tuple[str, ...] = ()
    """Prefixes of the Hub ids of its published weights; such an id can be given in place of the encoder's name."""
    config: Any
    """Options that the encoder was built from."""
    sampling_rate: int
    """Hz of the samples that `frontend` takes."""
    width: int
    """E, the width of a token."""
    seconds_per_token: float
    window_seconds: float | None = None
    """Longest window that the network takes; None: any length."""
    reach_seconds: float | None = None
    """Of an encoder without windows: audio further than this from a token does not change it. None: all of it does."""
    ahead_seconds: float | None = None
    """The same for audio after a token, 0 for a causal encoder; None: `reach_seconds`."""

    def standalone_config(self) -> Any:
        """Configuration that builds this network without reading weights, for bundles that contain all of them."""
        return self.config

    @abstractmethod
    def frontend(self, samples_N: Tensor) -> Tensor:
        """Mono samples of at most one window, float32 [N] -> frames [F, M] on the CPU, deterministic."""

    def frontends(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """`frontend` of several windows; override it to compute them in one call."""
        return [self.frontend(samples_N) for samples_N in windows]

    @abstractmethod
    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """Zero-padded frames and the number of real frames of each window -> tokens [W, A, E].

        The number of real tokens is computed from `lengths`: reading a tensor would make the host wait for the device.
        """

    def prepare(self, waveforms: Sequence[Tensor]) -> Frames:
        """Waveforms [N] at `sampling_rate`, one for each clip -> front-end frames of all their windows, on the host.

        The frames are in pinned memory if the encoder is on a CUDA device.
        """
        pinned = next(self.parameters()).is_cuda
        cut = [self._windows(samples_N) for samples_N in waveforms]
        frames: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):  # half precision would change the frames
            for group in _groups([window_N for clip in cut for window_N in clip]):
                frames += self.frontends(group)
        most = len(frames) if self.window_seconds is None else WINDOWS_AT_ONCE
        blocks = [frames[first : first + most] for first in range(0, len(frames), most)]
        padded = [pad_sequence(block, batch_first=True) for block in blocks]
        return Frames(
            blocks_WFM=tuple(x_WFM.pin_memory() for x_WFM in padded) if pinned else tuple(padded),
            lengths=tuple(tuple(len(frames_FM) for frames_FM in block) for block in blocks),
            windows=tuple(len(clip) for clip in cut),
        )

    def encode(self, clips: Sequence[Tensor] | Frames) -> AudioFeatures:
        """Waveforms, or their frames from `prepare` -> features [B, A, E], padded at the end."""
        frames = clips if isinstance(clips, Frames) else self.prepare(clips)
        weight = next(self.parameters())
        parts = [
            self(to_device(x_WFM, weight.device).to(weight.dtype), lengths)
            for x_WFM, lengths in zip(frames.blocks_WFM, frames.lengths, strict=True)
        ]
        return join_windows(_one_batch(parts), frames.windows)

    def _windows(self, samples_N: Tensor) -> list[Tensor]:
        if self.window_seconds is None:
            return [samples_N]
        return list(samples_N.split(round(self.window_seconds * self.sampling_rate)))


def _groups(windows: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Split windows, in order, into groups of at most `SAMPLES_AT_ONCE` samples or one window."""
    group: list[Tensor] = []
    for samples_N in windows:
        if group and sum(map(len, group)) + len(samples_N) > SAMPLES_AT_ONCE:
            yield group
            group = []
        group.append(samples_N)
    if group:
        yield group


def _one_batch(parts: list[AudioFeatures]) -> AudioFeatures:
    """Concatenate the features of several forward passes."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.x_BAE.shape[1] for part in parts)
    x_BAE = torch.cat([F.pad(part.x_BAE, (0, 0, 0, longest - part.x_BAE.shape[1])) for part in parts])
    lengths = tuple(n for part in parts for n in part.lengths)
    return AudioFeatures(x_BAE, lengths, parts[0].seconds_per_token)


def join_windows(features: AudioFeatures, counts: Sequence[int]) -> AudioFeatures:
    """Join the real tokens of each clip's windows, in order of time.

    Args:
        features: features of all windows, clip after clip.
        counts: number of windows of each clip.
    """
    if all(count == 1 for count in counts):
        return features
    # unbind once: the gradient of each single slice would be as large as the whole tensor
    windows = [x_AE[:n] for x_AE, n in zip(features.x_BAE.unbind(), features.lengths, strict=True)]
    clips = []
    for count in counts:
        clips.append(torch.cat(windows[:count]))
        del windows[:count]
    lengths = tuple(len(x_AE) for x_AE in clips)
    return AudioFeatures(pad_sequence(clips, batch_first=True), lengths, features.seconds_per_token)
