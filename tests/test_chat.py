"""Conversations in which text and audio alternate: the answers of whole conversations, with each part read once."""

import pytest
import torch

from pal import answering
from pal.backbone.finetuning import LoRA
from pal.backbone.session import Session
from pal.errors import AudioError, PalError, PromptError
from tests.models import noise, tiny_model
from tests.test_live import CONNECTORS, WHISPER

FLAMINGO = {"name": "flamingo", "every": 2}
OPTIONS = {"max_new_tokens": 5}
ENCODER = {"name": "tiny", "width": 12, "channels": [2, 3, 4, 6], "blocks": 1}


def clip(seconds, seed=0):
    return noise(seconds, seed).numpy(), 16_000


TALK = [
    ("What sound is this?", [clip(0.9, 1)]),
    ("Is it loud?", []),
    ("And this one?", [clip(0.5, 2)]),
    ("Which comes first, <audio> or <audio>?", [clip(0.3, 3), clip(0.7, 4)]),
    ("yes", []),
]


def said(model, talk=TALK):
    """The answers of a chat, and the chat."""
    chat = model.chat()
    return [chat.ask(question, clips, **OPTIONS) for question, clips in talk], chat


def expected(model, talk=TALK):
    """The same answers, each from the whole conversation."""
    turns, clips, answers = [], [], []
    for question, more in talk:
        clips += more
        placeholders = "" if "<audio>" in question else f"<audio>{model.config.style.after_clip}" * len(more)
        turns.append({"role": "user", "content": placeholders + question})
        answers.append(model.ask(clips, turns, **OPTIONS))
        turns.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize("integration", ["plits", "lal", "pal", FLAMINGO], ids=str)
def test_each_turn_is_the_whole_conversation_and_each_part_is_read_once(integration, monkeypatch):
    model = tiny_model(integration)
    answers = expected(model)
    heard, rows = [], []
    hear, run = Session.hear, Session.run
    monkeypatch.setattr(Session, "hear", lambda self, one, **more: (heard.append(one.lengths), hear(self, one, **more)))
    monkeypatch.setattr(
        Session, "run", lambda self, x, *given: (rows.append((given[1], x.shape[1])), run(self, x, *given))[1]
    )
    found, chat = said(model)
    assert found == answers
    assert len(heard) == len(chat.clips) == 4
    turns = chat.turns[:-1]
    whole = len(answering_ids(model, turns))
    assert chat.reads <= whole + sum(5 for _ in answers)
    text = sum(count for kind, count in rows if kind == "text")
    assert text <= whole + 2 * 5 * len(answers)  # answers, and those that were tokenised anew
    assert [turn["content"] for turn in chat.turns[1::2]] == answers


def answering_ids(model, turns):
    from pal.conversations import read_question

    count = sum(turn["content"].count("<audio>") for turn in turns)
    return read_question(turns, count, model.tokenizer, model.config.style).tokens[0].ids


@pytest.mark.parametrize(
    "options",
    [
        {"integration": "lal_audio_query"},
        {"integration": "lal", "connector": CONNECTORS["transformer"]},
        {"integration": "pal_routed", "encoders": [ENCODER, WHISPER]},
        {"integration": "pal", "connector": CONNECTORS["conv"]},
    ],
    ids=str,
)
def test_models_without_a_session_read_all_again(options):
    model = tiny_model(**options)
    found, _ = said(model, TALK[:3])
    assert found == expected(model, TALK[:3])


