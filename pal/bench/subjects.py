"""What is measured: a language model that reads a scene, writes on, or learns; and ours, one for each integration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pal.backbone.context import AudioContext
from pal.backbone.llm import Backbone
from pal.bench.presets import Preset
from pal.bench.scene import Scene
from pal.integrations.base import Integration, Route
from pal.registry import build
from pal.types import LLMInputs

INTEGRATIONS: dict[str, dict[str, Any]] = {
    "plits": {"name": "plits"},
    "lal": {"name": "lal"},
    "lal_third": {"name": "lal", "layers": "first_third"},
    "pal": {"name": "pal"},
    "flamingo": {"name": "flamingo"},
}
"""Variant -> integration; those with projectors get one as wide inside as the features."""


@dataclass
class Reading:
    """A scene as it was read: what writing on needs."""

    logits_BV: Tensor
    cache: Any
    """transformers' cache."""
    mask_BK: Tensor
    """Over all rows so far."""
    position: int
    """Of the next row."""
    audio: AudioContext | None = None

    def kv_bytes(self) -> int:
        """Of all keys and values that are kept: the cache's, and audio's beside it."""
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers if layer.keys is not None)
        for keys in () if self.audio is None else self.audio.keys:
            kept += sum(k_BGAC.nbytes + v_BGAC.nbytes for k_BGAC, v_BGAC in (keys.built or {}).values())
        return kept


class Subject(ABC):
    """One variant. All variants of a run share one LLM's weights, and one encoder's."""

    name: str
    own: nn.Module | None
    """What it adds to the LLM; None where it adds nothing."""

    def __init__(self, name: str, llm: Backbone, own: nn.Module | None) -> None:
        self.name = name
        self.llm = llm
        self.own = own

    @abstractmethod
    def read(self, scene: Scene) -> Reading:
        """The prompt in one forward pass: logits of the last row, keys and values kept."""

    @abstractmethod
    def step(self, reading: Reading, ids_B1: Tensor) -> Tensor:
        """Logits [B, V] after one more token, which joins the cache."""

    @abstractmethod
    def loss(self, scene: Scene) -> Tensor:
        """Mean cross-entropy of the answers."""

    def write(self, reading: Reading, tokens: int) -> None:
        """So many more tokens, greedily."""
        for _ in range(tokens):
            ids_B1 = reading.logits_BV.argmax(-1, keepdim=True)
            reading.mask_BK = torch.cat((reading.mask_BK, torch.ones_like(ids_B1)), dim=1)
            reading.logits_BV = self.step(reading, ids_B1)
            reading.position += 1

    def weights(self) -> list[nn.Parameter]:
        """Of the LLM and what is added to it, each once."""
        return _unique([*self.llm.parameters(), *(() if self.own is None else self.own.parameters())])

    def trained(self, train: str) -> list[nn.Parameter]:
        """What a training step trains; none where there is nothing to train."""
        own = [] if self.own is None else list(self.own.parameters())
        return self.weights() if train == "joint" else _unique(own)

    def compile(self) -> None:
        """`torch.compile` the LLM in place."""
        self.llm.compile()


class Attached(Subject):
    """Ours: an LLM with an integration; without one, text alone."""

    def __init__(self, name: str, llm: Backbone, integration: Integration, hears: bool = True) -> None:
        super().__init__(name, llm, integration if hears else None)
        self.integration = integration
        self._hears = hears

    def routes(self) -> Sequence[Route]:
        """How audio enters; none without."""
        return self.integration.routes() if self._hears else ()

    def _inputs(self, scene: Scene, trains: bool) -> LLMInputs:
        features = scene.features() if self._hears else None
        side = "right" if trains else "left"
        return self.integration(features, scene.rows(self._hears, trains), self.llm, side)

    def read(self, scene: Scene) -> Reading:
        """As `Backbone.generate` does it: audio K/V are made once, ahead."""
        inputs = self._inputs(scene, trains=False)
        if inputs.audio is not None:
            inputs = replace(inputs, audio=inputs.audio.prebuilt())
        out = self.llm(inputs, use_cache=True, logits_to_keep=1)
        after = int(inputs.position_ids_BT[0, -1]) + 1
        return Reading(out.logits[:, -1], out.past_key_values, inputs.attention_mask_BT, after, inputs.audio)

    def step(self, reading: Reading, ids_B1: Tensor) -> Tensor:
        """One more row."""
        inputs = LLMInputs(
            inputs_embeds_BTD=self.llm.embed(ids_B1),
            position_ids_BT=torch.full_like(ids_B1, reading.position),
            attention_mask_BT=reading.mask_BK,
            audio=reading.audio,
            labels_BT=None,
        )
        out = self.llm(inputs, use_cache=True, past_key_values=reading.cache, logits_to_keep=1)
        logits_BV: Tensor = out.logits[:, -1]
        return logits_BV

    def loss(self, scene: Scene) -> Tensor:
        """The model's own."""
        total, tokens = self.llm.loss(self._inputs(scene, trains=True))
        return total / tokens


def attached(name: str, llm: Backbone, preset: Preset) -> Attached:
    """The subject of one of our variants."""
    device, dtype = torch.device(preset.device), getattr(torch, preset.dtype)
    part = INTEGRATIONS["plits" if name == "text" else name]
    if name != "flamingo":  # which has no projectors
        part = {**part, "hidden": preset.width}
    with device:
        integration = build("integration", part, in_width=preset.width, llm=llm)
    return Attached(name, llm, integration.to(dtype), hears=name != "text")


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())
