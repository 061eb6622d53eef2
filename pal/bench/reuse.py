"""`pal bench --preset reuse`: several questions on one clip, with and without sharing what they have in common.

A conversation is some text, the clip, and a question. With sharing, text and clip are read once for all questions
(`pal.backbone.shared_prefix`, and packed rows in training); without, each conversation has a clip of its own, in one
batch. All variants are measured both ways, PLITS, too, whose shared prefix is its clip's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from pal.backbone.cache import JointCache
from pal.backbone.generate import ReadPrefixes
from pal.backbone.llm import Backbone
from pal.backbone.prefill import prepared, read_prompts
from pal.backbone.shared_prefix import Continuations, SharedPrefixCache
from pal.bench.machine import machine_facts, product_rate
from pal.bench.measure import counts, quick_collection, round_seconds
from pal.bench.models import AttachedModel, attached_to
from pal.bench.place import training
from pal.bench.presets import LLAMA_1B, SMALL
from pal.config import StrictConfig, parse
from pal.errors import ConfigError
from pal.memory import give_back_freed_memory, keep_freed_memory
from pal.types import AUDIO, IGNORE, AudioFeatures, LLMInputs, Tokens

ReuseVariant = Literal["text", "plits", "lal", "lal_third", "pal", "flamingo"]
ReusePhase = Literal["answers", "again", "train"]
"""`answers`: from the clip's features to the end of all answers. `again`: further questions on a clip that has been
read, to their first tokens. `train`: a training step."""


class ReusePreset(StrictConfig):
    """One benchmark of several questions on a clip."""

    name: str
    shape: str
    """Description of the LLM."""
    llm: dict[str, Any]
    width: int = Field(gt=0)
    """Width E of the features, and of the layer inside each projector."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    variants: tuple[ReuseVariant, ...] = ("text", "plits", "lal", "pal")
    phases: tuple[ReusePhase, ...] = get_args(ReusePhase)
    audio_tokens: int = Field(default=1500, ge=1)
    questions: tuple[int, ...] = Field(default=(1, 4, 16, 64), min_length=1)
    before: int = Field(default=16, ge=1)
    """Text tokens before the clip."""
    question: int = Field(default=32, ge=2)
    """Text tokens of a question."""
    answer: int = Field(default=8, ge=1)
    """Tokens of an answer: generated, or trained."""
    most_rows: int = Field(default=8192, ge=1)
    """Rows of the LLM's sequences above which a variant is left out without sharing, or in training."""
    repeats: int = Field(default=3, ge=0)
    """Timed rounds; 0 times nothing."""


PRESETS = {
    preset.name: preset
    for preset in (
        ReusePreset(
            name="reuse",
            shape="Llama-3.2-1B cut to 4 layers",
            llm={**LLAMA_1B, "num_hidden_layers": 4},
            width=768,
        ),
        ReusePreset(
            name="reuse-small",
            shape="4 layers of 32",
            llm=SMALL,
            width=16,
            audio_tokens=150,
            questions=(1, 4, 16),
            repeats=0,
        ),
    )
}


