"""The HTTP application: OpenAI's endpoints, health and metrics, and the page."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.sse import EventSourceResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from pal.data.manifest import PLACEHOLDER
from pal.serve import api_docs
from pal.serve.access import BearerAuth, BodyLimit, ReadsTheRest
from pal.serve.client_request import ClientRequest, EventInbox
from pal.serve.completions import ChatAnswer, usage_of
from pal.serve.decode_process import DecodeProcesses
from pal.serve.engine import Engine
from pal.serve.errors import ApiError, install_error_handlers
from pal.serve.metrics import Metrics
from pal.serve.page_routes import HEADERS, Attention, page_router
from pal.serve.replica import Replica, ReplicaHeader
from pal.serve.requests import AnswerPiece, ClosingError, Computed, EngineRequest, Finished, Indexed
from pal.serve.sampling import SamplingOptions
from pal.serve.schemas import ChatRequest, IndexRequest
from pal.serve.served import HANDLE, Emit, ServedModel, ServeOptions

TRANSCRIBE = "Transcribe the speech."
"""What a model is asked for a transcription, unless the request has a prompt."""
_FORM = ("file", "model", "prompt", "response_format", "temperature", "language", "stream")
_LOG = logging.getLogger(__name__)
_PREPARED = 2
"""Requests whose audio is decoded at once, at least."""


def create_app(
    engines: Mapping[str, Engine],
    options: ServeOptions | None = None,
    attention: Attention | None = None,
    processes: DecodeProcesses | None = None,
    replica: Replica | None = None,
) -> FastAPI:
    """The application for some engines by name; it closes them at its end.

    `attention` is what the page shows of an answer (`pal.probe.when.attention_by_word`); None shows nothing.
    `processes` decode clips and are closed, too; None starts `options.decoders` of them.
    `replica` is this server where it is one of several; it is named in responses and metrics.
    `app.state.stopping = True` refuses new requests, while those that run are answered; `app.state.give_up()` fails
    these, and returns whether there were any.
    """
    options = options or ServeOptions()
    if processes is None and options.decoders:
        processes = DecodeProcesses(options.decoders, options.decoder_memory, options.decoder_seconds)
    models = {name: ServedModel(engine, options, processes, replica) for name, engine in engines.items()}
    metrics = Metrics(engines, processes, replica)
    limiter: list[CapacityLimiter] = []
    inbox: list[EventInbox] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        limiter.append(CapacityLimiter(max(_PREPARED, options.decoders)))
        inbox.append(EventInbox())
        yield
        for engine in engines.values():
            await to_thread.run_sync(engine.close)
        if processes is not None:
            await to_thread.run_sync(processes.close)

    app = FastAPI(
        title="pal",
        summary="Questions about audio, by OpenAI's protocol.",
        docs_url=None,  # FastAPI's pages load scripts from another server
        redirect_slashes=False,  # a redirection would name the host that the client's request names
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.stopping = False

    def give_up() -> bool:
        left = sum(engine.give_up() for engine in engines.values())
        if left:
            _LOG.warning("%s given up, since the time to stop is over", f"{left} answer{'' if left == 1 else 's'}")
        return left > 0

    app.state.give_up = give_up
    app.add_middleware(BodyLimit, most=options.max_body, at_once=options.max_bodies)
    app.add_middleware(BearerAuth, key=options.api_key)
    if replica is not None:
        app.add_middleware(ReplicaHeader, name=replica.name)
    app.add_middleware(ReadsTheRest)
    install_error_handlers(app)

    def find(name: str) -> ServedModel:
        if name not in models:
            raise ApiError(f"no model '{name[:60]}'; served: {', '.join(models)}", 404, "model", "model_not_found")
        return models[name]

    def client_request(served: ServedModel, http: Request) -> ClientRequest:
        if app.state.stopping:
            raise ClosingError("the server is stopping; ask another one, or again later")
        return ClientRequest(served.engine, http, metrics, inbox[0])

    async def compute(name: str, http: Request, make: Callable[[ServedModel, Emit], EngineRequest]) -> Any:
        served = find(name)
        one = client_request(served, http)
        await one.submit(lambda: make(served, one.emit), limiter[0])
        async for event in one.events():
            if isinstance(event, Computed):
                return event.value
        raise ClientDisconnect

    app.include_router(page_router(models, options, compute, attention))

    @app.post("/v1/chat/completions", tags=["OpenAI"])
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        """Answer a conversation about audio."""
        served = find(body.model)
        one = client_request(served, http)
        await one.submit(lambda: served.chat(body, one.emit), limiter[0])
        tokenizer = served.tokenizer if body.logprobs else None
        answer = ChatAnswer(body.model, served.engine.digest, tokenizer)
        events = one.events()
        if not body.stream:
            return JSONResponse(await answer.whole(events))
        first = await anext(events)  # so that what fails before has a status of its own
        assert isinstance(first, AnswerPiece)
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventSourceResponse(_closing(answer.chunks(first, events, usage), one))

    @app.post("/v1/audio/transcriptions", tags=["OpenAI"])
    async def audio_transcriptions(
        http: Request,
        file: Annotated[UploadFile, File(description="an audio file")],
        model: Annotated[str, Form()],
        prompt: Annotated[str | None, Form(description="asked in place of 'Transcribe the speech.'")] = None,
        response_format: Annotated[str, Form(description="json or text")] = "json",
        temperature: Annotated[float, Form(ge=0, le=2)] = 0.0,
        language: Annotated[str | None, Form(description="accepted, and changes nothing")] = None,
        stream: Annotated[bool, Form(description="only false")] = False,
    ) -> Response:
        """Write down what is said in a clip, as far as the model has learned to."""
        given = [name for name, _ in (await http.form()).multi_items()]
        for name in given:
            if name not in _FORM:
                raise ApiError(f"'{name}' is not supported; leave it out", 422, name[:60], "unknown_parameter")
            if given.count(name) > 1:
                raise ApiError(
                    f"'{name}' is there {given.count(name)} times; give one, and ask once for each", 422, name
                )
        if PLACEHOLDER in (prompt or ""):
            raise ApiError(f"'{PLACEHOLDER}' stands for a clip; leave it out", 400, "prompt")
        if response_format not in ("json", "text"):
            raise ApiError("response_format: json or text", 400, "response_format")
        if stream:
            raise ApiError("transcriptions are not streamed; leave 'stream' out", 400, "stream")
        served = find(model)
        one = client_request(served, http)
        data, name = await file.read(), (file.filename or "").rpartition(".")[2][:20]
        sampling = SamplingOptions(max_tokens=options.max_tokens, temperature=temperature)
        await one.submit(lambda: served.question(prompt or TRANSCRIBE, data, name, sampling, one.emit), limiter[0])
        text, usage = "", None
        async for event in one.events():
            if isinstance(event, AnswerPiece):
                text += event.text
            elif isinstance(event, Finished):
                usage = {"type": "tokens", **usage_of(event.usage)}
                usage["input_tokens"], usage["output_tokens"] = event.usage.prompt, event.usage.completion
        return (
            PlainTextResponse(text + "\n")
            if response_format == "text"
            else JSONResponse({"text": text, "usage": usage})
        )

    @app.post("/v1/audio/index", tags=["pal"])
    async def audio_index(body: IndexRequest, http: Request) -> dict[str, Any]:
        """Keep a clip's audio keys and values; later requests name the clip by its handle."""
        served = find(body.model)
        one = client_request(served, http)
        request = None

        def prepare() -> Any:
            nonlocal request
            request = served.index(body.input_audio, one.emit)
            return request

        await one.submit(prepare, limiter[0])
        async for event in one.events():
            if isinstance(event, Indexed) and request is not None:
                digest = request.clips[0].digest
                if served.engine.stored(digest) is None:
                    said = "the clip's keys and values are larger than the whole cache; start with a larger --cache-gb"
                    raise ApiError(said, 413, "input_audio", "audio_too_large")
                return {
                    "id": HANDLE + digest,
                    "object": "audio.index",
                    "created": int(time.time()),
                    "model": body.model,
                    "seconds": event.audio.seconds,
                    "audio_tokens": event.audio.tokens,
                    "bytes": event.audio.nbytes,
                }
        raise ClientDisconnect

    @app.get("/v1/models", tags=["OpenAI"])
    async def list_models() -> dict[str, Any]:
        """The served models."""
        return {"object": "list", "data": [served.facts() for served in models.values()]}

    @app.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def get_model(name: str) -> dict[str, Any]:
        """One model."""
        return find(name).facts()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(api_docs.html(app.openapi()), headers=HEADERS)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["operation"])
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", tags=["operation"])
    async def ready() -> JSONResponse:
        """Whether new requests are taken."""
        fine = not app.state.stopping and all(engine.ready for engine in engines.values())
        return JSONResponse({"status": "ready" if fine else "stopping"}, 200 if fine else 503)

    @app.get("/metrics", tags=["operation"])
    async def show_metrics() -> Response:
        """Prometheus' metrics."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

    return app


async def _closing(chunks: AsyncIterator[bytes], one: ClientRequest) -> AsyncIterator[bytes]:
    """The chunks; the request is closed where they are not read to their end."""
    try:
        async for chunk in chunks:
            yield chunk
    except ClientDisconnect:
        return
    finally:
        one.close()
