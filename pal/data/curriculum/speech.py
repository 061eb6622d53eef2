"""Spoken sentences, word lists and single words, and what is asked about them.

Clips in which words are counted have a length of their own, drawn before the number of words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pal.data.curriculum import effects, grammar
from pal.data.curriculum.effects import Bounds, Effects, Samples, silence
from pal.data.curriculum.grammar import Sentence
from pal.data.curriculum.questions import COUNTS, Asker, Deck, Presence, Question, Rarity, Rng
from pal.data.curriculum.splits import sentence_is_held_out
from pal.data.curriculum.voices import Voice, held_out_voices, speak, training_voice
from pal.data.curriculum.words import sounds_like
from pal.data.synth.waves import RATE

BOUNDS = Bounds(probability=0.25, reverb_s=(0.1, 0.4), direct_db=(6.0, 14.0), noise_db=(15.0, 35.0))
KINDS = (*("sentence",) * 15, *("counted",) * 2, *("list",) * 2, "word")
"""Kinds of clip, in their shares."""
HELD_OUT_KINDS = (*("sentence",) * 4, "counted")
WORD_COUNTS = COUNTS[1:6]
COUNTED_SECONDS = (3.2, 4.2)
"""Length of clips whose words are counted."""
MOST_HELD_OUT_WORDS = 8
_LONGEST = 9.5
"""Longest speech in seconds; longer speech is played faster."""
_SPEEDS = (0.87, 1.15)
"""Playback speeds in training, which make other voices out of those that there are."""
_NEGATIVES, _OTHERS = 40, 5
"""Words drawn as candidates for one that is not spoken: alike, and of any kind."""


@dataclass(frozen=True)
class Speech:
    """Words spoken by a voice. They are in lower case, without punctuation, numbers as words."""

    sentence: Sentence
    voice: Voice
    is_list: bool
    """Whether the words are spoken with pauses, as a list."""
    before: float
    after: float
    """Seconds of silence before and after the speech."""
    length: float | None = None
    """Length of the whole clip in seconds where it is fixed; `before` and `after` then share what the speech leaves."""
    speed: float = 1.0


@dataclass(frozen=True)
class SpeechClip:
    """A clip of speech with its questions."""

    content: Speech
    effects: Effects
    questions: tuple[Question, ...]


def plan(rng: Rng, count: int, held_out: bool = False, taken: frozenset[str] = frozenset()) -> list[SpeechClip]:
    """Plan `count` clips of speech, no sentence twice.

    Args:
        rng: all randomness.
        count: number of clips.
        held_out: the held-out voices with held-out sentences of up to 8 words, unchanged and in the plain wording; else
            the training voices with other sentences, and word lists that hold every word.
        taken: sentences that may not occur.
    """
    kinds = Deck(HELD_OUT_KINDS if held_out else KINDS, rng)
    drawn = [kinds.deal() for _ in range(count)]
    said = _Texts(rng, held_out, taken).choose(drawn)
    speeds = np.exp(rng.uniform(np.log(_SPEEDS[0]), np.log(_SPEEDS[1]), count))
    voices = Deck(held_out_voices(), rng)
    questions = _Questions(rng, plain=held_out)
    clips = []
    for at, (kind, (sentence, is_list)) in enumerate(zip(drawn, said, strict=True)):
        faster = float(speeds[at]) if not held_out and rng.random() < 0.5 else 1.0
        voice = voices.deal() if held_out else training_voice(rng)
        if kind == "counted":
            # speech of six words must fit
            voice, faster = replace(voice, pace=max(voice.pace, 0.95)), max(faster, 0.95)
        before, after = (float(silence) for silence in rng.uniform(0.05, 0.4, 2))
        length = float(rng.uniform(*COUNTED_SECONDS)) if kind == "counted" else None
        clips.append(
            SpeechClip(
                Speech(sentence, voice, is_list, before, after, length, faster),
                effects.draw(rng, None if held_out else BOUNDS),
                tuple(questions.about(sentence, kind == "counted")),
            )
        )
    return clips


class _Texts:
    """Chooses the words of each clip."""

    def __init__(self, rng: Rng, held_out: bool, taken: frozenset[str]) -> None:
        self.rng, self.held_out, self.taken = rng, held_out, set(taken)

    def choose(self, kinds: Sequence[str]) -> list[tuple[Sentence, bool]]:
        """Words of each clip, and whether they are a list; lists hold the words that sentences use least."""
        counts = Deck(WORD_COUNTS, self.rng)
        texts: list[tuple[Sentence, bool] | int] = []
        for kind in kinds:
            if kind == "sentence":
                texts.append((self._sentence(range(2, 13)), False))
            elif kind == "counted":
                wanted = COUNTS.index(counts.deal()) + 1
                if self.held_out or self.rng.random() < 0.5:
                    texts.append((self._sentence((wanted,)), False))
                else:
                    texts.append(wanted)
            else:
                texts.append(1 if kind == "word" else int(self.rng.integers(2, 5)))
        used = Counter(word for text in texts if not isinstance(text, int) for word in text[0].words)
        clear = [word for word in grammar.vocabulary() if len(sounds_like(word)) == 1 and len(word) > 1]
        rare_first = sorted((clear[at] for at in self.rng.permutation(len(clear))), key=lambda word: used[word])
        stack = rare_first[::-1]
        out = []
        for text in texts:
            if isinstance(text, int):
                if len(stack) < text:
                    stack = [clear[at] for at in self.rng.permutation(len(clear))]
                words = tuple(stack.pop() for _ in range(text))
                out.append((Sentence(words, "list"), True))
            else:
                out.append(text)
        return out

    def _sentence(self, lengths: Collection[int]) -> Sentence:
        """A new sentence with one of these numbers of words."""
        while True:
            drawn = grammar.sentence(self.rng)
            if self.held_out and len(drawn.words) > MOST_HELD_OUT_WORDS:
                continue
            if sentence_is_held_out(drawn.text) != self.held_out or drawn.text in self.taken:
                continue
            if len(drawn.words) in lengths:
                self.taken.add(drawn.text)
                return drawn


class _Questions:
    """Asks about speech, with balanced answers."""

    def __init__(self, rng: Rng, plain: bool) -> None:
        self.rng = rng
        self.asker = Asker(rng, plain)
        self.presence = Presence(rng)
        self.first, self.last = Rarity(0.02), Rarity(0.02)
        self.vocabulary = grammar.vocabulary()
        self.kin = kin()

    def about(self, sentence: Sentence, counted: bool) -> list[Question]:
        """The questions about one clip."""
        asker, words = self.asker, sentence.words
        questions = asker.ask_ways(2, "transcription", sentence.text)
        asked: list[str] = []
        for _ in range(1 if self.rng.random() < 0.4 else min(2, len(set(words)))):
            about, answer = self.presence.pick(sorted(set(words)), self._absent(words), asked)
            if about not in asked:
                questions.append(asker.ask("word present", answer, ("yes", "no"), about))
            asked.append(about)
        if len(words) > 1:
            if self.first.allows(words[0]):
                questions.append(asker.ask("first word", words[0]))
            if self.last.allows(words[-1]):
                questions.append(asker.ask("last word", words[-1]))
        if counted:
            questions += asker.ask_ways(2, "word count", COUNTS[len(words) - 1], WORD_COUNTS)
        if sentence.asked_for:
            questions.append(asker.ask("request", sentence.asked_for))
        return questions

    def _absent(self, words: Sequence[str]) -> list[str]:
        """Words that are not spoken: of the kinds of those that are, or like them in sound, and some others."""
        pool = sorted({other for word in words for other in self.kin.get(word, ())})
        near = [pool[at] for at in self.rng.permutation(len(pool))[:_NEGATIVES]]
        due = sorted(word for word, surplus in self.presence.surplus.items() if surplus > 0)
        far = [due[at] for at in self.rng.permutation(len(due))[:_NEGATIVES]]
        any_ = [self.vocabulary[at] for at in self.rng.integers(len(self.vocabulary), size=_OTHERS)]
        return [word for word in dict.fromkeys((*near, *far, *any_)) if not confusable(word, words)]


def confusable(word: str, spoken: Sequence[str]) -> bool:
    """Whether a word is spoken, sounds like a spoken one, is a part of one or holds one of three letters or more."""
    alike = sounds_like(word)
    return any(other in alike or word in other or (len(other) > 2 and other in word) for other in spoken)


def kin() -> dict[str, tuple[str, ...]]:
    """For each word of the grammar, the words of its kinds and those that differ in one letter."""
    found: dict[str, set[str]] = {}
    for members in grammar.fillings().values():
        for word in members:
            found.setdefault(word, set()).update(members)
    holed: dict[str, list[str]] = {}
    for word in grammar.vocabulary():
        for at in range(len(word)):
            if len(word) > 2:
                holed.setdefault(f"{word[:at]}*{word[at + 1 :]}", []).append(word)
    for likes in holed.values():
        for word in likes:
            found.setdefault(word, set()).update(likes)
    return {word: tuple(sorted(others - {word})) for word, others in found.items()}


def render(content: Speech) -> Samples:
    """The speech [N] with silence around it."""
    text = ", ".join(content.sentence.words) if content.is_list else content.sentence.text
    x_N = effects.at_speed(speak(text, content.voice), content.speed)
    longest = _LONGEST if content.length is None else content.length - 0.05
    if len(x_N) > longest * RATE:
        x_N = effects.at_speed(x_N, len(x_N) / (longest * RATE))
    before, after = content.before, content.after
    if content.length is not None:
        free = content.length - len(x_N) / RATE
        before, after = free * before / (before + after), free * after / (before + after)
    return np.concatenate([silence(before), x_N, silence(after)])
