"""A clip that several requests bring at once is decoded once."""

import gc
import threading

import pytest

from pal.serve.decoded_clips import DecodedClips
from tests.models import noise
from tests.serve.engines import wave


def test_requests_that_come_meanwhile_get_the_same_samples():
    clips, decoding, going, got = DecodedClips(), threading.Event(), threading.Event(), []
    calls = []

    def decode():
        calls.append(1)
        decoding.set()
        assert going.wait(30)
        return wave(noise(0.1))

    threads = [threading.Thread(target=lambda: got.append(clips.get("one", decode))) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert decoding.wait(30)
    other = clips.get("two", lambda: wave(noise(0.1)))  # another clip does not wait
    going.set()
    for thread in threads:
        thread.join(30)
    assert len(calls) == 1 and len(got) == 6
    assert all(one is got[0] for one in got) and other is not got[0]


def test_samples_are_gone_with_the_last_request_that_holds_them():
    clips, calls = DecodedClips(), []

    def decode():
        calls.append(1)
        return wave(noise(0.1))

    held = clips.get("one", decode)
    assert clips.get("one", decode) is held and len(calls) == 1
    del held
    gc.collect()
    clips.get("one", decode)
    assert len(calls) == 2


def test_each_request_gets_its_own_error():
    clips, calls = DecodedClips(), []

    def decode():
        calls.append(1)
        raise ZeroDivisionError(len(calls))

    for number in (1, 2):
        with pytest.raises(ZeroDivisionError, match=str(number)):
            clips.get("one", decode)
    assert clips.get("one", lambda: wave(noise(0.1))) is not None
