"""Clips by URL, from a server with real faults: each gives the whole clip, or an error of one line."""

import gzip
import http.server
import io
import threading
import zlib

import numpy as np
import pytest
import soundfile
import torch
from torch.testing import assert_close

from pal.audio import urls
from pal.clips import read_clip
from pal.errors import AudioError

RATE = 16_000
SOUND_N = np.random.default_rng(0).uniform(-0.5, 0.5, 900).astype(np.float32)


def wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, SOUND_N, RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


WAV = wav()
RAW_DEFLATE = zlib.compressobj(wbits=-15)
BODIES = {
    "/gzip": ("gzip", gzip.compress(WAV)),
    "/twice": ("x-gzip", gzip.compress(WAV[:1000]) + gzip.compress(WAV[1000:])),
    "/zlib": ("deflate", zlib.compress(WAV)),
    "/deflate": ("deflate", RAW_DEFLATE.compress(WAV) + RAW_DEFLATE.flush()),
    "/cut.gz": ("gzip", gzip.compress(WAV)[:900]),
    "/none.gz": ("gzip", WAV),
    "/brotli": ("br", WAV),
    "/identity": ("Identity", WAV),
}


class Server(http.server.BaseHTTPRequestHandler):
    seen: list[tuple[str, dict[str, str]]] = []

    def log_message(self, *_):
        pass

    def answer(self, body=WAV, lengths=None, status=200, **headers):
        self.send_response(status)
        for length in [str(len(body))] if lengths is None else lengths:
            self.send_header("Content-Length", length)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.seen.append((self.path, dict(self.headers)))
        path = self.path.partition("?")[0]
        if path in BODIES:
            encoding, body = BODIES[path]
            self.answer(body, Content_Encoding=encoding)
        elif path == "/short":
            self.answer(WAV[:1124], [str(len(WAV))])
        elif path == "/empty":
            self.answer(b"", [str(len(WAV))])
        elif path == "/long":
            self.answer(WAV, [str(len(WAV) - 400)])
        elif path == "/two":
            self.answer(WAV, [str(len(WAV)), str(len(WAV) - 4)])
        elif path == "/same":
            self.answer(WAV, [str(len(WAV))] * 2)
        elif path == "/no-length":
            self.answer(WAV, [])
        elif path == "/odd-length":
            self.answer(WAV, ["many"])
        elif path == "/negative":
            self.answer(WAV, ["-5"])
        elif path == "/part":
            self.answer(WAV[:1000], status=206, Content_Range=f"bytes 0-999/{len(WAV)}")
        elif path == "/nothing":
            self.answer(b"", status=204)
        elif path == "/page":
            self.answer(b"<html>Please log in</html>")
        elif path == "/not-http":
            self.wfile.write(b"hello\r\n\r\n")
        elif path == "/hangs":
            self.answer(WAV[:100], [str(len(WAV))])
            threading.Event().wait(1.0)
        elif path in ("/chunks", "/cut-chunks"):
            self.protocol_version = "HTTP/1.1"
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            parts = [WAV[:1500], WAV[1500:]] if path == "/chunks" else [WAV[:1500]]
            for part in parts:
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.write(b"0\r\n\r\n" if path == "/chunks" else b"9999\r\nRIFF")
            self.close_connection = True
        elif path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", bytes.fromhex(path[4:]).decode("latin-1"))
            self.end_headers()
        elif path == "/nowhere":
            self.send_response(302)
            self.end_headers()
        elif path == "/404":
            self.send_error(404)
        else:
            self.answer()


@pytest.fixture(scope="module")
def server():
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def fetched(url):
    found = read_clip(url, RATE, allow_urls=True)
    assert_close(found.samples_N, torch.from_numpy(SOUND_N))
    return Server.seen[-1]


def fault(url):
    with pytest.raises(AudioError) as caught:
        read_clip(url, RATE, allow_urls=True)
    text = str(caught.value)
    assert "\n" not in text and len(text) <= 300 and "; " in text, text
    return text


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("/ok.wav", "/ok.wav"),
        ("/a b.wav", "/a%20b.wav"),
        ("/a%20b.wav", "/a%20b.wav"),
        ("/100%.wav", "/100%.wav"),
        ("/\u00e9/\u30c6.wav", "/%C3%A9/%E3%83%86.wav"),
        ('/a"<>b.wav', "/a%22%3C%3Eb.wav"),
        ("/(a)[b]!~*'@:,;=&$+.wav", "/(a)[b]!~*'@:,;=&$+.wav"),
        ("/ok.wav?name=a b&x=\u00e9%20#t=3", "/ok.wav?name=a%20b&x=%C3%A9%20"),
        ("?x=1", "/?x=1"),
        ("", "/"),
        ("  /ok.wav \n", None),
    ],
)
def test_urls_are_quoted_as_browsers_do(server, given, sent):
    if sent is None:
        assert fetched(f" {server}/ok.wav\n")[0] == "/ok.wav"
    else:
        assert fetched(server + given)[0] == sent


