"""`pal`, the hybrid: summary tokens as rows through all layers, every token by LAL in the early layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pal.backbone.llm import Backbone
from pal.backbone.score_bias import Bias
from pal.integrations.base import IntegrationOutput
from pal.integrations.gate import GatedRoute, GateOptions, gate_of, layout_of
from pal.integrations.keys import ProjectedKeys, zeroed
from pal.integrations.layers import Layers, chosen_layers, toy_layers
from pal.integrations.projector import LayerProjectorOptions, LayerProjectors, projector
from pal.registry import register
from pal.types import AudioFeatures


@register("integration", "pal")
class PAL(GatedRoute):
    """s = MLP(Conv1d_stride_r(a)) as rows, a by LAL in the first third; s_i comes after its r tokens (paper v3)."""

    class Config(GateOptions, LayerProjectorOptions):
        """Options of `pal`, of its gates and of its projectors; that of summary tokens is never shared."""

        stride: int = Field(default=3, ge=1)
        """r, audio tokens per summary token (paper: 3)."""
        layers: Layers = "first_third"
        """Layers with LAL, as in `lal` (paper: the first third)."""

        def toy(self) -> PAL.Config:
            """Toy size, for an LLM of few layers."""
            return super().toy().model_copy(update={"layers": toy_layers(self.layers)})

    def __init__(self, config: Config, in_width: int, llm: Backbone) -> None:
        super().__init__()
        self.config = config
        self.layers = chosen_layers(config.layers, llm)
        self.in_width = in_width
        self.summarize = nn.Conv1d(in_width, in_width, kernel_size=config.stride, stride=config.stride)
        if config.projector == "residual":
            self._start_from_means()
        self.projector = projector(config, in_width, llm)
        self.projectors = LayerProjectors(config, self.layers, in_width, llm)
        self.gate = gate_of(config, self.layers, llm)
        self.row_gate = gate_of(config, range(llm.n_layers), llm, rows=True)

    def row_bias(self) -> Bias | None:
        """Bias of the summary tokens' gate."""
        return None if self.row_gate is None else self.row_gate.bias()

    def inject(self, features: AudioFeatures, llm: Backbone) -> IntegrationOutput:
        """One key per token in the early layers, one row per `stride` tokens."""
        return IntegrationOutput(
            lengths=features.lengths,
            layout=layout_of(self.config, features.seconds_per_token, tokens=self.config.stride, rows=1),
            rows_USD=self.projector(self._summary(features)),
            keys=ProjectedKeys(features, self.projectors, llm),
            layers=self.layers,
            width_A=features.x_BAE.shape[1],
            bias=self.bias(),
            scale=self.scale(),
            row_bias=self.row_bias(),
        )

    def fold(self, llm: Backbone) -> int:
        """Fuse the projectors of the layers with LAL."""
        return self.projectors.fold(llm, self.layers)

    def _start_from_means(self) -> None:
        """Summary tokens that are the mean of their tokens at first, as residual projectors pass on what they get."""
        with torch.no_grad():
            self.summarize.weight.copy_(torch.eye(self.in_width)[:, :, None] / self.config.stride)
            assert self.summarize.bias is not None
            nn.init.zeros_(self.summarize.bias)

    def _summary(self, features: AudioFeatures) -> Tensor:
        """Features [B, A, E] -> summary tokens [B, S, E], S = ceil(A / r); the last group is padded with zeros."""
        x_BAE = zeroed(features)
        missing = -x_BAE.shape[1] % self.config.stride
        x_BAE = F.pad(x_BAE, (0, 0, 0, missing))
        return self.summarize(x_BAE.mT).mT
