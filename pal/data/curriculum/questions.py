"""Wordings of every task, and the means that keep answers balanced.

A clip's questions are made with its plan, before anything is rendered. Choices are dealt from shuffled decks, so that
each answer of a closed task is as frequent as the others; what is asked to be present is chosen so that for each word,
digit, sound and instrument "yes" is about as frequent as "no".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from pal.data.prepare import esc50, fsdd

T = TypeVar("T")
Rng = np.random.Generator

YES_NO = ("yes", "no")
COUNTS = ("one", "two", "three", "four", "five", "six")

WORDINGS: dict[str, tuple[str, ...]] = {
    # environmental sounds
    "classification": esc50.QUESTIONS,
    "sounds in order": (
        "Which sounds do you hear, in order?",
        "List the sounds in the order in which you hear them.",
        "Which sounds follow each other?",
        "Name the sounds from first to last.",
    ),
    "sounds at once": (
        "Which sounds do you hear at the same time? Answer in alphabetical order.",
        "Name the sounds that overlap, in alphabetical order.",
        "Which sounds are heard together, in alphabetical order?",
    ),
    "first sound": (
        "Which sound comes first?",
        "What is the first sound?",
        "What do you hear first?",
        "Which sound is at the beginning?",
    ),
    "last sound": (
        "Which sound comes last?",
        "What is the last sound?",
        "What do you hear last?",
        "Which sound is at the end?",
    ),
    "sound count": (
        "How many different sounds do you hear?",
        "How many kinds of sound are there?",
        "How many different sounds are in this recording?",
        "Count the different sounds.",
    ),
    "sound present": (
        "Is there the sound of {0}?",
        "Do you hear {0}?",
        "Can you hear {0}?",
        "Is {0} in this recording?",
    ),
    # digits
    "spoken digit": fsdd.QUESTIONS,
    "digits": (
        "Which digits are spoken, in order?",
        "What digits do you hear?",
        "Write down the digits that are spoken.",
        "Which digits does the speaker say?",
        "List the spoken digits.",
    ),
    "digit count": (
        "How many digits are spoken?",
        "How many digits do you hear?",
        "Count the spoken digits.",
        "How many digits does the speaker say?",
    ),
    "first digit": (
        "Which digit is spoken first?",
        "What is the first digit?",
        "Which digit comes first?",
        "Name the first spoken digit.",
    ),
    "last digit": (
        "Which digit is spoken last?",
        "What is the last digit?",
        "Which digit comes last?",
        "Name the last spoken digit.",
    ),
    "digit present": (
        "Is the digit {0} spoken?",
        "Do you hear the digit {0}?",
        "Does the speaker say {0}?",
        "Is {0} among the spoken digits?",
    ),
    # speech
    "transcription": (
        "Transcribe the speech.",
        "What does the speaker say?",
        "Write down what is said.",
        "What is said in this recording?",
        "Write down the spoken words.",
        "Transcribe the audio.",
    ),
    "word present": (
        "Is the word '{0}' spoken?",
        "Do you hear the word '{0}'?",
        "Does the speaker say '{0}'?",
        "Is '{0}' among the spoken words?",
    ),
    "first word": (
        "What is the first word?",
        "Which word is spoken first?",
        "Which word comes first?",
        "Name the first word that is spoken.",
    ),
    "last word": (
        "What is the last word?",
        "Which word is spoken last?",
        "Which word comes last?",
        "Name the last word that is spoken.",
    ),
    "word count": (
        "How many words are spoken?",
        "How many words do you hear?",
        "Count the spoken words.",
        "How many words does the speaker say?",
    ),
    "request": (
        "What is asked for?",
        "What does the speaker ask for?",
        "What does the speaker want?",
        "What is requested?",
    ),
    # music
    "instrument": (
        "Which instrument is playing?",
        "What instrument do you hear?",
        "Name the instrument.",
        "Which musical instrument is this?",
    ),
    "instrument family": (
        "Which family of instruments does it belong to?",
        "What family of instruments do you hear?",
        "Name the instrument family.",
        "Which instrument family is playing?",
    ),
    "instrument present": (
        "Is there the sound of {0}?",
        "Do you hear {0}?",
        "Can you hear {0}?",
        "Is {0} in this recording?",
    ),
    "higher or lower": (
        "Is the second note higher or lower than the first?",
        "Is the second of the two notes higher or lower?",
        "Compared with the first note, is the second higher or lower?",
    ),
    "up or down": (
        "Does the melody go up or down?",
        "Do the notes go up or down?",
        "Is the melody going up or down?",
        "In which direction does the melody move, up or down?",
    ),
    "note count": (
        "How many notes are played?",
        "How many notes do you hear?",
        "Count the notes.",
        "How many notes does the melody have?",
    ),
    "tempo": (
        "Is the music slow or fast?",
        "Is it played slowly or fast? Answer slow or fast.",
        "Is the tempo slow or fast?",
        "Are the notes slow or fast?",
    ),
    "instruments in order": (
        "Which two instruments play one after the other?",
        "Which instrument plays first, and which one then?",
        "Name the two instruments in the order in which they play.",
    ),
    "instruments at once": (
        "Which two instruments play at the same time? Answer in alphabetical order.",
        "Name the two instruments that play together, in alphabetical order.",
        "Which two instruments play together, in alphabetical order?",
    ),
}
"""Wordings of each task; the first is the plain one, which held-out questions use."""

GROUP_TASKS: dict[str, tuple[str, ...]] = {
    "scenes": (
        "classification",
        "sounds in order",
        "sounds at once",
        "first sound",
        "last sound",
        "sound count",
        "sound present",
    ),
    "digits": ("spoken digit", "digits", "digit count", "first digit", "last digit", "digit present"),
    "speech": ("transcription", "word present", "first word", "last word", "word count", "request"),
    "music": (
        "instrument",
        "instrument family",
        "instrument present",
        "higher or lower",
        "up or down",
        "note count",
        "tempo",
        "instruments in order",
        "instruments at once",
    ),
}
"""Tasks of each group of clips."""


@dataclass(frozen=True)
class Question:
    """A question about a clip, with its answer."""

    task: str
    text: str
    answer: str
    choices: tuple[str, ...] | None = None
    about: str | None = None
    """Word, digit, sound or instrument whose presence is asked about."""


class Deck(Generic[T]):
    """Deals from shuffled copies of a pack, so that after every pack each card has come equally often.

    Args:
        cards: the cards, each dealt once a round.
        rng: shuffles the pack.
        rounds: copies of the cards in a pack. With more than one, the last card of a round cannot be foretold.
    """

    def __init__(self, cards: Sequence[T], rng: Rng, rounds: int = 1) -> None:
        self.cards = list(cards) * rounds
        self.rng = rng
        self.left: list[T] = []

    def deal(self) -> T:
        """The next card."""
        if not self.left:
            self.left = [self.cards[at] for at in self.rng.permutation(len(self.cards))]
        return self.left.pop()

    def deal_other(self, *taken: T) -> T:
        """The next card that is none of `taken`; those passed over stay in the pack."""
        passed = []
        while (card := self.deal()) in taken:
            passed.append(card)
            if len(passed) > 2 * len(self.cards):
                raise ValueError("every card of the deck is taken")
        self.left += passed
        return card


class Tally(Generic[T]):
    """Picks what has been picked least, at random among equals."""

    def __init__(self, rng: Rng) -> None:
        self.rng = rng
        self.picked: Counter[T] = Counter()

    def least(self, candidates: Sequence[T]) -> T:
        """The candidate picked least so far; it is not counted."""
        shuffled = [candidates[at] for at in self.rng.permutation(len(candidates))]
        return min(shuffled, key=lambda one: self.picked[one])

    def add(self, one: T) -> None:
        """Count a pick."""
        self.picked[one] += 1


class Asker:
    """Words questions: at random for training, always the first wording for held-out questions."""

    def __init__(self, rng: Rng, plain: bool) -> None:
        self.rng = rng
        self.plain = plain

    def ask(
        self, task: str, answer: str, choices: Sequence[str] | None = None, about: str | None = None, named: str = ""
    ) -> Question:
        """One question.

        Args:
            task: a key of `WORDINGS`.
            answer: the correct answer.
            choices: the allowed answers of a closed task.
            about: what a question of presence is about.
            named: its name within a sentence, such as "a dog"; `about` by default.
        """
        return self.ask_ways(1, task, answer, choices, about, named)[0]

    def ask_ways(
        self,
        ways: int,
        task: str,
        answer: str,
        choices: Sequence[str] | None = None,
        about: str | None = None,
        named: str = "",
    ) -> list[Question]:
        """The same question in `ways` different wordings; in one where the wording is plain."""
        wordings = WORDINGS[task]
        order = [0] if self.plain else [int(at) for at in self.rng.permutation(len(wordings))[:ways]]
        allowed = None if choices is None else tuple(choices)
        return [Question(task, wordings[at].format(named or about), answer, allowed, about) for at in order]


class Presence:
    """Balances questions of presence: over all, and for each thing that is asked about."""

    def __init__(self, rng: Rng) -> None:
        self.rng = rng
        self.answers = Deck(YES_NO, rng, rounds=10)
        self.surplus: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()

    def pick(self, present: Sequence[str], absent: Sequence[str], taken: Sequence[str] = ()) -> tuple[str, str]:
        """What to ask about, and the answer.

        Args:
            present: candidates in the clip.
            absent: candidates that are not in it.
            taken: candidates already asked about.
        """
        answer = self.answers.deal()
        sign = 1 if answer == "yes" else -1
        pool = [thing for thing in (present if answer == "yes" else absent) if thing not in taken]
        pool = pool or list(present if answer == "yes" else absent)
        pool = [pool[at] for at in self.rng.permutation(len(pool))]
        thing = min(pool, key=lambda one: (sign * self.surplus[one], self.asked[one]))
        self.surplus[thing] += sign
        self.asked[thing] += 1
        return thing, answer


class Rarity:
    """Lets a question of many answers be asked only where its answer has not been too frequent."""

    def __init__(self, share: float, free: int = 3) -> None:
        self.share = share
        self.free = free
        self.answers: Counter[str] = Counter()

    def allows(self, answer: str) -> bool:
        """Whether the question may be asked; counts it if so."""
        if self.answers[answer] >= self.free + self.share * self.answers.total():
            return False
        self.answers[answer] += 1
        return True
