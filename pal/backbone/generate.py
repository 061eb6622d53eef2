"""Generation: our decoding loop for greedy search and sampling, transformers' for all other options.

Both generate the same tokens. Ours keeps its state on the device, checks only every few steps whether all answers have
ended, and, with a static cache on a GPU, replays each step as one CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)

from pal.backbone import graphs
from pal.backbone.cache import JointCache
from pal.backbone.cache_storage import ROOM, CachePlan
from pal.backbone.context import AudioContext
from pal.backbone.decoding import DecodingOptions, DecodingState, options_of, resolved
from pal.backbone.options import check_generation
from pal.backbone.packed import PackedContext
from pal.backbone.prefill import as_given, prepared, prompts_of, query_dtype, read_prompts
from pal.backbone.shared_prefix import Continuations, SharedPrefixCache
from pal.errors import PalError
from pal.transfer import to_device
from pal.types import LLMInputs

if TYPE_CHECKING:
    from pal.backbone.llm import Backbone

LOOK = 16
"""Steps of a CUDA graph between two checks whether all answers have ended. Without a graph a GPU is checked four times
as often, since it waits for the host anyway; on a CPU, where a check costs nothing, after every step."""


@torch.no_grad()
def generate(llm: Backbone, inputs: LLMInputs, **kwargs: Any) -> Tensor:
    """Continue each prompt: new token ids [B (times returned sequences), N].

    Audio K/V are computed once. Positions continue from each prompt's last one.

    Args:
        llm: the LLM.
        inputs: the prompts.
        kwargs: transformers' options. With `cache_implementation="static"` greedy answers and plain samples are
            decoded in buffers of a fixed size, on a GPU by a CUDA graph that prompts of similar length share;
            beams and processors use the buffers without a graph. It is faster from some tens of new tokens on, and
            not the default: the buffers have room for all new tokens from the start. A logits processor with
            `read_only = True` promises to change nothing and to leave its input on the device.

    Raises:
        PalError: an unsupported option.
    """
    check_generation(kwargs)
    inputs = padded_left(inputs)
    config = resolved(llm, kwargs)
    ours = options_of(config, kwargs)
    if ours is not None and llm.attends_to_audio:
        return _decode(llm, inputs, ours)
    return _by_transformers(llm, inputs, config, kwargs)


def stream(llm: Backbone, inputs: LLMInputs, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> Iterator[str]:
    """Stream the answer to one prompt as pieces of text; joined, they are the whole answer of `generate`."""
    packed = isinstance(inputs.audio_context, PackedContext)
    rows = len(inputs.audio_context.lengths) if packed else len(inputs.inputs_embeds_BTD)  # type: ignore[union-attr]
    if rows != 1:
        raise PalError(f"streaming takes one conversation, got {rows}")
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            generate(llm, inputs, streamer=streamer, **kwargs)
        except BaseException as error:  # raised below, in the reader, which would wait for ever otherwise
            failures.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failures:
        raise failures[0]


def prompt_side(llm: Backbone, kwargs: Mapping[str, Any]) -> Literal["left", "none"]:
    """The `padding_side` of `Integration.forward` for prompts of `generate` with these options."""
    return "none" if llm.packs and _joins(llm, resolved(llm, kwargs)) else "left"


def _joins(llm: Backbone, config: GenerationConfig | None) -> bool:
    """True if a `JointCache` can be used."""
    if config is None or config.use_cache is False:
        return False
    return llm.attends_to_audio and config.cache_implementation in (None, "dynamic", "static")


def _by_transformers(
    llm: Backbone, inputs: LLMInputs, config: GenerationConfig | None, kwargs: dict[str, Any]
) -> Tensor:
    cache = None
    if config is not None and _joins(llm, config):
        static = config.cache_implementation == "static"
        beams = max(config.num_beams or 1, config.num_return_sequences or 1)
        if inputs.audio_context is not None or beams > 1 or static:
            room = config.max_new_tokens if static and config.max_new_tokens else ROOM
            cache = prepared(llm, inputs, beams=beams, room=room)
            kwargs = {**kwargs, "past_key_values": cache}
            kwargs.pop("cache_implementation", None)
            if (given := kwargs.get("generation_config")) is not None:
                kwargs["generation_config"] = copy.deepcopy(given)
                kwargs["generation_config"].cache_implementation = None
    if inputs.audio_context is not None and cache is None:
        if isinstance(inputs.audio_context, PackedContext):
            raise PalError("packed prompts need a cache of ours; make them with padding_side='left'")
        kwargs = {**kwargs, "audio_context": inputs.audio_context.prebuilt()}
    made: Tensor = llm.lm.generate(**as_given(cache, inputs), **kwargs)
    return made


def _decode(llm: Backbone, inputs: LLMInputs, options: DecodingOptions) -> Tensor:
    gpu = graphs.possible(llm.device)
    fixed = options.cache == "static"
    prompts = prompts_of(inputs)
    room = options.tokens if fixed else min(options.tokens, ROOM)
    plan = CachePlan.of(llm.windows, prompts, beams=options.copies, room=room, fixed=fixed)
    kept = graphs.borrow(llm, plan, options) if fixed else None
    state = kept.state if kept is not None else DecodingState(JointCache(plan), options, llm.device)
    cache = state.cache
    assert isinstance(cache, JointCache)
    cache.begin(inputs, prompts, query_dtype(llm, llm.device))
    logits_RV = read_prompts(llm, cache, inputs).repeat_interleave(options.copies, dim=0)
    last_B1 = to_device(prompts.positions_BT[:, -1:], llm.device)
    state.begin(last_B1.repeat_interleave(options.copies, dim=0))
    graph = graphs.Stepper(llm, state, kept) if fixed and gpu else None
    said_RN = _said(llm, state, options, logits_RV, graph)
    if fixed:
        graphs.give_back(llm, plan, options, state, graph)
    return said_RN


@dataclass(frozen=True, eq=False)
class ReadPrefixes:
    """Prefixes that have been read, for any number of continuations."""

    cache: JointCache
    last_U: Tensor
    """Position of each prefix's last row."""


