"""What is measured: a language model that reads a scene, writes on, or learns; and ours, one for each integration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pal.backbone.cache import JointCache
from pal.backbone.cache_storage import ROOM
from pal.backbone.decoding import DecodingOptions, DecodingState
from pal.backbone.generate import padded_left
from pal.backbone.graphs import WORTH, Stepper
from pal.backbone.llm import Backbone
from pal.backbone.prefill import prepared, prompts_of, read_prompts
from pal.bench.presets import Preset
from pal.bench.scene import BenchScene
from pal.integrations.base import Integration, Route
from pal.integrations.projector import ProjectorOptions
from pal.registry import build, lookup
from pal.transfer import to_device
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
class PrefilledPrompt:
    """A scene as it was read: what writing on needs."""

    logits_BV: Tensor
    cache: Any
    """transformers' cache."""
    mask_BK: Tensor
    """Over all rows so far."""
    position_B1: Tensor
    """Of the next row of each conversation."""
    decoding: DecodingState | None = None
    """Ours: what the product's own loop keeps."""
    stepper: Stepper | None = None
    """Ours, by a CUDA graph."""

    def kv_bytes(self) -> int:
        """Of all keys and values that are kept, without the room for later ones."""
        if isinstance(self.cache, JointCache):
            layers: list[Any] = self.cache.layers
            used = [(x, one.prompt + one.steps) for one in layers for x in (one.keys, one.values)]
            crossed = [
                pair for layer in range(len(layers)) for *_, k, v in self.cache.crossing(layer) for pair in (k, v)
            ]
            return sum(x.nbytes // x.shape[2] * rows for x, rows in used) + sum(x.nbytes for x in crossed)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers if layer.keys is not None)


class BenchModel(ABC):
    """One variant. All variants of a run share one LLM's weights, and one encoder's."""

    name: str
    own: nn.Module | None
    """What it adds to the LLM; None where it adds nothing."""
    compiled_phases: ClassVar[tuple[str, ...]] = ("train", "prefill")
    """Where a run that compiles does so with it."""
    graphs: ClassVar[bool] = False
    """Whether it can decode by a CUDA graph."""

    def __init__(self, name: str, llm: Backbone, own: nn.Module | None) -> None:
        self.name = name
        self.llm = llm
        self.own = own

    @abstractmethod
    def read(self, scene: BenchScene) -> PrefilledPrompt:
        """The prompt in one forward pass: logits of the last row, keys and values kept."""

    @abstractmethod
    def loss(self, scene: BenchScene) -> Tensor:
        """Mean cross-entropy of the answers."""

    @abstractmethod
    def write(self, reading: PrefilledPrompt, tokens: int) -> None:
        """So many more tokens, greedily."""

    def weights(self) -> list[nn.Parameter]:
        """Of the LLM and what is added to it, each once."""
        return _unique([*self.llm.parameters(), *(() if self.own is None else self.own.parameters())])

    def trained(self, train: str) -> list[nn.Parameter]:
        """What a training step trains; none where there is nothing to train."""
        own = [] if self.own is None else list(self.own.parameters())
        return self.weights() if train == "joint" else _unique(own)

    @abstractmethod
    def compile(self, **options: Any) -> None:
        """`torch.compile` the LLM's layers in place; those of one that is shared once."""


class AttachedModel(BenchModel):
    """Ours: an LLM with an integration; without one, text alone."""

    graphs = True

    def __init__(self, name: str, llm: Backbone, integration: Integration, hears: bool = True) -> None:
        super().__init__(name, llm, integration if hears else None)
        self.integration = integration
        self._hears = hears

    def routes(self) -> Sequence[Route]:
        """How audio enters; none without."""
        return self.integration.routes() if self._hears else ()

    def compile(self, **options: Any) -> None:
        """As the product does it."""
        if "forward" not in vars(self.llm.layers[0]):
            self.llm.compile(**options)

    def inputs(self, scene: BenchScene, trains: bool) -> LLMInputs:
        """As the product makes them: without padding where the backbone takes that."""
        features = scene.features() if self._hears else None
        side: Any = "none" if self.llm.packs else "right" if trains else "left"
        return self.integration(features, scene.rows(self._hears, trains), self.llm, side)

    def read(self, scene: BenchScene, tokens: int = ROOM, fixed: bool = False) -> PrefilledPrompt:
        """As `Backbone.generate` does it: audio K/V are made once, ahead.

        Args:
            scene: what to read.
            tokens: that will be written.
            fixed: whether into buffers of a fixed size, and by a CUDA graph where there is a GPU.
        """
        inputs, llm = padded_left(self.inputs(scene, trains=False)), self.llm
        cache = prepared(llm, inputs, room=tokens if fixed else min(tokens, ROOM), fixed=fixed)
        logits_BV = read_prompts(llm, cache, inputs)
        state = DecodingState(cache, DecodingOptions(tokens), llm.device)
        last_B1 = to_device(prompts_of(inputs).positions_BT[:, -1:], llm.device)
        state.begin(last_B1)
        stepper = Stepper(llm, state, None) if fixed and llm.device.type == "cuda" else None
        return PrefilledPrompt(logits_BV, cache, inputs.attention_mask_BT, last_B1 + 1, state, stepper)

    def write(self, reading: PrefilledPrompt, tokens: int) -> None:
        """By the product's own loop, which is told no end."""
        state = reading.decoding
        assert state is not None
        for _ in range(tokens):
            if state.logits_RV is None:
                state.choose(reading.logits_BV)
            if reading.stepper is not None:
                reading.stepper.step(tokens + WORTH)
            else:
                state.step(self.llm.lm)
            assert state.logits_RV is not None
            reading.logits_BV = state.logits_RV

    def loss(self, scene: BenchScene) -> Tensor:
        """The model's own."""
        total, tokens = self.llm.loss(self.inputs(scene, trains=True))
        return total / tokens


def attached(name: str, llm: Backbone, preset: Preset) -> AttachedModel:
    """The subject of one of our variants."""
    device, dtype = torch.device(preset.device), getattr(torch, preset.dtype)
    part = INTEGRATIONS["plits" if name == "text" else name]
    options: Any = lookup("integration", part["name"]).Config  # type: ignore[attr-defined]
    if issubclass(options, ProjectorOptions):
        part = {**part, "hidden": preset.width}
    with device:
        integration = build("integration", part, in_width=preset.width, llm=llm)
    return AttachedModel(name, llm, integration.to(dtype), hears=name != "text")


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())
