"""PAL, the hybrid: summary tokens as rows through all layers, every token by LAL in the early ones."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pal.backbone.audio_kv import Layout
from pal.backbone.llm import Backbone
from pal.config import StrictConfig
from pal.integrations.base import ClipSpans, Integration, ProjectedKeys, mlp
from pal.integrations.layers import Layers, chosen_layers
from pal.registry import register
from pal.types import AudioFeatures


@register("integration", "pal")
class PAL(Integration):
    """s = MLP(Conv1d_stride_r(a)) as rows, a by LAL in the first third; s_i follows its r tokens (paper v3)."""

    class Config(StrictConfig):
        """Options of `pal`."""

        stride: int = Field(default=3, ge=1)
        """r, audio tokens per summary token (paper: 3)."""
        layers: Layers = "first_third"
        """Layers with LAL, as in `lal` (paper: the first third)."""
        hidden: int | None = None
        """Hidden width of the projectors; the LLM's width when left out."""

    def __init__(self, config: Config, in_width: int, llm: Backbone) -> None:
        super().__init__()
        self.config = config
        self.layers = chosen_layers(config.layers, llm)
        hidden = config.hidden or llm.width
        self.summarize = nn.Conv1d(in_width, in_width, kernel_size=config.stride, stride=config.stride)
        self.projector = mlp(in_width, hidden, llm.width)
        self.projectors = nn.ModuleDict({str(layer): mlp(in_width, hidden, llm.width) for layer in self.layers})

    def spans(self, features: AudioFeatures, llm: Backbone) -> ClipSpans:
        """One key per token in the early layers, one row per `stride` tokens."""
        return ClipSpans(
            lengths=features.lengths,
            layout=Layout(features.seconds_per_token, tokens=self.config.stride, rows=1),
            rows_USD=self.projector(self._summary(features)),
            keys=ProjectedKeys(features, self.projectors, llm),
            layers=self.layers,
            width_A=features.x_BAE.shape[1],
        )

    def _summary(self, features: AudioFeatures) -> Tensor:
        """Features [B, A, E] -> [B, S, E], S = ceil(A / r); the last group of a clip is filled up with zeros."""
        x_BAE = torch.where(features.mask_BA[..., None], features.x_BAE, 0.0)
        missing = -x_BAE.shape[1] % self.config.stride
        x_BAE = F.pad(x_BAE, (0, 0, 0, missing))
        return self.summarize(x_BAE.mT).mT
