"""The hostile programme on a server of its own, in reduced numbers; `make torture` takes the full ones."""

import asyncio
import json
import mmap
import os

import pytest

from pal.audio import Limits, load
from pal.errors import AudioError
from pal.serve import access
from pal.serve.decode_process import DecodeProcesses
from pal.serve.served import ServeOptions
from tests.counts import FULL, repeats
from tests.models import tiny_model
from tests.serve.hostile import bodies, files
from tests.serve.hostile.attacks import ATTACKS, Report, run, slow
from tests.serve.hostile.memory import MEBI, MemoryWatch
from tests.serve.hostile.soak import soak
from tests.serve.hostile.wire import Outcome, Target, ask, listening, part, posted, send, wav
from tests.serve.servers import serving

BODY = 2 * MEBI
"""Bytes of a request; ten times that in the full counts, whose files are larger."""
LIMITS = Limits(max_seconds=60, max_bytes=10 * BODY if FULL else BODY)


@pytest.fixture(scope="module")
def processes():
    made = DecodeProcesses(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def running(processes):
    options = ServeOptions(max_body=LIMITS.max_bytes, limits=LIMITS)
    with serving(tiny_model("pal"), options, processes=processes, batch=8, queue=32) as made:
        yield made


@pytest.fixture(scope="module")
def target(running):
    return Target(running.url, "tiny")


def attacked(target, name):
    """The report of an attack, after which the server answers; all its errors have OpenAI's shape and none is its own."""
    attack, full, reduced = ATTACKS[name]
    report = asyncio.run(run(attack, target, repeats(full, reduced)))
    assert report.alive is not None and report.requests
    assert report.shaped == report.errors, report
    assert not [kind for kind in report.kinds if not kind.isdigit() or int(kind) >= 500], report
    return report


@pytest.mark.torture
def test_malformed_bodies_have_errors(target, monkeypatch):
    if not FULL:  # some bodies promise more than comes
        monkeypatch.setattr(access, "FIRST", 2.0)
    report = attacked(target, "malformed")
    assert set(report.kinds) <= {"200", "400", "404", "405", "408", "413", "422"}
    assert report.errors > 0.8 * report.requests


@pytest.mark.torture
@pytest.mark.parametrize("name", ["bombs", "rates", "many_parts"])
def test_files_and_forms_that_ask_for_much_are_refused(target, name):
    assert set(attacked(target, name).kinds) <= {"400", "413", "422"}


@pytest.mark.torture
def test_large_bodies_are_refused(target):
    assert attacked(target, "large").kinds == {"413": 4}


@pytest.mark.torture
def test_nothing_is_fetched(target):
    report = attacked(target, "ssrf")
    assert report.requests == 40 and report.facts["connections"] == 0 and "200" not in report.kinds


@pytest.mark.torture
def test_nothing_is_read(target):
    report = attacked(target, "traversal")
    assert report.requests == 40 and report.facts["files read"] == 0 and "200" not in report.kinds


@pytest.mark.torture
def test_damaged_files_are_whole_or_refused(target):
    report = attacked(target, "damaged")
    for codec in files.CODECS:
        seen = report.facts[codec]
        assert sum(seen.values()) == repeats(*ATTACKS["damaged"][1:]) and "shortened" not in seen, report.facts
        assert seen.get("refused (400)", 0) >= sum(seen.values()) // 2  # all that were cut, at least


@pytest.mark.torture
@pytest.mark.parametrize("codec", files.CODECS)
def test_no_sample_of_a_damaged_file_is_left_out(codec):
    expected = len(load(files.whole(codec), 16_000).samples_N)
    taken = 0
    for number in range(repeats(full=200, reduced=20)):
        data = files.damaged(codec, number)
        try:
            found = len(load(data, 16_000, LIMITS).samples_N)
        except AudioError as error:
            assert "; " in str(error)
            continue
        taken += 1
        assert found >= expected, (number, found)
    assert taken < repeats(full=200, reduced=20)


@pytest.mark.torture
def test_clients_that_leave_leave_nothing_behind(running, target):
    before, attack = running.engine.stats.cancelled, ATTACKS["disconnects"]
    report = asyncio.run(run(attack[0], target, repeats(*attack[1:])))
    assert set(report.kinds) == {"200", "left"} and report.alive is not None
    # the answer afterwards came behind theirs, so those that were running have been left
    assert running.engine.running == 0 and running.engine.stats.cancelled > before


@pytest.mark.torture
def test_slow_connections_keep_nobody_out(target):
    async def briefly(target, report, count):
        await slow(target, report, count, seconds=60.0 if FULL else 4.0)

    report = asyncio.run(run(briefly, target, repeats(*ATTACKS["slow"][1:])))
    assert set(report.kinds) == {"200"} and report.alive is not None


def test_steady_load_is_counted(target):
    found = asyncio.run(soak(target.url, target.model, os.getpid(), seconds=2.0, rate=8.0))
    assert found["requests"] >= 8 and {"200", "400", "left"} <= set(found["seen"]) <= {"200", "400", "left"}


def test_a_bomb_takes_little_memory():
    data = files.flac_claiming(files.flac_bomb(files.HOUR), frames=0)
    load(wav(1.0, format="FLAC"), 16_000)
    with MemoryWatch(os.getpid()) as watch, pytest.raises(AudioError, match="longer than 60 s"):
        load(data, 16_000, LIMITS)
    assert watch.peak < 100 * MEBI


class TestTheProgramme:
    """What the programme says is true: the tests above could not fail if it saw nothing."""

    def test_a_server_that_does_everything_wrong_is_seen(self, tmp_path):
        async def attack():
            async with listening(b"{}") as (port, seen):
                wrong = Target(f"http://127.0.0.1:{port}", "tiny")
                made = [await run(ATTACKS[name][0], wrong, 2) for name in ("ssrf", "traversal", "damaged", "malformed")]
                assert len(seen) > 10
            return made

        fetched, read, damaged, malformed = asyncio.run(attack())
        assert fetched.kinds == {"200": 2} and read.facts["files read"] == 2
        assert all(damaged.facts[codec] == {"whole": 2} for codec in files.CODECS)
        assert malformed.kinds == {"200": 2}

    def test_shapes(self):
        error = {"message": "a", "type": "b", "param": None, "code": None}
        assert Outcome(400, json.dumps({"error": error}).encode()).shaped
        for body in (b"", b"no", b"[]", b'{"error": "a"}', b'{"detail": []}', b'{"error": {"message": "a"}}'):
            assert not Outcome(400, body).shaped
        report = Report("a")
        for status in (200, 400, 500, 0):
            report.take(Outcome(status, failure="closed"))
        assert report.kinds == {"200": 1, "400": 1, "500": 1, "closed": 1} and (report.errors, report.shaped) == (2, 0)

    def test_attacks_are_many_and_the_same_each_time(self, tmp_path):
        target = Target("http://127.0.0.1:1", "tiny")
        made = [bodies.malformed(target, number) for number in range(1_000)]
        assert made == [bodies.malformed(target, number) for number in range(1_000)] and len(set(made)) > 940
        assert len({request for _, request in bodies.ssrf(target, 1)}) == 40
        assert len({request for _, request in bodies.traversals(target, tmp_path / "canary.wav")}) == 40
        for codec in files.CODECS:
            assert len({files.damaged(codec, number) for number in range(50)} - {files.whole(codec)}) > 40

    def test_bombs_hold_what_they_should(self):
        for name, data in files.bombs(120.0):
            if "claims" not in name:
                assert load(data, 16_000).seconds == pytest.approx(120, rel=0.1), name
        assert len(files.opus_bomb(6 * files.HOUR)) < 600_000

    def test_memory_is_seen(self):
        with MemoryWatch(os.getpid()) as watch:
            held = mmap.mmap(-1, 64 * MEBI)  # not from the heap, which may have as much that is free and resident
            held.write(b"a" * (64 * MEBI))
        assert len(held) == 64 * MEBI and watch.kept > 50 * MEBI and watch.peak >= watch.kept
        held.close()

    def test_an_early_answer_ends_the_sending(self, target):
        found = asyncio.run(send(target, [target.head("/v1/chat/completions", {"Content-Length": "9" * 15})]))
        assert found.status == 413 and found.shaped
        good = asyncio.run(ask(target, part(wav(0.3)), patience=60))
        assert good.status == 200 and json.loads(good.body)["usage"]["prompt_tokens"]
        assert posted(target, b"{}").endswith(b"\r\n\r\n{}")
