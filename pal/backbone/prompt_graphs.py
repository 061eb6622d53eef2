"""CUDA graphs of prefill: one launch reads prompts of a size that occurred before.

A short prompt takes a GPU less time than the host needs to launch its kernels. Steps that a graph cannot repeat run
eagerly: prompts that are padded or have cross-attention blocks, and LLMs with hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pal.backbone import families
from pal.backbone.cache import CapturingCache, JointCache, LayerGroup
from pal.backbone.graphs import modules_of
from pal.backbone.packed import PackedContext
from pal.backbone.recording import BatchTensors, Recorder, Recordings, laid_out, same_autocast, setting_of
from pal.transfer import to_device
from pal.types import LLMInputs

if TYPE_CHECKING:
    from pal.backbone.llm import Backbone

KEPT = 32
"""Number of prompt sizes whose graphs are kept; the least recently used are freed."""
KEPT_BYTES = 2 << 30
"""Memory of the keys and values that kept graphs write."""
LARGEST = 32_768
"""Rows and audio keys of the largest prompts that are recorded; a GPU takes longer for larger ones than the host."""


class PromptGraphs:
    """Prefill by CUDA graphs where possible.

    Args:
        recorder: by default, CUDA graphs on the LLM's device.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recordings: Recordings[_Prefill] = Recordings(recorder, KEPT, KEPT_BYTES)
        self._lock = Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptGraphs:
        return PromptGraphs()

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptGraphs, ()

    def __len__(self) -> int:
        return len(self._recordings)

    @property
    def failed(self) -> str | None:
        """Reason why no more graphs are recorded; None while they are."""
        return self._recordings.failed

    def possible(self, device: torch.device) -> bool:
        """True if prompts on this device may become graphs."""
        return self._recordings.possible(device)

    @torch.no_grad()
    def read(self, llm: Backbone, cache: JointCache, inputs: LLMInputs) -> Tensor | None:
        """Fill the cache; logits [B, V] of the next token, or None where the prompts must be read eagerly."""
        context = inputs.audio_context
        if not self.possible(llm.device) or not isinstance(context, PackedContext) or not context.segments:
            return None
        if any(keys.blocks is not None for keys in context.keys) or families.checkpoints(llm.lm):
            return None  # transformers keeps nothing while it trains with gradient checkpointing
        keys = sum(sum(context.key_counts(which)) for which in range(len(context.keys)))
        if inputs.inputs_embeds_BTD.shape[1] + keys > LARGEST:
            return None
        ends_B = torch.tensor(context.lengths).cumsum(0) - 1
        tensors = BatchTensors()
        given = tensors.of((laid_out(inputs, context), to_device(ends_B, llm.device)))
        setting = setting_of(llm, modules_of([llm.lm, *tensors.modules]))
        if setting is None:
            return None
        groups = _groups(cache, context)
        sizes = (tensors.key(), groups, torch.is_inference_mode_enabled())

        def record(recorder: Recorder) -> _Prefill:
            return _Prefill(llm, tensors, given, groups, recorder)

        with self._lock:  # other threads may ask the same model (on the same stream), and the buffers are shared
            made = self._recordings.find(llm, setting, sizes, record)
            if made is None:
                return None
            made.put(tensors.tensors)
            made.replay()
            cache.hold_prompts(zip(groups, made.kept, strict=True))
            return made.logits_BV.clone()


def _groups(cache: JointCache, context: PackedContext) -> tuple[LayerGroup, ...]:
    """Layers that have storages of one size and attend to the same audio keys."""
    kinds: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for layer, kind in enumerate(cache.plan.layers):
        kinds.setdefault((kind, context.joined(layer)), []).append(layer)
    return tuple(LayerGroup(tuple(layers), joined) for (_, joined), layers in kinds.items())


class _Prefill:
    """Recorded prefill of prompts of one size."""

    def __init__(
        self,
        llm: Backbone,
        tensors: BatchTensors,
        given: Any,
        groups: Sequence[LayerGroup],
        recorder: Recorder,
    ) -> None:
        self._llm, self._groups = llm, groups
        self._inputs = [torch.empty_like(x) for x in tensors.tensors]
        self.put(tensors.tensors)
        self._given = tensors.rebuilt(given, self._inputs)
        recorder.warm_up(self._run)
        self.replay, outputs = recorder.record(self._run)
        found = iter(outputs)
        self.logits_BV = _tensor(next(found))
        self.kept = [(_tensor(next(found)), [_tensor(next(found)) for _ in group.joined]) for group in groups]
        """For each group K/V of the text and of each set of audio keys; see `JointCache.hold_prompts`."""

    @property
    def output_bytes(self) -> int:
        """Keys and values."""
        return sum(x.nbytes for text, joined in self.kept for x in (text, *joined))

    @torch.no_grad()
    def put(self, tensors: Sequence[Tensor]) -> None:
        """Copy other prompts of this size into the input buffers."""
        torch._foreach_copy_(self._inputs, list(tensors))

    def _run(self) -> list[Tensor | None]:
        inputs, ends_B = self._given
        cache = CapturingCache()
        with same_autocast(self._llm.device.type):
            out = self._llm.lm(
                inputs_embeds=inputs.inputs_embeds_BTD,
                attention_mask=inputs.audio_context.mask(inputs.attention_mask_BT),
                position_ids=inputs.position_ids_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=ends_B,
                attention_metadata=inputs.audio_context,
            )
        outputs: list[Tensor | None] = [out.logits[0]]
        for group in self._groups:
            captured = [cache.captured[layer] for layer in group.layers]
            outputs.append(torch.stack([x[0] for one in captured for x in one.text or ()]))
            for place in range(len(group.joined)):
                outputs.append(torch.stack([x for one in captured for x in one.joined[place]]))
        return outputs


def _tensor(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
