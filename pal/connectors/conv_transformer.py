"""`conv_transformer`: strided convolution, then Transformer layers over its tokens."""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor, nn

from pal.config import StrictConfig
from pal.connectors.attention import MultiHeadAttention, default_heads
from pal.connectors.base import Connector
from pal.connectors.strided_conv import StridedConv
from pal.errors import ConfigError
from pal.registry import register
from pal.types import AudioFeatures


@register("connector", "conv_transformer")
class ConvTransformer(Connector):
    """`strided_conv` to an inner width, pre-norm Transformer layers, LayerNorm, Linear.

    Every token sees its whole clip, so that it can stand for a word rather than for its own part of a second. There are
    no positions beyond those that the encoder's features have.
    """

    class Config(StrictConfig):
        """Options of the connector `conv_transformer`."""

        stride: int = Field(default=4, ge=1)
        """Number of tokens that become one."""
        kernel: int | None = Field(default=None, ge=1)
        """Kernel width, as in `strided_conv`."""
        layers: int = Field(default=2, ge=1)
        """Transformer layers."""
        inner: int | None = Field(default=None, ge=1)
        """Width of the Transformer; None: that of the encoder."""
        heads: int | None = Field(default=None, ge=1)
        """Attention heads; None: 64 wide if the width allows, else one head."""
        hidden: int | None = Field(default=None, ge=1)
        """Width inside the feed-forward networks; None: four times the inner width."""
        dropout: float = Field(default=0.0, ge=0, lt=1)
        """Dropout after each attention and feed-forward network."""
        width: int | None = Field(default=None, ge=1)
        """Output width; None: that of the encoder."""

        @model_validator(mode="after")
        def _fits(self) -> ConvTransformer.Config:
            if self.inner is not None and self.heads is not None and self.inner % self.heads:
                raise ValueError(f"inner width {self.inner} is not divisible by heads {self.heads}")
            StridedConv.Config(stride=self.stride, kernel=self.kernel)
            return self

        def toy(self) -> ConvTransformer.Config:
            """Toy size: a given width becomes 32, that of the toy LLM."""
            sizes = {"layers": 1, "inner": 16, "heads": self.heads and 1, "hidden": 32, "width": self.width and 32}
            return self.model_copy(update=sizes)

    def __init__(self, config: Config, in_width: int) -> None:
        super().__init__()
        self.width = config.width or in_width
        inner = config.inner or in_width
        heads = config.heads or default_heads(inner)
        if inner % heads:
            raise ConfigError(f"connector 'conv_transformer': width {inner} is not divisible by heads {heads}")
        self.conv = StridedConv(
            StridedConv.Config(stride=config.stride, kernel=config.kernel, width=inner), in_width=in_width
        )
        hidden = config.hidden or 4 * inner
        self.layers = nn.ModuleList(
            _SelfAttentionLayer(inner, heads, hidden, config.dropout) for _ in range(config.layers)
        )
        self.out = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, self.width))

    def forward(self, features: AudioFeatures) -> AudioFeatures:
        """[B, A, E_in] -> [B, ceil(A / r), width]."""
        tokens = self.conv(features)
        seen_BA = tokens.mask_BA if tokens.padded else None
        x_BAE = tokens.x_BAE
        for layer in self.layers:
            x_BAE = layer(x_BAE, seen_BA)
        return AudioFeatures(self.out(x_BAE), tokens.lengths, tokens.seconds_per_token)


class _SelfAttentionLayer(nn.Module):
    """Self-attention and a feed-forward network, pre-norm."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, width, heads)
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BAE: Tensor, seen_BA: Tensor | None) -> Tensor:
        h_BAE = self.norm(x_BAE)
        x_BAE = x_BAE + self.dropout(self.attention(h_BAE, h_BAE, seen_BA))
        return x_BAE + self.dropout(self.ffn(x_BAE))
