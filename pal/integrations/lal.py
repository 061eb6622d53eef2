"""LAL: audio as keys and values only; text rows, and only they, make queries."""

from torch import nn

from pal.backbone.audio_kv import Layout
from pal.backbone.llm import Backbone
from pal.config import StrictConfig
from pal.integrations.base import ClipSpans, Integration, ProjectedKeys, mlp
from pal.integrations.layers import Layers, chosen_layers
from pal.registry import register
from pal.types import AudioFeatures


@register("integration", "lal")
class LAL(Integration):
    """u_l = P_l(a); keys and values by layer l's own norm and projections (paper, section on LAL)."""

    class Config(StrictConfig):
        """Options of `lal`."""

        layers: Layers = "all"
        """all, first_third, {first: share}, {last: share}, {range: [from, to]}, or a list of layer numbers."""
        hidden: int | None = None
        """Hidden width of each layer's projector; the LLM's width when left out."""

    def __init__(self, config: Config, in_width: int, llm: Backbone) -> None:
        super().__init__()
        self.config = config
        self.layers = chosen_layers(config.layers, llm)
        hidden = config.hidden or llm.width
        self.projectors = nn.ModuleDict({str(layer): mlp(in_width, hidden, llm.width) for layer in self.layers})

    def spans(self, features: AudioFeatures, llm: Backbone) -> ClipSpans:
        """One key per token in each injected layer, no rows."""
        return ClipSpans(
            lengths=features.lengths,
            layout=Layout(features.seconds_per_token),
            keys=ProjectedKeys(features, self.projectors, llm),
            layers=self.layers,
            width_A=features.x_BAE.shape[1],
        )
