"""`mlp`: two linear layers on each token, as in LLaVA."""

from torch import nn

from pal.config import StrictConfig
from pal.connectors.base import Connector
from pal.registry import register
from pal.types import AudioFeatures


@register("connector", "mlp")
class MLP(Connector):
    """[LayerNorm,] Linear, GELU, Linear; number of tokens and time scale do not change."""

    class Config(StrictConfig):
        """Options of the connector `mlp`."""

        width: int | None = None
        """Output width; None: that of the encoder."""
        hidden: int | None = None
        """Width between the two layers; None: the output width."""
        norm: bool = True
        """LayerNorm before the first layer; encoders differ in scale by orders of magnitude."""

        def toy(self) -> "MLP.Config":
            """Toy size: given widths become 16."""
            return self.model_copy(update={"width": self.width and 16, "hidden": self.hidden and 16})

    reach = 0

    def __init__(self, config: Config, in_width: int) -> None:
        super().__init__()
        self.width = config.width or in_width
        hidden = config.hidden or self.width
        self.layers = nn.Sequential(
            nn.LayerNorm(in_width) if config.norm else nn.Identity(),
            nn.Linear(in_width, hidden),
            nn.GELU(),
            nn.Linear(hidden, self.width),
        )

    def forward(self, features: AudioFeatures) -> AudioFeatures:
        """[B, A, E_in] -> [B, A, width]."""
        return AudioFeatures(self.layers(features.x_BAE), features.lengths, features.seconds_per_token)
