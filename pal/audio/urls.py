"""Clips by URL: http and https, file: for local files, data: for inline data."""

from __future__ import annotations

import base64
import binascii
import http.client
import re
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, unquote, unquote_to_bytes, urlsplit

from pal.audio.reading import read_stream
from pal.audio.stream_info import DecodeError
from pal.errors import shortened

TIMEOUT = 30.0
"""Seconds to wait for a server's answer, and for further bytes of it."""

_SCHEME = re.compile(r"\s*(data|file):", re.IGNORECASE)
_PATH_KEPT, _QUERY_KEPT = "%/:@!$&'()*+,;=~[]|\\^", "%/:@!$&()*+,;=~[]|\\^?{}`"
"""Characters that are not percent-encoded in a path and in a query (WHATWG URL); "%20" stays "%20"."""
_DOWNLOAD = "download it and give its path"
_AGAIN = "fetch it again, or download it and give its path"


def is_url(text: str) -> bool:
    """Whether a string is a URL and not a path."""
    return "://" in text or _SCHEME.match(text) is not None


def redacted(url: str) -> str:
    """URL for messages, without password and without the content of a data: URL."""
    if url.lstrip()[:5].lower() == "data:":
        return shortened(url.strip().partition(",")[0], 60) + ",..."
    return re.sub(r"(?<=://)[^/?#]*@", "", url)


def read_url(url: str, allowed: bool, limit: int) -> bytes | Path:
    """Content of a URL as bytes, or the path of a local file.

    Args:
        url: http, https, file or data URL. Blanks and non-ASCII letters are quoted as browsers do.
        allowed: whether URLs may be fetched or read; a data: URL is always allowed.
        limit: most bytes of the content.

    Raises:
        DecodeError: not allowed, another scheme, or an incomplete response.
    """
    url = url.strip()
    if url[:5].lower() == "data:":
        return _data(url[5:], limit)
    if not allowed:
        scheme = url.partition(":")[0]
        if scheme.lower() not in ("http", "https", "file"):
            raise DecodeError(
                f"URLs of {shortened(scheme, 40)}: are not followed, only http, https, file and data", _DOWNLOAD
            )
        other = "give its path" if url[:5].lower() == "file:" else _DOWNLOAD
        raise DecodeError("URLs are not fetched", f"pass allow_urls=True or --allow-urls, or {other}")
    try:
        if url[:5].lower() == "file:":
            return _file(url)
        return _fetched(url, limit)
    except urllib.error.HTTPError as error:
        error.close()
        raise _unfetched(error.reason) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _unfetched(getattr(error, "reason", None) or error) from None


def from_base64(text: str | bytes, limit: int) -> bytes:
    """Decode base64 of either alphabet; white space and missing padding are allowed (WHATWG, forgiving-base64).

    Raises:
        DecodeError: invalid characters or length.
    """
    data = text.encode("ascii", "replace") if isinstance(text, str) else text
    data = data.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f").rstrip(b"=")
    if len(data) * 3 // 4 > limit:
        raise _too_large(limit)
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error:
        raise DecodeError("its base64 is cut or holds other characters", "encode the bytes of the file anew") from None


def _data(text: str, limit: int) -> bytes:
    """Decode a data: URL (RFC 2397), from the text after "data:"."""
    kind, comma, body = text.partition(",")
    if not comma:
        raise DecodeError("a data: URL has a comma before its data", "write data:audio/wav;base64,...")
    if kind.rpartition(";")[2].strip().lower() == "base64":
        return from_base64(unquote_to_bytes(body), limit)
    return unquote_to_bytes(body)


def _file(url: str) -> Path:
    """Path of a file: URL (RFC 8089): file:///path, file://localhost/path or file:/path, percent-encoded."""
    rest = url[5:]
    host = ""
    if rest.startswith("//"):
        host, slash, rest = rest[2:].partition("/")
        rest = slash + rest
    if host.lower() not in ("", "localhost") or not rest.startswith("/"):
        raise DecodeError("a file: URL names a local file", "write file:///folder/clip.wav")
    # A file: URL has no fragment or query, unless they are part of a name that was not quoted.
    places = [unquote(re.split("[?#]", rest, maxsplit=1)[0], errors="surrogateescape")]
    places += [unquote(rest, errors="surrogateescape"), rest]
    return next((Path(place) for place in places if _is_file(place)), Path(places[0]))


def _is_file(place: str) -> bool:
    try:
        return Path(place).is_file()
    except (OSError, ValueError):  # too long a name, a zero byte
        return False


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirect handler for http and https only."""

    def redirect_request(self, *arguments: Any) -> urllib.request.Request | None:
        _check_scheme(urlsplit(arguments[-1]))
        return super().redirect_request(*arguments)


def _fetched(url: str, limit: int) -> bytes:
    parts = urlsplit(url)
    _check_scheme(parts)
    request = urllib.request.Request(_quoted(parts), headers={"User-Agent": "pal-audio"})
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login).decode()}")
    with urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT) as answer:
        if answer.status not in (200, 203):
            raise ValueError(f"the server answers {answer.status} {answer.reason}")
        lengths = {length.strip() for length in answer.headers.get_all("Content-Length", [])}
        data = read_stream(answer, limit)
        left = answer.length  # of the announced bytes; None where the server announced none
        encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if len(data) > limit:
        raise _too_large(limit)
    if len(lengths) > 1:
        raise DecodeError("the server gives two lengths", _AGAIN)
    if left:
        raise DecodeError(f"the server sent {len(data)} of {len(data) + left} bytes", _AGAIN)
    return _uncompressed(data, encoding, limit)


def _check_scheme(parts: SplitResult) -> None:
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"it leads to {parts.scheme}:, but only http and https are fetched")


def _quoted(parts: SplitResult) -> str:
    """URL in ASCII, without user and fragment."""
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host.encode("idna").decode() if not host.isascii() else host
    port = "" if parts.port is None else f":{parts.port}"
    query = f"?{quote(parts.query, _QUERY_KEPT)}" if parts.query else ""
    return f"{parts.scheme}://{host}{port}{quote(parts.path, _PATH_KEPT) or '/'}{query}"


def _uncompressed(data: bytes, encoding: str, limit: int) -> bytes:
    """Decompress a response body (content coding, RFC 9110, section 8.4)."""
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise DecodeError(f"its server sends it compressed as '{encoding}'", _DOWNLOAD)
    # 47: a gzip or zlib header; some servers send deflate without a header
    headed = data[:2] == b"\x1f\x8b" or (len(data) > 1 and data[0] & 15 == 8 and int.from_bytes(data[:2]) % 31 == 0)
    whole = b""
    try:
        while data and len(whole) <= limit:
            decoder = zlib.decompressobj(47 if headed else -15)
            whole += decoder.decompress(data, limit + 1 - len(whole))
            if not decoder.eof and len(whole) <= limit:
                raise zlib.error("it ends early")
            data = decoder.unused_data
    except zlib.error as error:
        raise DecodeError(f"its compressed data are damaged ({error})", _AGAIN) from None
    if len(whole) > limit:
        raise _too_large(limit)
    return whole


def _unfetched(reason: object) -> DecodeError:
    return DecodeError(f"it cannot be fetched ({shortened(' '.join(str(reason).split()), 80)})", _DOWNLOAD)


def _too_large(limit: int) -> DecodeError:
    return DecodeError(f"it is larger than {limit} bytes", f"{_DOWNLOAD}, split")
