"""Runs a model over a manifest: every question with its audio, and again without it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from pal.audio import load, seconds
from pal.data import prompts
from pal.data.manifest import PLACEHOLDER
from pal.errors import AudioError, ManifestError, PalError
from pal.evaluate.score import Accuracy, ItemResult, Score
from pal.evaluate.scorers import NORMALISATION, best_choice, exact_match

if TYPE_CHECKING:
    from pal.data.manifest import Manifest, Record
    from pal.data.prompts import Conversation
    from pal.model import PalModel
    from pal.types import Heard

Scoring = Literal["exact", "rank"]


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
            "intervals": f"percentile bootstrap, 2000 resamples of whole clips, seed {seed}",
            "left_out": free if free < len(manifest) else 0,
            "options": options or {},
            "limit": limit,
            "batch": batch,
        },
        items=items,
        seconds=time.perf_counter() - started,
    )


class Answerer:
    """Turns questions into answers, in batches that share clips."""

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
        self.clip: Callable[[str], Any] = features or (lambda path: load(path, model.sampling_rate).samples_N)
        """What the model takes of an audio file."""

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
        if self.scoring == "exact":
            rows = [prompts.encode(tokenizer, talk, clips) for talk, clips in zip(talks, spans, strict=True)]
            return self.model.generate(heard, rows, max_new_tokens=self.max_new_tokens)
        rows = [
            prompts.encode(tokenizer, [*talk, {"role": "assistant", "content": choice}], clips, train=True)
            for question, talk, clips in zip(questions, talks, spans, strict=True)
            for choice in question.choices or ()
        ]
        scores = self.model.answer_scores(heard, rows).tolist()
        answers = []
        for question in questions:
            choices = question.choices or ()
            answers.append(best_choice(scores[: len(choices)], choices))
            scores = scores[len(choices) :]
        return answers


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
    questions: list[Question] = []
    closed = any(record.choices for record in manifest)  # without any, every record is asked
    for record in manifest:
        if closed and not record.choices:
            continue  # a free answer has no single right wording
        heard = prompts.conversation_of(record, with_audio=True, system=system)
        unheard = prompts.conversation_of(record, with_audio=False, system=system)
        asked = [place for place, message in enumerate(heard) if message["role"] == "user"]
        last = len(record.turns) - 1
        for number, (turn, place) in enumerate(zip(record.turns, asked, strict=True)):
            if scoring == "rank" and (number != last or not record.choices):
                continue  # with "exact", every turn of a record with choices is asked
            if limit is not None and len(questions) >= limit:
                return questions
            placed = sum(message["content"].count(PLACEHOLDER) for message in heard[: place + 1])
            questions.append(
                Question(
                    id=record.id if last == 0 else f"{record.id}#{number}",
                    clips=record.clips[:placed],
                    question=turn.question,
                    reference=turn.answer,
                    task=record.task or "all",
                    choices=record.choices if number == last else None,
                    heard=heard[: place + 1],
                    unheard=unheard[: place + 1],
                )
            )
    if not questions:
        where = getattr(manifest, "path", "the manifest")
        remedy = "; none has 'choices', use scoring 'exact'" if scoring == "rank" and len(manifest) else ""
        raise ManifestError(f"{where} has no questions to evaluate{remedy}")
    return questions


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
