"""`flamingo`: gated cross-attention blocks, each with a feed-forward network, every k layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pal.backbone.interfaces import PackedBlock
from pal.backbone.llm import Backbone
from pal.backbone.observers import attention_weights
from pal.backbone.packed import DeviceSegments, packed_attention, take_rows
from pal.backbone.stream_kv import Layout
from pal.config import StrictConfig
from pal.errors import ConfigError
from pal.integrations.base import IntegrationOutput, Route
from pal.integrations.keys import zeroed
from pal.registry import register
from pal.types import AudioFeatures


@register("integration", "flamingo")
class Flamingo(Route):
    """x + tanh(g) XAttn(x, a), then x + tanh(g') FFN(x), before every k-th layer (Alayrac et al. 2022, section 2.2).

    The gates start at zero, so the untrained model equals the text LLM exactly. Audio reserves no position ids, since
    the LLM's own attention never sees it. Three choices are ours. Blocks, FFN included, do not change rows before the
    audio. RoPE encodes the keys' index in the clip, since encoders may not encode time. A row sees all clips before it,
    not only the last one.
    """

    class Config(StrictConfig):
        """Options of `flamingo`."""

        every: int = Field(default=4, ge=1)
        """k: a block before each layer l with (l + 1) divisible by k (Flamingo: 1 to 7, by size of the LLM)."""
        ffn: int | None = Field(default=None, ge=1)
        """Width inside the blocks' feed-forward networks; None: four times the LLM's width."""

        def toy(self) -> Flamingo.Config:
            """Toy size, with a block at least every four layers."""
            return self.model_copy(update={"every": min(self.every, 4), "ffn": self.ffn and 32})

    def __init__(self, config: Config, in_width: int, llm: Backbone) -> None:
        super().__init__()
        self.config = config
        self.in_width = in_width
        self.layers = tuple(layer for layer in range(llm.n_layers) if (layer + 1) % config.every == 0)
        if not self.layers:
            raise ConfigError(
                f"integration 'flamingo': every {config.every} exceeds the LLM's {llm.n_layers} layers; lower it"
            )
        ffn = config.ffn or 4 * llm.width
        self.cross = nn.ModuleDict({str(layer): GatedBlock(in_width, llm, ffn) for layer in self.layers})

    def blocks(self) -> Mapping[int, PackedBlock]:
        """Gated blocks, by the layer that they precede."""
        return {layer: cast(GatedBlock, self.cross[str(layer)]) for layer in self.layers}

    def inject(self, features: AudioFeatures, llm: Backbone) -> IntegrationOutput:
        """One key per token for each block, no rows."""
        return IntegrationOutput(
            lengths=features.lengths,
            layout=Layout(features.seconds_per_token, beside=True),
            keys=_Keys(zeroed(features), self.cross),
            layers=self.layers,
            width_A=features.x_BAE.shape[1],
            blocks=self.blocks(),
        )


class _Keys:
    def __init__(self, x_UAE: Tensor, blocks: nn.ModuleDict) -> None:
        self._x_UAE = x_UAE
        self._blocks = blocks

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values, each [U, G, A, C]."""
        block = self._blocks[str(layer)]
        assert isinstance(block, GatedBlock)
        return block.keys_values(self._x_UAE)


class GatedBlock(nn.Module):
    """Cross-attention and a feed-forward network, each with a tanh gate; as many heads as the LLM."""

    def __init__(self, in_width: int, llm: Backbone, ffn: int) -> None:
        super().__init__()
        self.width = llm.head_width
        inner, shared = llm.heads * llm.head_width, llm.kv_heads * llm.head_width
        self.norm = nn.LayerNorm(llm.width)
        self.audio_norm = nn.LayerNorm(in_width)
        self.q = nn.Linear(llm.width, inner, bias=False)
        self.k = nn.Linear(in_width, shared, bias=False)
        self.v = nn.Linear(in_width, shared, bias=False)
        self.out = nn.Linear(inner, llm.width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))
        self.ffn = nn.Sequential(
            nn.LayerNorm(llm.width),
            nn.Linear(llm.width, ffn, bias=False),
            nn.GELU(),
            nn.Linear(ffn, llm.width, bias=False),
        )
        self.ffn_gate = nn.Parameter(torch.zeros(1))

    def keys_values(self, x_UAE: Tensor) -> tuple[Tensor, Tensor]:
        """Features [U, A, E] -> keys before RoPE and values, each [U, G, A, C]."""
        x_UAE = self.audio_norm(x_UAE.to(self.k.weight.dtype))
        k_UGAC, v_UGAC = (p(x_UAE).unflatten(-1, (-1, self.width)).transpose(1, 2) for p in (self.k, self.v))
        return k_UGAC, v_UGAC

    def forward(self, x_BQD: Tensor, k_BGAC: Tensor, v_BGAC: Tensor, seen_B1QA: Tensor | None) -> Tensor:
        """Rows [B, Q, D], keys after RoPE, values, and which keys each row sees (None: all) -> rows [B, Q, D]."""
        dtype = self.q.weight.dtype
        q_BHQC = self._queries(x_BQD)
        sees_audio_B1Q1 = None if seen_B1QA is None else seen_B1QA.any(-1, keepdim=True)
        # a row that sees no key sees all, since attention to no key is NaN; its output is not used
        mixed_BHQC = F.scaled_dot_product_attention(
            q_BHQC,
            k_BGAC.to(dtype),
            v_BGAC.to(dtype),
            attn_mask=None if seen_B1QA is None or sees_audio_B1Q1 is None else seen_B1QA | ~sees_audio_B1Q1,
            enable_gqa=q_BHQC.shape[1] != k_BGAC.shape[1],
        )
        y_BQD = self._added(x_BQD, mixed_BHQC.transpose(1, 2))
        return y_BQD if sees_audio_B1Q1 is None else torch.where(sees_audio_B1Q1[:, 0], y_BQD, x_BQD)

    def packed(
        self, x_1ND: Tensor, k_IGC: Tensor, v_IGC: Tensor, segments: DeviceSegments, sees_audio_N1: Tensor
    ) -> Tensor:
        """`forward` for packed rows: keys and values, segments, and which rows see any keys -> [1, N, D]."""
        q_NHC = self._queries(x_1ND)[0].transpose(0, 1)
        device = x_1ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q_NHC.dtype
        q_NHC, k_IGC, v_IGC = (x.to(dtype) for x in (q_NHC, k_IGC, v_IGC))
        if segments.keys_K is not None:
            k_IGC, v_IGC = (take_rows(x, segments.keys_K, segments.back) for x in (k_IGC, v_IGC))
        mixed_NHC = packed_attention(segments, q_NHC, k_IGC, v_IGC, False, None, None)
        return torch.where(sees_audio_N1, self._added(x_1ND, mixed_NHC[None]), x_1ND)

    def _added(self, x_BQD: Tensor, mixed_BQHC: Tensor) -> Tensor:
        """Rows plus the gated outputs of attention and feed-forward network."""
        dtype = self.q.weight.dtype
        y_BQD = x_BQD + (self.gate.tanh() * self.out(mixed_BQHC.flatten(2))).to(x_BQD.dtype)
        return y_BQD + (self.ffn_gate.tanh() * self.ffn(y_BQD.to(dtype))).to(x_BQD.dtype)

    def weights(self, x_BQD: Tensor, k_BGAC: Tensor, seen_B1QA: Tensor) -> Tensor:
        """Attention weights of each row on the keys: [B, H, Q, A], all 0 for a row that sees none."""
        return attention_weights(self._queries(x_BQD), k_BGAC, seen_B1QA, None)

    def _queries(self, x_BQD: Tensor) -> Tensor:
        q_BQX = self.q(self.norm(x_BQD.to(self.q.weight.dtype)))
        return q_BQX.unflatten(-1, (-1, self.width)).transpose(1, 2)
