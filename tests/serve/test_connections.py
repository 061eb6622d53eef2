"""What clients can hold of a server: connections, slow heads and bodies, answers that they do not read."""

import asyncio
import json
import socket
import time

import httpx
import pytest
from uvicorn.server import ServerState

from pal.serve import access, connections
from pal.serve.connections import Connection, most_connections
from pal.serve.process import make_server
from pal.serve.served import ServeOptions
from tests.models import tiny_model
from tests.serve.servers import says, serving, user

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [user(says("yes"))], "max_tokens": 2}
MOST = 400_000


@pytest.fixture(scope="module")
def running():
    with serving(tiny_model("pal"), ServeOptions(max_body=MOST, max_bodies=MOST)) as made:
        yield made


@pytest.fixture
def quick(monkeypatch):
    """Everything that takes its time is too late after a moment."""
    monkeypatch.setattr(connections, "HEAD", 0.3)
    monkeypatch.setattr(access, "FIRST", 0.3)


def head(length=None, more=""):
    said = f"Content-Length: {length}" if length is not None else "Transfer-Encoding: chunked"
    return f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{said}\r\n{more}\r\n".encode()


def connect(running):
    made = socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=60)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def answer(connection):
    """Status and JSON of an answer after which the server ends the connection; (0, None) for none."""
    data = b""
    try:
        while piece := connection.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    if not data:
        return 0, None
    first, _, body = data.partition(b"\r\n\r\n")
    return int(first.split()[1]), json.loads(body)["error"]


def answers(running):
    return httpx.post(running.url + CHAT, json=BODY).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"P", head(10)[:-2]], ids=["nothing", "a byte", "most of it"])
def test_a_head_that_does_not_come_ends_the_connection(running, quick, sent):
    with connect(running) as connection:
        connection.sendall(sent)
        assert answer(connection) == (0, None)
    assert answers(running)


def test_a_head_after_an_answer_has_its_time_too(running, quick):
    with connect(running) as connection:
        data = json.dumps(BODY).encode()
        connection.sendall(head(len(data)) + data)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"POST")
        while connection.recv(1 << 16):
            pass
    assert answers(running)


@pytest.mark.parametrize("length", [1_000, None])
def test_a_body_that_does_not_come_is_an_error(running, quick, length):
    with connect(running) as connection:
        connection.sendall(head(length) + b" ")
        status, error = answer(connection)
    assert (status, error["type"], error["code"]) == (408, "invalid_request_error", "request_timeout")
    assert answers(running)


def test_a_body_that_comes_fast_enough_has_more_time(running, quick, monkeypatch):
    monkeypatch.setattr(access, "RATE", 1)
    data = json.dumps(BODY).encode()
    with connect(running) as connection:
        connection.sendall(head(len(data), "Connection: close\r\n") + data[:20])
        time.sleep(0.6)
        connection.sendall(data[20:])
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("more", ["", "Connection: close\r\n"])
def test_an_early_answer_arrives_although_the_client_still_sends(running, more):
    with connect(running) as connection:
        connection.sendall(head(3_000_000, more))
        for _ in range(30):
            connection.sendall(b" " * 100_000)
        assert answer_of(connection)[1]["code"] == "request_too_large"


def test_the_rest_of_a_refused_body_is_not_read_for_ever(running, monkeypatch):
    monkeypatch.setattr(access, "LINGER", 0.2)
    monkeypatch.setattr(connections, "HEAD", 60.0)  # which would end it, too
    with connect(running) as connection, pytest.raises(ConnectionError):
        connection.sendall(head(MOST + 1))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")
        for _ in range(100):
            connection.sendall(b" " * 1_000)
            time.sleep(0.05)


def test_the_largest_of_too_many_bodies_makes_room(running):
    with connect(running) as large:
        large.sendall(head(MOST) + b" " * (MOST - 1_000))
        time.sleep(0.2)
        made = httpx.post(running.url + CHAT, json={**BODY, "user": "a" * 2_000})
        assert made.status_code == 200
        status, error = answer_of(large)
        assert (status, error["type"], error["code"]) == (503, "server_error", "busy")
    with connect(running) as small:
        small.sendall(head(MOST) + b" " * 10)
        time.sleep(0.2)
        made = httpx.post(running.url + CHAT, content=b" " * MOST, headers={"Content-Type": "application/json"})
        assert (made.status_code, made.headers["retry-after"]) == (503, "1")
    assert answers(running)


def answer_of(connection):
    """The answer on a connection that stays."""
    data = b""
    while b"}}" not in data:
        data += (received := connection.recv(1 << 16))
        assert received, data
    return int(data.split()[1]), json.loads(data.partition(b"\r\n\r\n")[2])["error"]


def test_beyond_the_most_connections_the_one_that_sends_for_longest_ends(running, monkeypatch):
    monkeypatch.setattr(Connection, "most", 5)
    held = [connect(running) for _ in range(4)]
    held[0].sendall(head(1_000) + b"{")
    time.sleep(0.2)
    for _ in range(3):
        assert answers(running)
        held.append(connect(running))
    time.sleep(0.2)
    ended = []
    for number, one in enumerate(held):
        one.setblocking(False)
        try:
            ended.append(number) if not one.recv(10) else None
        except BlockingIOError:
            pass
        except ConnectionResetError:
            ended.append(number)
    assert ended == sorted(ended) and ended[:1] == [0] and len(ended) >= 2 and 6 not in ended
    for one in held:
        one.close()
    assert answers(running)


def test_what_is_no_http_has_an_error_of_the_usual_shape(running):
    for sent in (b"\x16\x03\x01 hello\r\n\r\n", head(None) + b"zz\r\n", b"a" * 70_000):
        with connect(running) as connection:
            connection.sendall(sent)
            status, error = answer_of(connection)
            assert (status, error["type"], error["code"]) == (400, "invalid_request_error", "bad_request"), sent[:20]
    assert answers(running)


def test_an_answer_that_is_not_read_ends_the_connection(monkeypatch):
    monkeypatch.setattr(connections, "STALLED", 0.2)

    class Transport(asyncio.Transport):
        aborted = False

        def abort(self):
            self.aborted = True

    async def stall(read_on):
        config = make_server(lambda *_: None).config
        connection, transport = Connection(config, ServerState(), {}), Transport()
        connection.connection_made(transport)
        connection.pause_writing()
        if read_on:
            connection.resume_writing()
        await asyncio.sleep(0.6)
        return transport.aborted

    assert asyncio.run(stall(False)) and not asyncio.run(stall(True))


def test_connections_fit_into_the_open_files(monkeypatch):
    limits, infinite = [], connections.resource.RLIM_INFINITY
    monkeypatch.setattr(connections.resource, "setrlimit", lambda kind, both: limits.append(both))
    for soft, hard, most, raised in (
        (infinite, infinite, 1000, None),
        (20_000, 20_000, 1000, None),
        (256, 4096, 1000, (1128, 4096)),
        (256, infinite, 1000, (1128, infinite)),
        (256, 512, 384, (512, 512)),
        (64, 64, 1, (64, 64)),
    ):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda kind, both=(soft, hard): both)
        assert most_connections() == most
        assert limits == ([] if raised is None else [raised])
        limits.clear()
