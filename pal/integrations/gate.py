"""`ScoreGate`: a learned bias on the scores of audio, so that attaching it does the LLM no harm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from pal.backbone.llm import Backbone
from pal.backbone.score_bias import Bias, KeyScale
from pal.backbone.stream_kv import Layout
from pal.config import StrictConfig
from pal.integrations.base import Route

RATE = 100.0
"""Change of a bias per change of its weight: with learning rate 0.001 AdamW moves a bias by at most 0.1 a step."""


SCALE_RATE = 10.0
"""The same for the factor on keys."""


class GateOptions(StrictConfig):
    """Gate, and place of the audio among the position ids."""

    gate: float | None = Field(default=None, le=0)
    """Initial bias on the attention scores of audio keys, such as -16; it is learned. Audio rows of `pal` have one of
    their own. None: neither bias nor `key_scale`, as in the paper."""
    key_scale: float = 0.1
    """With `gate`: initial factor on the audio keys, learned for each key/value head. Projected audio can have scores
    above 20 in some heads of an LLM, which no bias of this size would close."""
    gate_by: Literal["layer", "head"] = "layer"
    """One bias for each layer, or for each query head of each layer."""
    positions: Literal["reserved", "shared"] = "reserved"
    """`reserved`: a clip reserves position ids, as its rows do in PLITS, and the text after it moves back. `shared`: it
    reserves none, so the text keeps the position ids it has without audio; RoPE rotates keys and rows as if they stood
    directly before the text that follows the clip."""
    tokens_per_position: int = Field(default=1, ge=1)
    """Consecutive tokens of a clip, with the summary tokens among them, that share a position id. RoPE turns less over
    a long clip then: with 64, an hour of 90,000 tokens lies within 1,407 positions. Tokens that share one keep their
    order only in what the encoder says of it. (V2PE, arXiv 2412.09616, has fractional ids for images to this end.)
    The audio of `lal_audio_query` attends to itself at one token a position in any case."""


class ScoreGate(nn.Module):
    """Bias and factor of each layer: their initial values plus `RATE` or `SCALE_RATE` times weights that start at 0.

    Args:
        options: initial values.
        layers: layers that have a gate.
        llm: the backbone.
        rows: the gate is of audio rows, whose keys the LLM makes; there is no factor.
    """

    def __init__(self, options: GateOptions, layers: Sequence[int], llm: Backbone, rows: bool = False) -> None:
        super().__init__()
        assert options.gate is not None
        self.initial, self.initial_scale = options.gate, options.key_scale
        self.layers = tuple(layers)
        heads = llm.heads if options.gate_by == "head" else 1
        self.weight_LH = nn.Parameter(torch.zeros(len(layers), heads))
        self.scale_LG = None if rows else nn.Parameter(torch.zeros(len(layers), llm.kv_heads))

    def bias(self) -> Bias:
        """Bias of each layer, [H] or [1] in float32."""
        bias_LH = self.initial + RATE * self.weight_LH.float()
        return dict(zip(self.layers, bias_LH, strict=True))

    def scale(self) -> KeyScale:
        """Factor on the keys of each layer, [G] in float32."""
        assert self.scale_LG is not None
        scale_LG = self.initial_scale + SCALE_RATE * self.scale_LG.float()
        return dict(zip(self.layers, scale_LG, strict=True))


class GatedRoute(Route):
    """Route whose keys may have a gate."""

    gate: ScoreGate | None
    """Gate of the keys."""

    def bias(self) -> Bias | None:
        """Bias of the gate."""
        return None if self.gate is None else self.gate.bias()

    def scale(self) -> KeyScale | None:
        """Factor of the gate."""
        return None if self.gate is None else self.gate.scale()


def layout_of(
    options: GateOptions, seconds_per_token: float, *, tokens: int = 1, rows: int = 0, joint: bool = False
) -> Layout:
    """Layout of keys and rows at the positions that the options name."""
    shared = options.positions == "shared"
    pace = options.tokens_per_position
    return Layout(
        seconds_per_token, tokens=tokens, rows=rows, beside=shared, before=shared, joint=joint, per_position=pace
    )


def gate_of(options: GateOptions, layers: Sequence[int], llm: Backbone, rows: bool = False) -> ScoreGate | None:
    """The gate that the options name, of keys or of rows; None without."""
    return None if options.gate is None else ScoreGate(options, layers, llm, rows)
