"""Evaluation of the same questions under several conditions, each with different audio masks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from pal.audio import seconds
from pal.backbone.audio_mask import AudioMask
from pal.backbone.context import AudioContext
from pal.data import prompts
from pal.errors import AudioError, ConfigError
from pal.evaluate import evaluate
from pal.evaluate.answerer import evaluation_mode
from pal.evaluate.bootstrap import bootstrap_ci
from pal.evaluate.clip_cache import EncodedClipCache
from pal.lab.records import domain_of
from pal.plots import style_of
from pal.types import EncodedClip, Tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pal.data.manifest import Record
    from pal.evaluate import Result
    from pal.model import PalModel

SCORING = "exact match of greedy answers, as in pal eval"

Seen = Mapping[tuple[int, str, int], tuple[int, ...]]
"""Audio that is visible to queries: (layer, pathway, stream) -> indices of keys or of rows."""


@dataclass(frozen=True)
class Condition:
    """Audio masks under which all questions are asked once."""

    name: str
    masks: tuple[AudioMask, ...] = ()
    """Masks, applied together."""


WHOLE = Condition("nothing")
NO_AUDIO = Condition("everything", (AudioMask(),))


@dataclass(frozen=True)
class Example:
    """Example question, about the longest clip, that shows what each condition masks."""

    clips: tuple[EncodedClip, ...]
    row: Tokens
    """Conversation without its answer."""

    @classmethod
    def of(cls, model: PalModel, records: Sequence[Record], encode_clip: EncodedClipCache) -> Example:
        """The first question of the record with the longest clip.

        A mask that hides nothing of that clip hides nothing of shorter ones.

        Raises:
            ConfigError: no record has a clip.
            AudioError: the clip cannot be used.
        """
        with_clips = [record for record in records if record.clips]
        if not with_clips:
            raise ConfigError("none of the questions has a clip to mask; give other manifests")
        record = max(with_clips, key=lambda record: max(map(_length, record.clips)))
        talk = prompts.conversation_of(record, with_audio=True, style=model.config.style)
        questions = [place for place, turn in enumerate(talk) if turn["role"] == "user"]
        row = prompts.encode(model.tokenizer, talk[: questions[-1] + 1], list(range(len(record.clips))))
        with evaluation_mode(model):
            return cls(tuple(encode_clip(path) for path in record.clips), row)

    @torch.no_grad()
    def context(self, model: PalModel, condition: Condition) -> AudioContext:
        """Audio context of the example under a condition.

        Raises:
            ConfigError: the model has no such layer or stream, or its audio tokens have no times.
        """
        # with_spans records stream, clip and time of every token, even without a mask
        with model.hiding(*condition.masks, with_spans=True), evaluation_mode(model):
            audio = model.inputs(list(self.clips), [self.row]).audio_context
        assert isinstance(audio, AudioContext)
        return audio

    def seen(self, model: PalModel, condition: Condition) -> Seen:
        """Visible audio of the example under a condition."""
        return seen(self.context(model, condition))


def seen(audio: AudioContext) -> Seen:
    """Visible audio of a context's first conversation; the context was made with `with_spans`."""
    found: dict[tuple[int, str, int], tuple[int, ...]] = {}
    for keys in audio.keys:
        assert keys.token_spans is not None
        tokens = _indices(keys.mask_BA[0])
        for layer in keys.layers if tokens else ():
            found[layer, "keys", int(keys.token_spans.stream_BX[0, tokens[0]])] = tokens
    if bool(audio.audio_rows_BT[0].any()):
        assert audio.token_spans is not None
        streams_T = audio.token_spans.stream_BX[0]
        for layer in range(len(audio.llm.windows)):
            visible_T = audio.audio_rows_BT[0].clone()
            for layers, hidden_BT in audio.hidden_rows:
                if layer in layers:
                    visible_T &= ~hidden_BT[0]
            for stream in streams_T[visible_T].unique().tolist():
                found[layer, "rows", stream] = _indices(visible_T & (streams_T == stream))
    return found


def pathways(all_seen: Seen) -> list[str]:
    """Pathways with visible audio: "keys", "rows" or both."""
    return sorted({pathway for _, pathway, _ in all_seen})


@dataclass(frozen=True)
class ProbedItem:
    """Question of a masking probe."""

    id: str
    task: str
    domain: str
    clip: int
    """Index of its group; questions of a group are about the same clips."""


