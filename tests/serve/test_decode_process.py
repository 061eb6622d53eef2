"""Clips are decoded in processes that may hang, crash and take memory without harm to the server."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import soundfile
import torch

from pal.audio import Limits, load
from pal.errors import AudioError, AudioWarning
from pal.serve.decode_process import DecodeProcesses
from pal.serve.decode_worker import DATA, FRAME, receive, send_frame
from pal.serve.served import ServeOptions
from tests.counts import repeats
from tests.models import tiny_model, tone
from tests.serve import hostile_worker
from tests.serve.servers import KEY, says, serving, user, wav

LIMITS = Limits(max_seconds=5, max_bytes=4_000_000)
RATE = 16_000
GOOD = wav(tone(0.3, 440.0))
SECONDS = 0.5
"""That a clip may take where hangs are tested; where nothing hangs, a busy machine may take longer."""


@contextmanager
def hostile(count=2, seconds=60.0, memory=64 << 20):
    made = DecodeProcesses(count, memory, seconds, "tests.serve.hostile_worker")
    try:
        yield made
    finally:
        made.close()


def test_the_fork_server_has_no_torch():
    """A process with torch takes several times as long to fork."""
    program = "import sys; import pal.serve.decode_worker; print('torch' in sys.modules, 'soundfile' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert said.stdout.split() == ["False", "True"]


@pytest.fixture(scope="module")
def processes():
    with hostile() as made:
        yield made


def children(pid):
    """Process ids of the children of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids):
    until = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


