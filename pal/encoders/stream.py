"""`EncoderStream`: an encoder's tokens of audio that arrives in chunks, equal to those of the whole clip."""

from __future__ import annotations

import torch
from torch import Tensor

from pal.audio import resample
from pal.encoders.base import Encoder


class EncoderStream:
    """Tokens of one encoder, chunk by chunk. It keeps the samples that later tokens may still depend on.

    Args:
        encoder: in evaluation mode.
        rate: of the samples in Hz. If it is not the encoder's, nothing settles, since resampling sees the whole.
    """

    def __init__(self, encoder: Encoder, rate: int) -> None:
        self.encoder = encoder
        # resampled audio is made from all of it
        whole = encoder.sampling_rate != rate
        self.window = None if whole or encoder.window_seconds is None else round(encoder.window_seconds * rate)
        self.hop = round(encoder.seconds_per_token * rate)
        self.reach: int | None = None
        """Tokens before a token that it depends on."""
        self.ahead = 0
        """Tokens after a token that it depends on."""
        if self.window is None and encoder.reach_seconds is not None and not whole:
            self.reach = -(-round(encoder.reach_seconds * rate) // self.hop)
            ahead = encoder.reach_seconds if encoder.ahead_seconds is None else encoder.ahead_seconds
            self.ahead = -(-round(ahead * rate) // self.hop)
        self.rate = rate
        self.tail_N = torch.zeros(0)
        self.first = 0
        """Tokens before the tail."""
        self.settled = 0

    @property
    def settles(self) -> bool:
        """True if tokens become final while more audio arrives."""
        return self.window is not None or self.reach is not None

    def append(self, samples_N: Tensor) -> tuple[Tensor, Tensor]:
        """New settled tokens [A, E], and those after them, which may still change."""
        self.tail_N = torch.cat((self.tail_N, samples_N))
        if self.window is not None:
            return self._by_windows(self.window)
        x_AE = self._encode(self.tail_N)
        if self.reach is None:
            return x_AE[:0], x_AE
        whole = self.first + len(self.tail_N) // self.hop
        settled = max(self.settled, whole - self.ahead)
        new_AE, rest_AE = x_AE[self.settled - self.first : settled - self.first], x_AE[settled - self.first :]
        self.settled = settled
        drop = max(0, settled - self.reach) - self.first
        self.tail_N = self.tail_N[drop * self.hop :]
        self.first += drop
        return new_AE, rest_AE

    def _by_windows(self, window: int) -> tuple[Tensor, Tensor]:
        whole = len(self.tail_N) // window * window
        done_N, self.tail_N = self.tail_N[:whole], self.tail_N[whole:]
        parts = [self._encode(x_N) if len(x_N) else None for x_N in (done_N, self.tail_N)]
        some = next(x_AE for x_AE in parts if x_AE is not None)
        new_AE, rest_AE = (some[:0] if x_AE is None else x_AE for x_AE in parts)
        return new_AE, rest_AE

    def _encode(self, samples_N: Tensor) -> Tensor:
        if self.encoder.sampling_rate != self.rate:
            samples_N = resample(samples_N, self.rate, self.encoder.sampling_rate)
        features = self.encoder.encode([samples_N])
        return features.x_BAE[0, : features.lengths[0]]
