"""A grammar of simple English sentences: statements, questions, requests, times and numbers.

A template is a sentence with slots in braces, each filled by a word of its kind. Square brackets are around what a
request asks for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from pal.data.curriculum.words import NUMBERS, slots

STATEMENTS = """
the {animal} is {acting} {how}
the {colour} {animal} is {where} the {thing}
my {family} is a {job}
{my} {family} works as a {job} in {country}
{name} is a very {person_quality} {job}
{name} {did} the {quality} {thing}
the {job} {did} {my} {thing} {when}
{who} {acted} {how}
{name} and {name} are {acting} in the {place}
{they} are {feeling}
i am very {feeling} {when}
the {family} of {name} is {feeling}
{name} {does} {food} and {drink}
{who} {does} the {quality} {clothing}
i would like to {act} in the {place}
the {thing} is {where} the {thing}
there are {count} {animals} in the {place}
there is a {quality} {thing} in the {room}
{name} has {count} {things}
i have {tens} {unit} {things}
we bought {count} {fruits} and {count} {fruits}
the {vehicle} is {size} and {colour}
the {vehicle} leaves on {day}
the {vehicle} to {country} is late
it is {weather} in {country} {when}
it will be {weather} on {day}
{name} plays the {instrument} every {part_of_day}
they play {sport} on {day}
we study {subject} and {subject}
the {thing} is made of {material}
my {body} hurts
{name} broke {my} {body} in {month}
the {nature} is {quality}
the {nature} and the {nature} are {quality}
the {size} {animal} {acted} {how}
the {animal} {did} the {animal}
{count} {animals} and {count} {animals}
{tens} {unit} {money}
the {idea} was {quality}
the {idea} begins on {day} {part_of_day}
her {family} told us a {quality} {idea}
{who} never {does} {food}
i usually drink {drink} in the {part_of_day}
the {job} and the {job} are {acting}
{my} {clothing} is {colour} and {colour}
he wore a {colour} {clothing} and a {colour} {clothing}
the {room} is {quality} and {quality}
my {family} lives near the {place}
the {jobs} in the {place} are {person_quality}
in {season} the {nature} is {quality}
{name} was born in {month}
{name} travels to {country} by {vehicle}
it costs {tens} {money}
the {place} is {count} {unit_of_length} away
{who} waited for {tens} {unit_of_time}
the {ordinal} {idea} was {quality}
{name} is the {ordinal} {job}
they found a {material} {thing} {where} the {place}
the {animals} {acted} {where} the {vehicle}
a {colour} {thing} fell from the {vehicle}
nobody {did} the {thing}
everybody in the {place} was {feeling}
this {thing} is {quality}
that {thing} belongs to {name}
these {things} are {quality}
the old {place} was {quality}
we could not {do} the {size} {thing}
my {family} and i {did} the {things}
{name} can {act} and {act}
i forgot {my} {thing} in the {room}
{name} should {act} more {how}
the {job} cooked {food} with {food}
she cut the {fruit} and the {fruit}
{acting} is {quality}
{name} was {acting} {where} the {place}
good {part_of_day} {name}
happy birthday {name}
thank you for the {quality} {idea}
see you on {day}
hello {name}
good {part_of_day}
thank you
{person_quality} {jobs}
{colour} {animals}
{quality} {things}
{count} {clothings}
there are {count} {places} in {country}
we saw {count} {vehicles} near the {places}
{name} sells {clothings} and {clothings}
our {familys} are {feeling}
the {vehicles} and the {vehicles} are {quality}
the {places} of {country} are {quality}
""".strip().splitlines()

QUESTIONS = """
where is {my} {thing}
where are the {things}
who {did} the {thing}
what is {where} the {thing}
when does the {vehicle} leave
when is the {idea}
do you like {food}
does {name} like {sport}
is the {animal} {acting}
is {name} {feeling}
are you {feeling}
are they {acting} in the {place}
how many {animals} are in the {place}
how much is the {colour} {clothing}
can you {act}
can the {animal} {act}
why is the {job} {feeling}
why did {name} {do} the {thing}
did you {do} the {quality} {thing}
have you ever been to {country}
is it {weather} in {country}
which {thing} is {colour}
which {vehicle} goes to the {place}
what did the {job} say
how old is {my} {family}
will {name} play {sport} {when}
what time is it
what is the {idea} about
who is {acting} in the {room}
is there a {place} near the {place}
""".strip().splitlines()

REQUESTS = """
please bring me [the {colour} {thing}]
please bring me [a {size} {thing}]
please give me [the {quality} {thing}]
please give {name} [a {fruit}]
could you bring me [some {food}]
could you bring us [some {food} and some {food}]
could i have [a cup of {drink}]
could i have [the {food} and the {drink}]
can i have [a {fruit}] please
can you pass me [the {thing}]
can you hand me [my {colour} {clothing}]
i need [a {quality} {thing}]
i need [{count} {things}]
i would like [a glass of {drink}] please
i would like [{count} {fruits}] please
we would like [two tickets to {country}]
show me [the {colour} {vehicle}]
show me [the way to the {place}]
get me [a {job}] please
hand me [the {material} {thing}]
please pass [the {food}]
may i borrow [your {thing}]
may i see [the {ordinal} {thing}]
buy me [a {colour} {clothing}]
find me [a {quality} {place}]
tell me [a {quality} story]
please send [the {thing}] to {name}
please order [a {size} pizza with {food}]
fetch [the {thing}] from the {room}
bring [the {colour} {thing}] to the {room}
give me [a {size} {colour} {thing}] please
""".strip().splitlines()

ORDERS = """
open the {thing} {how}
please {do} the {thing}
please {do} the {colour} {thing} in the {room}
do not {do} the {thing}
do not {act} in the {room}
{act} with {name}
turn {side} at the {place}
put the {thing} {where} the {thing}
put the {fruit} in the {colour} {thing}
take the {thing} to the {room}
meet me at the {place} on {day}
call {my} {family} {when}
let us {act} {when}
please {act} {how}
stop {acting} in the {room}
{act} {how}
{do} it
""".strip().splitlines()

TIMES_AND_NUMBERS = (
    """
