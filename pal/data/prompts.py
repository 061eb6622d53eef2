"""Tokenisation of conversations, with the positions of clips and the labels of trained tokens.

A conversation is a list of `{"role": ..., "content": ...}`, with the placeholder `<audio>` for each clip.
It is rendered by the tokenizer's chat template, or by LTU's template if there is none, split at the
placeholders and around the answers, and each piece is tokenised separately. So a prompt is always a
prefix of its training sequence, token for token, and no vocabulary needs an audio token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from pal.data.manifest import PLACEHOLDER, Record
from pal.errors import PromptError
from pal.types import AUDIO, IGNORE, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, str]]

ROLES = ("system", "user", "assistant")

_TEMPLATE_OPTIONS: dict[str, Any] = {
    # Llama 3's template would write today's date, so that a run would depend on the day.
    "date_string": "26 Jul 2024",
    # Qwen3's template would otherwise train the empty thinking block.
    "enable_thinking": False,
}

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True)
class PromptStyle:
    """The parts of a prompt that a model adds to what it is asked."""

    system: str | None = None
    """System message of conversations without one."""
    after_clip: str = ""
    """Text between a clip and what follows it, unless the question says where its clips stand."""


PLAIN = PromptStyle()
"""No system message, and no text after clips."""


def user_turn(question: str, n_clips: int, after_clip: str = "") -> dict[str, str]:
    """User message about `n_clips` clips: placeholders first, unless the question has its own.

    Args:
        question: the text.
        n_clips: number of placeholders.
        after_clip: text after each of them.
    """
    if PLACEHOLDER not in question:
        question = f"{PLACEHOLDER}{after_clip}" * n_clips + question
    return {"role": "user", "content": question}


def without_audio(question: str) -> str:
    """The question without its placeholders, for the baseline without audio."""
    return re.sub(re.escape(PLACEHOLDER) + r"\n?", "", question)


def conversation_of(
    record: Record, with_audio: bool = True, with_answers: bool = True, style: PromptStyle = PLAIN
) -> Conversation:
    """The conversation of a record.

    Args:
        record: its clips are at the placeholders of its questions, else before the first question.
        with_audio: False leaves the placeholders out.
        with_answers: False leaves the last answer out; earlier answers stay as history.
        style: system message to start with, and text after clips.
    """
    placed = any(PLACEHOLDER in turn.question for turn in record.turns)
    conversation = [{"role": "system", "content": style.system}] if style.system else []
    for number, turn in enumerate(record.turns):
        if with_audio:
            clips = len(record.clips) if number == 0 and not placed else 0
            conversation.append(user_turn(turn.question, clips, style.after_clip))
        else:
            conversation.append({"role": "user", "content": without_audio(turn.question)})
        conversation.append({"role": "assistant", "content": turn.answer})
    return conversation if with_answers else conversation[:-1]


def encode(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, clips: Sequence[int], train: bool = False
) -> Tokens:
    """Token ids of a conversation, never truncated.

    Args:
        tokenizer: any Hugging Face tokenizer.
        conversation: ends with a question, or with an answer when `train`.
        clips: for each placeholder in order, which clip of the batch stands there.
        train: True labels every answer with its end-of-turn token, and nothing else; False ends
            with the template's generation prompt.

    Raises:
        PromptError: placeholders and clips differ in number; the roles do not fit; the chat template
            refuses the conversation or, when training, rewrites its earlier turns.
    """
    _check(conversation, len(clips), train)
    conversation, typed = _escape_special_tokens(tokenizer, conversation)
    pieces = _pieces(tokenizer, conversation, train)
    rendered = "".join(text for text, _ in pieces)
    if rendered.count(PLACEHOLDER) != len(clips):
        raise PromptError(
            f"the chat template made {rendered.count(PLACEHOLDER)} placeholders of {len(clips)}; "
            "use a template that writes every message once"
        )
    specials = _special_ids(tokenizer)
    ids = _bos(tokenizer, rendered)
    labels = [IGNORE] * len(ids)
    for text, is_answer in pieces:
        piece = _tokenise(tokenizer, text, typed)
        end = len(piece)
        if is_answer:
            ends = [at for at, token in enumerate(piece) if token in specials]
            if ends:
                # Text after the end-of-turn token (ChatML's line break) is never generated.
                end = ends[-1] + 1
            elif tokenizer.eos_token_id is None:
                raise PromptError("neither the chat template nor the tokenizer ends an answer; set tokenizer.eos_token")
            else:
                piece.append(tokenizer.eos_token_id)
                end += 1
        ids += piece
        labels += [token if is_answer and at < end else IGNORE for at, token in enumerate(piece)]
    return Tokens(ids, list(clips), labels if train else None)


def encode_as_is(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, clips: Sequence[int], prompt: bool
) -> Tokens:
    """Token ids of a conversation with any last turn. Use `encode` to answer or train.

    Args:
        tokenizer: any Hugging Face tokenizer.
        conversation: any turns.
        clips: for each placeholder in order, which clip of the batch stands there.
        prompt: end with the template's generation prompt.

    Raises:
        PromptError: placeholders and clips differ in number, or the chat template refuses the conversation.
    """
    conversation, typed = _escape_special_tokens(tokenizer, conversation)
    return _tokens(tokenizer, render(tokenizer, conversation, prompt), typed, clips)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, clips: Sequence[int]) -> Tokens:
    """Token ids of a rendered prompt, whose special tokens are parsed as such. Never truncated.

    Raises:
        PromptError: placeholders and clips differ in number.
    """
    return _tokens(tokenizer, text, {}, clips)


def end_of_answer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-answer ids: the template's end-of-turn token and the tokenizer's eos."""
    sample = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        labels = encode(tokenizer, sample, [], train=True).labels or []
        last = [label for label in labels if label != IGNORE][-1:]
    except PromptError:  # a template that rewrites the question when there is an answer
        written = tokenizer(render(tokenizer, sample, prompt=False), add_special_tokens=False)["input_ids"]
        last = [token for token in written if token in tokenizer.all_special_ids][-1:]
    ids = [*last, tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in ids if token is not None))