def test_a_conversation_may_begin_without_audio_and_without_adapters():
    model = tiny_model("lal", adapters="with_audio")
    model.requires_grad_(False)
    model.llm.add_lora(LoRA(r=2, targets=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    model.eval()
    talk = [("yes", []), ("no", []), *TALK[:2]]
    found, _ = said(model, talk)
    assert found == expected(model, talk)


COUNTS = (
    "{% for m in messages %}{{ messages | length if messages | length > 2 else '' }}{{ m['role'] }}: {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKS_THE_LAST = (
    "{% for m in messages %}{{ m['role'] }}{{ '!' if loop.last and loop.index > 2 else '' }}: {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)

ENDS_THE_LAST = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '!' if loop.last and loop.index > 1 else '.' }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("template", [COUNTS, MARKS_THE_LAST], ids=["from the first word", "the last turn"])
def test_a_template_that_rewrites_earlier_turns(template):
    model = tiny_model("pal")
    model.tokenizer.chat_template = template
    found, _ = said(model)
    assert found == expected(model)


def test_a_long_clip_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(answering, "LONG_TOKENS", 20)
    model = tiny_model("lal")
    stored = []
    ours = Session.hear_stored
    monkeypatch.setattr(Session, "hear_stored", lambda self, one: (stored.append(one.lengths[0]), ours(self, one)))
    found, _ = said(model)
    assert stored == [23]
    monkeypatch.setattr(answering, "LONG_TOKENS", 10_000)
    assert found == expected(model)


def test_an_option_that_needs_another_loop_reads_all_again():
    model = tiny_model("pal")
    chat = model.chat()
    first = chat.ask("What sound is this?", clip(0.9, 1), **OPTIONS)
    second = chat.ask("Is it loud?", num_beams=2, **OPTIONS)
    third = chat.ask("yes", **OPTIONS)
    turns = [
        {"role": "user", "content": f"<audio>{model.config.style.after_clip}What sound is this?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Is it loud?"},
    ]
    assert second == model.ask(clip(0.9, 1), turns, num_beams=2, **OPTIONS)
    turns += [{"role": "assistant", "content": second}, {"role": "user", "content": "yes"}]
    assert third == model.ask(clip(0.9, 1), turns, **OPTIONS)


def test_what_fails_leaves_the_conversation_as_it_was(tmp_path, monkeypatch):
    model = tiny_model("lal")
    chat = model.chat()
    chat.ask(*TALK[0], **OPTIONS)
    before = (list(chat.turns), len(chat.clips))
    with pytest.raises(AudioError, match="no such file"):
        chat.ask("And this?", [clip(0.5, 2), tmp_path / "none.wav"])
    with pytest.raises(PromptError, match="clips"):
        chat.ask("And <audio>?")
    with pytest.raises(PalError, match="unknown option"):
        chat.ask("And?", max_tokens=3)
    choose = Session.generate
    monkeypatch.setattr(Session, "generate", lambda self, *given, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        chat.ask(*TALK[2], **OPTIONS)
    monkeypatch.setattr(Session, "generate", choose)
    assert (chat.turns, len(chat.clips)) == before
    talk = [TALK[0], (TALK[2][0], [clip(0.5, 9)]), *TALK[3:]]  # as long as the clip of the turn that failed
    assert [chat.ask(question, clips, **OPTIONS) for question, clips in talk[1:]] == expected(model, talk)[1:]


def test_moments_of_a_turn_that_failed_are_not_returned_to(monkeypatch):
    """The template ends the last turn in another way, so the turn after it begins within what was read."""
    model = tiny_model("lal")
    model.tokenizer.chat_template = ENDS_THE_LAST
    chat = model.chat()
    chat.ask(*TALK[0], **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "generate", lambda self, *given, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chat.ask("yes", [clip(0.3, 2)], **OPTIONS)
    talk = [TALK[0], ("yes, and what sound is this? Is it loud?", [clip(1.2, 3)]), TALK[1]]
    assert [chat.ask(question, clips, **OPTIONS) for question, clips in talk[1:]] == expected(model, talk)[1:]


def test_audio_that_is_hidden_is_hidden_in_a_chat():
    from pal.backbone.audio_mask import AudioMask

    model = tiny_model("lal")
    chat = model.chat()
    chat.ask(*TALK[0], **OPTIONS)
    with model.hiding(AudioMask()):
        hidden = chat.ask(*TALK[1], **OPTIONS)
        first, question = chat.turns[1]["content"], chat.turns[2]
        turns = [chat.turns[0], {"role": "assistant", "content": first}, question]
        assert hidden == model.ask(TALK[0][1], turns, **OPTIONS)
