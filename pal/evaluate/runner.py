"""Runs a model over a manifest: every question with its audio, and again without it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from pal.audio import load, seconds
from pal.data import prompts
from pal.data.manifest import PLACEHOLDER, Record, Turn
from pal.errors import AudioError, ManifestError, PalError
from pal.evaluate.figures import INTERVALS, RESAMPLES
from pal.evaluate.items import Item, each_turn
from pal.evaluate.score import Accuracy, ItemResult, Score
from pal.evaluate.scorers import NORMALISATION, best_choice, exact_match
from pal.types import IGNORE

if TYPE_CHECKING:
    from pal.data.manifest import Manifest
    from pal.data.prompts import Conversation
    from pal.model import PalModel
    from pal.types import Heard

Scoring = Literal["exact", "rank"]

_MARGINS = {torch.float64: 1e-10, torch.float32: 4e-4}
_MARGIN_OF_HALF = 0.5
"""Between the logits of two tokens, more than what they change by in batches of other questions: the shipped model's
change by 1.4e-5 at most, layers of full width by 1e-4. In half precision a logit's own steps are coarser than many
margins, so this is a compromise there, and answers may depend on the batch."""


@dataclass(frozen=True)
class Question:
    """One question of a record, with everything that comes before it in the conversation."""

    id: str
    clips: tuple[str, ...]
    question: str
    reference: str
    task: str
    choices: tuple[str, ...] | None
    heard: Conversation
    """Ends with the question; earlier turns carry their reference answers."""
    unheard: Conversation
    """The same without placeholders."""


def evaluate(
    model: PalModel,
    manifest: Manifest | Sequence[Record],
    scoring: Scoring = "exact",
    no_audio: bool = True,
    limit: int | None = None,
    batch: int = 32,
    progress: bool = True,
    *,
    max_new_tokens: int = 32,
    benchmark: str | None = None,
    seed: int = 0,
    features: Callable[[str], Heard] | None = None,
    options: dict[str, Any] | None = None,
) -> Score:
    """Answer every question of `manifest` and score the answers.

    Args:
        model: the model; it is put in evaluation mode for the while.
        manifest: records; each turn is one item, with the earlier turns' reference answers before it.
        scoring: "exact" generates greedily and compares after `scorers.normalise`; "rank" takes the
            choice with the highest summed log-likelihood (including the end of the turn); of several
            turns the last, which the choices belong to. Records without choices, such as captions,
            are left out where others have some; `settings` says how many.
        no_audio: also ask the same model every question without its audio.
        limit: only the first so many questions.
        batch: rows in a forward pass. Questions about one clip share the clip's encoding.
        progress: show a bar with the time left.
        max_new_tokens: of an answer.
        benchmark: the name in the score; the manifest's file name without it.
        seed: of the bootstrap.
        features: gives a clip as the model's encoders hear it, such as a `pal.features.FeatureCache`; without
            it they are run.
        options: how the benchmark was made, for the record.

    Returns:
        The score, with every raw answer. An item that raised counts as wrong and says why.

    Raises:
        ManifestError: no questions, or none with choices when scoring by rank.
        PalError: every single item raised.
    """
    started = time.perf_counter()
    questions = _questions(manifest, scoring, limit, model.config.system)
    free = sum(not record.choices for record in manifest)
    answer = Answerer(model, scoring, batch, max_new_tokens, features)
    items = [ItemResult(q.id, q.question, q.reference, task=q.task, group="\n".join(q.clips)) for q in questions]
    with evaluation_mode(model), torch.no_grad():
        for index, text, error in answer.with_audio(questions, progress):
            items[index].prediction, items[index].error = text, error
            items[index].correct = error is None and exact_match(text, questions[index].reference)
        if all(item.error is not None for item in items):
            raise PalError(f"none of {len(items)} questions could be answered; the first: {items[0].error}")
        if no_audio:
            for index, text, error in answer.without_audio(questions, progress):
                items[index].no_audio_prediction, items[index].no_audio_error = text, error
                items[index].no_audio_correct = error is None and exact_match(text, questions[index].reference)
    tasks = sorted({question.task for question in questions})
    return Score(
        benchmark=benchmark or Path(getattr(manifest, "path", "records")).stem,
        metric="exact_match" if scoring == "exact" else "rank_accuracy",
        overall=Accuracy.of(items, seed),
        per_task={task: Accuracy.of([item for item in items if item.task == task], seed) for task in tasks},
        settings={
            "prompt": shown_prompt(model, questions[0]),
            "decoding": f"greedy, at most {max_new_tokens} new tokens" if scoring == "exact" else "none",
            "scoring": f"exact match; {NORMALISATION}"
            if scoring == "exact"
            else "argmax over the choices of the answer's summed log-likelihood, end of turn included",
            "data_digest": getattr(manifest, "digest", None),
            "model_digest": model.digest,
            "intervals": f"{INTERVALS}; {RESAMPLES} resamples, seed {seed}",
            "left_out": free if free < len(manifest) else 0,
            "options": options or {},
            "limit": limit,
            "batch": batch,
        },
        items=items,
        seconds=time.perf_counter() - started,
    )


class Hearing:
    """Clips as a model's encoders hear them, each by itself, the last ones kept.

    In a padded batch the same sums are done in another order, so what a clip sounds like would depend on the others.
    """

    def __init__(self, model: PalModel, most_bytes: int = 256 << 20) -> None:
        self.model = model
        self.most_bytes = most_bytes
        self._kept: dict[str, Heard] = {}
        self._bytes = 0

    def __call__(self, path: str) -> Heard:
        """One clip. Raises AudioError for a file that cannot be used."""
        heard = self._kept.pop(path, None)
        if heard is None:
            heard = self.model.hear(load(path, self.model.sampling_rate).samples_N)
            self._bytes += _bytes(heard)
        self._kept[path] = heard  # the last to go
        while len(self._kept) > 1 and self._bytes > self.most_bytes:
            self._bytes -= _bytes(self._kept.pop(next(iter(self._kept))))
        return heard


class Answerer:
    """Turns questions into answers, in batches that share clips.

    An answer does not hang on which questions it was asked with: where a batch leaves so little between the best and
    the second-best that round-off could decide, the question is asked again alone.
    """

    def __init__(
        self,
        model: PalModel,
        scoring: Scoring,
        batch: int,
        max_new_tokens: int,
        features: Callable[[str], Heard] | None,
    ) -> None:
        self.model = model
        self.scoring = scoring
        self.batch = batch
        self.max_new_tokens = max_new_tokens
        self.clip: Callable[[str], Heard] = features or Hearing(model)
        """What the model takes of an audio file."""
        self._margin = _MARGINS.get(model.llm.dtype, _MARGIN_OF_HALF)

    def with_audio(self, questions: Sequence[Question], progress: bool) -> Iterator[tuple[int, str, str | None]]:
        """Yields (index of the question, raw answer, error) for each question, in any order."""
        by_clips: dict[tuple[str, ...], list[int]] = {}
        for index, question in enumerate(questions):
            by_clips.setdefault(question.clips, []).append(index)
        lengths = {clips: _seconds(clips) for clips in by_clips}
        # Clips of like length lie in one batch: little padding, and the slowest batch comes first,
        # where it shows at once if memory does not suffice.
        longest_first = sorted(by_clips, key=lengths.__getitem__, reverse=True)
        order = [index for clips in longest_first for index in by_clips[clips]]
        batches = self._batches(order, questions, lambda index: lengths[questions[index].clips])
        yield from self._run(batches, lambda part: self._answer([questions[i] for i in part]), progress, "audio")

    def without_audio(self, questions: Sequence[Question], progress: bool) -> Iterator[tuple[int, str, str | None]]:
        """As `with_audio`; a question that comes again about another clip is asked once."""
        same: dict[str, list[int]] = {}
        for index, question in enumerate(questions):
            same.setdefault(repr((question.unheard, self._choices(question))), []).append(index)
        firsts = sorted((indices[0] for indices in same.values()), key=lambda i: len(repr(questions[i].unheard)))
        twins = {indices[0]: indices for indices in same.values()}

        def answer(part: list[int]) -> list[str]:
            return self._answer([questions[i] for i in part], deaf=True)

        for first, text, error in self._run(self._batches(firsts, questions), answer, progress, "no audio"):
            for index in twins[first]:
                yield index, text, error

    def _choices(self, question: Question) -> tuple[str, ...] | None:
        return question.choices if self.scoring == "rank" else None

    def _batches(
        self, order: Sequence[int], questions: Sequence[Question], length: Callable[[int], float] = lambda index: 0.0
    ) -> list[list[int]]:
        """Cut `order`, longest first, so that no batch has more rows than `batch`, except by one question's choices,
        and none a clip shorter than half its longest: one long recording would pad all others to its length."""
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
    ) -> Iterator[tuple[int, str, str | None]]:
        with tqdm(total=sum(map(len, batches)), desc=what, unit="question", disable=not progress, leave=False) as bar:
            for part in batches:
                yield from _one_by_one_on_error(part, answer)
                bar.update(len(part))

    def _answer(self, questions: Sequence[Question], deaf: bool = False) -> list[str]:
        """One raw answer a question."""
        places: dict[str, int] = {}
        if not deaf:
            for question in questions:
                for path in question.clips:
                    places.setdefault(path, len(places))
        heard = [self.clip(path) for path in places]
        spans = [[] if deaf else [places[path] for path in question.clips] for question in questions]
        talks = [question.unheard if deaf else question.heard for question in questions]
        tokenizer = self.model.tokenizer
        alone = len(questions) == 1
        if self.scoring == "exact":
            rows = [prompts.encode(tokenizer, talk, clips) for talk, clips in zip(talks, spans, strict=True)]
            if alone:
                return self.model.generate(heard, rows, max_new_tokens=self.max_new_tokens)
            watch = _Close(len(rows), prompts.end_of_answer(tokenizer), self._margin)
            texts = self.model.generate(heard, rows, max_new_tokens=self.max_new_tokens, logits_processor=[watch])
            return self._surely(questions, texts, watch.close_B.tolist(), deaf)
        rows = [
            prompts.encode(tokenizer, [*talk, {"role": "assistant", "content": choice}], clips, train=True)
            for question, talk, clips in zip(questions, talks, spans, strict=True)
            for choice in question.choices or ()
        ]
        scores = self.model.answer_scores(heard, rows).tolist()
        tokens = [sum(label != IGNORE for label in row.labels or ()) for row in rows]
        answers, close = [], []
        for question in questions:
            choices = question.choices or ()
            own, scores = scores[: len(choices)], scores[len(choices) :]
            longest, tokens = max(tokens[: len(choices)]), tokens[len(choices) :]
            answers.append(best_choice(own, choices))
            close.append(not alone and _near(own, longest * self._margin))
        return self._surely(questions, answers, close, deaf)

    def _surely(
        self, questions: Sequence[Question], answers: list[str], close: Sequence[bool], deaf: bool
    ) -> list[str]:
        """The answers, those to close questions as they are alone."""
        return [
            self._answer([question], deaf)[0] if doubtful else answer
            for question, answer, doubtful in zip(questions, answers, close, strict=True)
        ]


class _Close:
    """A logits processor that changes nothing and notes the rows in which round-off could have chosen a token.

    What it notes stays on the device until the answers are complete.
    """

    only_watches = True

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


def _bytes(heard: Heard) -> int:
    return sum(x_AE.nbytes for x_AE in heard.x_AE)


def _one_by_one_on_error(
    part: list[int], answer: Callable[[list[int]], list[str]]
) -> Iterable[tuple[int, str, str | None]]:
    """Answers of a batch; when it raises, of its items alone, so that one bad clip costs one item."""
    try:
        return [(index, text, None) for index, text in zip(part, answer(part), strict=True)]
    except Exception as error:  # any fault of an item belongs in the report, not in a lost evaluation
        if len(part) == 1:
            return [(part[0], "", f"{type(error).__name__}: {error}")]
    return [result for index in part for result in _one_by_one_on_error([index], answer)]


def _questions(
    manifest: Manifest | Sequence[Record], scoring: Scoring, limit: int | None, system: str | None
) -> list[Question]:
    closed = any(record.choices for record in manifest)  # without any, every record is asked
    items = (
        item
        for record in manifest
        if record.choices or not closed  # a free answer has no single right wording
        for item in each_turn(record, last=scoring == "rank")
        if scoring == "exact" or item.choices
    )
    questions = [question_of(item, system) for item in islice(items, limit)]
    if not questions:
        where = getattr(manifest, "path", "the manifest")
        remedy = "; none has 'choices', use scoring 'exact'" if scoring == "rank" and len(manifest) else ""
        raise ManifestError(f"{where} has no questions to evaluate{remedy}")
    return questions


def question_of(item: Item, system: str | None = None) -> Question:
    """An item as the model is asked, with a system message where there is one."""
    reference = item.references[0] if item.references else ""
    task = next(iter(item.category.get("task", ())), "") or "all"
    turns = (*item.before, Turn(item.prompt, reference))
    record = Record(item.id, item.clips, turns, task, "", item.choices)
    return Question(
        id=item.id,
        clips=item.clips,
        question=item.prompt,
        reference=reference,
        task=task,
        choices=item.choices,
        heard=prompts.conversation_of(record, with_answers=False, system=system),
        unheard=prompts.conversation_of(record, with_audio=False, with_answers=False, system=system),
    )


def _seconds(clips: Sequence[str]) -> float:
    """Length of the clips by their headers; 0 where one cannot be read, which its item will report."""
    try:
        return sum(seconds(clip) for clip in clips)
    except AudioError:
        return 0.0


def shown_prompt(model: PalModel, question: Question) -> str:
    """The first question as the LLM gets it, with `<audio>` where the clips stand."""
    tokens = prompts.encode(model.tokenizer, question.heard, list(range(len(question.clips))))
    text = ""
    run: list[int] = []
    for token in tokens.ids:
        if token < 0:
            text += _decode(model, run) + PLACEHOLDER
            run = []
        else:
            run.append(token)
    return text + _decode(model, run)


def _decode(model: PalModel, ids: list[int]) -> str:
    decoded: Any = model.tokenizer.decode(ids, skip_special_tokens=False)
    return str(decoded)


@contextmanager
def evaluation_mode(model: PalModel) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
