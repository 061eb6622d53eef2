"""`lal`: audio as keys and values only; only text rows make queries."""

from __future__ import annotations

from pal.backbone.llm import Backbone
from pal.integrations.base import IntegrationOutput
from pal.integrations.gate import GatedRoute, GateOptions, gate_of, layout_of
from pal.integrations.keys import ProjectedKeys
from pal.integrations.layers import Layers, chosen_layers, toy_layers
from pal.integrations.projector import LayerProjectorOptions, LayerProjectors
from pal.registry import register
from pal.types import AudioFeatures


@register("integration", "lal")
class LAL(GatedRoute):
    """u_l = P_l(a); keys and values by layer l's own norm and projections (paper, section on LAL).

    With a range of layers that does not start at 0, it is the delayed injection of the paper's first version.
    """

    class Config(GateOptions, LayerProjectorOptions):
        """Options of `lal`, of its gate and of its projectors."""

        layers: Layers = "all"
        """Layers that see the audio: all, first_third, {first: share}, {last: share}, {range: [from, to]} or a list."""

        def toy(self) -> LAL.Config:
            """Toy size, for an LLM of few layers."""
            return super().toy().model_copy(update={"layers": toy_layers(self.layers)})

    def __init__(self, config: Config, in_width: int, llm: Backbone) -> None:
        super().__init__()
        self.config = config
        self.layers = chosen_layers(config.layers, llm)
        self.projectors = LayerProjectors(config, self.layers, in_width, llm)
        self.gate = gate_of(config, self.layers, llm)

    def inject(self, features: AudioFeatures, llm: Backbone) -> IntegrationOutput:
        """One key per token in each injected layer, no rows."""
        return IntegrationOutput(
            lengths=features.lengths,
            layout=layout_of(self.config, features.seconds_per_token),
            keys=ProjectedKeys(features, self.projectors, llm),
            layers=self.layers,
            width_A=features.x_BAE.shape[1],
            bias=self.bias(),
            scale=self.scale(),
        )

    def fold(self, llm: Backbone) -> int:
        """Fuse the projectors."""
        return self.projectors.fold(llm, self.layers)