@dataclass(frozen=True)
class MaskedAnswers:
    """Correctness of every answer under each condition; lists are in the order of `items`."""

    items: list[ProbedItem]
    no_audio: list[bool]
    """Correctness of the answers without audio in the prompt."""
    correct: dict[str, list[bool]]
    """Condition -> correctness; conditions in `same_as` have no entry."""
    same_as: dict[str, str]
    """Condition -> earlier condition with the same effect, which was asked in its place."""
    hidden: dict[str, float]
    """Condition -> masked share of the example's audio tokens, each counted once for every layer."""
    raised: list[str] = field(default_factory=list)
    """Messages of questions that raised an error, which count as wrong."""
    seed: int = 0
    """Seed of the bootstrap."""

    def right(self, name: str) -> list[bool]:
        """Correctness of the answers under a condition."""
        return self.correct[self.same_as.get(name, name)]

    def among(self, **what: str) -> list[int]:
        """Indices of the items of a domain or a task."""
        return [i for i, item in enumerate(self.items) if all(getattr(item, k) == v for k, v in what.items())]

    def values(self, key: str) -> list[str]:
        """All domains or all tasks."""
        return sorted({getattr(item, key) for item in self.items})

    def score(self, right: Sequence[bool], items: Sequence[int] | None = None) -> tuple[float, tuple[float, float]]:
        """Accuracy over all items or some, with its interval."""
        items = range(len(self.items)) if items is None else items
        values = [float(right[i]) for i in items]
        return sum(values) / len(values), bootstrap_ci(values, self._clips(items), seed=self.seed)

    def drop(self, name: str, items: Sequence[int] | None = None) -> Drop:
        """Drop in accuracy under a condition, over all items or some."""
        items = range(len(self.items)) if items is None else items
        before = [self.right(WHOLE.name)[i] for i in items]
        after = [self.right(name)[i] for i in items]
        apart = [float(a) - float(b) for a, b in zip(before, after, strict=True)]
        return Drop(
            n=len(items),
            whole=sum(before) / len(items),
            score=sum(after) / len(items),
            drop=sum(apart) / len(items),
            ci95=bootstrap_ci(apart, self._clips(items), seed=self.seed),
            lost=sum(a and not b for a, b in zip(before, after, strict=True)),
            gained=sum(b and not a for a, b in zip(before, after, strict=True)),
        )

    def details(self) -> dict[str, Any]:
        """Every answer, for `probe.json`."""
        return {
            "items": [vars(item) for item in self.items],
            "no_audio": [int(right) for right in self.no_audio],
            "correct": {name: [int(right) for right in rights] for name, rights in self.correct.items()},
            "same_as": self.same_as,
            "raised": self.raised,
        }

    def _clips(self, items: Sequence[int]) -> list[int]:
        return [self.items[i].clip for i in items]


@dataclass(frozen=True)
class Drop:
    """Drop in accuracy under a condition, relative to the whole audio."""

    n: int
    whole: float
    """Accuracy with the whole audio."""
    score: float
    """Accuracy under the condition."""
    drop: float
    """whole - score"""
    ci95: tuple[float, float]
    """Paired bootstrap interval of the drop, over clips."""
    lost: int
    """Number of questions answered right only with the whole audio."""
    gained: int
    """Number of questions answered right only under the condition."""

    @property
    def relative(self) -> float | None:
        """The drop as a share of the accuracy with the whole audio; None if that is 0."""
        return self.drop / self.whole if self.whole else None

    @property
    def significant(self) -> bool:
        """True if the interval excludes 0."""
        return self.ci95[0] > 0 or self.ci95[1] < 0

    def points(self) -> str:
        """The drop in words, such as "12 points (8 to 16)"."""
        drop, low, high = (round(100 * share) for share in (self.drop, *self.ci95))
        return f"{drop} point{'' if abs(drop) == 1 else 's'} ({low} to {high})"


