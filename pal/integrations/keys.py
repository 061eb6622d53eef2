"""Audio keys and values that the layers compute from projected features."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from torch import Tensor

from pal.backbone.llm import Backbone
from pal.backbone.packed import Projection, take_rows
from pal.backbone.segments import where
from pal.integrations.projector import LayerProjectors
from pal.transfer import move
from pal.types import AudioFeatures


class ProjectedKeys:
    """K/V that are computed in the layer that attends to them: P_l(a), then the layer's own norm and projections."""

    def __init__(self, features: AudioFeatures, projectors: LayerProjectors, llm: Backbone) -> None:
        self._features = features
        self._projectors = projectors
        self._llm = llm
        self._more = 0

    @cached_property
    def _padded(self) -> Tensor:
        """Features [U, A, E]."""
        return zeroed(self._features)

    @cached_property
    def _packed(self) -> Tensor:
        """Features without padding [M, E], filling tokens included."""
        return real_tokens(self._features, self._more)

    def ready(self, more: int | None) -> None:
        """Compute what all layers share. Not done in a layer, since backward may recompute the layer.

        Args:
            more: number of filling tokens, for packed rows; None: padded rows.
        """
        self._more = more or 0
        _ = self._padded if more is None else self._packed

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values, each [U, G, A, C]."""
        folded = self._projectors.folded(layer, self._llm)
        if folded is not None:
            return self._llm.folded_kv(layer, folded, self._projectors.inside(layer)(self._padded))
        return self._llm.project_kv(layer, self._projectors.of(layer)(self._padded))

    def projection(self, layer: int) -> Projection:
        """Projection of the clips' real tokens to K/V, computed in the layer."""
        return self._llm.projection(layer, self._projectors.of(layer), self._packed)


def real_tokens(features: AudioFeatures, more: int = 0) -> Tensor:
    """Real tokens of all clips, one after the other, and `more` copies of the first one: [M, E]."""
    x_XE = features.x_BAE.flatten(0, 1)
    if not features.padded and not more:
        return x_XE.clone()  # no view: torch.compile would compile one graph for views and another for other tensors
    width = features.x_BAE.shape[1]
    index_M = np.concatenate([clip * width + np.arange(count) for clip, count in enumerate(features.lengths)])
    filled_M = np.concatenate((index_M, np.full(more, index_M[0])))
    # filling tokens get no gradient: nothing attends to them
    none, places = len(index_M), where(index_M, len(x_XE))[0]
    index, back = move([filled_M, np.where(places == none, len(filled_M), places)], x_XE.device)
    return take_rows(x_XE, index, (back,))


def zeroed(features: AudioFeatures) -> Tensor:
    """Features [B, A, E] with zeros for padding, since even masked keys must be finite."""
    return features.x_BAE.masked_fill(~features.mask_BA[..., None], 0.0) if features.padded else features.x_BAE
