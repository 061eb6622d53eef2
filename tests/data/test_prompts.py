"""Prompts against the rendered text tokenised whole, and their refusals."""

import pytest
from transformers import PreTrainedTokenizerFast

from pal.data.manifest import Record, Turn
from pal.data.prompts import PromptStyle, conversation_of, encode, end_of_answer, user_turn, without_audio
from pal.errors import PromptError
from pal.types import AUDIO, IGNORE

TALK = [
    {"role": "system", "content": "You hear."},
    user_turn("what sound is this", 1),
    {"role": "assistant", "content": "a dog barks"},
    {"role": "user", "content": "and this? <audio> which digit"},
    {"role": "assistant", "content": "seven"},
]


def record(*questions: str, clips: int = 1) -> Record:
    turns = tuple(Turn(question, f"answer {at}") for at, question in enumerate(questions))
    return Record("r", tuple(f"{at}.wav" for at in range(clips)), turns, "t", "d")


@pytest.fixture(params=["chatml", "llama", "plain"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Decoded, with the placeholders back in."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == AUDIO:
            parts.append([])
        else:
            parts[-1].append(token)
    return "<audio>".join(tokenizer.decode(part) if part else "" for part in parts)


def test_the_text_is_the_templates(chatml, llama):
    for tokenizer in (chatml, llama):
        theirs = tokenizer.apply_chat_template(TALK, tokenize=False)
        assert text_of(tokenizer, encode(tokenizer, TALK, [0, 1], train=True).ids) == theirs
        theirs = tokenizer.apply_chat_template(TALK[:-1], tokenize=False, add_generation_prompt=True)
        assert text_of(tokenizer, encode(tokenizer, TALK[:-1], [0, 1]).ids) == theirs


def test_without_a_template_it_is_ltus(plain):
    tokens = encode(plain, [{"role": "user", "content": "which digit"}], [])
    assert tokens.ids == plain("### Instruction:\nwhich digit\n\n### Response:\n").input_ids
    assert text_of(plain, encode(plain, TALK, [0, 1], train=True).ids) == (
        "<s>You hear.\n\n### Instruction:\n<audio>what sound is this\n\n### Response:\na dog barks</s>"
        "### Instruction:\nand this? <audio> which digit\n\n### Response:\nseven</s>"
    )


def test_single_turn_ids_are_those_of_the_whole_text(chatml, llama):
    question = [{"role": "user", "content": "what sound is this"}]
    for tokenizer in (chatml, llama):
        whole = tokenizer.apply_chat_template(question, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert encode(tokenizer, question, []).ids == whole


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("llama", "<|eot_id|>"), ("plain", "</s>")])
def test_answers_and_their_ends_are_trained_and_nothing_else(request, name, end):
    tokenizer = request.getfixturevalue(name)
    tokens = encode(tokenizer, TALK, [0, 1], train=True)
    assert tokens.labels is not None
    answers = [tokenizer(answer + end, add_special_tokens=False).input_ids for answer in ("a dog barks", "seven")]
    assert [label for label in tokens.labels if label != IGNORE] == answers[0] + answers[1]
    for token, label in zip(tokens.ids, tokens.labels, strict=True):
        assert label in (IGNORE, token)
        assert token != AUDIO or label == IGNORE


def test_a_prompt_is_a_prefix_of_its_training_sequence(tokenizer):
    whole = encode(tokenizer, TALK, [4, 2], train=True)
    for end, clips in ((2, [4]), (4, [4, 2])):
        prompt = encode(tokenizer, TALK[:end], clips)
        assert prompt.labels is None
        assert prompt.clips == clips
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        assert whole.labels is not None
        assert whole.labels[len(prompt.ids)] == whole.ids[len(prompt.ids)], "the first token after it is trained"


def test_the_start_token_comes_once(chatml, llama, plain):
    for tokenizer, times in ((chatml, 0), (llama, 1), (plain, 1)):
        ids = encode(tokenizer, TALK, [0, 1], train=True).ids
        assert ids.count(tokenizer.bos_token_id) == times
        if times:
            assert ids[0] == tokenizer.bos_token_id


def test_eos_is_added_where_the_template_ends_no_turn(make_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(["</s>"], template, eos_token="</s>")
    tokens = encode(tokenizer, TALK[1:], [0, 1], train=True)
    assert tokens.labels is not None
    assert tokens.ids.count(tokenizer.eos_token_id) == tokens.labels.count(tokenizer.eos_token_id) == 2
    prompt = encode(tokenizer, TALK[1:4], [0, 1])
    assert tokens.ids[: len(prompt.ids)] == prompt.ids, "the history of a prompt ends its answers too"
    tokenizer = make_tokenizer(["<x>"], template)
    with pytest.raises(PromptError, match="set tokenizer"):
        encode(tokenizer, TALK[1:], [0, 1], train=True)


def test_end_of_answer(chatml, llama, plain):
    assert end_of_answer(chatml) == chatml.convert_tokens_to_ids(["<|im_end|>"])
    assert end_of_answer(llama) == llama.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    assert end_of_answer(plain) == plain.convert_tokens_to_ids(["</s>"])


def test_a_template_that_rewrites_its_questions_still_has_an_end_of_answer(make_tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + '<end>' }}"
        "{% else %}{{ (messages | length) ~ ' ' ~ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(["</s>", "<end>"], template, eos_token="</s>", additional_special_tokens=["<end>"])
    assert end_of_answer(tokenizer) == tokenizer.convert_tokens_to_ids(["<end>", "</s>"])


def test_special_tokens_that_somebody_types_stay_text(tokenizer):
    clean = encode(tokenizer, TALK, [0, 1], train=True)
    for special in (*tokenizer.all_special_tokens, *(t.content for t in tokenizer.added_tokens_decoder.values())):
        talk = [dict(message) for message in TALK]
        talk[1]["content"] += special
        talk[2]["content"] = f"a{special}dog"
        tokens = encode(tokenizer, talk, [0, 1], train=True)
        number = tokenizer.convert_tokens_to_ids(special)
        assert tokens.ids.count(number) == clean.ids.count(number)
        assert text_of(tokenizer, tokens.ids).count(f"a{special}dog") == 1
        assert tokens.labels is not None
        ends = [label for label in tokens.labels if label in end_of_answer(tokenizer)]
        assert len(ends) == 2


def test_saved_truncation_and_padding_are_ignored(make_tokenizer):
    tokenizer = make_tokenizer(["</s>"], None, eos_token="</s>", pad_token="</s>")
    talk = [user_turn("what sound is this " * 200, 1)]
    expected = encode(tokenizer, talk, [0]).ids
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=4096)
    tokenizer.model_max_length = 8
    assert len(expected) > 500
    assert encode(tokenizer, talk, [0]).ids == expected


