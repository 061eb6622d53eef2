"""Requests that no client of good will sends: malformed bodies and framing, URLs and paths where audio belongs."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.serve.hostile.wire import CHAT, Target, chat, part, posted, wav

TRANSCRIBE, INDEX, ATTENTION = "/v1/audio/transcriptions", "/v1/audio/index", "/page/api/attention"
SECRET = "the-secret-of-a-file-on-the-server"
"""What a file that no request may read says."""
_ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\x00",
    "\ud800",
    "a" * 20_000,
    "\u202e\u0000\uffff",
    "<audio>",
    "{{7*7}}",
    "'; DROP TABLE clips; --",
    [],
    {},
    [[[[]]]],
    {"": None},
    {"$ref": "#"},
    {"__class__": "os.system"},
)
_FIELDS = (
    "model",
    "messages",
    "stream",
    "n",
    "stop",
    "temperature",
    "max_tokens",
    "seed",
    "top_p",
    "logprobs",
    "tools",
)
_TYPES = (
    "",
    "text/plain",
    "application/xml",
    "application/json; charset=utf-16",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "application/python-pickle",
)


def _nodes(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places in a JSON value."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from _nodes(below, (*at, key))


def _replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    made = dict(value) if isinstance(value, dict) else list(value)
    made[at[0]] = _replaced(made[at[0]], at[1:], new)
    return made


def _multipart(target: Target, chance: random.Random) -> bytes:
    """A transcription whose form is broken."""
    edge = chance.choice(("edge", "e" * 200, "edge--"))
    name = chance.choice(("file", "model", "prompt", "\x00", 'file"; x="', "other"))
    file = chance.choice(('; filename="a.wav"', '; filename="../../a.wav"', "", '; filename="\r\nX: y"'))
    data = chance.choice((chance.randbytes(5), b"RIFF" + chance.randbytes(5), wav(), chance.randbytes(500)))
    field = f'--{edge}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode("latin-1", "replace")
    body = field + data + b"\r\n"
    if chance.random() < 0.5:
        said = f'--{edge}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{target.model}\r\n'
        body += said.encode() * chance.choice((1, 2, 300))
    body += chance.choice((f"--{edge}--\r\n".encode(), b"", b"--"))
    kind = chance.choice(
        (f"multipart/form-data; boundary={edge}", "multipart/form-data", "multipart/form-data; boundary=")
    )
    return posted(target, body, TRANSCRIBE, Content_Type=kind)


def _framing(target: Target, chance: random.Random) -> bytes:
    """A request that is none of HTTP's."""
    body = json.dumps(chat(target.model, text=f"What is {chance.random()}?")).encode()
    length = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    chunked = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    head = target.head(CHAT, length)
    return chance.choice(
        (
            target.head(CHAT, chunked) + b"zz\r\n" + body,
            target.head(CHAT, chunked) + b"-5\r\n" + body,
            target.head(CHAT, chunked) + b"ffffffffffffffffffff\r\n" + body,
            target.head(CHAT, {**length, "Content-Length": "-1"}) + body,
            target.head(CHAT, {**length, "Content-Length": "ten"}) + body,
            target.head(CHAT, {**length, "Content-Length": "9" * 30}) + body,
            target.head(CHAT, {**length, "Transfer-Encoding": "chunked"}) + body,
            target.head(CHAT, {**length, "Content-Encoding": "gzip"}) + body,
            target.head(CHAT, {**length, "X": "a" * 100_000}) + body,
            target.head(CHAT, {**length, **{f"X{number}": "a" for number in range(2_000)}}) + body,
            head.replace(b"HTTP/1.1", b"HTTP/9.9") + body,
            head.replace(b"POST", b"P\x00ST") + body,
            head.replace(b"\r\n", b"\n", 1).replace(b": ", b" : ") + body,
            head.replace(b"/v1", b"/v1\xff\xfe") + body,
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(400),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            chance.randbytes(chance.randrange(1, 3_000)) + b"\r\n\r\n",
        )
    )


