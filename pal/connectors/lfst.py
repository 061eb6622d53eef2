"""`lfst`: latents in order of time that attend to the tokens of a fine-grained and a language-aligned encoder."""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pal.config import StrictConfig
from pal.connectors.attention import MultiHeadAttention, default_heads, sinusoids
from pal.connectors.base import Connector
from pal.errors import ConfigError
from pal.registry import register
from pal.transfer import to_device
from pal.types import AudioFeatures

_BLOCK = 64
"""Latents in one attention call; they see tokens near them in time, so the cost is linear in the clip's length."""


@register("connector", "lfst")
class LFST(Connector):
    """Language-aligned and Fine-grained Spatio-Temporal connector, the paper's default.

    The paper gives three cross-attention layers, a local region on the fine tokens, and SSLAM and CLAP as encoders; all
    sizes are our choice. The first encoder is the fine-grained one, the second the language-aligned one; any two can be
    used.
    """

    n_encoders = 2

    class Config(StrictConfig):
        """Options of the connector `lfst`."""

        seconds_per_latent: float = Field(default=0.32, gt=0)
        """Time between latents; 0.32 gives 32 for ten seconds, as many as LTU and GAMA have tokens."""
        layers: int = Field(default=3, ge=1)
        """Cross-attention layers (paper: 3)."""
        fine_seconds: float = Field(default=0.96, gt=0)
        """Length of the region, around its own time, in which a latent sees the fine tokens."""
        aligned_seconds: float = Field(default=10.0, gt=0)
        """Length of that region for the language-aligned tokens; CLAP's windows are ten seconds long."""
        width: int = Field(default=768, ge=1)
        """E of the latents and the output (that of SSLAM and CLAP)."""
        heads: int | None = Field(default=None, ge=1)
        """Attention heads; None: 64 wide if the width allows, else one head."""
        hidden: int | None = Field(default=None, ge=1)
        """Width inside the feed-forward networks; None: four times the width."""

        @model_validator(mode="after")
        def _fits(self) -> LFST.Config:
            if self.heads is not None and self.width % self.heads:
                raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
            return self

        def toy(self) -> LFST.Config:
            """Toy size, with a width of 16."""
            return self.model_copy(update={"width": 16, "heads": self.heads and 1, "hidden": self.hidden and 32})

    def __init__(self, config: Config, in_widths: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        heads = config.heads or default_heads(config.width)
        self.latent_E = nn.Parameter(torch.randn(config.width) * 0.02)
        self.enter = nn.ModuleList(nn.Sequential(nn.LayerNorm(w), nn.Linear(w, config.width)) for w in in_widths)
        self.layers = nn.ModuleList(
            _LFSTLayer(config.width, heads, config.hidden or 4 * config.width) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, *features: AudioFeatures) -> AudioFeatures:
        """Fine [B, A, E] and aligned [B, A', E'] tokens -> latents [B, S, width] in order of time.

        Raises:
            ConfigError: an encoder whose tokens have no time.
        """
        fine, aligned = features
        step = self.config.seconds_per_latent
        if not fine.seconds_per_token or not aligned.seconds_per_token:
            raise ConfigError("connector 'lfst' needs encoders whose tokens have a time; give others")
        seconds = [
            max(a * fine.seconds_per_token, b * aligned.seconds_per_token)
            for a, b in zip(fine.lengths, aligned.lengths, strict=True)
        ]
        lengths = [max(1, math.ceil(s / step - 1e-6)) for s in seconds]
        S = max(lengths)
        device = fine.x_BAE.device
        tokens = [
            _TimedTokens(enter, stream, reach / 2, step)
            for enter, stream, reach in zip(
                self.enter, features, (self.config.fine_seconds, self.config.aligned_seconds), strict=True
            )
        ]
        start_SE = self.latent_E + to_device(
            sinusoids(_times(0, S, step) / step, self.width).to(self.latent_E.dtype), device
        )
        blocks = []
        for first in range(0, S, _BLOCK):
            near = [stream.near(first, min(first + _BLOCK, S)) for stream in tokens]
            keys_BKE = torch.cat([x_BKE for x_BKE, _ in near], dim=1)
            seen_BQK = torch.cat([seen for _, seen in near], dim=2)
            # a latent that sees no token sees all, since attention to no key is NaN; such latents are padding
            seen_BQK = seen_BQK | ~seen_BQK.any(2, keepdim=True)
            x_BQE = start_SE[first : first + _BLOCK].expand(len(lengths), -1, -1)
            for layer in self.layers:
                x_BQE = layer(x_BQE, keys_BKE, seen_BQK)
            blocks.append(x_BQE)
        return AudioFeatures(self.norm(torch.cat(blocks, dim=1)), tuple(lengths), step)


class _TimedTokens:
    """Tokens of one encoder, at the connector's width, plus sinusoids of their time."""

    def __init__(self, enter: nn.Module, features: AudioFeatures, reach: float, step: float) -> None:
        x_BAE = features.x_BAE
        if features.padded:
            x_BAE = x_BAE.masked_fill(~features.mask_BA[..., None], 0.0)
        x_BAE = enter(x_BAE)
        self.seconds = features.seconds_per_token
        self.step = step
        self.times_A = _times(0, x_BAE.shape[1], self.seconds)
        waves_AE = sinusoids(self.times_A / step, x_BAE.shape[2]).to(x_BAE.dtype)
        self.x_BAE = x_BAE + to_device(waves_AE, x_BAE.device)
        self.features = features
        self.reach = max(reach, self.seconds / 2)
        """Seconds that a latent sees to either side; at least one token."""

    def near(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tokens [B, K, E] that the latents `first` to `last - 1` see, and which latent sees which: [B, Q, K]."""
        start = math.floor(((first + 0.5) * self.step - self.reach) / self.seconds) - 1
        end = math.ceil(((last - 0.5) * self.step + self.reach) / self.seconds) + 1
        part = slice(max(0, start), max(0, end))
        seen_QK = (self.times_A[part] - _times(first, last, self.step)[:, None]).abs() <= self.reach + 1e-9
        seen_1QK = to_device(seen_QK, self.x_BAE.device)[None]
        if not self.features.padded:
            return self.x_BAE[:, part], seen_1QK.expand(len(self.x_BAE), -1, -1)
        return self.x_BAE[:, part], seen_1QK & self.features.mask_BA[:, None, part]


def _times(first: int, last: int, step: float) -> Tensor:
    """Centres of steps in seconds, on the host; float32 would be too coarse at the borders of regions after an hour."""
    return (torch.arange(first, last, dtype=torch.float64) + 0.5) * step


class _LFSTLayer(nn.Module):
    """Cross-attention and a feed-forward network, pre-norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, width, heads)
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BQE: Tensor, keys_BKE: Tensor, seen_BQK: Tensor) -> Tensor:
        x_BQE = x_BQE + self.attention(self.norm(x_BQE), self.key_norm(keys_BKE), seen_BQK)
        return x_BQE + self.ffn(x_BQE)
