"""`strided_conv`: one token from every r, by a convolution over time."""

from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional as F

from pal.config import StrictConfig
from pal.connectors.base import Connector
from pal.registry import register
from pal.types import AudioFeatures


@register("connector", "strided_conv")
class StridedConv(Connector):
    """[LayerNorm,] Conv1d of stride r: ceil(A / r) tokens, each for r times the time.

    A clip is padded with zeros before its first and after its last real token, alone and in a batch.
    """

    class Config(StrictConfig):
        """Options of the connector `strided_conv`."""

        stride: int = Field(default=3, ge=1)
        """r, the number of tokens that become one (paper: 3, for its summary tokens)."""
        kernel: int | None = Field(default=None, ge=1)
        """Kernel width, at least r, centred on the r tokens; None: r."""
        width: int | None = None
        """Output width; None: that of the encoder."""
        norm: bool = True
        """LayerNorm before the convolution."""

        @model_validator(mode="after")
        def _covers_every_token(self) -> "StridedConv.Config":
            if self.kernel is not None and self.kernel < self.stride:
                raise ValueError(f"kernel {self.kernel} is less than stride {self.stride} and would skip tokens")
            return self

        def toy(self) -> "StridedConv.Config":
            """Toy size: a given width becomes 32, that of the toy LLM."""
            return self.model_copy(update={"width": self.width and 32})

    def __init__(self, config: Config, in_width: int) -> None:
        super().__init__()
        self.width = config.width or in_width
        self.stride = config.stride
        self.kernel = config.kernel or config.stride
        self.reach = self.kernel - self.stride
        self.norm = nn.LayerNorm(in_width) if config.norm else nn.Identity()
        self.conv = nn.Conv1d(in_width, self.width, self.kernel, self.stride)

    def forward(self, features: AudioFeatures) -> AudioFeatures:
        """[B, A, E_in] -> [B, ceil(A / r), width]."""
        size = features.x_BAE.shape[1]
        x_BAE = self.norm(features.x_BAE)
        if features.padded:
            # after the norm, whose bias makes padding differ from zero
            x_BAE = x_BAE.masked_fill(~features.mask_BA[:, :, None], 0.0)
        tokens = -(-size // self.stride)
        before = (self.kernel - self.stride) // 2
        after = (tokens - 1) * self.stride + self.kernel - before - size
        x_BEA = F.pad(x_BAE.transpose(1, 2), (before, after))
        return AudioFeatures(
            self.conv(x_BEA).transpose(1, 2),
            tuple(-(-n // self.stride) for n in features.lengths),
            features.seconds_per_token * self.stride,
        )