def malformed(target: Target, number: int) -> bytes:
    """A request with a broken body; each number always the same. A few are harmless changes that have an answer."""
    chance = random.Random(number)
    clip = part(wav(number=number))
    good: dict[str, Any] = chat(target.model, clip, text=f"What sound is number {number}?")
    path = CHAT
    if number % 10 == 8:
        path, good = INDEX, {"model": target.model, "input_audio": clip["input_audio"]}
    elif number % 10 == 9:
        path = ATTENTION
        good = {
            "model": target.model,
            "input_audio": clip["input_audio"],
            "question": "What?",
            "answer": "A dog",
        }
    data = json.dumps(good).encode()
    how = number % 12
    if how == 0:
        return posted(target, chance.randbytes(chance.randrange(2_000)), path)
    if how == 1:
        return posted(target, data[: chance.randrange(len(data))], path)
    if how == 2:
        flipped = bytearray(data)
        for _ in range(chance.choice((1, 3, 10))):
            # the beginning and the end, where the fields are; the base64 has its own
            place = chance.choice(
                (chance.randrange(100), len(data) - 1 - chance.randrange(100), chance.randrange(len(data)))
            )
            flipped[place] ^= 1 << chance.randrange(8)
        return posted(target, bytes(flipped), path)
    if how in (3, 4):
        at = chance.choice(list(_nodes(good)))
        return posted(target, _replaced(good, at, chance.choice(_ODD)), path)
    if how == 5:
        return posted(
            target,
            {**good, chance.choice((*_FIELDS, "\ud800", "", "a" * 5_000, "__proto__")): chance.choice(_ODD)},
            path,
        )
    if how == 6:
        left = dict(good)
        left.pop(chance.choice(list(left)))
        return posted(target, left, path)
    if how == 7:
        deep = chance.choice((100, 5_000, 100_000)) + number
        nest = chance.choice(
            (
                b"[" * deep,
                b'{"a":' * deep,
                b"[" * deep + b"]" * deep,
                b'{"messages":' + b"[" * deep + b"]" * deep + b"}",
            )
        )
        return posted(target, nest, path)
    if how == 8:
        texts = ("", "=", "====", "A", "%%%%", "\x00", "Ã", "AAAA" * 5_000, "data:audio/wav;base64,AAAA", "\ud83d")
        bad = part(
            chance.choice((*texts, base64.b64encode(chance.randbytes(2_000)).decode())),
            chance.choice(("wav", "", "exe", None)),
        )
        if path == CHAT:
            return posted(target, chat(target.model, bad, text=f"And number {number}?"), path)
        return posted(target, {**good, "input_audio": bad["input_audio"]}, path)
    if how == 9:
        return posted(
            target,
            chance.choice((data, data.decode().encode("utf-16"), b"\xef\xbb\xbf" + data)),
            path,
            Content_Type=chance.choice(_TYPES),
        )
    return _multipart(target, chance) if how == 10 else _framing(target, chance)


def spellings(port: int) -> list[str]:
    """Ways to write the address of a server on the same machine."""
    return [
        f"http://127.0.0.1:{port}/a.wav",
        f"http://localhost:{port}/a.wav",
        f"HTTP://LOCALHOST:{port}/a.wav",
        f"http://127.1:{port}/a.wav",
        f"http://0.0.0.0:{port}/a.wav",
        f"http://0:{port}/a.wav",
        f"http://2130706433:{port}/a.wav",
        f"http://0x7f000001:{port}/a.wav",
        f"http://017700000001:{port}/a.wav",
        f"http://[::1]:{port}/a.wav",
        f"http://[::ffff:127.0.0.1]:{port}/a.wav",
        f"http://user:word@127.0.0.1:{port}/a.wav",
        f"http://127.0.0.1:{port}#@example.com/a.wav",
        f"http://example.com@127.0.0.1:{port}/a.wav",
        f"http://127.0.0.1:{port}\\@example.com/a.wav",
        f"http:127.0.0.1:{port}/a.wav",
        f"http:/127.0.0.1:{port}/a.wav",
        f"http:\\\\127.0.0.1:{port}\\a.wav",
        f"//127.0.0.1:{port}/a.wav",
        f" http://127.0.0.1:{port}/a.wav",
        f"\thttp://127.0.0.1:{port}/a.wav",
        f"ht\ntp://127.0.0.1:{port}/a.wav",
        f"https://127.0.0.1:{port}/a.wav",
        f"ftp://127.0.0.1:{port}/a.wav",
        f"gopher://127.0.0.1:{port}/a.wav",
        f"dict://127.0.0.1:{port}/a.wav",
        f"http://①②⑦.⓪.⓪.①:{port}/a.wav",
        f"http://127%2e0%2e0%2e1:{port}/a.wav",
        f"http://127.0.0.1:{port}/a.wav?x=.wav",
        f"url:http://127.0.0.1:{port}/a.wav",
        f"http://[::]:{port}/a.wav",
    ]


