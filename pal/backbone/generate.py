"""Generation: a loop of our own for what most answers need, transformers' for everything else.

Both give the same tokens. Ours keeps all that a step needs on the device, asks only now and then whether all rows have
ended, and, with a static cache on a GPU, replays a step as one CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pal.backbone import graphs
from pal.backbone.attention import without_cudnn
from pal.backbone.cache import JointCache
from pal.backbone.context import AudioContext
from pal.backbone.options import check_generation
from pal.backbone.packed import PackedContext
from pal.backbone.storage import ROOM, Plan, Prompts
from pal.errors import PalError
from pal.transfer import to_device
from pal.types import LLMInputs

if TYPE_CHECKING:
    from pal.backbone.context import Geometry
    from pal.backbone.llm import Backbone

LOOK = 16
"""Steps after which the host asks a GPU whether all rows have ended; on a CPU asking costs nothing, and it is 1."""
STATIC_FROM = 32
"""New tokens from which on a GPU decodes with a static cache unless told otherwise: making a CUDA graph takes as long
as some ten tokens, and is made once for prompts of like length."""
_OURS = frozenset(
    """max_new_tokens do_sample temperature top_k top_p num_return_sequences pad_token_id eos_token_id bos_token_id
    max_length cache_implementation compile_config disable_compile transformers_version _from_model_config""".split()  # noqa: SIM905
)
"""Options that our loop follows, or that say nothing of what is generated."""
_OFF = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "use_cache": True,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "typical_p": 1.0,
    "min_length": 0,
}
"""Values with which an option changes nothing, beside False."""


@torch.no_grad()
def generate(llm: Backbone, inputs: LLMInputs, **kwargs: Any) -> Tensor:
    """Continue each row: new token ids [B (times returned sequences), N].

    Audio K/V are made once. Positions go on from each row's last one.

    Args:
        llm: the LLM.
        inputs: the prompts.
        kwargs: transformers' options. With `cache_implementation="static"` greedy answers and plain samples are
            decoded in buffers of a fixed size, on a GPU by a CUDA graph that is kept for prompts of like length;
            beams and processors use the buffers without a graph. It is the default on a GPU from `STATIC_FROM` new
            tokens on; "dynamic" turns it off. A logits processor with `only_watches = True` says that it changes
            nothing and leaves what it sees on the device.

    Raises:
        PalError: an option that cannot be followed.
    """
    check_generation(kwargs)
    inputs = padded_left(inputs)
    config = _resolved(llm, kwargs)
    ours = _ours(config, kwargs)
    if ours is not None and llm.hears:
        return _decode(llm, inputs, ours)
    return _by_transformers(llm, inputs, config, kwargs)


def stream(llm: Backbone, inputs: LLMInputs, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> Iterator[str]:
    """`generate` for one row, as pieces of text when they are ready; together they equal its whole text."""
    if inputs.inputs_embeds_BTD.shape[0] != 1:
        raise PalError(f"streaming takes one conversation, got {inputs.inputs_embeds_BTD.shape[0]}")
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            generate(llm, inputs, streamer=streamer, **kwargs)
        except BaseException as error:  # handed to the reader below, who would wait for ever otherwise
            failures.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failures:
        raise failures[0]


def prompt_side(llm: Backbone, kwargs: Mapping[str, Any]) -> Literal["left", "none"]:
    """How `Integration.forward` should lay out prompts for `generate` with these options: its `padding_side`."""
    return "none" if llm.packs and _joins(llm, _resolved(llm, kwargs)) else "left"


def _joins(llm: Backbone, config: GenerationConfig | None) -> bool:
    """Whether a `JointCache` can be used."""
    if config is None or config.use_cache is False:
        return False
    return llm.hears and config.cache_implementation in (None, "dynamic", "static")


def _resolved(llm: Backbone, kwargs: Mapping[str, Any]) -> GenerationConfig | None:
    """The options as transformers puts them together; None where it would refuse them, and says so better."""
    config = copy.deepcopy(kwargs.get("generation_config")) or GenerationConfig()
    try:
        config.update(**llm.lm.generation_config.to_dict(), defaults_only=True)
        config.update(**{name: value for name, value in kwargs.items() if name != "generation_config"})
    except (AttributeError, TypeError, ValueError):
        return None
    return config


@dataclass(frozen=True)
class Options:
    """What our loop must know."""

    tokens: int
    """At most so many new ones."""
    ends: tuple[int, ...] = ()
    """Which of them end an answer."""
    pad: int = 0
    """What follows an end."""
    copies: int = 1
    """Answers to each prompt."""
    warpers: tuple[tuple[type, float], ...] | None = None
    """How logits are changed before one is drawn; None takes the largest."""
    cache: str | None = None
    watchers: Sequence[Callable[[Tensor, Tensor], Tensor]] = ()
    streamer: Any = None


def _ours(config: GenerationConfig | None, kwargs: Mapping[str, Any]) -> Options | None:
    """The options for our loop, where it follows all that are given."""
    if config is None:
        return None
    given = {name: value for name, value in config.to_dict().items() if value is not None}
    more = {name: value for name, value in kwargs.items() if value is not None and not hasattr(config, name)}
    processors = list(more.pop("logits_processor", ()))
    streamer = more.pop("streamer", None)
    more.pop("generation_config", None)
    follows = all(name in _OURS or _OFF.get(name, False) == value for name, value in given.items())
    if more or not follows or not all(getattr(one, "only_watches", False) for one in processors):
        return None
    tokens, copies, cache = config.max_new_tokens, config.num_return_sequences or 1, config.cache_implementation
    ends = config.eos_token_id
    ends = () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (ends,)
    pad = config.pad_token_id if config.pad_token_id is not None else ends[0] if ends else 0
    if not isinstance(tokens, int) or tokens < 1 or cache not in (None, "static", "dynamic"):
        return None
    if not all(isinstance(token, int) for token in (*ends, pad)) or (copies > 1 and not config.do_sample):
        return None
    if streamer is not None and copies > 1:
        return None
    return Options(tokens, ends, pad, copies, _warpers(config), cache, processors, streamer)


def _warpers(config: GenerationConfig) -> tuple[tuple[type, float], ...] | None:
    """transformers' own, in its order and with its defaults."""
    if not config.do_sample:
        return None
    found: list[tuple[type, float]] = []
    if config.temperature is not None and config.temperature != 1.0:
        found.append((TemperatureLogitsWarper, config.temperature))
    top_k = 50 if config.top_k is None else config.top_k
    if top_k != 0:
        found.append((TopKLogitsWarper, top_k))
    if config.top_p is not None and config.top_p < 1.0:
        found.append((TopPLogitsWarper, config.top_p))
    return tuple(found)