def _check(conversation: Conversation, n_clips: int, train: bool) -> None:
    for message in conversation:
        if not isinstance(message.get("content"), str) or "role" not in message:
            raise PromptError("a message needs 'role' and a text as 'content'; chats with parts go to the processor")
        if message["role"] not in ROLES:
            raise PromptError(f"unknown role '{message['role']}'; known: {', '.join(ROLES)}")
        if message["role"] == "assistant" and PLACEHOLDER in message["content"]:
            raise PromptError(f"an answer holds '{PLACEHOLDER}'; clips may stand in questions only")
    last = conversation[-1]["role"] if conversation else None
    if train and last != "assistant":
        raise PromptError("a conversation to train on must end with an answer")
    if not train and last != "user":
        raise PromptError("a conversation to be answered must end with a question of the user")
    _check_clips(sum(message["content"].count(PLACEHOLDER) for message in conversation), n_clips)


def _check_clips(placed: int, n_clips: int) -> None:
    if placed > n_clips:
        raise PromptError(
            f"{placed} '{PLACEHOLDER}' placeholders but {n_clips} clips; give a clip for each, or remove some"
        )
    if placed < n_clips:
        raise PromptError(
            f"{n_clips} clips but {placed} '{PLACEHOLDER}' placeholders; put one into a question for each clip"
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, typed: dict[str, str], clips: Sequence[int]) -> Tokens:
    _check_clips(text.count(PLACEHOLDER), len(clips))
    return Tokens([*_bos(tokenizer, text), *_tokenise(tokenizer, text, typed)], list(clips))


def _pieces(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, train: bool) -> list[tuple[str, bool]]:
    """Pieces of the rendered text: (text, whether it is an answer with its end-of-turn token)."""
    whole = render(tokenizer, conversation, prompt=not train)
    pieces = []
    done = 0
    for at, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, conversation[:at], prompt=True)
        after = render(tokenizer, conversation[: at + 1], prompt=False)
        if not (after.startswith(before) and whole.startswith(after)):
            if train:
                raise PromptError(
                    "the chat template rewrites earlier turns, so one sequence cannot train them all; "
                    "give each answer a record of its own"
                )
            # For inference the history is as the template writes it, in one piece.
            return [(whole, False)]
        pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    return [*pieces, (whole[done:], False)]


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, prompt: bool) -> str:
    """Rendered text of a conversation, with `<audio>` for each clip; `prompt` adds the generation prompt.

    Raises:
        PromptError: the chat template refuses the conversation.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return _render_ltu(conversation, prompt)
    if not conversation:  # the text before a first answer
        raise PromptError("a chat cannot begin with an answer; put a message of the user before it")
    try:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=prompt, **_TEMPLATE_OPTIONS
        )
    except TemplateError as error:
        fault = " ".join(str(error).split())
        raise PromptError(f"the chat template refuses this conversation: {fault}") from error
    assert isinstance(text, str)
    return text


def _render_ltu(conversation: Conversation, prompt: bool) -> str:
    """LTU's template (github YuanGongND/ltu), a single-turn template, here repeated for each turn."""
    headings = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
    text = ""
    for message in conversation:
        # The tokenizer's eos ends an answer, so only other roles end with a blank line.
        blank = "" if message["role"] == "assistant" else "\n\n"
        text += headings[message["role"]] + message["content"] + blank
    return text + headings["assistant"] if prompt else text


def _escape_special_tokens(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> tuple[Conversation, dict[str, str]]:
    """Replace special tokens in the messages by unused characters, so that they are tokenised as plain text.

    Returns the conversation and the text that each such character replaces.
    """
    contents = "".join(message["content"] for message in conversation)
    found = [token for token in _special_texts(tokenizer) if token in contents and token != PLACEHOLDER]
    if not found:
        return conversation, {}
    unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in contents)
    typed = {next(unused): token for token in found}
    stand_in = {token: character for character, token in typed.items()}
    pattern = re.compile("|".join(re.escape(token) for token in sorted(found, key=len, reverse=True)))
    escaped = [
        {"role": message["role"], "content": pattern.sub(lambda match: stand_in[match[0]], message["content"])}
        for message in conversation
    ]
    return escaped, typed


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str, typed: dict[str, str]) -> list[int]:
    cuts = "|".join(re.escape(mark) for mark in (PLACEHOLDER, *typed))
    ids: list[int] = []
    for part in re.split(f"({cuts})", text):
        if part == PLACEHOLDER:
            ids.append(AUDIO)
        elif part in typed:
            ids += _ids(tokenizer, typed[part], split_special_tokens=True)
        elif part:
            ids += _ids(tokenizer, part)
    return ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        raise PromptError(f"a text holds {found}, half of a surrogate pair and no character; mend the text") from None
    # A saved tokenizer may have truncation or padding enabled: both are disabled explicitly.
    encoding = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False, **options)
    return list(encoding["input_ids"])


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    return {*tokenizer.all_special_ids, *added}


def _bos(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """The start token, if the tokenizer would add it and the template has not."""
    if tokenizer.bos_token_id is None or tokenizer.bos_token in rendered:
        return []
    adds = tokenizer("a", truncation=False, verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if adds else []
