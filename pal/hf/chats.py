"""Chats as clients write them: messages whose contents are texts or lists of parts, and the clips that these hold.

| part | its clip |
|---|---|
| `{"type": "audio", ...}` | `audio`, `url`, `path`, `audio_url`, `base64` or `data`; or the keys of a clip as a dict |
| `{"type": "audio_url", "audio_url": ...}` | an address, or `{"url": ...}` (Qwen, vLLM) |
| `{"type": "input_audio", "input_audio": {"data": ..., "format": ...}}` | base64 (OpenAI), or an address |
| `{"type": "text", "text": ...}`, or a string | none; also `input_text` and `output_text` |

A part without `type` is what its keys say. An audio part without a clip marks a place.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pal.audio import Limits
from pal.audio.addresses import from_base64, is_address
from pal.audio.declared import DecodeError
from pal.data.manifest import PLACEHOLDER
from pal.data.prompts import ROLES
from pal.errors import AudioError, PromptError

if TYPE_CHECKING:
    from pal.data.prompts import Conversation

_TEXTS = ("text", "input_text", "output_text")
_AUDIO = ("audio", "audio_url", "input_audio")
_CLIPS = ("audio", "url", "path", "audio_url", "input_audio")
"""Keys that hold a clip or its address."""
_BASE64 = ("base64", "data")
_DICTS = ("array", "raw", "waveform", "bytes")
"""Keys of a part that is itself a clip as a dict."""
_CUTS = ("audio_start", "audio_end", "start", "end", "offset", "duration")
"""Keys that ask for a piece of a clip elsewhere."""


def read_chat(messages: Any, system: str | None) -> tuple[Conversation, list[Any]]:
    """A chat as `pal.data.prompts` takes it, and what each of its audio parts holds, None for a bare place.

    Args:
        messages: with `role` and `content`.
        system: put before a chat that brings no system message.

    Raises:
        PromptError: no chat, or a part of an unknown kind.
        AudioError: an audio part that does not say which clip it is.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise PromptError("a chat is a list of messages with 'role' and 'content'")
    talk: Conversation = []
    sources: list[Any] = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise PromptError(f"a message needs 'role' and 'content', not {reprlib.repr(message)}")
        if message.get("tool_calls") or message["role"] in ("tool", "function"):
            raise PromptError("calls of tools are not supported; write what they gave into a message of the user")
        if message["role"] not in ROLES:
            raise PromptError(f"unknown role '{message['role']}'; known: {', '.join(ROLES)}")
        if message["content"] is None:
            raise PromptError(f"the content of a message of role '{message['role']}' is None; give text or parts")
        content, found = _content(message["content"])
        talk.append({"role": message["role"], "content": content})
        sources += found
    if system and all(message["role"] != "system" for message in talk):
        talk.insert(0, {"role": "system", "content": system})
    return talk, sources


def _content(content: Any) -> tuple[str, list[Any]]:
    if isinstance(content, str):
        return content, [None] * content.count(PLACEHOLDER)
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise PromptError(f"a content is a text or a list of parts, not {reprlib.repr(content)}")
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
            text += PLACEHOLDER + ("\n" if at + 1 < len(content) else "")
            sources.append(clip_of(part))
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


def clip_of(part: Mapping[str, Any]) -> Any:
    """What an audio part of a message holds, as `read_clip` takes it; None where it only marks a place.

    Raises:
        AudioError: two clips, a piece of one, or base64 that is none.
    """
    cuts = [key for key in _CUTS if part.get(key) is not None]
    if cuts:
        raise AudioError(f"an audio part has '{cuts[0]}', and clips are heard whole; cut the clip yourself")
    if any(part.get(key) is not None for key in _DICTS):
        return part
    given = [key for key in (*_CLIPS, *_BASE64) if part.get(key) is not None]
    if len(given) > 1:
        raise AudioError(f"an audio part has {' and '.join(given)}; give one of {', '.join(_CLIPS)}")
    if not given:
        return None
    clip = part[given[0]]
    encoded = given[0] in (*_BASE64, "input_audio")
    if isinstance(clip, Mapping) and given[0] in ("input_audio", "audio_url", "audio", "url"):
        inner = [key for key in ("url", *_BASE64) if isinstance(clip.get(key), str | bytes)]
        if len(inner) == 1:
            encoded, clip = inner[0] in _BASE64, clip[inner[0]]
        elif given[0] in ("input_audio", "audio_url"):
            raise AudioError(f"the '{given[0]}' of an audio part needs 'data' or 'url'; give one of them")
    if given[0] == "path" and isinstance(clip, bytes):
        return os.fsdecode(clip)
    if encoded and isinstance(clip, str | bytes) and not (isinstance(clip, str) and is_address(clip)):
        try:
            return from_base64(clip, Limits().max_bytes)
        except DecodeError as error:
            if isinstance(clip, bytes):
                return clip  # the bytes of a file as they are
            raise AudioError(f"'{given[0]}' of an audio part: {error.what}; {error.remedy}") from None
    rate = part.get("sampling_rate")
    bare = isinstance(clip, list) or hasattr(clip, "__array__")
    return {"array": clip, "sampling_rate": rate} if bare and rate is not None else clip