def _by_transformers(
    llm: Backbone, inputs: LLMInputs, config: GenerationConfig | None, kwargs: dict[str, Any]
) -> Tensor:
    cache = None
    if config is not None and _joins(llm, config):
        static = config.cache_implementation == "static"
        beams = max(config.num_beams or 1, config.num_return_sequences or 1)
        if inputs.audio is not None or beams > 1 or static:
            room = config.max_new_tokens if static and config.max_new_tokens else ROOM
            cache = prepared(llm, inputs, beams=beams, room=room)
            kwargs = {**kwargs, "past_key_values": cache}
            kwargs.pop("cache_implementation", None)
            if (given := kwargs.get("generation_config")) is not None:
                kwargs["generation_config"] = copy.deepcopy(given)
                kwargs["generation_config"].cache_implementation = None
    if inputs.audio is not None and cache is None:
        if isinstance(inputs.audio, PackedContext):
            raise PalError("packed prompts need a cache of ours; make them with padding_side='left'")
        kwargs = {**kwargs, "audio": inputs.audio.prebuilt()}
    made: Tensor = llm.lm.generate(**_as_given(cache, inputs), **kwargs)
    return made


def prepared(llm: Geometry, inputs: LLMInputs, *, beams: int = 1, room: int = ROOM, fixed: bool = False) -> JointCache:
    """A cache that has begun with prompts, padded on the left or packed.

    Args:
        llm: the LLM.
        inputs: the prompts.
        beams: rows that continue each.
        room: rows that will be generated, as far as known.
        fixed: whether no more than these will be.
    """
    prompts = prompts_of(inputs)
    cache = JointCache(Plan.of(llm.windows, prompts, beams=beams, room=room, fixed=fixed))
    cache.begin(inputs, prompts, query_dtype(llm, inputs.position_ids_BT.device))
    return cache


def prompts_of(inputs: LLMInputs) -> Prompts:
    """How prompts lie."""
    if isinstance(inputs.audio, PackedContext):
        return Prompts.packed(inputs.audio)
    return Prompts.padded(inputs.audio, inputs.attention_mask_BT, inputs.position_ids_BT)


def cache_for(
    audio: AudioContext, embeds_BTD: Tensor | None, valid_BT: Tensor | None, positions_BT: Tensor | None
) -> JointCache | None:
    """A cache for a forward that asks for one; None where its rows are not padded on the left, or incomplete."""
    if embeds_BTD is None or valid_BT is None or positions_BT is None or valid_BT.ndim != 2:
        return None
    if not valid_BT.shape == positions_BT.shape == audio.rows_BT.shape or not bool(valid_BT[:, -1].all()):
        return None
    return prepared(audio.llm, LLMInputs(embeds_BTD, positions_BT, valid_BT, audio, None))


