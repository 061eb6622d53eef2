"""Parse chats in the formats of common clients: text and audio parts of messages.

The content of a message is a string or a list of parts. A part is a string, `{"type": "text", "text": ...}` (also
`input_text` and `output_text`), or audio in one of the forms of `pal.clips`. If a part has no `type`, its keys decide.
An audio part without a clip is a placeholder; its clip is given separately.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pal.clips import part_clip
from pal.data.manifest import PLACEHOLDER
from pal.data.prompts import ROLES, PromptStyle
from pal.errors import PromptError

if TYPE_CHECKING:
    from pal.data.prompts import Conversation

_TEXTS = ("text", "input_text", "output_text")
_AUDIO = ("audio", "audio_url", "input_audio")


def read_chat(messages: Any, style: PromptStyle) -> tuple[Conversation, list[Any]]:
    """Parse a chat: the conversation as `pal.data.prompts` takes it, and the clip of each audio part.

    The clip is as in the part (a path, an array, ...), and None for a placeholder.

    Args:
        messages: dicts with `role` and `content`.
        style: system prompt, for a chat without one, and text after clips.

    Raises:
        PromptError: not a chat, or a part of unknown type.
        AudioError: see `pal.clips.part_clip`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise PromptError("a chat is a list of messages with 'role' and 'content'")
    talk: Conversation = []
    sources: list[Any] = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise PromptError(f"a message needs 'role' and 'content', not {reprlib.repr(message)}")
        if message.get("tool_calls") or message["role"] in ("tool", "function"):
            raise PromptError("tool calls are not supported; write the tool's result into a user message")
        if message["role"] not in ROLES:
            raise PromptError(f"unknown role '{message['role']}'; known: {', '.join(ROLES)}")
        if message["content"] is None:
            raise PromptError(f"the content of a message of role '{message['role']}' is None; give text or parts")
        content, found = _content(message["content"], style.after_clip)
        talk.append({"role": message["role"], "content": content})
        sources += found
    if style.system and all(message["role"] != "system" for message in talk):
        talk.insert(0, {"role": "system", "content": style.system})
    return talk, sources


def _content(content: Any, after_clip: str) -> tuple[str, list[Any]]:
    if isinstance(content, str):
        return content, [None] * content.count(PLACEHOLDER)
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise PromptError(f"content must be a string or a list of parts, not {reprlib.repr(content)}")
    text = ""
    sources: list[Any] = []
    for at, part in enumerate(content):
        kind = _kind(part)
        if kind in _TEXTS:
            words = part if isinstance(part, str) else part.get("text")
            if not isinstance(words, str):
                raise PromptError(f"a part of type '{kind}' needs 'text', not {reprlib.repr(words)}")
            text += words
            sources += [None] * words.count(PLACEHOLDER)
        elif kind in _AUDIO:
            text += PLACEHOLDER + (after_clip if at + 1 < len(content) else "")
            sources.append(part_clip(part))
        else:
            raise PromptError(f"a part of type '{kind}' is unknown; known: audio, text, audio_url, input_audio")
    return text, sources


def _kind(part: Any) -> Any:
    if isinstance(part, str):
        return "text"
    if not isinstance(part, Mapping):
        return type(part).__name__
    if part.get("type") is not None:
        return part["type"]
    return next((kind for kind in (*_AUDIO, "text") if part.get(kind) is not None), None)
