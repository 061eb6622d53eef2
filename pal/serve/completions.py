"""Answers in OpenAI's shape: whole, and as a stream of chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi.sse import format_sse_event

from pal.serve.errors import ApiError
from pal.serve.requests import AnswerPiece, Computed, Finished, Indexed, Usage
from pal.serve.sampling import TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Events = AsyncIterator[AnswerPiece | Finished | Indexed | Computed]


def usage_of(usage: Usage) -> dict[str, Any]:
    """Token counts of a request."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"audio_tokens": usage.audio, "cached_tokens": usage.cached},
    }


class ChatAnswer:
    """The answer to a chat.

    Args:
        model: its name.
        fingerprint: of its weights.
        tokenizer: for the texts of single tokens; None without log-probabilities.
    """

    def __init__(self, model: str, fingerprint: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fp_{fingerprint[:12]}",
        }

    async def whole(self, events: Events) -> dict[str, Any]:
        """One JSON object."""
        texts: dict[int, str] = {}
        finish: dict[int, str | None] = {}
        tokens: dict[int, list[TokenLogprob]] = {}
        usage = Usage()
        async for event in events:
            if isinstance(event, AnswerPiece):
                texts[event.choice] = texts.get(event.choice, "") + event.text
                finish[event.choice] = event.finish
                tokens.setdefault(event.choice, []).extend(event.tokens)
            elif isinstance(event, Finished):
                usage = event.usage
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": texts[number], "refusal": None},
                "logprobs": self._logprobs(tokens[number]),
                "finish_reason": finish[number],
            }
            for number in sorted(texts)
        ]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage_of(usage)}

    async def chunks(self, first: AnswerPiece | None, events: Events, with_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events, beginning with a piece that was waited for already."""
        begun: set[int] = set()
        if first is not None:
            yield self._pieces(first, begun, with_usage)
        try:
            async for event in events:
                if isinstance(event, AnswerPiece):
                    yield self._pieces(event, begun, with_usage)
                elif isinstance(event, Finished):
                    usage = self._event([], usage_of(event.usage), with_usage) if with_usage else b""
                    yield usage + format_sse_event(data_str="[DONE]")
        except ApiError as error:  # the status was sent already
            yield format_sse_event(data_str=json.dumps(error.body()))

    def _pieces(self, piece: AnswerPiece, begun: set[int], with_usage: bool) -> bytes:
        """The events of one piece, to be sent together: each sending is a system call beside the engine's thread."""
        found = b""
        if piece.choice not in begun:
            begun.add(piece.choice)
            found += self._choice(piece.choice, {"role": "assistant", "content": ""}, with_usage)
        if piece.text or piece.tokens:
            found += self._choice(piece.choice, {"content": piece.text}, with_usage, tokens=piece.tokens)
        if piece.finish is not None:
            found += self._choice(piece.choice, {}, with_usage, finish=piece.finish)
        return found

    def _choice(
        self,
        number: int,
        delta: dict[str, str],
        with_usage: bool,
        finish: str | None = None,
        tokens: Sequence[TokenLogprob] = (),
    ) -> bytes:
        logprobs = self._logprobs(tokens) if tokens else None
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._event([choice], None, with_usage)

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, with_usage: bool) -> bytes:
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": choices}
        if with_usage:
            chunk["usage"] = usage
        return format_sse_event(data_str=json.dumps(chunk, ensure_ascii=False))

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.tokenizer is None:
            return None
        return {"content": [self._token(one) for one in tokens], "refusal": None}

    def _token(self, one: TokenLogprob) -> dict[str, Any]:
        top = [self._shown(token, logprob) for token, logprob in one.top]
        return {**self._shown(one.token, one.logprob), "top_logprobs": top}

    def _shown(self, token: int, logprob: float) -> dict[str, Any]:
        assert self.tokenizer is not None
        text = self.tokenizer.decode([token])
        assert isinstance(text, str)
        # a part of a character has no text of its own
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode()) if whole else None}
