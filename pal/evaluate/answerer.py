"""Asks a model the items of a benchmark, in batches that share clips, with their audio and without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pal.audio import seconds
from pal.data import prompts
from pal.data.manifest import PLACEHOLDER, Record, Turn
from pal.errors import AudioError
from pal.evaluate.clip_cache import EncodedClipCache
from pal.evaluate.items import Item
from pal.types import IGNORE

if TYPE_CHECKING:
    from pal.data.prompts import Conversation
    from pal.model import PalModel
    from pal.types import EncodedClip

_MARGINS = {torch.float64: 1e-10, torch.float32: 4e-4}
_MARGIN_OF_HALF = 0.5
"""Between the logits of two tokens, more than what they change by in batches of other questions: the shipped model's
change by 1.4e-5 at most, layers of full width by 1e-4. In half precision a logit's own steps are coarser than many
margins, so this is a compromise there, and answers may depend on the batch."""

RawAnswer = tuple[int, str, str | None]
"""Index of the item among those that were asked, the answer as the model gave it, and why there is none."""


@dataclass(frozen=True)
class ItemPrompt:
    """An item as the conversations that the model is given; both end with the item's question."""

    item: Item
    with_audio: Conversation
    """Earlier turns carry their reference answers."""
    without_audio: Conversation
    """The same without placeholders of clips."""

    @classmethod
    def of(cls, item: Item, system: str | None = None) -> ItemPrompt:
        """The conversations of an item, with a system message where there is one."""
        turns = (*item.before, Turn(item.prompt, ""))
        record = Record(item.id, item.clips, turns, "", "", item.choices)
        return cls(
            item,
            prompts.conversation_of(record, with_answers=False, system=system),
            prompts.conversation_of(record, with_audio=False, with_answers=False, system=system),
        )

    def shown(self, model: PalModel) -> str:
        """The conversation as the LLM gets it, with `<audio>` where the clips stand."""
        tokens = prompts.encode(model.tokenizer, self.with_audio, list(range(len(self.item.clips))))
        text = ""
        run: list[int] = []
        for token in tokens.ids:
            if token < 0:
                text += _decode(model, run) + PLACEHOLDER
                run = []
            else:
                run.append(token)
        return text + _decode(model, run)


class Answerer:
    """Turns items into raw answers, in batches that share clips.

    An answer does not depend on which items it was asked with: where a batch leaves so little between the best and
    the second-best that round-off could decide, the item is asked again alone.

    Args:
        model: in evaluation mode (see `evaluation_mode`).
        ranked: take the likeliest of an item's choices instead of generating.
        batch: rows in a forward pass; a choice that is ranked is a row.
        max_new_tokens: of a generated answer.
        features: gives a clip's encoder features, made of it alone; without it they are run.
    """

    def __init__(
        self,
        model: PalModel,
        ranked: bool,
        batch: int,
        max_new_tokens: int,
        features: Callable[[str], EncodedClip] | None,
    ) -> None:
        self.model = model
        self.ranked = ranked
        self.batch = batch
        self.max_new_tokens = max_new_tokens
        self.clip: Callable[[str], EncodedClip] = features or EncodedClipCache(model)
        """What the model takes of an audio file."""
        self._margin = _MARGINS.get(model.llm.dtype, _MARGIN_OF_HALF)

    def ask(self, asked: Sequence[ItemPrompt], with_audio: bool, progress: bool = False) -> Iterator[RawAnswer]:
        """Yields one answer for each item, in any order. One that raised has an empty answer and says why."""
        return self._with_audio(asked, progress) if with_audio else self._without_audio(asked, progress)

    def _with_audio(self, asked: Sequence[ItemPrompt], progress: bool) -> Iterator[RawAnswer]:
        by_clips: dict[tuple[str, ...], list[int]] = {}
        for index, one in enumerate(asked):
            by_clips.setdefault(one.item.clips, []).append(index)
        lengths = {clips: _seconds(clips) for clips in by_clips}
        # Clips of like length lie in one batch: little padding, and the slowest batch comes first,
        # where it shows at once if memory does not suffice.
        longest_first = sorted(by_clips, key=lengths.__getitem__, reverse=True)
        order = [index for clips in longest_first for index in by_clips[clips]]
        batches = self._batches(order, asked, lambda index: lengths[asked[index].item.clips])
        yield from self._run(batches, lambda part: self._answer([asked[i] for i in part]), progress, "audio")

    def _without_audio(self, asked: Sequence[ItemPrompt], progress: bool) -> Iterator[RawAnswer]:
        """As `_with_audio`; a question that comes again about another clip is asked once."""
        same: dict[str, list[int]] = {}
        for index, one in enumerate(asked):
            same.setdefault(repr((one.without_audio, self._choices(one))), []).append(index)
        firsts = sorted((indices[0] for indices in same.values()), key=lambda i: len(repr(asked[i].without_audio)))
        twins = {indices[0]: indices for indices in same.values()}

        def answer(part: list[int]) -> list[str]:
            return self._answer([asked[i] for i in part], no_audio=True)

        for first, text, error in self._run(self._batches(firsts, asked), answer, progress, "no audio"):
            for index in twins[first]:
                yield index, text, error

    def _choices(self, one: ItemPrompt) -> tuple[str, ...] | None:
        return one.item.choices if self.ranked else None

    def _batches(
        self, order: Sequence[int], asked: Sequence[ItemPrompt], length: Callable[[int], float] = lambda index: 0.0
    ) -> list[list[int]]:
        """Cut `order`, longest first, so that no batch has more rows than `batch`, except by one item's choices,
        and none a clip shorter than half its longest: one long recording would pad all others to its length."""
        batches: list[list[int]] = []
        rows = self.batch
        for index in order:
            cost = len(self._choices(asked[index]) or (None,))
            if rows + cost > self.batch or length(index) < length(batches[-1][0]) / 2:
                batches.append([])
                rows = 0
            batches[-1].append(index)
            rows += cost
        return batches

    def _run(
        self, batches: list[list[int]], answer: Callable[[list[int]], list[str]], progress: bool, what: str
    ) -> Iterator[RawAnswer]:
        with tqdm(total=sum(map(len, batches)), desc=what, unit="question", disable=not progress, leave=False) as bar:
            for part in batches:
                yield from _one_by_one_on_error(part, answer)
                bar.update(len(part))

    def _answer(self, asked: Sequence[ItemPrompt], no_audio: bool = False) -> list[str]:
        """One raw answer an item."""
        places: dict[str, int] = {}
        if not no_audio:
            for one in asked:
                for path in one.item.clips:
                    places.setdefault(path, len(places))
        clips = [self.clip(path) for path in places]
        spans = [[] if no_audio else [places[path] for path in one.item.clips] for one in asked]
        talks = [one.without_audio if no_audio else one.with_audio for one in asked]
        tokenizer = self.model.tokenizer
        alone = len(asked) == 1
        if not self.ranked:
            rows = [prompts.encode(tokenizer, talk, of_row) for talk, of_row in zip(talks, spans, strict=True)]
            if alone:
                return self.model.generate(clips, rows, max_new_tokens=self.max_new_tokens)
            watch = _CloseTokens(len(rows), prompts.end_of_answer(tokenizer), self._margin)
            texts = self.model.generate(clips, rows, max_new_tokens=self.max_new_tokens, logits_processor=[watch])
            return self._surely(asked, texts, watch.close_B.tolist(), no_audio)
        rows = [
            prompts.encode(tokenizer, [*talk, {"role": "assistant", "content": choice}], of_row, train=True)
            for one, talk, of_row in zip(asked, talks, spans, strict=True)
            for choice in one.item.choices or ()
        ]
        scores = self.model.answer_scores(clips, rows).tolist()
        tokens = [sum(label != IGNORE for label in row.labels or ()) for row in rows]
        answers, close = [], []
        for one in asked:
            choices = one.item.choices or ()
            own, scores = scores[: len(choices)], scores[len(choices) :]
            longest, tokens = max(tokens[: len(choices)]), tokens[len(choices) :]
            answers.append(best_choice(own, choices))
            close.append(not alone and _near(own, longest * self._margin))
        return self._surely(asked, answers, close, no_audio)

    def _surely(
        self, asked: Sequence[ItemPrompt], answers: list[str], close: Sequence[bool], no_audio: bool
    ) -> list[str]:
        """The answers, those of close items as they are alone."""
        return [
            self._answer([one], no_audio)[0] if doubtful else answer
            for one, answer, doubtful in zip(asked, answers, close, strict=True)
        ]