def read_prompts(llm: Backbone, cache: JointCache, inputs: LLMInputs) -> Tensor:
    """Put the prompts that a cache has begun with through the LLM; logits [B, V] of what follows them."""
    out = llm.lm(**_as_given(cache, inputs), past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits_BV: Tensor = out.logits[:, -1]
    return logits_BV


def _as_given(cache: JointCache | None, inputs: LLMInputs) -> dict[str, Any]:
    """Prompts as a causal LLM's forward takes them; of packed ones, which the cache has, what stands for them."""
    if cache is None or not isinstance(inputs.audio, PackedContext):
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
    """A causal LLM's forward with a cache of ours: the prompts, each once, or one row more of each beam.

    Args:
        forward: transformers'.
        cache: what is stored so far.
        input_ids: of the rows, or
        inputs_embeds: the rows [B, Q, D].
        attention_mask: [B, K] over all rows so far; the cache knows it in a step.
        position_ids: [B, Q] of the rows.
        kwargs: what else the forward takes.
        compiled: whether layers are; those of a step run as they are written.
    """
    if position_ids is None:
        raise PalError("a forward with audio needs position_ids: positions have gaps that cannot be guessed")
    given: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
    with without_cudnn():
        if cache.begun:
            given |= {"attention_mask": cache.no_mask, "past_key_values": cache, "audio": cache.step(position_ids)}
            # lengths and places change from step to step, so that compiled layers would be compiled for each
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                return forward(**given, **kwargs)
        beams = cache.plan.beams if position_ids.shape[0] > cache.plan.rows else 1
        if cache.packed is not None:
            out = _read_packed(forward, cache, cache.packed, kwargs)
        else:
            given = {name: None if x is None else x[::beams] for name, x in given.items()}
            # transformers drops a mask of ones
            mask = (torch.ones_like(position_ids) if attention_mask is None else attention_mask)[::beams]
            if cache.context is not None:
                kwargs = {**kwargs, "audio": cache.context.view(mask, given["position_ids"])}
            out = forward(**given, attention_mask=mask, past_key_values=cache, **kwargs)
        cache.end_prompts()
        if beams > 1:
            out.logits = out.logits.repeat_interleave(beams, dim=0)
        return out


def _read_packed(forward: Callable[..., Any], cache: JointCache, inputs: LLMInputs, kwargs: dict[str, Any]) -> Any:
    audio = inputs.audio
    assert isinstance(audio, PackedContext)
    given: dict[str, Any] = {
        "inputs_embeds": inputs.inputs_embeds_BTD,
        "position_ids": inputs.position_ids_BT,
        "attention_mask": audio.mask(inputs.attention_mask_BT),
    }
    if not audio.segments:  # each has a row of its own in the batch
        return forward(**given, past_key_values=cache, audio=audio, **kwargs)
    lasts = torch.tensor([sum(audio.lengths[: b + 1]) - 1 for b in range(len(audio.lengths))])
    kwargs["logits_to_keep"] = to_device(lasts, inputs.position_ids_BT.device)
    out = forward(**given, past_key_values=cache, audio=audio, **kwargs)
    out.logits = out.logits.transpose(0, 1)
    return out


def query_dtype(llm: Geometry, device: torch.device) -> torch.dtype:
    """What attention computes in."""
    autocast = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if autocast else llm.dtype


class Decoding:
    """The state of one answer to each row, on the device; nothing of it is read while a step is made.

    Args:
        cache: of the prompts.
        options: what ends an answer and how a token is chosen.
        device: of the LLM.
        fixed: whether all of it is kept for other calls.
    """

    def __init__(self, cache: JointCache, options: Options, device: torch.device) -> None:
        rows = cache.plan.rows * cache.plan.beams
        room = cache.plan.room if cache.plan.fixed else options.tokens
        self.cache = cache
        self.pad = options.pad
        self.warpers = None if options.warpers is None else [kind(value) for kind, value in options.warpers]
        with torch.inference_mode(False):
            self.ends_X = torch.tensor(options.ends, dtype=torch.long, device=device)
            self.said_RN = torch.full((rows, room), options.pad, dtype=torch.long, device=device)
            self.next_R1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self.positions_R1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self.ended_R = torch.zeros(rows, dtype=torch.bool, device=device)
            self.lengths_R = torch.zeros(rows, dtype=torch.long, device=device)
            self.count_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.logits_RV: Tensor | None = None
        """Of the last token."""

    def begin(self, last_B1: Tensor) -> None:
        """Before the first token, given the positions of the prompts' last rows."""
        self.said_RN.fill_(self.pad)
        self.positions_R1.copy_(last_B1.repeat_interleave(self.cache.plan.beams, dim=0))
        for state in (self.ended_R, self.lengths_R, self.count_1):
            state.zero_()

    def choose(self, logits_RV: Tensor) -> None:
        """Take a token of each row by its logits; after the end of an answer it is padding."""
        logits_RV = logits_RV.float()
        if self.warpers is None:
            next_R = logits_RV.argmax(-1)
        else:
            scores_RV = logits_RV
            for warper in self.warpers:
                scores_RV = warper(self.said_RN, scores_RV)
            # what torch.multinomial does, which on a GPU looks at its input from the host
            p_RV = F.softmax(scores_RV, dim=-1)
            next_R = (p_RV / torch.empty_like(p_RV).exponential_(1)).argmax(-1)
        next_R = next_R.masked_fill(self.ended_R, self.pad)
        self.lengths_R += ~self.ended_R
        if len(self.ends_X):
            self.ended_R |= (next_R[:, None] == self.ends_X).any(1)
        self.said_RN.index_copy_(1, self.count_1, next_R[:, None])
        self.next_R1.copy_(next_R[:, None])
        self.positions_R1 += 1
        self.count_1 += 1
        self.logits_RV = logits_RV

    def step(self, lm: Any) -> None:
        """One token more of each row."""
        out = lm(
            input_ids=self.next_R1,
            position_ids=self.positions_R1,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.choose(out.logits[:, -1])


def _decode(llm: Backbone, inputs: LLMInputs, options: Options) -> Tensor:
    gpu = llm.device.type == "cuda"
    fixed = options.cache == "static" or (options.cache is None and gpu and options.tokens >= STATIC_FROM)
    prompts = prompts_of(inputs)
    room = options.tokens if fixed else min(options.tokens, ROOM)
    plan = Plan.of(llm.windows, prompts, beams=options.copies, room=room, fixed=fixed)
    kept = graphs.borrow(llm, plan, options) if fixed else None
    state = kept.state if kept is not None else Decoding(JointCache(plan), options, llm.device)
    state.cache.begin(inputs, prompts, query_dtype(llm, llm.device))
    logits_RV = read_prompts(llm, state.cache, inputs).repeat_interleave(options.copies, dim=0)
    state.begin(to_device(prompts.positions_BT[:, -1:], llm.device))
    graph = graphs.Stepper(llm, state, kept) if fixed and gpu else None
    look = LOOK if gpu else 1
    if options.streamer is not None:
        options.streamer.put(torch.zeros(plan.rows, 0, dtype=torch.long))
    for count in range(options.tokens):
        if count == 0:
            state.choose(logits_RV)
        elif graph is not None:
            graph.step(options.tokens - count)
        else:
            state.step(llm.lm)
        for watcher in options.watchers:
            assert state.logits_RV is not None
            watcher(state.said_RN[:, :count], state.logits_RV)
        if options.streamer is not None:
            options.streamer.put(state.next_R1[:, 0].cpu())
        if options.ends and ((count + 1) % look == 0 or options.streamer is not None) and bool(state.ended_R.all()):
            break
    if options.streamer is not None:
        options.streamer.end()
    longest = int(state.lengths_R.max())
    said_RN = state.said_RN[:, :longest].clone()
    if fixed:
        graphs.give_back(llm, plan, options, state, graph)
    return said_RN


def padded_left(inputs: LLMInputs) -> LLMInputs:
    """The same rows with their padding moved to the left, as generation needs it; packed ones have none."""
    if isinstance(inputs.audio, PackedContext):
        return inputs
    mask_BT = inputs.attention_mask_BT
    order_BT = mask_BT.long().argsort(dim=1, stable=True)
    if bool((mask_BT[:, -1] != 0).all()):
        return inputs
    return reordered(inputs, order_BT)


def reordered(inputs: LLMInputs, order_BT: Tensor) -> LLMInputs:
    """The rows of each sequence in another order, or only some of them: [B, T] of their numbers."""
    mask_BT = inputs.attention_mask_BT
    return replace(
        inputs,
        inputs_embeds_BTD=inputs.inputs_embeds_BTD.gather(
            1, order_BT[..., None].expand(-1, -1, inputs.inputs_embeds_BTD.shape[-1])
        ),
        position_ids_BT=inputs.position_ids_BT.gather(1, order_BT),
        attention_mask_BT=mask_BT.gather(1, order_BT),
        audio=inputs.audio.reordered(order_BT) if isinstance(inputs.audio, AudioContext) else None,
        labels_BT=None if inputs.labels_BT is None else inputs.labels_BT.gather(1, order_BT),
    )
