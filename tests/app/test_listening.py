"""`pal listen`: answers to a stream, from standard input and from a file."""

import io
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from pal.app import listening
from pal.app.cli import app
from tests.models import noise, tiny_model, tone

QUESTION = "What sound is this?"
RATE = 16_000


@pytest.fixture(scope="module")
def model():
    return tiny_model("lal")


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "model"
    model.save_pretrained(path, full=True)
    return path


@pytest.fixture(scope="module")
def samples():
    return np.concatenate(
        [noise(1.0, 1).numpy(), tone(1.0, 300.0).numpy(), np.zeros(RATE, np.float32), tone(0.5, 900.0)]
    )


def run(*arguments, given=None):
    return CliRunner().invoke(app, [str(one) for one in arguments], input=given)


def expected(model, samples, every=1.0, window=None, tokens=6):
    """Answers to the file so far, at each second and at the end."""
    found = []
    step = round(every * RATE)
    for end in [*range(step, len(samples), step), len(samples)]:
        start = 0.0 if window is None else max(0.0, end / RATE - window)
        clip = model.index((samples[:end], RATE))
        clip = clip if start == 0 else clip.slice(start, end / RATE)
        answer = model.ask(clip, QUESTION, max_new_tokens=tokens)
        if not found or found[-1][1] != answer:
            found.append((end / RATE, answer))
    return found


@pytest.mark.parametrize("window", [None, 1.5])
def test_a_file_as_fast_as_it_goes(model, bundle, samples, window, tmp_path):
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    given = ["listen", tmp_path / "a.wav", QUESTION, "--model", bundle, "--fast", "--max-new-tokens", 6]
    more = [] if window is None else ["--window", window]
    wanted = expected(model, samples, window=window)
    assert len(wanted) > 1
    done = run(*given, *more, "--json")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["seconds"], line["answer"]) for line in lines] == wanted
    done = run(*given, *more)
    assert [line.split("  ", 1)[0] for line in done.stdout.splitlines()] == [f"0:{end:04.1f}" for end, _ in wanted]


def test_raw_samples_from_standard_input(model, bundle, samples):
    ints = (samples * 32767).astype("<i2")
    done = run(
        "listen", "-", QUESTION, "--model", bundle, "--fast", "--json", "--max-new-tokens", 6, given=ints.tobytes()
    )
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["seconds"], line["answer"]) for line in lines] == expected(model, ints.astype(np.float32) / 32768)


def test_what_cannot_be_heard(bundle, tmp_path):
    done = run("listen", "-", QUESTION, "--model", bundle, given=b"")
    assert done.exit_code == 1 and "no sample arrived" in done.stderr
    for fast in ([], ["--fast"]):
        done = run("listen", "-", QUESTION, "--model", bundle, *fast, given=b"abc")
        assert done.exit_code == 1 and "ended within a sample" in done.stderr
    done = run("listen", "-", QUESTION, "--model", bundle, "--rate", 8000, given=b"")
    assert done.exit_code == 1 and "the model hears 16000 Hz; resample the stream" in done.stderr
    done = run("listen", tmp_path / "none.wav", QUESTION, "--model", bundle)
    assert done.exit_code == 1 and "none.wav" in done.stderr


def test_a_file_is_read_at_its_own_pace(monkeypatch):
    slept = []
    now = [100.0]
    monkeypatch.setattr(listening.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        listening.time, "sleep", lambda seconds: (slept.append(seconds), now.__setitem__(0, now[0] + seconds))
    )
    blocks = list(listening.paced_blocks(np.zeros(RATE, np.float32), RATE, fast=False))
    assert sum(map(len, blocks)) == RATE and sum(slept) == pytest.approx(1.0)
    assert list(map(len, listening.paced_blocks(np.zeros(2000, np.float32), RATE, fast=True))) == [1600, 400]


def test_a_slow_answer_delays_no_later_one():
    """All that has arrived meanwhile is one chunk."""

    def blocks():
        for _ in range(20):
            yield np.ones(10, np.float32)

    taken = []
    for chunk in listening.gathered(blocks(), 10, ahead=True):
        taken.append(len(chunk))
        time.sleep(0.2)
    assert sum(taken) == 200 and len(taken) <= 3
    assert [len(chunk) for chunk in listening.gathered(blocks(), 30, ahead=False)] == [30] * 6 + [20]


class Short(io.RawIOBase):
    """A pipe, which gives what is there: here three bytes at a time."""

    def __init__(self, data):
        self.data = data

    def read(self, size=-1):
        some, self.data = self.data[:3], self.data[3:]
        return some


def test_short_reads_lose_no_half_sample():
    numbers = np.arange(-5, 6, dtype="<i2")
    found = np.concatenate(list(listening.raw_blocks(Short(numbers.tobytes()), RATE)))
    assert (found * 32768).tolist() == numbers.tolist()
    below = list(listening.raw_blocks(SimpleNamespace(raw=Short(numbers.tobytes())), RATE))  # the buffer is not used
    assert sum(map(len, below)) == len(numbers)


def test_raw_blocks_are_scaled():
    found = list(listening.raw_blocks(io.BytesIO(np.array([0, 16384, -32768], "<i2").tobytes()), 10))
    assert np.concatenate(found).tolist() == [0.0, 0.5, -1.0]
