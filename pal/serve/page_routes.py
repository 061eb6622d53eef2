"""The web page at `/`: its files, the built-in examples, facts of the models, and attention of answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from pal.serve import examples
from pal.serve.errors import ApiError
from pal.serve.requests import EngineRequest
from pal.serve.schemas import AttentionRequest
from pal.serve.served import Emit, ServedModel, ServeOptions

if TYPE_CHECKING:
    from torch import Tensor

    from pal.backbone.audio_kv import AudioKV
    from pal.model import PalModel

_FOLDER = Path(__file__).parent / "page"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = (
    "page.css",
    "icon.svg",
    "main.js",
    "dom.js",
    "api.js",
    "sound.js",
    "recording.js",
    "recorder.js",
    "spectrogram.js",
    "view.js",
    "excerpt.js",
    "answers.js",
    "listened.js",
    "snippets.js",
)
"""Files that are served under `/page/`; nothing else of the folder is."""
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "media-src": "'self' blob:",
    "img-src": "'self' data: blob:",
    "frame-ancestors": "'none'",
    "base-uri": "'none'",
    "form-action": "'none'",
}
_OFF = ("camera", "display-capture", "geolocation", "hid", "midi", "payment", "serial", "usb")
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": ", ".join(["microphone=(self)", *(f"{name}=()" for name in _OFF)]),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""Of everything that belongs to the page."""


Attention = Callable[["PalModel", "AudioKV", str, str], tuple[list[str], "Tensor", float]]
"""Where the words of an answer to a question about a clip attended: the words, their attention mass on each of X equal
stretches [W, X], and the seconds that these cover."""
Compute = Callable[[str, Request, Callable[[ServedModel, Emit], EngineRequest]], Awaitable[Any]]
"""Runs a request's function in the engine of the model with this name, and returns its value."""


def page_router(
    models: Mapping[str, ServedModel], options: ServeOptions, compute: Compute, attention: Attention | None
) -> APIRouter:
    """Everything of the page.

    Args:
        models: the served models by name.
        options: of the application.
        compute: runs a function of a request.
        attention: of answers; None leaves it out.
    """
    router = APIRouter(include_in_schema=False)
    files = {name: (_FOLDER / name).read_bytes() for name in ("index.html", *FILES)}

    def static(name: str) -> Response:
        return Response(files[name], media_type=_KINDS[Path(name).suffix], headers=HEADERS)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page() -> Response:
        return static("index.html")

    @router.get("/page/access")
    async def access() -> Response:
        return JSONResponse({"key": options.api_key is not None}, headers=HEADERS)

    @router.get("/page/api/facts")
    async def facts() -> Response:
        found = {
            "models": [_facts(served) for served in models.values()],
            "rate": max(served.engine.model.sampling_rate for served in models.values()),
            "max_body": options.max_body,
            "max_seconds": options.limits.max_seconds,
            "max_tokens": options.max_tokens,
            "attention": attention is not None,
            "examples": examples.described(),
        }
        return JSONResponse(found, headers=HEADERS)

    @router.get("/page/api/examples/{name}")
    async def example(name: str) -> Response:
        found = await to_thread.run_sync(examples.audio, name)
        if found is None:
            raise ApiError(f"no example '{name[:60]}'; known: {', '.join(examples.names())}", 404)
        return Response(found[0], media_type=found[1], headers=HEADERS)

    @router.post("/page/api/attention")
    async def words(body: AttentionRequest, http: Request) -> Response:
        if attention is None:
            raise ApiError("this server does not show attention; `pal serve` does", 404)
        function = attention
        said, mass_WX, seconds = await compute(
            body.model, http, lambda served, emit: served.attention(body, emit, function)
        )
        shown = {"words": said, "mass": mass_WX.tolist(), "seconds": seconds}
        return JSONResponse(shown, headers=HEADERS)

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in FILES:
            raise ApiError("the page has no such file", 404)
        return static(name)

    return router


def _facts(served: ServedModel) -> dict[str, Any]:
    model = served.engine.model
    return {
        "id": served.engine.name,
        "integration": model.config.integration["name"],
        "encoders": [encoder["name"] for encoder in model.config.encoders],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "notice": model.config.notice,
    }