@torch.no_grad()
def read_prefixes(llm: Backbone, prefixes: LLMInputs, rows: int) -> ReadPrefixes | None:
    """Read what conversations have in common, up to the end of their last clip.

    Args:
        llm: the LLM.
        prefixes: inputs of the common beginnings.
        rows: most rows that will follow one, generated ones included.

    Returns:
        None where later rows would not see all of a prefix, since a sliding window ends within it.
    """
    inputs = padded_left(prefixes)
    layout = prompts_of(inputs)
    if any(llm.windows):
        far = int(layout.positions_BT.max() - layout.positions_BT.min().clamp(max=0)) + 1 + rows
        if any(window is not None and window <= far for window in llm.windows):
            return None
    cache = JointCache(CachePlan.of(llm.windows, layout, room=1))
    cache.begin(inputs, layout, query_dtype(llm, llm.device))
    read_prompts(llm, cache, inputs)
    return ReadPrefixes(cache, to_device(layout.positions_BT[:, -1], llm.device))


def continues(llm: Backbone, kwargs: Mapping[str, Any]) -> int | None:
    """Most new tokens of `generate_after` with these options; None with ones that it does not support.

    These are options that only transformers' loop has, a static cache, and dropout of attention probabilities.
    """
    options = options_of(resolved(llm, kwargs), kwargs)
    if options is None or options.cache == "static" or options.streamer is not None or not llm.attends_to_audio:
        return None
    return None if llm.lm.training and llm.dropout else options.tokens


@torch.no_grad()
def generate_after(llm: Backbone, read: ReadPrefixes, continuations: Continuations, **kwargs: Any) -> Tensor:
    """New token ids [R (times returned sequences), N]: those of `generate` for each prefix with its continuation.

    Args:
        llm: the LLM.
        read: the prefixes.
        continuations: the rest of each conversation.
        kwargs: as in `generate`, if `continues` supports them.
    """
    check_generation(kwargs)
    options = options_of(resolved(llm, kwargs), kwargs)
    assert options is not None, "ask `continues` first"
    continuations = continuations.repeated(options.copies)
    ids_RT, positions_RT = continuations.rows(read.last_U)
    cache = SharedPrefixCache(read.cache, continuations, room=min(options.tokens, ROOM))
    state = DecodingState(cache, options, llm.device)
    out = llm.lm(input_ids=ids_RT, position_ids=positions_RT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    state.begin(positions_RT[:, -1:])
    return _said(llm, state, options, out.logits[:, -1], None)


def _said(
    llm: Backbone,
    state: DecodingState,
    options: DecodingOptions,
    logits_RV: Tensor,
    graph: graphs.Stepper | None,
) -> Tensor:
    """Decode answers, from the logits of their first tokens: [R, N]."""
    look = 1 if not graphs.possible(llm.device) else LOOK // 4 if graph is None else LOOK
    if options.streamer is not None:
        options.streamer.put(torch.zeros(len(logits_RV), 0, dtype=torch.long))
    for count in range(options.tokens):
        if count == 0:
            state.choose(logits_RV)
        elif graph is not None:
            graph.step(options.tokens - count)
        else:
            state.step(llm.lm)
        for watcher in options.read_only_processors:
            assert state.logits_RV is not None
            watcher(state.said_RN[:, :count], state.logits_RV)
        if options.streamer is not None:
            options.streamer.put(state.next_R1[:, 0].cpu())
        if options.ends and ((count + 1) % look == 0 or options.streamer is not None) and bool(state.ended_R.all()):
            break
    if options.streamer is not None:
        options.streamer.end()
    longest = int(state.lengths_R.max())
    return state.said_RN[:, :longest].clone()


def padded_left(inputs: LLMInputs) -> LLMInputs:
    """The inputs with their padding moved to the left, as generation needs it; packed rows have no padding."""
    if isinstance(inputs.audio_context, PackedContext):
        return inputs
    mask_BT = inputs.attention_mask_BT
    order_BT = mask_BT.long().argsort(dim=1, stable=True)
    if bool((mask_BT[:, -1] != 0).all()):
        return inputs
    return reordered(inputs, order_BT)


def reordered(inputs: LLMInputs, order_BT: Tensor) -> LLMInputs:
    """The inputs with the rows of each sequence reordered or selected by `order_BT` [B, T], indices of rows."""
    mask_BT, context = inputs.attention_mask_BT, inputs.audio_context
    return replace(
        inputs,
        inputs_embeds_BTD=inputs.inputs_embeds_BTD.gather(
            1, order_BT[..., None].expand(-1, -1, inputs.inputs_embeds_BTD.shape[-1])
        ),
        position_ids_BT=inputs.position_ids_BT.gather(1, order_BT),
        attention_mask_BT=mask_BT.gather(1, order_BT),
        audio_context=context.reordered(order_BT) if isinstance(context, AudioContext) else None,
        labels_BT=None if inputs.labels_BT is None else inputs.labels_BT.gather(1, order_BT),
    )
