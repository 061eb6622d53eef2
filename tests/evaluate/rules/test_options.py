"""Rules for questions with options, against the official scripts' behaviour worked out by hand."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pal.evaluate.items import Item
from pal.evaluate.rules.letters import first_or_second_last, only_letter
from pal.evaluate.rules.options import chosen_option
from pal.evaluate.rules.token_sets import matches
from pal.registry import build

CHOICES = ("dog", "a car horn", "plan b", "footsteps")


def item(answer, choices=CHOICES, name="q"):
    return Item(name, (f"{name}.wav",), "?", (answer,), tuple(choices))


def judged(rule, answer, *texts, choices=CHOICES):
    items = [item(answer, choices, str(number)) for number in range(len(texts))]
    verdict = build("rule", rule).judge(items, list(texts))
    return verdict, {name: figure.value() for name, figure in verdict.metrics.items()}


# MMAU and MMAR


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("a car horn", "a car horn", True),
        ("It is A CAR-HORN, I think", "a car horn", True),  # order and other words do not matter
        ("car horn", "a car horn", False),  # every word of the answer is needed, articles too
        ("a car horn, not a dog", "a car horn", False),  # a word that only another option has
        ("(B) a car horn", "a car horn", False),  # 'b' is a word of 'plan b'
        ("(A) dog", "dog", False),  # 'a' is a word of 'a car horn'
        ("(D) footsteps", "footsteps", True),
        ("", "dog", False),
        ("?!", "dog", False),
        ("dogs", "dog", False),
    ],
)
def test_token_sets(answer, reference, right):
    assert matches(answer, reference, CHOICES) is right


def test_gold_text_is_always_right_and_the_letter_style_is_not():
    sets = [CHOICES, ("a man", "a woman"), ("Two", "Three"), ("major a", "minor")]
    items = [item(choice, choices, f"{i}{j}") for i, choices in enumerate(sets) for j, choice in enumerate(choices)]
    rule = build("rule", "token_sets")
    verbatim = rule.judge(items, [one.references[0] for one in items])
    assert verbatim.metrics["accuracy"].value() == 1.0
    lettered = [f"({'ABCD'[one.choices.index(one.references[0])]}) {one.references[0]}" for one in items]
    verdict = rule.judge(items, lettered)
    # lost: "(A) dog" and "(B) a car horn"; in "(A) a man", "(B) minor" the letter is no other option's word alone
    assert verdict.correct == [False, False, True, True, True, True, True, True, True, True]
    assert verdict.metrics["accuracy"].value() == 0.8
    assert verdict.metrics["repaired_accuracy"].value() == 1.0
    assert any("(B)" in quirk for quirk in rule.describe()["quirks"])


words = st.text("ab1 ,.-(", max_size=12)


@given(words, words.filter(lambda text: any(c.isalnum() for c in text)), st.lists(words, max_size=3))
def test_token_sets_against_plain_counting(answer, reference, others):
    def split(text):
        return "".join(c if c.isalnum() else " " for c in text.lower()).split()

    wanted, said = split(reference), split(answer)
    foreign = [word for other in others for word in split(other) if word not in wanted]
    expected = all(word in said for word in wanted) and not any(word in foreign for word in said)
    assert matches(answer, reference, [reference, *others]) is expected


def test_an_item_without_answer_is_wrong_not_skipped():
    verdict, values = judged({"name": "token_sets"}, "dog", "dog", None)
    assert verdict.correct == [True, False]
    assert values == {"accuracy": 0.5, "repaired_accuracy": 0.5}


# AIR-Bench and MMSU


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B. joy", "B"),
        ("The answer is C.", "C"),
        ("(D)", "D"),
        ("A dog barks", "A"),  # kept: a word that starts so
        ("Both of them", "B"),
        ("(B) joy", None),
        ("The answer is C", None),  # the second-last character is the space
        ("joy", None),
        ("b", None),
        ("E.", None),
        ("\n A\n", "A"),
        ("None", None),
        ("", None),
    ],
)
def test_first_or_second_last(answer, letter):
    assert first_or_second_last(answer) == letter


def test_unread_answers_leave_the_denominator():
    texts = ("B. a car horn", "The answer is A.", "a car horn", "", "(B) a car horn", None)
    for whose, official in (("air_bench", 1 / 3), ("mmsu", 1 / 4)):
        verdict, values = judged({"name": "letters", "of": whose}, "a car horn", *texts)
        assert verdict.parsed == ["B", "A", None, None, None, None]
        assert verdict.correct == [True, False, False, False, False, False]
        # right: the first; read: the first two; the item that raised always counts; MMSU counts empty answers
        assert values["accuracy"] == pytest.approx(official)
        assert values["accuracy_over_all"] == pytest.approx(1 / 6)
        assert values["repaired_accuracy"] == pytest.approx(3 / 6)
        assert verdict.facts == {"unread": 3}


def test_an_empty_answer_does_not_inherit_the_one_before_it():
    verdict, _ = judged({"name": "letters", "of": "mmsu"}, "a car horn", "B", "", "")
    assert verdict.correct == [True, False, False]


def test_a_letter_beyond_the_options_is_wrong():
    verdict, _ = judged({"name": "letters", "of": "air_bench"}, "joy", "D", "B", choices=("fear", "joy"))
    assert verdict.correct == [False, True]


# MuChoMusic


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("(B)", "B"),
        ("The correct answer is: B", "B"),
        ("A or B. The correct answer is: (C) Plan b", "C"),
        ("it is a car horn", "B"),
        ("I hear footsteps", "D"),
        ("Dogs", "D"),  # kept: any capital counts
        ("A and B: a dog", "A"),  # two letters, so the text decides, and the first option that is in it
        ("nothing", None),
        ("", None),
    ],
)
def test_only_letter(answer, letter):
    assert only_letter(answer, CHOICES) == letter


def test_muchomusic_counts_unread_answers_as_wrong():
    verdict, values = judged({"name": "letters", "of": "muchomusic"}, "dog", "(A)", "hm", None, "Bossa nova")
    assert verdict.correct == [True, False, False, False]
    assert values == {"accuracy": 0.25, "repaired_accuracy": 0.25}


# What is meant


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("dog", 0),
        ("A dog.", 0),
        ("(B) a car horn", 1),
        ("B", 1),
        ("b", None),
        ("D: footsteps", 3),
        ("The answer is C", 2),
        ("the correct option is (D) because I hear steps", 3),
        ("I think the answer is a dog", 0),
        ("I hear footsteps near", 3),
        ("a dog and footsteps", None),
        ("E", None),
        ("", None),
        ("A dog barks at footsteps", None),
    ],
)
def test_meant(answer, index):
    assert chosen_option(answer, CHOICES) == index


def test_meant_takes_the_longer_of_nested_options():
    assert chosen_option("it is a lead guitar", ("guitar", "lead guitar", "bass")) == 1
    assert chosen_option("a guitar, a lead guitar and a bass", ("guitar", "lead guitar", "bass")) is None


@given(
    st.lists(st.text(string.ascii_lowercase, min_size=2, max_size=6), min_size=2, max_size=4, unique=True), st.data()
)
def test_meant_understands_every_usual_form(choices, data):
    index = data.draw(st.integers(0, len(choices) - 1))
    letter, choice = "ABCD"[index], choices[index]
    for form in ("{c}", "({l}) {c}", "{l}. {c}", "{l}", "{l})", "The answer is ({l})", "Answer: {l}."):
        assert chosen_option(form.format(l=letter, c=choice), choices) == index, form
