"""Answers with their timings; generation options, checked before anything is generated."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pal.backbone import adapters
from pal.backbone.audio_kv import AudioKV
from pal.backbone.options import check_generation
from pal.backbone.session import Session
from pal.conversations import check_ids, shared_prefixes
from pal.data.prompts import end_of_answer
from pal.errors import PalError, shortened
from pal.types import AUDIO

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from pal.clips import Clip, ClipFeatures, Clips
    from pal.model import PalModel
    from pal.types import Tokens


LONG_TOKENS = 16_384
"""Audio tokens of a clip that is read in blocks."""


@dataclass(frozen=True)
class DetailedAnswer:
    """One answer with its clips' length, its number of audio tokens, and its timings."""

    text: str
    audio_seconds: float
    """Length of the conversation's clips."""
    audio_seconds_used: float
    """Length that the encoders' tokens cover; equal to `audio_seconds`, since clips are never cut."""
    audio_tokens: int
    """Audio tokens of the clips, of all streams together."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each step: `encode`, `prefill`, `generate`."""
    notes: tuple[str, ...] = ()
    """With `read_to_end`: clips whose length could not be checked, each with the reason."""


class FirstTokenTimer:
    """Logits processor that changes nothing and records the time of the first logits, the end of prefill."""

    read_only = True
    at = 0.0
    """Time of the first logits by `time.perf_counter`; 0 before."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record the time at the first call; return the scores unchanged."""
        if not self.at:
            if scores.device.type == "cuda":
                torch.cuda.synchronize(scores.device)  # wait for the kernels that compute the scores
            self.at = time.perf_counter()
        return scores


def generate(model: PalModel, clips: Clips | ClipFeatures, rows: list[Tokens], **options: Any) -> list[str]:
    """As `PalModel.generate`, with adapters only for the conversations that have them by `ModelConfig.adapters`."""
    text = [i for i, row in enumerate(rows) if is_the_llm_s(model, row)]
    if not text:
        return model.generate(clips, rows, **options)
    with adapters.disabled(model.llm):
        texts = model.generate([], [rows[i] for i in text], **options)
    heard = [i for i in range(len(rows)) if i not in text]
    answers = [*texts, *model.generate(clips, [rows[i] for i in heard], **options)]
    each = len(answers) // len(rows)
    place = {row: position for position, row in enumerate([*text, *heard])}
    return [answers[each * place[i] + k] for i in range(len(rows)) for k in range(each)]


def generate_detailed(
    model: PalModel, clips: Sequence[Clip], rows: list[Tokens], notes: tuple[str, ...], options: dict[str, Any]
) -> list[DetailedAnswer]:
    """As `generate`, with lengths, numbers of audio tokens and timings; `notes` on the clips are in each answer."""
    start = time.perf_counter()
    features = model.encode(model.ready(clips))
    encoded = time.perf_counter()
    first = FirstTokenTimer()
    options = {**options, "logits_processor": [first, *(options.get("logits_processor") or ())]}
    texts = generate(model, features, rows, **options)
    done = time.perf_counter()
    timings = {"encode": encoded - start, "prefill": first.at - encoded, "generate": done - first.at}
    used = [min(clip.seconds, covered) for clip, covered in zip(clips, features.seconds, strict=True)]
    tokens = features.tokens()
    return [
        DetailedAnswer(
            text=text,
            audio_seconds=sum(clips[clip].seconds for clip in row.clips),
            audio_seconds_used=sum(used[clip] for clip in row.clips),
            audio_tokens=sum(tokens[clip] for clip in row.clips),
            seconds=timings,
            notes=notes,
        )
        for text, row in zip(texts, rows, strict=True)
    ]


def generate_ids(
    model: PalModel, features: ClipFeatures, conversations: list[Tokens], options: dict[str, Any]
) -> Tensor | list[list[int]]:
    """New token ids of conversations, with complete and checked options."""
    check_ids(conversations, model.llm.vocab, model.tokenizer)
    if not model.hides:
        in_blocks = _generate_in_blocks(model, features, conversations, options)
        if in_blocks is not None:
            return in_blocks
    shared = _generate_shared(model, features, conversations, options)
    if shared is not None:
        return shared
    return model.llm.generate(model.inputs(features, conversations, model.llm.prompt_side(**options)), **options)


def _generate_shared(
    model: PalModel, features: ClipFeatures, conversations: list[Tokens], options: dict[str, Any]
) -> Tensor | None:
    """New token ids of conversations of which neighbours begin alike; None where nothing can be shared.

    What neighbours have in common is read once (`Backbone.read_prefixes`).
    """
    llm = model.llm
    tokens = llm.continues(**options)
    shared = shared_prefixes(conversations) if llm.shares_prefixes and tokens is not None else None
    if shared is None or tokens is None:
        return None
    prefixes = model.inputs(features, shared.prefixes, llm.prompt_side(**options))
    read = llm.read_prefixes(prefixes, max(map(len, shared.continuations.ids)) + tokens)
    return None if read is None else llm.generate_after(read, shared.continuations, **options)


