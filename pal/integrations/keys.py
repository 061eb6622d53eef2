"""Audio keys and values that layers make on the spot from projected features."""

from __future__ import annotations

from torch import Tensor

from pal.backbone.llm import Backbone
from pal.integrations.projector import LayerProjectors
from pal.types import AudioFeatures


class ProjectedKeys:
    """K/V made in the layer that asks: P_l(a), then the LLM's own norm and projections."""

    def __init__(self, features: AudioFeatures, projectors: LayerProjectors, llm: Backbone) -> None:
        self._x_UAE = zeroed(features)
        self._projectors = projectors
        self._llm = llm

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values, each [U, G, A, C]."""
        folded = self._projectors.folded(layer, self._llm)
        if folded is not None:
            return self._llm.folded_kv(layer, folded, self._projectors.inside(layer)(self._x_UAE))
        return self._llm.project_kv(layer, self._projectors.of(layer)(self._x_UAE))


def zeroed(features: AudioFeatures) -> Tensor:
    """Features [B, A, E] with zeros for padding, since even a masked key must be finite."""
    return features.x_BAE.masked_fill(~features.mask_BA[..., None], 0.0) if features.padded else features.x_BAE
