"""The tokenizer: deterministic, lossless on any text, with a chat template whose parts are special tokens."""

import pytest
from transformers import AutoTokenizer

from pal.backbone.tokenizer import train_tokenizer

TEXTS = ["a dog barks twice", "what sound is this?", "the bell rings after the siren"] * 4


def test_any_text_comes_back():
    tokenizer = train_tokenizer(TEXTS, 320)
    for text in ("a dog barks", " zwölf 犬 🔔 \n\t x", "UNSEEN — bytes"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) <= 320
    assert len(tokenizer("the bell rings").input_ids) < len("the bell rings")


def test_the_same_texts_give_the_same_tokenizer():
    assert train_tokenizer(TEXTS, 320).get_vocab() == train_tokenizer(TEXTS, 320).get_vocab()


def test_a_word_is_the_same_token_in_question_and_answer():
    """Trap: an answer that starts without a space is other tokens, which learn on their own what the word means."""
    tokenizer = train_tokenizer([" siren"] * 9, 320)
    turns = [{"role": "user", "content": "a siren"}, {"role": "assistant", "content": "siren"}]
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False)).input_ids
    (siren,) = tokenizer(" siren").input_ids
    assert ids.count(siren) == 2


def test_chat_template(tmp_path):
    train_tokenizer(TEXTS, 320).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a dog"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<user>what?<assistant> a dog<eos>"
    assert (
        tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == "<user>what?<assistant>"
    )
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids("<user>")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == "what? a dog"


def test_too_small():
    with pytest.raises(ValueError, match="261"):
        train_tokenizer(TEXTS, 200)
