"""Protocols for attention to audio: geometry of an LLM, source of keys and values, cross-attention blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pal.backbone.packed import DeviceSegments

Rope = dict[str, tuple[Tensor, Tensor]]
"""Layer type -> cos and sin, each [B, A, C]."""


class Block(Protocol):
    """Cross-attention block between two layers: rows attend to audio keys."""

    def __call__(self, x_BQD: Tensor, k_BGAC: Tensor, v_BGAC: Tensor, seen_B1QA: Tensor | None) -> Tensor:
        """Rows, K and V, and which keys each row sees (None: all) -> rows [B, Q, D]."""
        ...

    def weights(self, x_BQD: Tensor, k_BGAC: Tensor, seen_B1QA: Tensor) -> Tensor:
        """Attention weights of each row on the keys: [B, H, Q, A], all 0 where it sees none."""
        ...


class PackedBlock(Block, Protocol):
    """A `Block` that also takes packed rows."""

    def packed(
        self, x_1ND: Tensor, k_IGC: Tensor, v_IGC: Tensor, segments: DeviceSegments, sees_audio_N1: Tensor
    ) -> Tensor:
        """Rows, K and V of the batch, segments of keys, and which rows see any -> rows [1, N, D]."""
        ...


class LaterRows(ABC):
    """Attention metadata of rows that see stored keys and values, and one another causally."""

    @abstractmethod
    def crosses(self, layer: int) -> bool:
        """Whether cross-attention blocks come before the layer."""

    @abstractmethod
    def cross(self, layer: int, x_BQD: Tensor) -> Tensor:
        """The layer's input rows after the blocks before it."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Queries [B, H, Q, C], keys and values of the rows [B, G, K, C], after RoPE -> [B, Q, H, C]."""


class AttentionGeometry(Protocol):
    """Facts of an LLM that attention to audio needs: RoPE, sliding windows, head width."""

    layer_types: tuple[str, ...]
    """Per layer, the key of its rotary embedding in `rope`."""
    windows: tuple[int | None, ...]
    """Per layer, how many positions back a query sees, itself included; None means all."""

    head_width: int
    """C."""
    dropout: float
    """Dropout of attention probabilities in training."""
    recomputes_audio: bool
    """Recompute audio keys and values in backward instead of keeping their activations."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the LLM."""
        ...

    def rope(self, positions_BA: Tensor) -> Rope:
        """Cos and sin of the LLM's rotary embedding at positions."""
        ...

    def check_attention(self) -> None:
        """Raise PalError if the LLM's attention function ignores audio."""
        ...


class KeySource(Protocol):
    """Source of a layer's audio keys and values: a projector, or an `AudioKV`."""

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values of all clips, each [U, G, A, C], U the number of clips."""
        ...
