"""Requests as clients of OpenAI write them. An unknown field is an error that names it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from pal.serve.errors import ApiError

_HARMLESS = "accepted, and changes nothing"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class InputAudio(_Strict):
    """Audio: the base64 of a file's bytes, or the handle of a clip that was indexed."""

    data: str | None = Field(None, description="base64 of the bytes of an audio file; no URL and no path")
    format: str | None = Field(None, max_length=20, description="wav, mp3, flac, ...; the bytes decide")
    id: str | None = Field(None, max_length=100, description="a handle from /v1/audio/index")

    @model_validator(mode="after")
    def _one(self) -> InputAudio:
        if (self.data is None) == (self.id is None):
            raise ValueError("give 'data' (base64) with 'format', or 'id' (a handle from /v1/audio/index)")
        return self


class AudioPart(_Strict):
    """A clip in a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


def _kind(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"{kind} part" if isinstance(kind, str) else None


# tags with a blank, by which they can be told from fields in pydantic's locations
Part = Annotated[
    Annotated[TextPart, Tag("text part")] | Annotated[AudioPart, Tag("input_audio part")],
    Discriminator(
        _kind,
        custom_error_type="part_type",
        custom_error_message="parts of this type are not supported; known: text, input_audio",
    ),
]


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = Field(None, description=_HARMLESS)
    refusal: None = Field(None, description="as in answers; only null")
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)

    @field_validator("content")
    @classmethod
    def _something(cls, content: Any) -> Any:
        if isinstance(content, list) and not content:
            raise ValueError("the list of parts is empty; give text or audio")
        return content


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description=_HARMLESS)


class ResponseFormat(_Strict):
    """Only text."""

    type: Literal["text"]


class ChatRequest(_Strict):
    """`POST /v1/chat/completions`."""

    model: str = Field(max_length=200)
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, description="most tokens of an answer")
    max_completion_tokens: int | None = Field(None, ge=1, description="as max_tokens; give one of them")
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, takes the most likely token")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = Field(None, description="up to four strings")
    n: int | None = Field(None, ge=1, description="answers; at most the server's batch")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="with logprobs")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="only 0")
    presence_penalty: float | None = Field(None, ge=0, le=0, description="only 0")
    logit_bias: dict[str, float] | None = Field(None, max_length=0, description="only empty")
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: list[Any] | None = Field(None, max_length=0, description="only empty")
    tool_choice: Literal["none", "auto"] | None = None
    user: str | None = Field(None, description=_HARMLESS)
    store: bool | None = Field(None, description=f"{_HARMLESS}: nothing is stored")
    metadata: dict[str, str] | None = Field(None, description=_HARMLESS)
    service_tier: str | None = Field(None, description=_HARMLESS)
    safety_identifier: str | None = Field(None, description=_HARMLESS)
    prompt_cache_key: str | None = Field(None, description=_HARMLESS)
    parallel_tool_calls: bool | None = Field(None, description=_HARMLESS)

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: Any) -> Any:
        each = [stop] if isinstance(stop, str) else stop or []
        if len(each) > 4 or not all(1 <= len(one) <= 200 for one in each):
            raise ValueError("give up to four strings of 1 to 200 characters")
        return stop

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError("give max_tokens or max_completion_tokens, not both", 422, "max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true", 422, "top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options needs stream: true", 422, "stream_options")
        return self


class AttentionRequest(_Strict):
    """`POST /page/api/attention`: what the page asks about an answer."""

    model: str = Field(max_length=200)
    input_audio: InputAudio
    question: str = Field(max_length=2000)
    answer: str = Field(max_length=2000)


class IndexRequest(_Strict):
    """`POST /v1/audio/index`."""

    model: str = Field(max_length=200)
    input_audio: InputAudio