def test_what_is_told_to_servers(server):
    assert "Authorization" not in fetched(f"{server}/ok.wav")[1]
    found = fetched(server.replace("//", "//me:s%20e@") + "/ok.wav")
    assert found[1]["Authorization"] == "Basic bWU6cyBl"
    text = fault(server.replace("//", "//me:secret@") + "/404")
    assert "secret" not in text and "127.0.0.1" in text
    other = f"{server.replace('127.0.0.1', 'localhost')}/ok.wav"
    fetched(server.replace("//", "//me:secret@") + f"/to/{other.encode().hex()}")
    assert "Authorization" not in Server.seen[-1][1]


@pytest.mark.parametrize("path", ["/gzip", "/twice", "/zlib", "/deflate", "/identity", "/chunks", "/same"])
def test_bodies_in_other_clothes(server, path):
    fetched(server + path)


@pytest.mark.parametrize("path", ["/no-length", "/odd-length", "/negative"])
def test_without_a_length_the_end_is_the_clips_own(server, path):
    fetched(server + path)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/short", f"the server sent 1124 of {len(WAV)} bytes; fetch it again"),
        ("/empty", f"the server sent 0 of {len(WAV)} bytes"),
        ("/long", "it is cut"),
        ("/two", "the server gives two lengths"),
        ("/part", "it cannot be fetched (the server answers 206 Partial Content)"),
        ("/nothing", "it cannot be fetched (the server answers 204 No Content)"),
        ("/cut-chunks", "it cannot be fetched (IncompleteRead"),
        ("/cut.gz", "its compressed data are damaged (it ends early)"),
        ("/none.gz", "its compressed data are damaged"),
        ("/brotli", "its server sends it compressed as 'br'"),
        ("/404", "it cannot be fetched (Not Found); download it and give its path"),
        ("/page", "it is"),
        ("/not-http", "it cannot be fetched (hello"),
        ("/nowhere", "it cannot be fetched (Found)"),
    ],
)
def test_what_is_not_whole_is_refused(server, path, says):
    text = fault(server + path)
    assert text.startswith(f"{server}{path}: ") and says in text, text


def test_redirects_lead_to_http_only(server, tmp_path):
    (tmp_path / "a.wav").write_bytes(WAV)

    def to(target):
        return f"{server}/to/{target.encode().hex()}"

    for target in ("/ok.wav", "../ok.wav", f"{server}/ok.wav", "/a b.wav", "/\u00e9.wav"):
        fetched(to(target))
    for target in (f"file://{tmp_path}/a.wav", "ftp://127.0.0.1/a.wav", "data:audio/wav;base64,AAAA", "gopher://x/"):
        assert "it cannot be fetched (" in fault(to(target))


def test_a_redirect_to_ftp_is_not_begun(server):
    target = b"ftp://127.0.0.1/a.wav".hex()
    assert "it cannot be fetched (it leads to ftp:, but only http and https are fetched)" in fault(
        f"{server}/to/{target}"
    )


def test_a_server_that_does_not_answer(server, monkeypatch):
    monkeypatch.setattr(urls, "TIMEOUT", 0.2)
    assert "it cannot be fetched (timed out)" in fault(f"{server}/hangs")
    assert "it cannot be fetched (" in fault("http://127.0.0.1:1/a.wav")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://127.0.0.1/a.wav", "it leads to ftp:, but only http and https are fetched"),
        ("hf://datasets/a.wav", "it leads to hf:, but only http and https are fetched"),
        ("zip://a.wav::https://x.org/a.zip", "only http and https"),
        ("http://", "it cannot be fetched"),
        ("http://[x/a.wav", "it cannot be fetched"),
        ("http://127.0.0.1:port/a.wav", "it cannot be fetched"),
        ("http://\u00e9" + "a" * 70 + ".invalid/a.wav", "it cannot be fetched"),
        ("http://127.0.0.1:1/\udce9.wav", "it cannot be fetched"),
        ("://x", "it cannot be fetched"),
    ],
)
def test_invalid_urls(url, says):
    assert says in fault(url)


def test_more_than_the_limit_is_refused(server, monkeypatch):
    for path in ("/ok.wav", "/gzip", "/chunks"):
        with pytest.raises(urls.DecodeError, match="larger than 1000 bytes"):
            urls.read_url(server + path, True, 1000)
    with pytest.raises(urls.DecodeError, match="larger than 1000 bytes"):
        urls.from_base64("A" * 2000, 1000)
