"""`lal_audio_query`: LAL whose audio tokens also make queries, an ablation of LAL."""

from __future__ import annotations

from torch import Tensor

from pal.backbone.llm import Backbone
from pal.integrations.base import IntegrationOutput
from pal.integrations.gate import GatedRoute, GateOptions, gate_of, layout_of
from pal.integrations.keys import zeroed
from pal.integrations.layers import Layers, chosen_layers, toy_layers
from pal.integrations.projector import ProjectorOptions, projector
from pal.registry import register
from pal.types import AudioFeatures


@register("integration", "lal_audio_query")
class LALAudioQuery(GatedRoute):
    """u_0 = P(a); u_{l+1} = u_l + attention_l(u_l), without the feed-forward network; K and V of layer l from u_l.

    Audio tokens attend to their own clip, causally and within the layer's window, as in PLITS; the paper's LAL has no
    such attention. They do not see the text before them, so that their K/V can be computed once for many questions
    (our choice).
    """

    class Config(GateOptions, ProjectorOptions):
        """Options of `lal_audio_query`, those of its gate, and those of its projector."""

        layers: Layers = "all"
        """Layers that see the audio, as in `lal`; the audio tokens are updated in these layers only."""

        def toy(self) -> LALAudioQuery.Config:
            """Toy size, for an LLM of few layers."""
            return super().toy().model_copy(update={"layers": toy_layers(self.layers)})

    runs_layers = True

    def __init__(self, config: Config, in_width: int, llm: Backbone) -> None:
        super().__init__()
        self.config = config
        self.layers = chosen_layers(config.layers, llm)
        self.in_width = in_width
        self.projector = projector(config, in_width, llm)
        self.gate = gate_of(config, self.layers, llm)

    def inject(self, features: AudioFeatures, llm: Backbone) -> IntegrationOutput:
        """One key per token in each injected layer, no rows."""
        return IntegrationOutput(
            lengths=features.lengths,
            layout=layout_of(self.config, features.seconds_per_token, joint=True),
            keys=_UpdatedKeys(self.projector(zeroed(features)), features.mask_BA, self.layers, llm),
            layers=self.layers,
            width_A=features.x_BAE.shape[1],
            bias=self.bias(),
            scale=self.scale(),
        )


class _UpdatedKeys:
    """K/V of audio tokens that earlier layers updated.

    The inputs of all layers are computed at once, outside of the layers. If they were cached inside a layer, they could
    come from the first pass of gradient checkpointing, which has no gradients.
    """

    def __init__(self, u_UAD: Tensor, mask_UA: Tensor, layers: tuple[int, ...], llm: Backbone) -> None:
        self._llm = llm
        self._inputs: dict[int, Tensor] = {}
        u_UAD = u_UAD.to(llm.dtype)
        for layer in layers:
            self._inputs[layer] = u_UAD
            if layer != layers[-1]:  # the last layer's output is not used
                u_UAD = llm.self_attend(layer, u_UAD, mask_UA)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values, each [U, G, A, C]."""
        return self._llm.project_kv(layer, self._inputs[layer])