it is {hour} o'clock
the {idea} starts at {hour} thirty
it is {minute} past {hour}
it is {minute} minutes to {hour}
the {vehicle} leaves at {hour} {minute}
we meet on {day} at {hour}
wake me up at {hour} {minute} on {day}
{month} the {ordinal}
my number is {unit} {unit} {unit} {unit}
room {unit} {unit} {unit}
{unit} plus {unit} is {unit}
{tens} {unit} and {tens} {unit}
the answer is {tens} {unit}
page {unit} hundred and {tens} {unit}
they paid {unit} hundred {money}
{unit} thousand {unit} hundred
the {place} opens at {hour} and closes at {hour}
{name} is {tens} {unit} years old
{tens} {things}
{teen} {animals}
{teen} minus {unit}
the number {teen}
zero point {unit}
""".strip()
    .replace("o'clock", "exactly")
    .splitlines()
)

SIDES = ["left", "right"]
TEENS = NUMBERS[13:20]
LINKS = ["and", "but", "because", "so"]
KINDS: dict[str, tuple[list[str], float]] = {
    "statement": (STATEMENTS, 0.42),
    "question": (QUESTIONS, 0.15),
    "request": (REQUESTS, 0.22),
    "order": (ORDERS, 0.1),
    "time or number": (TIMES_AND_NUMBERS, 0.11),
}
"""Templates of each kind of sentence, and the kind's share of the sentences drawn."""

LINKED = 0.25
"""Share of short statements to which a second one is linked."""

_SLOT = re.compile(r"{(\w+)}")
_VOWEL_SOUND = re.compile(r"(?!uni|use|one|euro)[aeiou]")


@dataclass(frozen=True)
class Sentence:
    """A sentence in lower-case words without punctuation."""

    words: tuple[str, ...]
    kind: str
    asked_for: str | None = None
    """Words of the thing that a request asks for."""

    @property
    def text(self) -> str:
        """The words with single spaces."""
        return " ".join(self.words)


@cache
def fillings() -> dict[str, list[str]]:
    """Words of every slot."""
    return {**slots(), "side": SIDES, "teen": TEENS}


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word that a sentence may hold, sorted."""
    words = {word for words in fillings().values() for word in words} | set(NUMBERS)
    for templates, _ in KINDS.values():
        for template in templates:
            words.update(re.sub(r"{\w+}|[\[\]]", " ", template).split())
    return tuple(sorted(words | {"an", *LINKS}))


def sentence(rng: np.random.Generator) -> Sentence:
    """Draw a sentence of 2 to 12 words."""
    names = list(KINDS)
    kind = names[int(rng.choice(len(names), p=[share for _, share in KINDS.values()]))]
    drawn = fill(_any(KINDS[kind][0], rng), kind, rng)
    if kind == "statement" and 4 <= len(drawn.words) <= 5 and rng.random() < LINKED:
        other = fill(_any(STATEMENTS, rng), kind, rng)
        if 4 <= len(other.words) <= 6:
            return Sentence((*drawn.words, _any(LINKS, rng), *other.words), kind)
    return drawn


def _any(options: list[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def fill(template: str, kind: str, rng: np.random.Generator) -> Sentence:
    """A template with a random word in each slot; no two slots of a kind get the same word."""
    taken: set[str] = set()

    def word(match: re.Match[str]) -> str:
        free = [word for word in fillings()[match[1]] if word not in taken]
        chosen = free[int(rng.integers(len(free)))]
        taken.add(chosen)
        return chosen

    words = _SLOT.sub(word, template).replace("[", " [ ").replace("]", " ] ").split()
    for at, current in enumerate(words[:-1]):
        if current == "a" and _VOWEL_SOUND.match(words[at + 1]):
            words[at] = "an"
    asked_for = None
    if "[" in words:
        asked_for = " ".join(words[words.index("[") + 1 : words.index("]")])
    return Sentence(tuple(word for word in words if word not in "[]"), kind, asked_for)
