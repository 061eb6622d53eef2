"""A served model: requests of clients become requests of its engine."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from pal.audio import Limits, Waveform
from pal.audio.stream_info import DecodeError
from pal.audio.urls import from_base64, is_url
from pal.conversations import check_ids, read_question
from pal.data.manifest import PLACEHOLDER
from pal.data.prompts import user_turn
from pal.errors import AudioError, PromptError
from pal.serve.audio_input import decode_request_audio
from pal.serve.decode_process import MEMORY_BYTES, SECONDS, DecodeProcesses
from pal.serve.decoded_clips import DecodedClips
from pal.serve.engine import Engine
from pal.serve.errors import ApiError
from pal.serve.replica import Replica
from pal.serve.requests import EngineRequest, Event, RequestClip
from pal.serve.sampling import SamplingOptions
from pal.serve.schemas import AttentionRequest, ChatRequest, InputAudio, Message, TextPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pal.backbone.audio_kv import AudioKV
    from pal.model import PalModel

Emit = Callable[[Event], None]
HANDLE = "audio-"
"""Beginning of the handle of an indexed clip."""
MEBI = 1 << 20
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ServeOptions:
    """Options of the application."""

    api_key: str | None = None
    max_body: int = 64 * MEBI
    """Bytes of a request."""
    limits: Limits = field(default_factory=lambda: Limits(max_seconds=600.0, max_bytes=64 * MEBI))
    max_tokens: int = 256
    """Of an answer, where the request says nothing."""
    max_clips: int = 32
    """Of a request."""
    decoders: int = 2
    """Processes that decode clips at once; 0 decodes in the server's own."""
    decoder_memory: int = MEMORY_BYTES
    """Bytes that each of them may take."""
    decoder_seconds: float = SECONDS
    """That each clip may take."""
    max_bodies: int = 512 * MEBI
    """Bytes of all requests that are not answered yet; at least those of one."""


