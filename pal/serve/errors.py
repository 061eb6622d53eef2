"""Errors in the shape of OpenAI's, without tracebacks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pal.errors import AudioError, PalError
from pal.serve.requests import ClosingError, QueueFullError, TooLongError

_LOG = logging.getLogger(__name__)
_KNOWN = {
    400: ("invalid_request_error", "bad_request"),
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    422: ("invalid_request_error", "invalid_request"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "stopping"),
}
"""Type and code of each status."""
_UNREADABLE = "There was an error parsing the body"
"""FastAPI's words for a body that is no text, too deep, or compressed."""
TOO_SLOW = "the request's body did not arrive in time; send it faster, or less audio at once"
BUSY = "the requests that are being answered hold too many bytes; ask again later, or send less audio at once"


def too_large(most: int) -> str:
    """What is said of a body of more than so many bytes."""
    return (
        f"the request's body is larger than {most / 1e6:g} MB, the most that this server takes; send less audio at once"
    )


class ApiError(PalError):
    """An error of a request.

    Args:
        message: one line with the remedy.
        status: of HTTP.
        param: the field that it is about, such as `messages[0].content[1]`.
        code: a word for programs; None takes that of the status.
        headers: of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """The response's content."""
        kind, code = _KNOWN.get(self.status, _KNOWN[500 if self.status >= 500 else 400])
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code or code}}

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.body(), self.status, self.headers)


def to_api_error(error: Exception, retry_after: int = 1) -> ApiError:
    """The error that a client is shown; what is not the client's fault says nothing of the server's inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(str(error), 429, headers={"Retry-After": str(retry_after)})
    if isinstance(error, ClosingError):
        return ApiError(str(error), 503, headers={"Retry-After": str(retry_after)})
    if isinstance(error, TooLongError):
        return ApiError(str(error), 400, "messages", "context_length_exceeded")
    if isinstance(error, AudioError):
        return ApiError(str(error), 400, code="invalid_audio")
    if isinstance(error, PalError):
        return ApiError(str(error), 400)
    _LOG.error("a request failed", exc_info=error)
    return ApiError("the server failed on this request; its log says why", 500)


def param_of(where: Sequence[object]) -> str | None:
    """A field as clients write it, such as `messages[0].content`, from pydantic's location."""
    text = ""
    for part in where:
        if isinstance(part, int):
            text += f"[{part}]"
        elif isinstance(part, str) and part.isidentifier():
            text += f".{part}" if text else part
    return text or None


def _invalid(error: RequestValidationError) -> ApiError:
    first = max(error.errors(), key=lambda one: len(one["loc"]))  # of alternatives, the one that fits best
    where = [part for part in first["loc"] if part not in ("body", "query", "path", "str")]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ApiError):  # of a validator, which knows the field
        return cause
    if not where and isinstance(first["input"], bytes):
        return ApiError("the request's body is not taken for JSON; send it with 'Content-Type: application/json'", 422)
    if not where and first["type"] == "missing":
        return ApiError("the request has no body; send JSON, as /docs has it", 422)
    if first["type"] == "json_invalid":
        return ApiError("the request's body is not valid JSON; encode it anew", 400, code="invalid_json")
    param = param_of(where)
    if first["type"] == "extra_forbidden":
        return ApiError(f"'{param}' is not supported; leave it out", 422, param, "unknown_parameter")
    said = str(first["msg"]).removeprefix("Value error, ")
    if "Expected UploadFile" in said:
        said = "is no file; send the audio as a file of the form"
    return ApiError(f"{param or 'the request'}: {said}", 422, param)


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of the application OpenAI's shape."""

    @app.exception_handler(PalError)
    async def of_pal(request: Request, error: PalError) -> JSONResponse:
        return to_api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error).response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path[:100]
        said = {
            404: f"there is nothing at {path}; /docs lists what there is",
            405: f"{path} does not take {request.method}; /docs lists what it takes",
            408: TOO_SLOW,
            503: BUSY,
        }.get(error.status_code, str(error.detail))
        if said == _UNREADABLE:
            said = "the request's body cannot be read; send valid JSON or a form, as UTF-8 and not compressed"
        elif error.status_code == 400:
            said = f"{said.rstrip('.')}; let a client library write the request"
        headers = dict(error.headers) if error.headers else {}
        headers |= {"Retry-After": "1"} if error.status_code == 503 else {}
        code = "busy" if error.status_code == 503 else None
        return ApiError(said, error.status_code, code=code, headers=headers).response()

    @app.exception_handler(Exception)
    async def of_anything(request: Request, error: Exception) -> JSONResponse:
        return to_api_error(error).response()
