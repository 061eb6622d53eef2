"""Models that are measured: the interface of prefill, decoding and training, and one model for each integration."""

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
"""Variant -> integration; the hidden width of projectors is that of the features."""


@dataclass
class PrefilledPrompt:
    """State after prefill: all that decoding needs."""

    logits_BV: Tensor
    cache: Any
    """transformers' cache."""
    mask_BK: Tensor
    """Attention mask over all rows so far."""
    position_B1: Tensor
    """Position of the next row of each conversation."""
    decoding: DecodingState | None = None
    """State of this package's decoding loop; None in models of transformers."""
    stepper: Stepper | None = None
    """CUDA graph of a decoding step, where one is used."""

    def kv_bytes(self) -> int:
        """Bytes of all keys and values, without the room for later ones."""
        if isinstance(self.cache, JointCache):
            layers: list[Any] = self.cache.layers
            used = [(x, one.prompt + one.steps) for one in layers for x in (one.keys, one.values)]
            crossed = [
                pair for layer in range(len(layers)) for *_, k, v in self.cache.crossing(layer) for pair in (k, v)
            ]
            return sum(x.nbytes // x.shape[2] * rows for x, rows in used) + sum(x.nbytes for x in crossed)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers if layer.keys is not None)


class BenchModel(ABC):
    """Model of one variant. All variants of a run share the weights of one LLM and one encoder."""

    name: str
    own: nn.Module | None
    """Modules added to the LLM; None where there are none."""
    compiled_phases: ClassVar[tuple[str, ...]] = ("train", "prefill")
    """Phases in which this model is compiled, in runs that compile."""
    graphs: ClassVar[bool] = False
    """Whether it can decode with CUDA graphs."""

    def __init__(self, name: str, llm: Backbone, own: nn.Module | None) -> None:
        self.name = name
        self.llm = llm
        self.own = own

    @abstractmethod
    def read(self, scene: BenchScene) -> PrefilledPrompt:
        """Prefill: one forward pass over the prompt, for the logits of the last row and the cache."""

    @abstractmethod
    def loss(self, scene: BenchScene) -> Tensor:
        """Mean cross-entropy of the answers."""

    @abstractmethod
    def write(self, reading: PrefilledPrompt, tokens: int) -> None:
        """Decode so many more tokens greedily."""

    def weights(self) -> list[nn.Parameter]:
        """Parameters of the LLM and of the added modules, each once."""
        return _unique([*self.llm.parameters(), *(() if self.own is None else self.own.parameters())])

    def trained(self, train: str) -> list[nn.Parameter]:
        """Parameters that a training step trains; may be none."""
        own = [] if self.own is None else list(self.own.parameters())
        return self.weights() if train == "joint" else _unique(own)

    @abstractmethod
    def compile(self, **options: Any) -> None:
        """`torch.compile` the LLM's layers in place; layers that variants share are compiled once."""


class AttachedModel(BenchModel):
    """An LLM with one of this package's integrations; or the LLM on text alone."""

    graphs = True

    def __init__(self, name: str, llm: Backbone, integration: Integration, with_audio: bool = True) -> None:
        super().__init__(name, llm, integration if with_audio else None)
        self.integration = integration
        self._with_audio = with_audio

    def routes(self) -> Sequence[Route]:
        """Routes by which audio enters; none for text alone."""
        return self.integration.routes() if self._with_audio else ()

    def compile(self, **options: Any) -> None:
        """Compile as `Backbone.compile` does."""
        if "forward" not in vars(self.llm.layers[0]):
            self.llm.compile(**options)

    def inputs(self, scene: BenchScene, trains: bool) -> LLMInputs:
        """Inputs of the LLM, packed where the backbone packs, as in training and generation."""
        features = scene.features() if self._with_audio else None
        side: Any = "none" if self.llm.packs else "right" if trains else "left"
        return self.integration(features, scene.rows(self._with_audio, trains), self.llm, side)

    def read(self, scene: BenchScene, tokens: int = ROOM, fixed: bool = False) -> PrefilledPrompt:
        """Prefill as `Backbone.generate` does it, with audio K/V made once, ahead.

        Args:
            scene: what to read.
            tokens: most tokens that will be decoded.
            fixed: use buffers of a fixed size, and a CUDA graph where there is a GPU.
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
        """Decode with this package's loop, without an end token."""
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
        """Mean cross-entropy by the loss of `Backbone`."""
        total, tokens = self.llm.loss(self.inputs(scene, trains=True))
        return total / tokens


def attached(name: str, llm: Backbone, preset: Preset) -> AttachedModel:
    """Model of one of this package's variants."""
    return attached_to(name, llm, preset.width, torch.device(preset.device), getattr(torch, preset.dtype))


def attached_to(name: str, llm: Backbone, width: int, device: torch.device, dtype: torch.dtype) -> AttachedModel:
    """Model of one of this package's variants, for features of a width, which is also that inside projectors."""
    part = INTEGRATIONS["plits" if name == "text" else name]
    options: Any = lookup("integration", part["name"]).Config  # type: ignore[attr-defined]
    if issubclass(options, ProjectorOptions):
        part = {**part, "hidden": width}
    with device:
        integration = build("integration", part, in_width=width, llm=llm)
    return AttachedModel(name, llm, integration.to(dtype), with_audio=name != "text")


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())
