"""Batches against clips loaded and rows encoded one by one."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.testing import assert_close

import pal.audio
from pal.data.collate import Collator, WaveformCache
from pal.data.manifest import Record, Turn
from pal.data.prompts import PromptStyle, conversation_of, encode
from pal.errors import AudioError
from pal.types import TagSpan

RATE = 8_000


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    paths = [folder / f"{name}.wav" for name in "abc"]
    for path, rate in zip(paths, (RATE, 16_000, RATE), strict=True):
        soundfile.write(path, rng.uniform(-0.5, 0.5, rate // 10).astype(np.float32), rate, subtype="FLOAT")
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def records(clips) -> list[Record]:
    a, b, c = clips
    tags = (TagSpan("dog", 0.0, 0.1),)
    return [
        Record("0", (a,), (Turn("what sound", "a dog"),), "t", "d", tags=tags),
        Record("1", (b, a), (Turn("is <audio> as <audio>?", "no"),), "t", "d"),
        Record("2", (a,), (Turn("which digit", "seven"), Turn("sure?", "yes")), "t", "d", tags=tags),
        Record("3", (), (Turn("what digit", "seven"),), "t", "d"),
        Record("4", (c, c), (Turn("same?", "yes"),), "t", "d"),
    ]


def test_each_clip_once_and_rows_point_at_it(chatml, records, clips):
    batch = Collator(chatml, RATE)(records)
    assert len(batch.waveforms) == 3
    for path, samples_N in zip(clips, batch.waveforms, strict=True):
        assert_close(samples_N, pal.audio.load(path, RATE).samples_N, rtol=0, atol=0)
    assert [row.clips for row in batch.conversations] == [[0], [1, 0], [0], [], [2, 2]]
    for record, row in zip(records, batch.conversations, strict=True):
        assert row == encode(chatml, conversation_of(record), row.clips, train=True)
    assert batch.records == ["0", "1", "2", "3", "4"]
    assert batch.tags == [[TagSpan("dog", 0.0, 0.1)], None, None]
    assert Collator(chatml, RATE)(records[1:2]).tags is None


def test_prompts_without_answers_and_without_audio(chatml, records):
    batch = Collator(chatml, RATE, train=False, style=PromptStyle("Hear."))(records)
    for record, row in zip(records, batch.conversations, strict=True):
        talk = conversation_of(record, with_answers=False, style=PromptStyle("Hear."))
        assert row == encode(chatml, talk, row.clips)
    deaf = Collator(chatml, RATE, with_audio=False)(records)
    assert deaf.waveforms == []
    assert all(row.clips == [] for row in deaf.conversations)
    assert [row.labels for row in deaf.conversations[3:4]] == [Collator(chatml, RATE)(records).conversations[3].labels]


def test_augmentation_hangs_on_the_first_rows_seed_only(chatml, records, clips):
    def augment(samples_N, rate, rng, tags):
        assert rate == RATE
        start = None if tags is None else [TagSpan(tag.label, 0.05) for tag in tags]
        return samples_N.mul_(torch.tensor(rng.uniform(), dtype=torch.float32)), start

    collate = Collator(chatml, RATE, augment)
    batch = collate(records, [7, 8, 9, 10, 11])
    draws = [np.random.default_rng(seed).uniform() for seed in ([7, 0], [8, 0], [11, 0])]
    for path, draw, samples_N in zip(clips, draws, batch.waveforms, strict=True):
        assert_close(samples_N, pal.audio.load(path, RATE).samples_N * draw)
    assert batch.tags == [[TagSpan("dog", 0.05)], None, None]
    # again from the cache, which a change in place must not have reached
    assert all(
        torch.equal(a, b) for a, b in zip(batch.waveforms, collate(records, [7, 8, 0, 0, 11]).waveforms, strict=True)
    )
    assert not torch.equal(batch.waveforms[0], collate(records, [6, 8, 9, 10, 11]).waveforms[0])
    with pytest.raises(AssertionError, match="seed"):
        collate(records)


def test_clips_are_decoded_once_within_the_limit(chatml, records, monkeypatch):
    decoded: list[str] = []
    load = pal.audio.load

    def counting(source, rate, **options):
        decoded.append(Path(source).stem)
        return load(source, rate, **options)

    monkeypatch.setattr(pal.audio, "load", counting)
    collate = Collator(chatml, RATE)
    collate(records)
    collate(records)
    assert decoded == ["a", "b", "c"]
    decoded.clear()
    none = Collator(chatml, RATE, cache_bytes=0)
    none(records)
    none(records)
    assert decoded == ["a", "b", "c"] * 2


def test_cache_lets_go_of_the_least_recently_used():
    cache = WaveformCache(max_bytes=100)
    a, b, c = torch.zeros(10), torch.ones(10), torch.ones(15)
    cache.put("a", a)
    cache.put("b", b)
    assert cache.get("a") is a
    cache.put("c", c)
    assert cache.get("b") is None
    assert cache.get("a") is a
    assert cache.get("c") is c
    assert cache.bytes == 100
    cache.put("too large", torch.zeros(26))
    cache.put("c", torch.zeros(15))
    assert cache.get("c") is c
    assert cache.bytes == 100
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.max_bytes, copy.bytes, copy.get("a")) == (100, 0, None)


def test_a_missing_clip_is_named(chatml, tmp_path):
    record = Record("0", (str(tmp_path / "gone.wav"),), (Turn("what", "a"),), "t", "d")
    with pytest.raises(AudioError, match=r"gone.wav"):
        Collator(chatml, RATE)([record])