def test_a_template_with_a_date_does_not_change_from_day_to_day(make_tokenizer):
    # Llama 3.2's way of writing the date
    template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y %f') %}{% endif %}"
        "Today: {{ date_string }} {{ messages[0].content }}"
    )
    tokenizer = make_tokenizer(["</s>"], template, eos_token="</s>")
    ids = encode(tokenizer, [user_turn("what", 0)], []).ids
    assert tokenizer.decode(ids) == "Today: 26 Jul 2024 what"


THINKING = (  # Qwen3's way: the block of thoughts stands in the last answer only
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_thoughts_are_not_trained_and_rewritten_turns_are_refused(make_tokenizer):
    tokenizer = make_tokenizer(["<|im_start|>", "<|im_end|>"], THINKING, eos_token="<|im_end|>")
    tokens = encode(tokenizer, TALK[:3], [0], train=True)
    trained = [label for label in tokens.labels or [] if label != IGNORE]
    assert tokenizer.decode(trained) == "a dog barks<|im_end|>"
    with pytest.raises(PromptError, match="rewrites earlier turns"):
        encode(tokenizer, TALK, [0, 1], train=True)
    whole = tokenizer.apply_chat_template(TALK[:4], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert text_of(tokenizer, encode(tokenizer, TALK[:4], [0, 1]).ids) == whole


def test_a_template_that_refuses_or_loses_a_message(make_tokenizer):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}a"
    with pytest.raises(PromptError, match="refuses this conversation: System role not supported"):
        encode(make_tokenizer(["</s>"], refuses, eos_token="</s>"), TALK[:2], [0])
    loses = "{{ messages[-1].role }}"
    with pytest.raises(PromptError, match="0 placeholders of 1"):
        encode(make_tokenizer(["</s>"], loses, eos_token="</s>"), TALK[:2], [0])


@pytest.mark.parametrize(
    ("talk", "clips", "train", "message"),
    [
        (TALK[:2], [], False, "1 '<audio>' placeholders but 0 clips"),
        (TALK[:2], [0, 1], False, "2 clips but 1 '<audio>' placeholders"),
        ([{"role": "user", "content": "what"}], [0], False, "1 clips but 0 '<audio>' placeholders"),
        ([{"role": "tool", "content": "what"}], [], False, "unknown role 'tool'; known: system, user, assistant"),
        (TALK[:2], [0], True, "must end with an answer"),
        (TALK[:3], [0], False, "must end with a question"),
        ([], [], False, "must end with a question"),
        ([*TALK[:2], {"role": "assistant", "content": "<audio>"}], [0, 1], True, "an answer holds '<audio>'"),
    ],
)
def test_faults_are_one_line(chatml, talk, clips, train, message):
    with pytest.raises(PromptError) as caught:
        encode(chatml, talk, clips, train)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_user_turn_puts_clips_first_unless_they_have_a_place():
    assert user_turn("what?", 2)["content"] == "<audio><audio>what?"
    assert user_turn("what?", 2, "\n")["content"] == "<audio>\n<audio>\nwhat?"
    assert user_turn("is <audio> louder?", 1)["content"] == "is <audio> louder?"
    assert user_turn("what?", 0)["content"] == "what?"
    assert without_audio(user_turn("what?", 2)["content"]) == "what?"
    assert without_audio(user_turn("what?", 2, "\n")["content"]) == "what?"


def test_conversation_of_a_record():
    two = record("what?", "how many?")
    assert conversation_of(two, style=PromptStyle("Hear.", "\n")) == [
        {"role": "system", "content": "Hear."},
        {"role": "user", "content": "<audio>\nwhat?"},
        {"role": "assistant", "content": "answer 0"},
        {"role": "user", "content": "how many?"},
        {"role": "assistant", "content": "answer 1"},
    ]
    assert [message["content"] for message in conversation_of(two, with_answers=False)] == [
        "<audio>what?",
        "answer 0",
        "how many?",
    ]
    placed = record("what?", "is it <audio> or <audio>?", clips=2)
    assert conversation_of(placed)[0]["content"] == "what?"
    assert conversation_of(placed, with_audio=False)[2]["content"] == "is it  or ?"
