"""Conversion of users' questions about clips to conversations of token ids."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pal.backbone.shared_prefix import Continuations
from pal.data.manifest import PLACEHOLDER
from pal.data.prompts import PromptStyle, encode, user_turn
from pal.errors import PromptError, shortened
from pal.types import AUDIO, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatTurns = list[dict[str, str]]
"""`[{"role": ..., "content": ...}, ...]`, with `<audio>` in a content for each clip."""

Question = str | list[str] | tuple[str, ...] | ChatTurns
"""A text, several texts, or the turns of a chat."""


@dataclass(frozen=True)
class Conversations:
    """Token ids of the conversations that a question becomes, one for each answer."""

    tokens: list[Tokens]
    single: bool
    """True if the answer is returned alone, not in a list."""


def read_question(
    question: Question, clips: int, tokenizer: PreTrainedTokenizerBase, style: PromptStyle
) -> Conversations:
    """Tokenise the conversations that a question about clips becomes.

    Args:
        question: a text, several texts, or the turns of a chat.
        clips: number of clips. All questions are about a single clip. Several clips get one question each (one string
            is asked about each), or all are in one conversation: a chat, or a question with as many `<audio>`.
        tokenizer: of the model.
        style: system prompt for conversations without a system message, and text after clips.

    Raises:
        PromptError: neither texts nor chat turns, or clips and placeholders do not match.
    """
    given: Any = list(question) if isinstance(question, tuple) else question
    if isinstance(given, list) and given and isinstance(given[0], dict):
        _check(given, lambda turn: isinstance(turn, dict) and "role" in turn)
        return Conversations([_encode(given, list(range(clips)), tokenizer, style.system)], single=True)
    texts = given if isinstance(given, list) else [given]
    _check(texts, lambda text: isinstance(text, str))
    single = isinstance(given, str)
    if clips == 1 or (single and (PLACEHOLDER in given or not clips)):
        turns = [user_turn(text, clips, style.after_clip) for text in texts]
        made = [_encode([turn], list(range(clips)), tokenizer, style.system) for turn in turns]
        return Conversations(made, single)
    texts = texts * clips if single else texts
    if len(texts) != clips:
        raise PromptError(f"{clips} clips and {len(texts)} questions; give one question, or as many as clips")
    turns = [user_turn(text, 1, style.after_clip) for text in texts]
    made = [_encode([turn], [at], tokenizer, style.system) for at, turn in enumerate(turns)]
    return Conversations(made, single=False)


def check_ids(conversations: Sequence[Tokens], vocab: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise PromptError for an id without an embedding in an LLM with `vocab` embeddings."""
    for conversation in conversations:
        for number in conversation.ids:
            if not (0 <= number < vocab or number == AUDIO):
                entry = tokenizer.convert_ids_to_tokens(number) if number >= 0 else None
                named = f"'{str(entry)[:60]}' (id {number})" if entry else f"id {number}"
                raise PromptError(
                    f"{named} is outside of the LLM's vocabulary of {vocab}; leave it out, or give the LLM a row "
                    "for it with resize_token_embeddings"
                )


@dataclass(frozen=True)
class SharedPrefixes:
    """Conversations in two parts: what neighbours have in common, up to the end of their last clip, and the rest."""

    prefixes: list[Tokens]
    continuations: Continuations


def shared_prefixes(conversations: Sequence[Tokens]) -> SharedPrefixes | None:
    """Conversations split after their last clips.

    None if fewer than half would be saved, or a conversation has no clip, or no text before or after its clips.
    """
    parts = [_split(one) for one in conversations]
    groups = [list(group) for _, group in groupby(parts, key=lambda part: (part[0].ids, part[0].clips))]
    if 2 * len(groups) > len(parts) or not all(rest and set(prefix.ids) > {AUDIO} for prefix, rest in parts):
        return None
    rests = tuple(rest for _, rest in parts)
    return SharedPrefixes([group[0][0] for group in groups], Continuations(tuple(map(len, groups)), rests))


def _split(one: Tokens) -> tuple[Tokens, list[int]]:
    """The part of a conversation up to its last clip, and the token ids after it."""
    end = len(one.ids) - one.ids[::-1].index(AUDIO) if one.clips else 0
    return Tokens(one.ids[:end], one.clips), one.ids[end:]


def _check(questions: list[Any], fits: Callable[[Any], bool]) -> None:
    for one in questions:
        if not fits(one):
            raise PromptError(
                f"a question is a text, or a list of chat turns with 'role' and 'content', not "
                f"{shortened(reprlib.repr(one), 120)}"
            )


def _encode(talk: ChatTurns, clips: list[int], tokenizer: PreTrainedTokenizerBase, system: str | None) -> Tokens:
    if system and not any(turn["role"] == "system" for turn in talk):
        talk = [{"role": "system", "content": system}, *talk]
    return encode(tokenizer, talk, clips)