def ask(
    model: PalModel,
    records: Sequence[Record],
    conditions: Sequence[Condition],
    example: Example,
    encode_clip: EncodedClipCache,
    batch: int = 32,
    progress: bool = False,
    seed: int = 0,
) -> MaskedAnswers:
    """Ask all questions with the whole audio, without audio in the prompt, and under each condition.

    Args:
        model: the model.
        records: the questions.
        conditions: with distinct names; of those with the same effect only the first is asked.
        example: example question, to find conditions with the same effect.
        encode_clip: cache of encoded clips, shared by all conditions.
        batch: rows of a forward pass.
        progress: show a progress bar.
        seed: seed of the bootstrap.

    Raises:
        ConfigError: a condition does not fit the model; raised before any question is asked.
    """
    runs = [WHOLE, *(condition for condition in conditions if condition.name != WHOLE.name)]
    visible = {condition.name: example.seen(model, condition) for condition in runs}
    total = sum(map(len, visible[WHOLE.name].values()))
    same_as: dict[str, str] = {}
    for place, condition in enumerate(runs):
        for earlier in runs[:place]:
            if earlier.name not in same_as and _have_same_effect(earlier, condition, visible):
                same_as[condition.name] = earlier.name
                break
    # evaluated apart: `evaluate` leaves out records without choices if others have choices
    closed = [record for record in records if record.choices]
    free = [record for record in records if not record.choices]
    parts = [part for part in (closed, free) if part]
    clips: dict[tuple[str, ...], int] = {}
    correct: dict[str, list[bool]] = {}
    items: list[ProbedItem] = []
    no_audio: list[bool] = []
    raised: list[str] = []
    todo = [condition for condition in runs if condition.name not in same_as]
    for condition in tqdm(todo, unit="condition", disable=not progress, leave=False):
        first = condition.name == WHOLE.name
        with model.hiding(*condition.masks):
            results = [
                evaluate(model, part, no_audio=first, batch=batch, progress=False, features=encode_clip)
                for part in parts
            ]
        answered = [item for result in results for item in result.items]
        correct[condition.name] = [bool(item.correct) for item in answered]
        raised += [f"{condition.name}: {item.id}: {item.error}" for item in answered if item.error is not None]
        if first:
            no_audio = [bool(item.no_audio_correct) for item in answered]
            items = [item for part, one in zip(parts, results, strict=True) for item in _items(part, one, clips)]
    hidden = {name: 1 - sum(map(len, seen_audio.values())) / total for name, seen_audio in visible.items()}
    return MaskedAnswers(items, no_audio, correct, same_as, hidden, raised, seed)


def settings_of(records: Sequence[Record], asked: MaskedAnswers, batch: int) -> dict[str, Any]:
    """Settings of an evaluation, for `probe.json`."""
    text = repr([(r.id, r.dataset, r.task, r.turns, r.choices, len(r.clips)) for r in records])
    return {
        "questions": len(asked.items),
        "clips": len({item.clip for item in asked.items}),
        "questions_digest": hashlib.sha256(text.encode()).hexdigest(),
        "scoring": SCORING,
        "intervals": f"percentile bootstrap of 95 %, 2000 resamples of whole clips, paired, seed {asked.seed}",
        "seed": asked.seed,
        "batch": batch,
    }


def remarks(asked: MaskedAnswers) -> list[str]:
    """Sentences about conditions without an evaluation of their own, and about errors."""
    nothing = [name for name, other in asked.same_as.items() if other == WHOLE.name]
    again = [f"'{name}' as '{other}'" for name, other in asked.same_as.items() if other != WHOLE.name]
    sentences = [f"Masks without effect on this model: {', '.join(nothing)}."] if nothing else []
    sentences += [f"Masks with the same effect, evaluated once: {', '.join(again)}."] if again else []
    if asked.raised:
        sentences.append(
            f"{len(asked.raised)} answers raised an error and count as wrong; the first: {asked.raised[0]}."
        )
    return sentences


def errors(value: Sequence[float], ends: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Error bars for matplotlib: distances from each value to the lower and upper end of its interval."""
    below = [max(0.0, v - low) for v, (low, _) in zip(value, ends, strict=True)]
    above = [max(0.0, high - v) for v, (_, high) in zip(value, ends, strict=True)]
    return [below, above]


def lines(axes: Axes, x: Sequence[float], series: Mapping[str, Sequence[tuple[float, tuple[float, float]]]]) -> None:
    """Plot a line with intervals for each series, slightly shifted against each other."""
    step = 0.06 * min((b - a for a, b in zip(sorted(x), sorted(x)[1:], strict=False) if b > a), default=1.0)
    for place, (name, points) in enumerate(series.items()):
        values = [value for value, _ in points]
        shifted = [at + (place - (len(series) - 1) / 2) * step for at in x]
        bars = errors(values, [ends for _, ends in points])
        axes.errorbar(
            shifted, values, yerr=bars, capsize=3, lw=2 if name == "all" else 1.2, label=name, **style_of(place)
        )
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _items(records: Sequence[Record], result: Result, clips: dict[tuple[str, ...], int]) -> list[ProbedItem]:
    of_item = [record for record in records for _ in record.turns]
    return [
        ProbedItem(item.id, record.task or "all", domain_of(record), clips.setdefault(record.clips, len(clips)))
        for record, item in zip(of_item, result.items, strict=True)
    ]


def _have_same_effect(one: Condition, other: Condition, visible: Mapping[str, Seen]) -> bool:
    """True if two conditions mask the same audio in every clip. For time spans the example alone does not show it."""
    if visible[one.name] != visible[other.name]:
        return False
    times = [{(mask.seconds, mask.share) for mask in condition.masks} for condition in (one, other)]
    return not one.masks or times[0] == times[1]


def _indices(chosen_X: torch.Tensor) -> tuple[int, ...]:
    return tuple(chosen_X.nonzero().flatten().tolist())


def _length(path: str) -> float:
    try:
        return seconds(path)
    except AudioError:
        return 0.0