def best_choice(scores: Sequence[float], choices: Sequence[str]) -> str:
    """The choice with the highest log-likelihood; the first of equals. NaN never wins."""
    assert len(scores) == len(choices) and len(choices) > 0
    values = np.asarray(scores, dtype=float)
    return choices[int(np.argmax(np.where(np.isnan(values), -np.inf, values)))]


@contextmanager
def evaluation_mode(model: PalModel) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _CloseTokens:
    """A logits processor that changes nothing and notes the rows in which round-off could have chosen a token.

    What it notes stays on the device until the answers are complete.
    """

    read_only = True

    def __init__(self, rows: int, ends: Sequence[int], margin: float) -> None:
        self.ends_X = torch.tensor(ends, dtype=torch.long)
        self.margin = margin
        self.close_B = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, said_BN: Tensor, logits_BV: Tensor) -> Tensor:
        self.ends_X, self.close_B = (x.to(logits_BV.device) for x in (self.ends_X, self.close_B))
        best_B2 = logits_BV.float().topk(2).values
        ended_B = (said_BN[:, :, None] == self.ends_X).flatten(1).any(1)
        # not <=, which a NaN would pass
        self.close_B |= ~ended_B & ~(best_B2[:, 0] - best_B2[:, 1] > self.margin)
        return logits_BV


def _near(scores: Sequence[float], margin: float) -> bool:
    """Whether the best two are no further apart."""
    best = sorted(scores)[-2:]
    return len(best) == 2 and not best[1] - best[0] > margin


def _one_by_one_on_error(part: list[int], answer: Callable[[list[int]], list[str]]) -> Iterable[RawAnswer]:
    """Answers of a batch; when it raises, of its items alone, so that one bad clip costs one item."""
    try:
        return [(index, text, None) for index, text in zip(part, answer(part), strict=True)]
    except Exception as error:  # any fault of an item belongs in the report, not in a lost evaluation
        if len(part) == 1:
            return [(part[0], "", f"{type(error).__name__}: {error}")]
    return [result for index in part for result in _one_by_one_on_error([index], answer)]


def _seconds(clips: Sequence[str]) -> float:
    """Length of the clips by their headers; 0 where one cannot be read, which its item will report."""
    try:
        return sum(seconds(clip) for clip in clips)
    except AudioError:
        return 0.0


def _decode(model: PalModel, ids: list[int]) -> str:
    decoded: Any = model.tokenizer.decode(ids, skip_special_tokens=False)
    return str(decoded)