def _generate_in_blocks(
    model: PalModel, features: ClipFeatures, conversations: list[Tokens], options: dict[str, Any]
) -> list[list[int]] | None:
    """New token ids of conversations about one long clip; None where the clip is not long, or for a `Session`.

    The clip is read in blocks, once for all that begin alike. Its keys and values are attended where they are stored,
    so memory grows by what is stored and by the keys and values of the audio rows, if there are any.
    """
    llm, routes = model.llm, model.integration.routes()
    if len(routes) != 1 or len(features.seconds) != 1 or features.tokens()[0] < LONG_TOKENS:
        return None
    if not Session.answers_with(llm, options):
        return None
    parts = []
    for one in conversations:
        place = one.ids.index(AUDIO) if one.clips == [0] else 0
        parts.append((one.ids[:place], one.ids[place + 1 :]))
    if not all(before and after for before, after in parts):
        return None
    (route,), (given,) = routes, features.features
    clip = given.streams[0] if isinstance(given, AudioKV) else route.stream_kv(given, llm)
    if not Session.suits(llm, clip.layout) or clip.kept_LBA is not None:
        return None
    answers: list[list[int]] = []
    session, read = route.session(llm, clip.layout), None
    for before, after in parts:
        if before != read:
            session, read = route.session(llm, clip.layout), before
            session.read(before)
            session.hear_stored(clip)
        answers += session.answer(after, **options).tolist()
    return answers


def stream(model: PalModel, clips: Clips, row: Tokens, **options: Any) -> Iterator[str]:
    """As `PalModel.stream`, with adapters only for a conversation that has them."""
    pieces = model.stream(clips, row, **options)
    return _without_adapters(model, pieces) if is_the_llm_s(model, row) else pieces


def is_the_llm_s(model: PalModel, row: Tokens) -> bool:
    """True for a conversation that the LLM answers without its adapters."""
    return model.config.adapters == "with_audio" and not row.clips


def _without_adapters(model: PalModel, pieces: Iterator[str]) -> Iterator[str]:
    with adapters.disabled(model.llm):
        yield from pieces


def default_options(tokenizer: PreTrainedTokenizerBase, vocab: int) -> dict[str, Any]:
    """Default options of `generate`: greedy search, ids that end an answer, padding id.

    Args:
        tokenizer: of the model; may have entries without an embedding in the LLM, as Gemma3's has.
        vocab: number of the LLM's embeddings.
    """
    ends = [token for token in end_of_answer(tokenizer) if token < vocab]
    # Generation needs a padding id; it never appears in an answer.
    pad = tokenizer.pad_token_id
    if pad is None or pad >= vocab:
        pad = (ends or [0])[0]
    return {"do_sample": False, "pad_token_id": pad, "eos_token_id": ends or None}


def generation_options(
    options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, stream: bool = False, several: bool = False
) -> dict[str, Any]:
    """Check generation options, and replace `stop_strings` by transformers' stopping criterion.

    Args:
        options: transformers' generation options of one call.
        tokenizer: of the model, for `stop_strings`.
        stream: whether the answer is streamed.
        several: whether a conversation may have several answers.

    Raises:
        PalError: an unknown option, an invalid value, or one without support here, such as beams with `stream`.
    """
    from transformers import GenerationConfig, GenerationMixin
    from transformers.generation import StopStringCriteria

    check_generation(options)
    given = dict(options)
    tokenizer = given.pop("tokenizer", None) or tokenizer
    config = copy.deepcopy(given.get("generation_config")) or GenerationConfig()
    known = {*config.to_dict(), *inspect.signature(GenerationMixin.generate).parameters} - {"inputs", "kwargs", "self"}
    for name, value in given.items():
        if name not in known:
            raise PalError(
                f"generate: unknown option '{shortened(name, 60)}'; known are transformers' generation options"
            )
        if hasattr(config, name):
            setattr(config, name, value)
    tokens = config.max_new_tokens
    if tokens is not None and (not isinstance(tokens, Integral) or isinstance(tokens, bool) or tokens < 1):
        raise PalError(f"generate: max_new_tokens must be a whole number above 0, not {shortened(repr(tokens), 60)}")
    try:
        _validate(config)
        if config.stop_strings is not None:
            stop = StopStringCriteria(tokenizer, config.stop_strings)
            given["stopping_criteria"] = [*(given.get("stopping_criteria") or ()), stop]
            given.pop("stop_strings", None)
            if given.get("generation_config") is not None:
                given["generation_config"] = copy.deepcopy(given["generation_config"])
                given["generation_config"].stop_strings = None
    except (AttributeError, TypeError, ValueError) as error:
        raise PalError(f"generate: {shortened(' '.join(str(error).split()), 280)}") from None
    if ((config.num_return_sequences or 1) > 1 and not several) or config.return_dict_in_generate:
        name = "return_dict_in_generate" if config.return_dict_in_generate else "num_return_sequences"
        raise PalError(
            f"generate: '{name}' is not supported here, where each conversation has one text as its answer; use "
            "`generate` of the transformers interface"
        )
    if stream and (config.num_beams or 1) > 1:
        raise PalError("generate: num_beams cannot be used with stream=True: beam search may change earlier text")
    streamer = given.get("streamer")
    if streamer is not None and (stream or not hasattr(streamer, "put")):
        raise PalError("generate: streamer must be one of transformers', without stream=True; leave it out")
    return given


def _validate(config: GenerationConfig) -> None:
    """Let transformers check the values; raises its TypeError or ValueError."""
    from transformers.generation import logits_process as rules

    config.validate(user_set_attributes=set())
    if config.repetition_penalty not in (None, 1):
        rules.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)
    if not config.do_sample:
        return
    if config.temperature not in (None, 1):
        rules.TemperatureLogitsWarper(config.temperature)
    if config.top_k not in (None, 0):
        rules.TopKLogitsWarper(config.top_k)
    if config.top_p is not None and config.top_p < 1:
        rules.TopPLogitsWarper(config.top_p)
