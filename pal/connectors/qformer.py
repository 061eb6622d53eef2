"""`qformer`: learned queries that attend to the audio tokens (BLIP-2's Q-Former, arXiv 2301.12597)."""

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pal.config import StrictConfig
from pal.connectors.attention import MultiHeadAttention, default_heads, sinusoids
from pal.connectors.base import Connector
from pal.errors import ConfigError
from pal.registry import register
from pal.transfer import length_mask, to_device
from pal.types import AudioFeatures


@register("connector", "qformer")
class QFormer(Connector):
    """BERT layers over learned queries; every k-th layer has cross-attention to the audio.

    Without `window_seconds`, a clip of any length becomes `queries` tokens, as in GAMA. These tokens have no time, so
    `seconds_per_token` is 0. With `window_seconds`, each window becomes `queries` tokens that see only this window
    (SALMONN, arXiv 2310.13289): `queries / window_seconds` tokens a second, in order of time.
    """

    class Config(StrictConfig):
        """Options of the connector `qformer`; GAMA's values are those of BERT-base."""

        queries: int = Field(default=32, ge=1)
        """Number of learned queries, for a clip or a window (GAMA: 32; SALMONN: 1)."""
        window_seconds: float | None = Field(default=None, gt=0)
        """Length of a window, rounded to whole audio tokens (SALMONN: 0.33); None: one window for the clip."""
        width: int | None = None
        """Width of the queries and the output (GAMA: 768); None: that of the encoder."""
        layers: int = Field(default=4, ge=1)
        """Number of layers. GAMA has 12, initialised from BERT; the default is lower, since nothing is loaded here."""
        cross_attention_every: int = Field(default=2, ge=1)
        """k: layers 0, k, 2k, ... have cross-attention to the audio (GAMA: 2)."""
        heads: int | None = Field(default=None, ge=1)
        """Attention heads; None: 64 wide if the width allows, else one head (GAMA: 12 of 64)."""
        hidden: int | None = None
        """Width inside the feed-forward network; None: four times the width, as in BERT."""
        dropout: float = Field(default=0.0, ge=0, lt=1)
        """Dropout after each sub-layer (BERT: 0.1)."""
        positions: bool = True
        """Add sinusoidal positions to the audio tokens. GAMA has none; without them the order of the tokens is lost,
        unless the encoder has encoded it."""

        @model_validator(mode="after")
        def _heads_divide_width(self) -> "QFormer.Config":
            if self.width is not None and self.heads is not None and self.width % self.heads:
                raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
            return self

        def toy(self) -> "QFormer.Config":
            """Toy size, with two layers and a few queries."""
            sizes = {"queries": min(self.queries, 4), "layers": min(self.layers, 2), "width": self.width and 16}
            return self.model_copy(update={**sizes, "heads": self.heads and 1, "hidden": self.hidden and 32})

    def __init__(self, config: Config, in_width: int) -> None:
        super().__init__()
        self.width = config.width or in_width
        self.window_seconds = config.window_seconds
        self.positions = config.positions
        heads = config.heads or default_heads(self.width)
        if self.width % heads:
            raise ConfigError(f"connector 'qformer': width {self.width} is not divisible by heads {heads}")
        hidden = config.hidden or 4 * self.width
        self.queries_SE = nn.Parameter(torch.randn(config.queries, self.width) * 0.02)
        self.query_norm = nn.LayerNorm(self.width)
        self.audio_norm = nn.LayerNorm(in_width)
        self.blocks = nn.ModuleList(
            _QFormerLayer(
                self.width,
                heads,
                hidden,
                config.dropout,
                audio_width=in_width if index % config.cross_attention_every == 0 else None,
            )
            for index in range(config.layers)
        )

    def forward(self, features: AudioFeatures) -> AudioFeatures:
        """[B, A, E_in] -> [B, windows x queries, width]; one window if `window_seconds` is None."""
        x_BAE = features.x_BAE
        batch, tokens = x_BAE.shape[:2]
        size = tokens
        seconds = 0.0
        if self.window_seconds is not None:
            size = max(1, round(self.window_seconds / features.seconds_per_token))
            seconds = size * features.seconds_per_token / len(self.queries_SE)
        windows = -(-tokens // size)
        missing = windows * size - tokens
        x_WAE = F.pad(x_BAE, (0, 0, 0, missing)).reshape(batch * windows, size, -1)

        audio_WAE = self.audio_norm(x_WAE)
        if self.positions:
            waves_AE = sinusoids(torch.arange(size).float(), audio_WAE.shape[2]).to(audio_WAE.dtype)
            audio_WAE = audio_WAE + to_device(waves_AE, audio_WAE.device)
        # a window of padding only sees all of it, since attention to no key is NaN; its tokens are padding, too
        starts = range(0, windows * size, size)
        seen = [min(n - start, size) if start < n else size for n in features.lengths for start in starts]
        visible_WA = length_mask(seen, size, audio_WAE.device) if min(seen) < size else None
        s_WSE = self.query_norm(self.queries_SE).expand(len(audio_WAE), -1, -1)
        for block in self.blocks:
            s_WSE = block(s_WSE, audio_WAE, visible_WA)

        lengths = tuple(-(-n // size) * len(self.queries_SE) for n in features.lengths)
        return AudioFeatures(s_WSE.reshape(batch, -1, self.width), lengths, seconds)


class _QFormerLayer(nn.Module):
    """BERT layer, post-norm: self-attention, cross-attention in some layers, feed-forward network."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, audio_width: int | None) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(width, width, heads)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = None
        if audio_width is not None:
            self.cross_attention = MultiHeadAttention(width, audio_width, heads)
            self.cross_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.ffn_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, s_WSE: Tensor, audio_WAE: Tensor, mask_WA: Tensor | None) -> Tensor:
        s_WSE = self.self_norm(s_WSE + self.dropout(self.self_attention(s_WSE, s_WSE, None)))
        if self.cross_attention is not None:
            s_WSE = self.cross_norm(s_WSE + self.dropout(self.cross_attention(s_WSE, audio_WAE, mask_WA)))
        return self.ffn_norm(s_WSE + self.dropout(self.ffn(s_WSE)))