def written(format, rate, channels, **options):
    x_NC = np.random.default_rng(0).normal(0, 0.1, (rate // 3, channels)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, x_NC, rate, format=format, **options)
    return file.getvalue()


FILES = {
    "wav": written("WAV", 44_100, 2),
    "float wav": written("WAV", RATE, 1, subtype="FLOAT"),
    "flac": written("FLAC", 48_000, 2),
    "ogg": written("OGG", 22_050, 1),
    "mp3": written("MP3", 44_100, 2),
}


def says_bad(processes, data):
    with pytest.raises(AudioError) as caught:
        processes.load(data, RATE, LIMITS, "the clip")
    return str(caught.value)


def hang(processes, thread):
    """A clip that is being decoded for ever, and the process that does."""
    hanging = thread.submit(says_bad, processes, hostile_worker.NATIVE_HANG)
    while not (running := children(processes.pid)) and not hanging.done():
        time.sleep(0.01)
    return hanging, *running


def hears(processes, data=GOOD):
    return torch.equal(processes.load(data, RATE, LIMITS, "the clip").samples_N, load(data, RATE).samples_N)


@pytest.mark.parametrize("kind", FILES)
def test_samples_are_those_of_load(processes, kind):
    found, here = (f(FILES[kind], RATE, LIMITS, "the clip") for f in (processes.load, load))
    assert torch.equal(found.samples_N, here.samples_N) and found.samples_N.dtype == torch.float32
    assert (found.rate, found.seconds, found.name, found.note) == (here.rate, here.seconds, here.name, here.note)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no sound at all",
        GOOD[:-100],
        FILES["flac"][: len(FILES["flac"]) // 2],
        FILES["mp3"][: len(FILES["mp3"]) // 2],
        written("WAV", 3_000, 1),
        wav(tone(5.1, 440.0)),
        bytes(LIMITS.max_bytes + 1),
    ],
    ids=["empty", "text", "short wav", "short flac", "short mp3", "slow", "long", "large"],
)
def test_refusals_are_those_of_load(processes, data):
    with pytest.raises(AudioError) as here:
        load(data, RATE, LIMITS, "the clip")
    assert says_bad(processes, data) == str(here.value)


def test_nothing_is_sent_behind_an_empty_frame():
    """Trap: a process that had refused an empty file and ended made the sender fail, and the file was said to crash it."""
    ours, theirs = socket.socketpair()

    class ClosedAfterTheHead:
        def sendall(self, data):
            ours.sendall(data)
            assert receive(theirs, FRAME.size)
            theirs.close()

    with ours:
        send_frame(ClosedAfterTheHead(), DATA, b"")


def test_the_decoders_of_the_server_are_those_of_load():
    processes = DecodeProcesses(1)
    try:
        assert hears(processes, FILES["ogg"])
    finally:
        processes.close()


def test_warnings_and_notes_arrive(processes):
    with pytest.warns(AudioWarning, match="^the clip: read as far as it goes$"):
        assert processes.load(hostile_worker.WARNS, RATE, LIMITS, "the clip").note == "a note"


def test_a_process_writes_no_file_and_opens_few_of_them(processes):
    size, core, files, nice = processes.load(hostile_worker.WRITES, RATE, LIMITS, "the clip").samples_N.tolist()
    assert (size, core) == (0, 0) and files <= 32
    assert nice == min(19, os.nice(0) + 5)


def test_a_large_part_arrives_whole(processes):
    found = processes.load(hostile_worker.LARGE, 1_000_000, LIMITS, "the clip")
    assert torch.equal(found.samples_N, torch.arange(5_000_000.0))


def test_each_clip_has_a_process_of_its_own(processes):
    ids = {processes.load(hostile_worker.ID, RATE, LIMITS, "the clip").samples_N.item() for _ in range(3)}
    assert len(ids) == 3


CRASHED = "the clip: the decoder crashed on this file; convert it: ffmpeg -i IN OUT.wav"


@pytest.mark.torture
@pytest.mark.parametrize("how", [hostile_worker.SEGFAULT, hostile_worker.ABORT, hostile_worker.EXIT])
def test_crashes_are_said_and_the_next_clip_is_decoded(processes, how):
    before, server = processes.stats.crashes, processes.pid
    count = repeats(full=100, reduced=3)
    for _ in range(count):
        assert says_bad(processes, how) == CRASHED
        assert hears(processes)
    assert processes.stats.crashes == before + count
    assert processes.pid == server and children(server) == []


@pytest.mark.torture
@pytest.mark.parametrize("how", [hostile_worker.HANG, hostile_worker.NATIVE_HANG])
def test_hangs_are_ended_and_the_next_clip_is_decoded(processes, how):
    server = processes.pid
    count = repeats(full=100, reduced=3)
    assert hears(processes)
    for _ in range(count):
        processes.seconds = SECONDS
        said = says_bad(processes, how)
        processes.seconds = 60.0
        assert said.startswith("the clip: decoding takes more than 0.5 s; ") and "damaged" not in said
        assert hears(processes)
    assert processes.stats.timeouts >= count
    assert processes.pid == server and children(server) == []


@pytest.mark.parametrize("how", [hostile_worker.HUGE, hostile_worker.MUCH, hostile_worker.HIDDEN])
def test_memory_is_bounded(processes, how):
    before = processes.stats.out_of_memory
    said = says_bad(processes, how)
    assert said.startswith("the clip: decoding takes more than 64 MiB of memory; ") and "damaged" not in said
    assert processes.stats.out_of_memory == before + 1
    assert hears(processes)


@pytest.mark.parametrize("how", [hostile_worker.BUG, hostile_worker.NAN, hostile_worker.ENDLESS])
def test_nonsense_of_a_decoder_counts_as_a_crash(processes, how):
    assert says_bad(processes, how) == CRASHED
    assert hears(processes)


def test_a_decoder_that_was_killed_does_not_blame_the_file(processes):
    assert "the decoder was killed while it read this file; send it again" in says_bad(processes, hostile_worker.KILLED)


def test_a_killed_fork_server_is_replaced_and_leaves_no_process(processes):
    with ThreadPoolExecutor(1) as thread:
        hanging, pid = hang(processes, thread)
        old, starts = processes.pid, processes.stats.starts
        os.kill(old, signal.SIGKILL)
        assert "the decoder was killed while it read this file" in hanging.result(60)
    assert gone([old, pid])
    assert hears(processes) and processes.pid != old and processes.stats.starts == starts + 1


def test_threads_share_the_processes(processes):
    kinds = list(FILES) * 3
    expected = {kind: load(data, RATE).samples_N for kind, data in FILES.items()}

    def decode(place):
        if place % 4 == 3:
            return says_bad(processes, hostile_worker.SEGFAULT) == CRASHED
        kind = kinds[place % len(kinds)]
        return torch.equal(processes.load(FILES[kind], RATE, LIMITS, "the clip").samples_N, expected[kind])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(decode, range(24)))


def test_nothing_is_left_where_the_server_is_killed():
    code = (
        "from threading import Thread\n"
        "from pal.audio import Limits\n"
        "from pal.serve.decode_process import DecodeProcesses\n"
        "processes = DecodeProcesses(1, module='tests.serve.hostile_worker')\n"
        "print(processes.pid, flush=True)\n"
        "processes.load(b'native hang', 16000, Limits(), 'the clip')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        fork_server = int(server.stdout.readline())
        while not (running := children(fork_server)) and server.poll() is None:
            time.sleep(0.05)
        server.kill()
    assert running and gone([fork_server, *running])


def test_a_hang_is_an_error_of_its_request_alone_and_nothing_is_left_after_the_end(monkeypatch):
    monkeypatch.setenv("PAL_API_KEY", KEY)
    with hostile() as processes, ThreadPoolExecutor(1) as thread:
        assert hears(processes)
        assert processes.load(hostile_worker.KEY, RATE, LIMITS, "the clip").samples_N.item() == 0
        processes.seconds = SECONDS
        options = ServeOptions(api_key=KEY)
        with serving(tiny_model("pal"), options, processes=processes) as running, running.client() as client:
            with pytest.raises(openai.BadRequestError) as caught:
                create(client, hostile_worker.HANG)
            error = caught.value.response.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_audio")
            assert error["param"] == "messages[0].content[0].input_audio"
            assert error["message"].startswith("the wav clip: decoding takes more than 0.5 s; ")
            processes.seconds = 60.0
            assert create(client, GOOD).choices[0].finish_reason == "length"
            shown = httpx.get(f"{running.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
            assert "pal_decoder_timeouts_total 1.0" in shown and "pal_decoder_clips_total 3.0" in shown
            hanging, pid = hang(processes, thread)
            pids = [processes.pid, pid]
        assert "the decoder was killed" in hanging.result(60) and gone(pids)
        with pytest.raises(RuntimeError, match="closed"):
            processes.load(GOOD, RATE, LIMITS, "the clip")


def create(client, data):
    clip = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
    return client.chat.completions.create(model="tiny", messages=[user(clip, says("What is it?"))], max_tokens=4)
