"""Text while it is generated: whole characters, nothing of a stop string, and in the end the decoded answer."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pal.backbone.tokenizer import train_tokenizer
from pal.serve.text import TextStream
from tests.models import WORDS

TOKENIZER = train_tokenizer(WORDS, 320)


def streamed(ids, stops=()):
    text = TextStream(TOKENIZER, stops)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()], text.stopped


def whole(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@given(ids=st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_pieces_of_any_tokens_join_to_the_decoded_answer(ids):
    assert "".join(streamed(ids)[0]) == whole(ids).strip()


@given(text=st.text("añ€🦆 \n", max_size=12))
@example("🦆🦆")
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_piece_ends_within_a_character(text):
    pieces, _ = streamed(TOKENIZER.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text.strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(text=st.text("ab \n", max_size=16), stops=st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_answer_ends_before_the_first_stop_string(text, stops):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    pieces, stopped = streamed(ids, stops)
    said = [whole(ids[:count]) for count in range(len(ids) + 1)]
    text = next((one for one in said if any(stop in one for stop in stops)), text)
    found = min((text.find(stop) for stop in stops if stop in text), default=None)
    assert stopped == (found is not None)
    assert "".join(pieces) == (text if found is None else text[:found]).strip()


def test_text_is_given_out_at_once_where_no_stop_string_can_begin():
    assert streamed(TOKENIZER.encode("dog", add_special_tokens=False), ("\n",))[0][0] != ""