def preset_of(name: str, **changes: Any) -> ReusePreset:
    """A preset by name, with some of its fields changed; what is None stays.

    Raises:
        ConfigError: a value that a field does not take.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    found = parse(ReusePreset, {**PRESETS[name].model_dump(), **given}, where="bench")
    if min(found.questions) < 1:
        raise ConfigError("bench: numbers of questions count from 1")
    return found


@dataclass(frozen=True)
class ReuseMeasurement:
    """Cost of one variant in one phase for some questions on a clip."""

    variant: str
    shared: bool
    phase: ReusePhase
    questions: int
    seconds: float | None
    """Median; None where nothing was timed."""
    seconds_spread: float | None
    """Distance between the quartiles."""
    flops: int
    peak_bytes: int
    """The most at once above what was there before."""
    kv_bytes: int
    """Keys and values at the end of prefill, audio and text, without room for later ones; 0 in training."""


@dataclass
class ReuseResult:
    """Result of a run."""

    preset: ReusePreset
    machine: dict[str, Any]
    rows: list[ReuseMeasurement] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    """Whether the run was stopped; its rows are complete all the same."""

    def seconds(self, variant: str, shared: bool, phase: ReusePhase, questions: int) -> float | None:
        """Median seconds of a row; None if there is none."""
        about = (variant, shared, phase, questions)
        found = [row for row in self.rows if (row.variant, row.shared, row.phase, row.questions) == about]
        return found[0].seconds if found else None


def run(
    preset: ReusePreset, progress: bool = False, keep: Callable[[ReuseResult], object] = lambda result: None
) -> ReuseResult:
    """Measure everything in a preset, with random weights. Ctrl-C ends it with the rows so far.

    Args:
        preset: what to measure.
        progress: whether to draw a bar.
        keep: called with the result so far after each phase and number of questions.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, preset.dtype)
    facts = machine_facts("cpu")
    result = ReuseResult(preset, facts)
    if preset.repeats:
        keep_freed_memory()
        facts["product_flops_per_second"] = product_rate(torch.device("cpu"), dtype)
    llm = Backbone.load(preset.llm, dtype=dtype).eval().requires_grad_(False)
    models = [attached_to(name, llm, preset.width, torch.device("cpu"), dtype) for name in preset.variants]
    for model in models:
        for parameter in model.weights():
            parameter.requires_grad_(False)
    places = [(phase, count) for phase in preset.phases for count in preset.questions]
    with quick_collection(), tqdm(places, desc="bench", disable=None if progress else True) as bar:
        try:
            for phase, count in bar:
                bar.set_postfix_str(f"{phase}, {count} questions")
                _measure(preset, models, phase, count, result)
                keep(result)
                give_back_freed_memory()
        except KeyboardInterrupt:
            result.interrupted = True
    return result


def _measure(
    preset: ReusePreset, models: list[AttachedModel], phase: ReusePhase, count: int, result: ReuseResult
) -> None:
    steps: dict[str, Callable[[], object]] = {}
    found: dict[str, tuple[AttachedModel, bool, Any, int]] = {}
    for model in models:
        for shared in (True, False):
            if (phase == "again" and not shared) or (phase == "train" and shared and not model.routes()):
                continue  # nothing is kept; in training, only clips are shared
            name = f"{model.name} {shared}"
            made = _Steps(preset, model, count, shared)
            if (rows := made.rows()) > preset.most_rows:
                why = f"{rows:,} rows of the sequences, above {preset.most_rows:,}"
                about = {"variant": model.name, "shared": shared, "phase": phase, "questions": count, "why": why}
                result.left_out.append(about)
                continue
            step = {"answers": made.answers, "again": made.again, "train": made.train}[phase]
            kv = 0 if phase == "train" else made.kv_bytes()
            if phase == "again":
                made.again()  # reads the clip
            found[name] = (model, shared, counts(step), kv)
            steps[name] = step
    timed = round_seconds(steps, preset.repeats, "cpu") if preset.repeats and steps else {}
    for name, (model, shared, counted, kv) in found.items():
        seconds = timed.get(name)
        result.rows.append(
            ReuseMeasurement(
                variant=model.name,
                shared=shared,
                phase=phase,
                questions=count,
                seconds=None if seconds is None else seconds.median,
                seconds_spread=None if seconds is None else seconds.spread,
                flops=counted.flops,
                peak_bytes=counted.peak_bytes,
                kv_bytes=kv,
            )
        )


_GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class _Steps:
    """What is measured of one variant: `count` questions on one clip.

    Args:
        preset: sizes.
        model: the variant.
        count: number of questions.
        shared: they share what they have in common.
    """

    def __init__(self, preset: ReusePreset, model: AttachedModel, count: int, shared: bool) -> None:
        self.preset, self.model, self.llm, self.shared = preset, model, model.llm, shared
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, preset.dtype)
        x_1AE = torch.randn(1, preset.audio_tokens, preset.width, generator=generator).to(dtype)
        clips = 1 if shared else count
        features = AudioFeatures(x_1AE.repeat(clips, 1, 1), (preset.audio_tokens,) * clips, 0.04)
        self.features = features if model.routes() else None
        text = torch.randint(
            3, self.llm.vocab, (count, preset.before + preset.question + preset.answer), generator=generator
        )
        before, *_ = texts = text.tolist()
        clip = [AUDIO] if model.routes() else []
        ends = [row[preset.before :] for row in texts]
        self.heads = [*before[: preset.before], *clip]
        self.questions = [row[: preset.question] for row in ends]
        self.trained = [
            Tokens(
                [*self.heads, *row],
                [0 if shared else number] * len(clip),
                [IGNORE] * (len(self.heads) + preset.question) + row[preset.question :],
            )
            for number, row in enumerate(ends)
        ]
        self._read: ReadPrefixes | None = None

    @property
    def prompts(self) -> list[Tokens]:
        """Conversations up to their answers."""
        clips = [[0 if self.shared else number] * (AUDIO in self.heads) for number in range(len(self.questions))]
        return [Tokens([*self.heads, *ids], of_row) for ids, of_row in zip(self.questions, clips, strict=True)]

    @torch.inference_mode()
    def rows(self) -> int:
        """Rows of the LLM's sequences: text, and the clip's where the variant has any."""
        prefix = self._head_inputs().inputs_embeds_BTD.shape[1]
        questions = len(self.questions)
        return prefix * (1 if self.shared else questions) + questions * (self.preset.question + self.preset.answer)

    @torch.inference_mode()
    def answers(self) -> Tensor:
        """All answers, from features."""
        options: dict[str, Any] = {**_GREEDY, "max_new_tokens": self.preset.answer}
        if self.shared:
            return self.llm.generate_after(self._prefix(), self._continuations(), **options)
        return self.llm.generate(self.model.integration(self.features, self.prompts, self.llm, "left"), **options)

    @torch.inference_mode()
    def again(self) -> Tensor:
        """First tokens of further questions, on a clip that has been read."""
        if self._read is None:
            self._read = self._prefix()
        return self.llm.generate_after(self._read, self._continuations(), **_GREEDY, max_new_tokens=1)

    def train(self) -> None:
        """A step of the joint stage, without the optimizer."""
        self.llm.shares_prefixes = self.shared
        try:
            with training(self.model, "joint"):
                inputs = self.model.integration(self.features, self.trained, self.llm, "any")
                total, tokens = self.llm.loss(inputs)
                (total / tokens).backward()
        finally:
            self.llm.shares_prefixes = True

    @torch.inference_mode()
    def kv_bytes(self) -> int:
        """Bytes of keys and values after prefill."""
        if not self.shared:
            inputs = self.model.integration(self.features, self.prompts, self.llm, "left")
            cache = prepared(self.llm, inputs, room=1)
            read_prompts(self.llm, cache, inputs)
            return _used(cache)
        read = self._prefix()
        own = SharedPrefixCache(read.cache, self._continuations(), room=0)
        ids_RT, positions_RT = self._continuations().rows(read.last_U)
        self.llm.lm(input_ids=ids_RT, position_ids=positions_RT, past_key_values=own, use_cache=True, logits_to_keep=1)
        return _used(read.cache) + sum(x.nbytes for store in own.stores for x in (store.keys, store.values))

    def _continuations(self) -> Continuations:
        return Continuations((len(self.questions),), tuple(self.questions))

    def _prefix(self) -> ReadPrefixes:
        read = self.llm.read_prefixes(self._head_inputs(), self.preset.question + self.preset.answer)
        assert read is not None, "a preset's LLM has no sliding windows"
        return read

    def _head_inputs(self) -> LLMInputs:
        head = Tokens(self.heads, [0] * (AUDIO in self.heads))
        return self.model.integration(self.features, [head], self.llm, "left")


def _used(cache: JointCache) -> int:
    """Bytes of keys and values of prompts, without room for later rows."""
    stores = [(x, store.prompt) for store in cache.stores for x in (store.keys, store.values)]
    crossed = [pair for layer in range(len(cache.stores)) for *_, k, v in cache.crossing(layer) for pair in (k, v)]
    return sum(x.nbytes // x.shape[2] * rows for x, rows in stores) + sum(x.nbytes for x in crossed)
