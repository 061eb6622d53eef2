"""Prefill and decoding steps of an LLM with a `JointCache`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pal.backbone.attention import without_cudnn
from pal.backbone.cache import JointCache
from pal.backbone.cache_storage import ROOM, CachedPrompts, CachePlan
from pal.backbone.packed import PackedContext
from pal.backbone.shared_prefix import ContinuedRows, SharedPrefixCache
from pal.errors import PalError
from pal.transfer import to_device
from pal.types import LLMInputs

if TYPE_CHECKING:
    from pal.backbone.context import AudioContext
    from pal.backbone.interfaces import AttentionGeometry
    from pal.backbone.llm import Backbone


def prepared(
    llm: AttentionGeometry, inputs: LLMInputs, *, beams: int = 1, room: int = ROOM, fixed: bool = False
) -> JointCache:
    """A cache for prompts, padded on the left or packed.

    Args:
        llm: the LLM.
        inputs: the prompts.
        beams: per prompt.
        room: number of rows to generate, if known.
        fixed: no more than `room` rows will be generated.
    """
    prompts = prompts_of(inputs)
    cache = JointCache(CachePlan.of(llm.windows, prompts, beams=beams, room=room, fixed=fixed))
    cache.begin(inputs, prompts, query_dtype(llm, inputs.position_ids_BT.device))
    return cache


def prompts_of(inputs: LLMInputs) -> CachedPrompts:
    """Layout of prompts."""
    if isinstance(inputs.audio_context, PackedContext):
        if inputs.audio_context.tiles is not None or any(one.shared for one in inputs.audio_context.conversations):
            raise PalError("these inputs are laid out for training; make those of prompts without labels")
        return CachedPrompts.packed(inputs.audio_context)
    return CachedPrompts.padded(inputs.audio_context, inputs.attention_mask_BT, inputs.position_ids_BT)


def cache_for(
    context: AudioContext, embeds_BTD: Tensor | None, valid_BT: Tensor | None, positions_BT: Tensor | None
) -> JointCache | None:
    """A cache for a forward with `use_cache`; None where its rows are not padded on the left, or inputs are missing."""
    if embeds_BTD is None or valid_BT is None or positions_BT is None or valid_BT.ndim != 2:
        return None
    if not valid_BT.shape == positions_BT.shape == context.rows_BT.shape or not bool(valid_BT[:, -1].all()):
        return None
    return prepared(context.llm, LLMInputs(embeds_BTD, positions_BT, valid_BT, context, None))


def read_prompts(llm: Backbone, cache: JointCache, inputs: LLMInputs) -> Tensor:
    """Prefill: run the LLM on the cache's prompts; logits [B, V] of the next token."""
    if llm.prompt_graphs is not None:
        read = llm.prompt_graphs.read(llm, cache, inputs)
        if read is not None:
            return read
    out = llm.lm(**as_given(cache, inputs), past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits_BV: Tensor = out.logits[:, -1]
    return logits_BV


def as_given(cache: JointCache | None, inputs: LLMInputs) -> dict[str, Any]:
    """Arguments of a causal LLM's forward for prompts; for packed ones, which the cache holds, padded placeholders."""
    if cache is None or not isinstance(inputs.audio_context, PackedContext):
        rows, valid_BT, positions_BT = inputs.inputs_embeds_BTD, inputs.attention_mask_BT, inputs.position_ids_BT
    else:
        prompts = prompts_of(inputs)
        device = inputs.position_ids_BT.device
        valid_BT, positions_BT = (to_device(x.long(), device) for x in (prompts.valid_BT, prompts.positions_BT))
        rows = inputs.inputs_embeds_BTD.new_zeros(1, 1, 1).expand(*prompts.shape, inputs.inputs_embeds_BTD.shape[-1])
    given: dict[str, Any] = {"inputs_embeds": rows, "attention_mask": valid_BT, "position_ids": positions_BT}
    return given


def through_cache(
    forward: Callable[..., Any],
    cache: JointCache,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    compiled: bool,
) -> Any:
    """A causal LLM's forward with a `JointCache`: prefill, or one decoding step of each beam. Without gradients.

    Args:
        forward: transformers' forward.
        cache: K/V so far.
        input_ids: of the rows [B, Q], or None.
        inputs_embeds: embeddings of the rows [B, Q, D], or None.
        attention_mask: [B, K] over all rows so far; not used in a decoding step.
        position_ids: [B, Q] of the rows.
        kwargs: other arguments of the forward.
        compiled: layers are compiled; only packed prompts run compiled.

    Raises:
        PalError: no position ids, or an LLM that drops the cache.
    """
    if position_ids is None:
        raise PalError("a forward with audio needs position_ids: positions have gaps that cannot be guessed")
    given: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
    # a compiled layer cannot write to a cache; the K/V of packed prompts are captured and stored outside of it
    with torch.no_grad(), without_cudnn(), eager(compiled and cache.packed is None):
        if cache.begun:
            given |= {"attention_mask": cache.no_mask, "past_key_values": cache}
            return forward(**given, attention_metadata=cache.step(position_ids), **kwargs)
        beams = cache.plan.beams if position_ids.shape[0] > cache.plan.rows else 1
        if cache.packed is not None:
            out = _read_packed(forward, cache, cache.packed, kwargs)
        else:
            given = {name: None if x is None else x[::beams] for name, x in given.items()}
            # transformers drops a mask of ones
            mask = (torch.ones_like(position_ids) if attention_mask is None else attention_mask)[::beams]
            if cache.context is not None:
                kwargs = {**kwargs, "attention_metadata": cache.context.attention_metadata(mask, given["position_ids"])}
            out = forward(**given, attention_mask=mask, past_key_values=cache, **kwargs)
        cache.end_prompts()
        if not cache.begun:
            raise PalError("nothing is kept while an LLM trains with gradient checkpointing; call eval() to generate")
        if beams > 1:
            out.logits = out.logits.repeat_interleave(beams, dim=0)
        return out


def eager(on: bool) -> AbstractContextManager[Any]:
    """Run compiled layers eagerly inside the block."""
    return torch.compiler.set_stance("force_eager") if on else nullcontext()


def continued(
    forward: Callable[..., Any],
    cache: SharedPrefixCache,
    input_ids: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    compiled: bool,
) -> Any:
    """A causal LLM's forward with a `SharedPrefixCache`: given rows of all continuations, or a decoding step.

    The arguments are those of `through_cache`.
    """
    given: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": cache.no_mask}
    with torch.no_grad(), without_cudnn(), eager(compiled):
        return forward(**given, past_key_values=cache, attention_metadata=ContinuedRows(cache), **kwargs)


def _read_packed(forward: Callable[..., Any], cache: JointCache, inputs: LLMInputs, kwargs: dict[str, Any]) -> Any:
    context = inputs.audio_context
    assert isinstance(context, PackedContext)
    given: dict[str, Any] = {
        "inputs_embeds": inputs.inputs_embeds_BTD,
        "position_ids": inputs.position_ids_BT,
        "attention_mask": context.mask(inputs.attention_mask_BT),
    }
    if not context.segments:  # the conversations form a rectangle [B, T]
        return forward(**given, past_key_values=cache, attention_metadata=context, **kwargs)
    lasts = torch.tensor([sum(context.lengths[: b + 1]) - 1 for b in range(len(context.lengths))])
    kwargs["logits_to_keep"] = to_device(lasts, inputs.position_ids_BT.device)
    out = forward(**given, past_key_values=cache, attention_metadata=context, **kwargs)
    out.logits = out.logits.transpose(0, 1)
    return out


def query_dtype(llm: AttentionGeometry, device: torch.device) -> torch.dtype:
    """Dtype of queries: autocast's, or the LLM's."""
    autocast = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if autocast else llm.dtype
