"""Batched inference over the items of a benchmark, in batches that share clips, with and without audio."""

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
from pal.data.prompts import PLAIN, PromptStyle
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
"""Margin between two logits below which round-off could decide an answer. The other questions of a batch change logits
by at most 1.4e-5 in the shipped model and 1e-4 in layers of full width (float32). In half precision the margin is a
compromise, since logits themselves are coarse, so answers may depend on the batch."""

RawAnswer = tuple[int, str, str | None]
"""(index of the item among the questions, raw answer, error or None)."""


@dataclass(frozen=True)
class ItemPrompt:
    """Prompts of an item, with and without audio; both end with the item's question."""

    item: Item
    with_audio: Conversation
    """Conversation with reference answers in earlier turns."""
    without_audio: Conversation
    """Conversation without the placeholders of clips."""

    @classmethod
    def of(cls, item: Item, style: PromptStyle = PLAIN) -> ItemPrompt:
        """Prompts of an item in a model's style."""
        turns = (*item.before, Turn(item.prompt, ""))
        record = Record(item.id, item.clips, turns, "", "", item.choices)
        return cls(
            item,
            prompts.conversation_of(record, with_answers=False, style=style),
            prompts.conversation_of(record, with_audio=False, with_answers=False, style=style),
        )

    def shown(self, model: PalModel) -> str:
        """Rendered prompt with `<audio>` for each clip."""
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
    """Batched inference over questions, in batches that share clips.

    An answer does not depend on the other items of its batch: if the margin between the best and the second-best is
    within round-off, the item is answered again alone.

    Args:
        model: in evaluation mode (see `evaluation_mode`).
        ranked: answer with the choice of highest log-likelihood instead of generating.
        batch: maximum number of rows of a forward pass; each ranked choice is a row.
        max_new_tokens: maximum length of a generated answer.
        features: function from the path of a clip to its features, encoded alone; default: run the encoders.
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
        """Path -> encoded clip."""
        self._margin = _MARGINS.get(model.llm.dtype, _MARGIN_OF_HALF)

    def ask(self, questions: Sequence[ItemPrompt], with_audio: bool, progress: bool = False) -> Iterator[RawAnswer]:
        """Yield one answer for each item, in any order. An item that raised has an empty answer and an error."""
        return self._with_audio(questions, progress) if with_audio else self._without_audio(questions, progress)

    def _with_audio(self, questions: Sequence[ItemPrompt], progress: bool) -> Iterator[RawAnswer]:
        by_clips: dict[tuple[str, ...], list[int]] = {}
        for index, one in enumerate(questions):
            by_clips.setdefault(one.item.clips, []).append(index)
        lengths = {clips: _seconds(clips) for clips in by_clips}
        # Clips of similar length share a batch, for little padding; the slowest batch comes first,
        # so that a lack of memory shows at once.
        longest_first = sorted(by_clips, key=lengths.__getitem__, reverse=True)
        order = [index for clips in longest_first for index in by_clips[clips]]
        batches = self._batches(order, questions, lambda index: lengths[questions[index].item.clips])
        yield from self._run(batches, lambda part: self._answer([questions[i] for i in part]), progress, "audio")

    def _without_audio(self, questions: Sequence[ItemPrompt], progress: bool) -> Iterator[RawAnswer]:
        """Like `_with_audio`, but equal questions about different clips are answered only once."""
        same: dict[str, list[int]] = {}
        for index, one in enumerate(questions):
            same.setdefault(repr((one.without_audio, self._choices(one))), []).append(index)
        unique = sorted((indices[0] for indices in same.values()), key=lambda i: len(repr(questions[i].without_audio)))
        duplicates = {indices[0]: indices for indices in same.values()}

        def answer(part: list[int]) -> list[str]:
            return self._answer([questions[i] for i in part], no_audio=True)

        for first, text, error in self._run(self._batches(unique, questions), answer, progress, "no audio"):
            for index in duplicates[first]:
                yield index, text, error

    def _choices(self, one: ItemPrompt) -> tuple[str, ...] | None:
        return one.item.choices if self.ranked else None

    def _batches(
        self, order: Sequence[int], questions: Sequence[ItemPrompt], length: Callable[[int], float] = lambda index: 0.0
    ) -> list[list[int]]:
        """Split `order`, longest first, into batches of at most `batch` rows; an item with more choices is a batch.

        No clip is shorter than half the longest clip of its batch, which limits padding.
        """
        batches: list[list[int]] = []
        rows = self.batch
        for index in order:
            cost = len(self._choices(questions[index]) or (None,))
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

    def _answer(self, questions: Sequence[ItemPrompt], no_audio: bool = False) -> list[str]:
        """Raw answer of each item, in one batch."""
        places: dict[str, int] = {}
        if not no_audio:
            for one in questions:
                for path in one.item.clips:
                    places.setdefault(path, len(places))
        clips = [self.clip(path) for path in places]
        spans = [[] if no_audio else [places[path] for path in one.item.clips] for one in questions]
        conversations = [one.without_audio if no_audio else one.with_audio for one in questions]
        tokenizer = self.model.tokenizer
        alone = len(questions) == 1
        if not self.ranked:
            rows = [
                prompts.encode(tokenizer, conversation, of_row)
                for conversation, of_row in zip(conversations, spans, strict=True)
            ]
            if alone:
                return self.model.generate(clips, rows, max_new_tokens=self.max_new_tokens)
            close_tokens = _CloseTokens(len(rows), prompts.end_of_answer(tokenizer), self._margin)
            texts = self.model.generate(
                clips, rows, max_new_tokens=self.max_new_tokens, logits_processor=[close_tokens]
            )
            return self._rerun_close(questions, texts, close_tokens.close_B.tolist(), no_audio)
        rows = [
            prompts.encode(tokenizer, [*conversation, {"role": "assistant", "content": choice}], of_row, train=True)
            for one, conversation, of_row in zip(questions, conversations, spans, strict=True)
            for choice in one.item.choices or ()
        ]
        scores = self.model.answer_scores(clips, rows).tolist()
        tokens = [sum(label != IGNORE for label in row.labels or ()) for row in rows]
        answers, close = [], []
        for one in questions:
            choices = one.item.choices or ()
            own, scores = scores[: len(choices)], scores[len(choices) :]
            longest, tokens = max(tokens[: len(choices)]), tokens[len(choices) :]
            answers.append(best_choice(own, choices))
            close.append(not alone and _is_close(own, longest * self._margin))
        return self._rerun_close(questions, answers, close, no_audio)

    def _rerun_close(
        self, questions: Sequence[ItemPrompt], answers: list[str], close: Sequence[bool], no_audio: bool
    ) -> list[str]:
        """The answers, with close ones recomputed alone."""
        return [
            self._answer([one], no_audio)[0] if is_close else answer
            for one, answer, is_close in zip(questions, answers, close, strict=True)
        ]


def best_choice(scores: Sequence[float], choices: Sequence[str]) -> str:
    """The choice of highest log-likelihood, the first of equal ones. NaN counts as lowest."""
    assert len(scores) == len(choices) and len(choices) > 0
    values = np.asarray(scores, dtype=float)
    return choices[int(np.argmax(np.where(np.isnan(values), -np.inf, values)))]


@contextmanager
def evaluation_mode(model: PalModel) -> Iterator[None]:
    """Set evaluation mode in the block, and restore the mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _CloseTokens:
    """Logits processor without effect that records the rows in which round-off could have chosen a token.

    The record stays on the device until the answers are complete.
    """

    read_only = True

    def __init__(self, rows: int, ends: Sequence[int], margin: float) -> None:
        self.ends_X = torch.tensor(ends, dtype=torch.long)
        self.margin = margin
        self.close_B = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, ids_BN: Tensor, logits_BV: Tensor) -> Tensor:
        self.ends_X, self.close_B = (x.to(logits_BV.device) for x in (self.ends_X, self.close_B))
        best_B2 = logits_BV.float().topk(2).values
        ended_B = (ids_BN[:, :, None] == self.ends_X).flatten(1).any(1)
        # not <=, which is False for NaN
        self.close_B |= ~ended_B & ~(best_B2[:, 0] - best_B2[:, 1] > self.margin)
        return logits_BV


def _is_close(scores: Sequence[float], margin: float) -> bool:
    """True if the best two scores are within `margin`."""
    best = sorted(scores)[-2:]
    return len(best) == 2 and not best[1] - best[0] > margin


def _one_by_one_on_error(part: list[int], answer: Callable[[list[int]], list[str]]) -> Iterable[RawAnswer]:
    """Answer a batch; if it raises, answer each item alone, so that a bad clip fails only its item."""
    try:
        return [(index, text, None) for index, text in zip(part, answer(part), strict=True)]
    except Exception as error:  # an item's error is reported and does not end the evaluation
        if len(part) == 1:
            return [(part[0], "", f"{type(error).__name__}: {error}")]
    return [result for index in part for result in _one_by_one_on_error([index], answer)]


def _seconds(clips: Sequence[str]) -> float:
    """Length of the clips by their headers; 0 if one is unreadable, an error that its item reports."""
    try:
        return sum(seconds(clip) for clip in clips)
    except AudioError:
        return 0.0


def _decode(model: PalModel, ids: list[int]) -> str:
    decoded: Any = model.tokenizer.decode(ids, skip_special_tokens=False)
    return str(decoded)
