"""PLITS: audio takes the placeholder's place in the token sequence and runs through every layer."""

from pal.backbone.audio_kv import Layout
from pal.backbone.llm import Backbone
from pal.config import StrictConfig
from pal.integrations.base import ClipSpans, Integration, mlp
from pal.registry import register
from pal.types import AudioFeatures


@register("integration", "plits")
class PLITS(Integration):
    """u = MLP(a) as ordinary rows (the usual LLaVA way; the paper's baseline)."""

    class Config(StrictConfig):
        """Options of `plits`."""

        hidden: int | None = None
        """Hidden width of the projector; the LLM's width when left out."""

    def __init__(self, config: Config, in_width: int, llm: Backbone) -> None:
        super().__init__()
        self.config = config
        self.projector = mlp(in_width, config.hidden or llm.width, llm.width)

    def spans(self, features: AudioFeatures, llm: Backbone) -> ClipSpans:
        """One row per token."""
        return ClipSpans(
            lengths=features.lengths,
            layout=Layout(features.seconds_per_token, rows=1, keys=False),
            rows_USD=self.projector(features.x_BAE),
        )