class ServedModel:
    """Prepares requests for an engine; its methods may run in several threads.

    Args:
        engine: of the model.
        options: of the application.
        processes: that decode clips; None decodes in this one.
        replica: this server where it is one of several; clips by their handles are sought at the others, too.
    """

    def __init__(
        self,
        engine: Engine,
        options: ServeOptions,
        processes: DecodeProcesses | None = None,
        replica: Replica | None = None,
    ) -> None:
        self.engine, self.options, self.processes, self.replica = engine, options, processes, replica
        # fast tokenizers cannot be used by two threads at once, and the engine uses the model's own
        self.tokenizer: PreTrainedTokenizerBase = copy.deepcopy(engine.model.tokenizer)
        self._tokenizing = Lock()
        self._clips = DecodedClips()

    def chat(self, body: ChatRequest, emit: Emit) -> EngineRequest:
        """The engine's request of a chat.

        Raises:
            ApiError: what cannot be answered; `param` names the part.
        """
        n = body.n or 1
        if n > self.engine.batch:
            raise ApiError(f"n: at most {self.engine.batch} answers of one request", 400, "n")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        options = SamplingOptions(
            max_tokens=body.max_completion_tokens or body.max_tokens or self.options.max_tokens,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stop=stop,
            n=n,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        turns, given = self._turns(body.messages)
        if len(given) > self.options.max_clips:
            raise ApiError(f"{len(given)} clips in one request; at most {self.options.max_clips}", 400, "messages")
        clips = [self.clip(audio, param) for audio, param in given]
        return self._request(turns, clips, options, emit, "messages")

    def question(self, text: str, data: bytes, name: str, options: SamplingOptions, emit: Emit) -> EngineRequest:
        """The engine's request of one question about the bytes of one audio file."""
        turns = [user_turn(text, 1, self.engine.model.config.style.after_clip)]
        return self._request(turns, [self.decoded(data, name, "file")], options, emit, "prompt")

    def index(self, audio: InputAudio, emit: Emit) -> EngineRequest:
        """The engine's request to keep a clip."""
        return EngineRequest(None, [self.clip(audio, "input_audio")], SamplingOptions(), emit)

    def attention(
        self, body: AttentionRequest, emit: Emit, function: Callable[[PalModel, AudioKV, str, str], object]
    ) -> EngineRequest:
        """The engine's request to run a function of a clip, a question and its answer.

        Raises:
            ApiError: a clip that cannot be used.
        """
        if PLACEHOLDER in body.question:
            raise ApiError(f"'{PLACEHOLDER}' stands for a clip; leave it out", 400, "question")

        def run(clips: list[AudioKV]) -> object:
            return function(self.engine.model, clips[0], body.question, body.answer)

        return EngineRequest(None, [self.clip(body.input_audio, "input_audio")], SamplingOptions(), emit, run)

    def _request(
        self, turns: list[dict[str, str]], clips: list[RequestClip], options: SamplingOptions, emit: Emit, param: str
    ) -> EngineRequest:
        model = self.engine.model
        try:
            with self._tokenizing:
                (tokens,) = read_question(turns, len(clips), self.tokenizer, model.config.style).tokens
            check_ids([tokens], model.llm.vocab, self.tokenizer)
        except PromptError as error:
            raise ApiError(str(error), 400, param) from None
        return EngineRequest(tokens, clips, options, emit)

    def _turns(self, messages: list[Message]) -> tuple[list[dict[str, str]], list[tuple[InputAudio, str]]]:
        """The turns with a placeholder for each clip, and the clips with their places."""
        after_clip = self.engine.model.config.style.after_clip
        turns: list[dict[str, str]] = []
        found: list[tuple[InputAudio, str]] = []
        for number, message in enumerate(messages):
            where = f"messages[{number}].content"
            parts = (
                [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
            )
            content = ""
            for at, part in enumerate(parts):
                if isinstance(part, TextPart):
                    if PLACEHOLDER in part.text:
                        raise ApiError(f"'{PLACEHOLDER}' stands for a clip; give the clip as a part", 400, where)
                    content += part.text
                    continue
                if message.role != "user":
                    raise ApiError("clips may stand in messages of the user only", 400, f"{where}[{at}]")
                content += PLACEHOLDER + (after_clip if at + 1 < len(parts) else "")
                found.append((part.input_audio, f"{where}[{at}].input_audio"))
            role = "system" if message.role == "developer" else message.role
            turns.append({"role": role, "content": content})
        return turns, found

    def clip(self, audio: InputAudio, param: str) -> RequestClip:
        """A clip of a request, from the cache or decoded.

        Raises:
            ApiError: an unknown handle, a URL or path, broken base64 or audio.
        """
        if audio.id is not None:
            digest = audio.id.removeprefix(HANDLE)
            stored = self._stored(digest) if audio.id.startswith(HANDLE) else None
            if stored is None:
                said = "this audio is not in the cache (any more); index it again, or send the clip"
                raise ApiError(said, 404, f"{param}.id", "audio_not_found")
            return RequestClip(digest, stored)
        text = audio.data or ""
        if is_url(text[:200]):
            raise ApiError("URLs are not followed; send the bytes of the file as base64", 400, f"{param}.data", "url")
        try:
            data = from_base64(text, self.options.limits.max_bytes)
        except DecodeError as error:
            raise ApiError(f"{error.what}; {error.remedy}", 400, f"{param}.data", "invalid_base64") from None
        return self.decoded(data, audio.format or "", param)

    def _stored(self, digest: str) -> AudioKV | None:
        """Keys and values of an indexed clip: from the cache, else from another replica, and then in the cache."""
        found = self.engine.stored(digest)
        if found is None and self.replica is not None and _DIGEST.fullmatch(digest):
            found = self.replica.elsewhere(self.engine.name, digest)
            if found is not None:
                self.engine.keep(digest, found)
        return found

    def decoded(self, data: bytes, format: str, param: str) -> RequestClip:
        """A clip from the bytes of a file: its keys and values, if the cache has them, else samples."""
        digest = hashlib.sha256(self.engine.digest.encode() + data).hexdigest()
        stored = self.engine.stored(digest)
        if stored is not None:
            return RequestClip(digest, stored)

        def decode() -> Waveform:
            rate = self.engine.model.sampling_rate
            return decode_request_audio(data, format, rate, self.options.limits, self.processes)

        try:
            return RequestClip(digest, self._clips.get(digest, decode))
        except AudioError as error:
            code = "audio_too_long" if "longer than" in str(error) else "invalid_audio"
            raise ApiError(str(error), 400, param, code) from None

    def facts(self) -> dict[str, Any]:
        """The model in a list of models."""
        return {"id": self.engine.name, "object": "model", "created": 0, "owned_by": "pal"}
