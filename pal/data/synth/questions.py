"""Questions and captions about a scene, balanced so that the wording does not reveal the answer.

A *form* is one kind of question ("which of two comes first"), with paraphrases. For every scene all
questions with a clear answer are candidates; `Chooser` samples some of them so that tasks, and answers
within a form, are about equally frequent. It uses only the plans, in the order of the scenes, so its
choice does not depend on the rendering of the audio.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from pal.data.synth.events import KINDS
from pal.data.synth.scene import ASK, Event, Scene, most_events
from pal.data.synth.waves import Rng

COUNTS = ("one", "two", "three", "four")
THIRDS = ("beginning", "middle", "end")
HALVES = ("first half", "second half")
BORDER = 0.15
"""Smallest distance in seconds of an onset from the border between two answers."""
SEMITONES = 5
"""Smallest interval between compared notes."""
LOUDER_DB = 8.0
"""Smallest difference between compared levels."""
TASKS = ("what", "order", "count", "presence", "timing", "pitch", "loudness", "caption")

PARAPHRASES: dict[str, tuple[str, ...]] = {
    "only": ("What sound is this?", "What is the only sound?", "What do you hear?"),
    "first": ("What is the first sound?", "Which sound comes first?", "What do you hear first?"),
    "last": ("What is the last sound?", "Which sound comes last?", "What do you hear last?"),
    "earlier": (
        "Which comes first, {a} or {b}?",
        "Which starts earlier, {a} or {b}?",
        "Which do you hear first, {a} or {b}?",
    ),
    "next": ("What comes right after {a}?", "Which sound follows {a}?", "What is the next sound after {a}?"),
    "count": ("How many sounds are there?", "How many different sounds do you hear?", "Count the sounds."),
    "presence": ("Is there {some}?", "Can you hear {some}?", "Do you hear {some}?"),
    "third": (
        "When {does} {a} start?",
        "{Does} {a} start at the beginning, in the middle or at the end?",
        "In which part {does} {a} start?",
    ),
    "half": (
        "{Is} {a} heard in the first half or the second half?",
        "In which half {is} {a}, first half or second half?",
    ),
    "register": (
        "Is {a} note low, middle or high?",
        "How high is {a} note: low, middle or high?",
        "What is the pitch of {a} note?",
    ),
    "higher": ("Which note is higher, {a} or {b}?", "Which has the higher pitch, {a} or {b}?"),
    "louder": ("Which is louder, {a} or {b}?", "Which of the two is louder, {a} or {b}?"),
    "level": ("{Is} {a} loud or quiet?", "How loud {is} {a}, loud or quiet?"),
    "caption": ("Describe the sounds.", "Describe what you hear.", "What happens in this recording?"),
}


@dataclass(frozen=True)
class SceneQuestion:
    """Question with its one correct answer."""

    task: str
    text: str
    answer: str
    choices: tuple[str, ...] | None
    form: str


@dataclass(frozen=True)
class Candidate:
    """Possible question about a scene, before its wording is chosen."""

    task: str
    form: str
    answer: str
    choices: tuple[str, ...] | None
    first: str = ""
    """Kind of event in the question, or the one mentioned first."""
    second: str = ""
    balance: str = ""
    """Value balanced within the form: the answer, or its position among the kinds mentioned."""

    @property
    def subject(self) -> tuple[str, ...]:
        """Identity of the question: equal subjects are the same question."""
        return (self.form, *sorted((self.first, self.second)))


def candidates(scene: Scene) -> Iterator[Candidate]:
    """Every question about the scene that has a clear answer, captions included."""
    events, kinds = scene.events, tuple(KINDS)
    for form in ("first", "last") if len(events) > 1 else ("only",):
        answer = events[-1 if form == "last" else 0].kind
        yield Candidate("what", form, answer, kinds, balance=answer)
    for event, after in pairwise(events):
        yield Candidate("order", "next", after.kind, kinds, event.kind, balance=after.kind)
    if most_events(scene.seconds) > 1:
        counts = COUNTS[: most_events(scene.seconds)]
        yield Candidate("count", "count", counts[len(events) - 1], counts, balance=counts[len(events) - 1])
    present = {event.kind for event in events}
    for kind in kinds:
        answer = "yes" if kind in present else "no"
        yield Candidate("presence", "presence", answer, ("yes", "no"), kind, balance=answer)
    for one, two in combinations(events, 2):
        yield from _comparison("order", "earlier", one, two)
        if one.note is not None and two.note is not None and abs(one.note - two.note) >= SEMITONES:
            yield from _comparison("pitch", "higher", *((one, two) if one.note > two.note else (two, one)))
        if abs(one.level_db - two.level_db) >= LOUDER_DB:
            yield from _comparison("loudness", "louder", *((one, two) if one.level_db > two.level_db else (two, one)))
    for event in events:
        yield from _about_one(scene, event)
    yield Candidate("caption", "caption", caption(scene), None)


def _comparison(task: str, form: str, right: Event, wrong: Event) -> Iterator[Candidate]:
    """Candidates of a comparison, in both orders of mention."""
    for place, (a, b) in (("first", (right.kind, wrong.kind)), ("second", (wrong.kind, right.kind))):
        yield Candidate(task, form, right.kind, (a, b), a, b, balance=place)


def _about_one(scene: Scene, event: Event) -> Iterator[Candidate]:
    third, half = scene.seconds / 3, scene.seconds / 2
    if all(abs(event.start - border) > BORDER for border in (third, 2 * third)):
        answer = THIRDS[int(event.start // third)]
        yield Candidate("timing", "third", answer, THIRDS, event.kind, balance=answer)
    if event.end < half - BORDER or event.start > half + BORDER:
        answer = HALVES[int(event.start > half)]
        yield Candidate("timing", "half", answer, HALVES, event.kind, balance=answer)
    if event.register is not None:
        choices = ("low", "middle", "high")
        yield Candidate("pitch", "register", event.register, choices, event.kind, balance=event.register)
    answer = "loud" if event.loud else "quiet"
    yield Candidate("loudness", "level", answer, ("loud", "quiet"), event.kind, balance=answer)


def caption(scene: Scene) -> str:
    """Every event in order, as in "a quiet siren, then a loud dog bark, then a high piano note"."""
    return ", then ".join(_phrase(event) for event in scene.events)


def _phrase(event: Event) -> str:
    kind = KINDS[event.kind]
    adjective = event.register or ("loud" if event.loud else "quiet")
    return f"{'a ' if kind.countable else ''}{adjective} {kind.caption}"


class Chooser:
    """Balanced sampling of questions, scene by scene, over tasks and answers of all scenes so far."""

    def __init__(self) -> None:
        self.tasks: Counter[str] = Counter()
        self.forms: Counter[str] = Counter()
        self.answers: Counter[tuple[str, str]] = Counter()
        self.subjects: Counter[tuple[str, str, str]] = Counter()

    def choose(self, scene: Scene, number: int, rng: Rng) -> list[SceneQuestion]:
        """Up to `number` different questions about the scene, in random order."""
        pool = list(candidates(scene))
        pool = [pool[i] for i in rng.permutation(len(pool))]  # random order of ties
        chosen: list[Candidate] = []
        while pool and len(chosen) < number:
            fair = [candidate for candidate in pool if self._is_fair(candidate)]
            best = min(fair or pool, key=self._cost)
            chosen.append(best)
            pool = [candidate for candidate in pool if candidate.subject != best.subject]
            self.tasks[best.task] += 1
            self.forms[best.form] += 1
            self.answers[best.form, best.balance] += 1
            self.subjects[best.form, best.first, best.balance] += 1
        chosen = [chosen[i] for i in rng.permutation(len(chosen))]
        return [worded(candidate, int(rng.integers(len(PARAPHRASES[candidate.form])))) for candidate in chosen]

    def _is_fair(self, candidate: Candidate) -> bool:
        """Whether the candidate keeps the answers of a form with few answers about equally frequent."""
        answers = _answers(candidate)
        if len(answers) > len(COUNTS):
            return True
        fewest = min(self.answers[candidate.form, answer] for answer in answers)
        return self.answers[candidate.form, candidate.balance] <= fewest + 2 + 0.02 * self.forms[candidate.form]

    def _cost(self, candidate: Candidate) -> tuple[int, ...]:
        return (
            self.tasks[candidate.task],
            self.forms[candidate.form],
            self.answers[candidate.form, candidate.balance],
            self.subjects[candidate.form, candidate.first, candidate.balance],
        )


def _answers(candidate: Candidate) -> tuple[str, ...]:
    """The values that `balance` takes in the candidate's form."""
    if candidate.second:
        return ("first", "second")
    return candidate.choices or (candidate.balance,)


def worded(candidate: Candidate, paraphrase: int = 0) -> SceneQuestion:
    """The candidate in the words of one of its form's `PARAPHRASES`."""
    words = {}
    if candidate.first:
        kind = KINDS[candidate.first]
        does, is_ = ("do", "are") if kind.plural else ("does", "is")
        words = {"a": f"the {kind.name}", "some": kind.some, "does": does, "Does": does.capitalize()}
        words |= {"is": is_, "Is": is_.capitalize()}
    if candidate.second:
        words["b"] = f"the {candidate.second}"
    text = PARAPHRASES[candidate.form][paraphrase].format(**words)
    return SceneQuestion(candidate.task, text, candidate.answer, candidate.choices, candidate.form)


def spans(scene: Scene) -> list[tuple[str, float, float]]:
    """Tags of every event: kind, level and register, with start and end in seconds."""
    out = []
    for event in scene.events:
        labels = [event.kind, "loud" if event.loud else "quiet"]
        if event.register is not None:
            labels.append(f"pitch {event.register}")
        out += [(label, event.start, event.end) for label in labels]
    return out


def question_rng(scene: Scene) -> np.random.Generator:
    """The generator that chooses and words the questions of a scene."""
    return np.random.default_rng((scene.seed, scene.index, ASK))
