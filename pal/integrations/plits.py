"""`plits`: audio tokens replace the placeholder in the token sequence and run through all layers."""

from pal.backbone.llm import Backbone
from pal.backbone.stream_kv import Layout
from pal.integrations.base import IntegrationOutput, Route
from pal.integrations.projector import ProjectorOptions, projector
from pal.registry import register
from pal.types import AudioFeatures


@register("integration", "plits")
class PLITS(Route):
    """u = MLP(a) as ordinary rows (the usual LLaVA way; the paper's baseline)."""

    class Config(ProjectorOptions):
        """Options of `plits`, which are those of its projector."""

    def __init__(self, config: Config, in_width: int, llm: Backbone) -> None:
        super().__init__()
        self.config = config
        self.in_width = in_width
        self.projector = projector(config, in_width, llm)

    def inject(self, features: AudioFeatures, llm: Backbone) -> IntegrationOutput:
        """One row per token."""
        return IntegrationOutput(
            lengths=features.lengths,
            layout=Layout(features.seconds_per_token, rows=1, keys=False),
            rows_USD=self.projector(features.x_BAE),
        )