def _places(target: Target, text: str) -> list[tuple[str, bytes]]:
    """Places of a request in which a URL or a path may stand."""

    def chats(**one: Any) -> bytes:
        return posted(target, chat(target.model, one))

    edge = "edge"
    fields = {"model": target.model, "file": text}
    form = "".join(f'--{edge}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items())
    return [
        ("data", chats(**part(text))),
        ("data without format", chats(**part(text, None))),
        ("input_audio as text", chats(type="input_audio", input_audio=text)),
        ("url of input_audio", chats(type="input_audio", input_audio={"url": text, "format": "wav"})),
        ("audio_url", chats(type="audio_url", audio_url={"url": text})),
        ("image_url", chats(type="image_url", image_url={"url": text})),
        ("video_url", chats(type="video_url", video_url={"url": text})),
        ("audio", chats(type="audio", audio=text)),
        ("index", posted(target, {"model": target.model, "input_audio": {"data": text, "format": "wav"}}, INDEX)),
        (
            "form",
            posted(
                target,
                f"{form}--{edge}--\r\n".encode(),
                TRANSCRIBE,
                Content_Type=f"multipart/form-data; boundary={edge}",
            ),
        ),
    ]


def ssrf(target: Target, port: int) -> list[tuple[str, bytes]]:
    """40 requests that ask the server to fetch something from a port of its own machine."""
    found = [
        (f"{spelling!r} as data without format", dict(_places(target, spelling))["data without format"])
        for spelling in spellings(port)
    ]
    places = [one for one in _places(target, spellings(port)[0]) if one[0] != "data without format"]
    return found + [(f"http://127.0.0.1 as {place}", request) for place, request in places]


def traversals(target: Target, file: Path) -> list[tuple[str, bytes]]:
    """40 requests that ask the server for a file of its own disk; `file` is a WAV file with `SECRET` beside it."""
    path, up = str(file), "../" * 12
    relative = up + path.lstrip("/")
    forms = [
        f"./{relative}",
        f"file://{path}",
        f"file:{path}",
        f"FILE://localhost{path}",
        f"file:///%2e%2e{path}",
        relative,
        relative.replace("/", "\\"),
        quote(relative, safe=""),
        f"{path}\x00.wav",
        f"data:audio/wav;base64,../../{path}",
        f"/proc/self/root{path}",
        f"~/{relative}",
        f"${{HOME}}/{relative}",
        f"@{path}",
        f"pipe:cat {path}",
        f"zip://{path}!a.wav",
    ]
    found = [(f"{form!r} as data without format", dict(_places(target, form))["data without format"]) for form in forms]
    found += [(f"the path as {place}", request) for place, request in _places(target, path)]
    secret = str(file.with_suffix(".txt"))
    below = up + secret.lstrip("/")
    got = [f"/page/{below}", f"/page/{quote(below, safe='')}", f"/page/api/examples/{below}", f"/v1/models/{below}"]
    got += [f"/{below}", f"/static/{below}", f"/docs/{below}", f"/page/..%5c..%5c{quote(secret, safe='')}"]
    got += [f"//{secret}", f"/page/%252e%252e/{quote(below, safe='')}"]
    found += [(f"GET {path}", target.head(path, {}, "GET")) for path in got]
    found += [
        (f"model {name!r}", posted(target, chat(name))) for name in (secret, below, f"tiny/{below}", f"file://{secret}")
    ]
    return found
