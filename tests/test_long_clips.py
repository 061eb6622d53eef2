"""Long recordings: in blocks they have the keys, values and answers that they have whole."""

import numpy as np
import pytest
import soundfile
import torch

from pal import answering, audio, long_clips
from pal.audio import Limits
from pal.backbone import session as session_module
from pal.backbone.session import Session
from pal.errors import AudioError
from pal.folder_index import FolderIndex
from pal.live import LiveAudio
from tests.models import noise, tiny_model
from tests.test_live import CONNECTORS, WHISPER, chunks, model_of, same

QUESTION = "What sound is this?"
ASKED = [QUESTION, "Is it loud?", "yes"]
FLAMINGO = {"name": "flamingo", "every": 2}


@pytest.fixture
def small(monkeypatch):
    """Limits so low that seconds are long."""
    monkeypatch.setattr(long_clips, "LONG_SECONDS", 2)
    monkeypatch.setattr(long_clips, "BLOCK_SECONDS", 1.5)
    monkeypatch.setattr(answering, "LONG_TOKENS", 40)
    monkeypatch.setattr(session_module, "BLOCK", 7)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "long.flac"
    soundfile.write(path, noise(5.3, 1).numpy(), 16_000)
    return path


@pytest.mark.parametrize("encoders", [None, [WHISPER]], ids=["local", "windows"])
@pytest.mark.parametrize("integration", ["plits", "lal", "pal"])
def test_a_long_file_is_indexed_in_blocks(integration, encoders, file, small, monkeypatch):
    model = model_of(integration, encoders=encoders)
    heard = []
    ours = LiveAudio.append
    monkeypatch.setattr(LiveAudio, "append", lambda self, part: (heard.append(len(part)), ours(self, part))[1])
    made = model.index(file)
    assert sum(heard) == 84_800 and len(heard) > 1
    whole, _ = soundfile.read(file, dtype="float32")
    same(made, model.index((whole, 16_000)))
    assert made.durations == (5.3,)


@pytest.mark.parametrize("integration", ["plits", "lal", "pal"])
def test_a_long_file_is_asked_in_blocks(integration, file, small, monkeypatch):
    model = model_of(integration)
    whole, _ = soundfile.read(file, dtype="float32")
    expected = model.ask((whole, 16_000), ASKED, max_new_tokens=6)
    two = model.ask([(whole, 16_000), (whole[:20_000], 16_000)], QUESTION, max_new_tokens=6)
    heard = []
    ours = LiveAudio.append
    monkeypatch.setattr(LiveAudio, "append", lambda self, part: (heard.append(len(part)), ours(self, part))[1])
    assert model.ask(str(file), ASKED, max_new_tokens=6) == expected
    (detailed,) = model.ask_detailed(file, QUESTION, max_new_tokens=6)
    assert (detailed.text, detailed.audio_seconds, detailed.audio_seconds_used) == (expected[0], 5.3, 5.3)
    assert sum(heard) == 2 * 84_800
    assert model.ask([file, (whole[:20_000], 16_000)], QUESTION, max_new_tokens=6) == two


@pytest.mark.parametrize("integration", ["plits", "lal", "pal"])
def test_int8_is_rounded_block_by_block(integration, file, small):
    model = model_of(integration)
    expected = model.index(file).quantized()
    made, _ = long_clips.index(model, file, int8=True)
    same(made, expected)
    assert made.streams[0].k_LBGAC.dtype == torch.int8
    assert model.ask(made, QUESTION, max_new_tokens=5) == model.ask(expected, QUESTION, max_new_tokens=5)
    live = LiveAudio(model, window=1.0, int8=True)
    live.append(noise(1.5, 1))
    assert live.audio.streams[0].k_scale_LBGA is not None


def test_another_rate_is_resampled_as_a_whole(tmp_path, small):
    samples = noise(4.1, 2, rate=22_050)
    soundfile.write(tmp_path / "a.wav", np.stack([samples, samples], 1), 22_050, subtype="FLOAT")
    model = tiny_model("lal")
    same(model.index(str(tmp_path / "a.wav")), model.index((samples.numpy(), 22_050)))


def test_what_is_not_long_or_does_not_settle_is_indexed_whole(file, small, tmp_path, monkeypatch):
    whole = audio.load(file, 16_000)
    monkeypatch.setattr(LiveAudio, "append", lambda self, part: pytest.fail("in blocks"))
    for model in (tiny_model("lal", connector=CONNECTORS["transformer"]), tiny_model("lal_audio_query")):
        same(model.index(file), model.index((whole.samples_N.numpy(), 16_000)))
    soundfile.write(tmp_path / "short.wav", noise(1.9).numpy(), 16_000)
    assert tiny_model("lal").index(tmp_path / "short.wav").seconds == 1.9


def test_a_day_may_be_indexed_and_an_hour_decoded_whole(file, small, monkeypatch):
    assert long_clips.LIMITS.max_seconds == 86_400 and Limits().max_seconds == 3_600
    model = tiny_model("lal")
    monkeypatch.setattr(long_clips, "LIMITS", Limits(max_seconds=5.0))
    with pytest.raises(AudioError, match=r"long.flac: it is longer than 5 s"):
        model.index(file)


def test_a_file_that_is_cut_is_refused_at_its_end(file, small, tmp_path):
    cut = tmp_path / "cut.flac"
    cut.write_bytes(file.read_bytes()[:-3_000])
    model = tiny_model("lal")
    with pytest.raises(AudioError, match=r"cut\.flac: "):
        model.index(cut)
    with pytest.warns(match=r"cut\.flac: read as far as it goes"):
        made = model.index(cut, read_to_end=True)
    assert 4.0 < made.seconds < 5.3


@pytest.mark.parametrize("store", ["kv", "int8", "features"])
def test_long_files_of_a_folder(store, file, small):
    model = tiny_model("pal")
    made = FolderIndex.open(file.parent / "all.palidx", model, store)
    report = made.update(file.parent, model)
    assert (report.added, report.failed) == (1, {})
    whole, _ = soundfile.read(file, dtype="float32")
    expected = model.index((whole, 16_000))
    clip = expected.quantized() if store == "int8" else expected
    assert made.ask(model, QUESTION, max_new_tokens=5) == {"long.flac": model.ask(clip, QUESTION, max_new_tokens=5)}


@pytest.mark.parametrize("integration", ["plits", "lal", "pal", FLAMINGO], ids=str)
def test_a_long_clip_is_asked_in_blocks(integration, small, monkeypatch):
    model = model_of(integration)
    clip = (noise(5.3, 1).numpy(), 16_000)
    indexed = model.index(clip)
    monkeypatch.setattr(answering, "LONG_TOKENS", 10_000)
    expected = model.ask(clip, ASKED, max_new_tokens=6)
    detailed = model.ask_detailed(clip, QUESTION, max_new_tokens=6)
    monkeypatch.setattr(answering, "LONG_TOKENS", 40)
    heard = []
    ours = Session.hear
    monkeypatch.setattr(
        Session, "hear", lambda self, chunk, **more: (heard.append(chunk.lengths[0]), ours(self, chunk, **more))[1]
    )
    assert model.ask(clip, ASKED, max_new_tokens=6) == expected
    assert sum(heard) == indexed.tokens and max(heard) <= 7  # once for all questions
    assert model.ask(indexed, ASKED, max_new_tokens=6) == expected
    found = model.ask_detailed(clip, QUESTION, max_new_tokens=6)
    assert [one.text for one in found] == [one.text for one in detailed] and found[0].seconds["prefill"] > 0
    talk = [
        {"role": "user", "content": f"<audio>{QUESTION}"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "no"},
    ]
    monkeypatch.setattr(answering, "LONG_TOKENS", 10_000)
    one = model.ask(clip, talk, max_new_tokens=6)
    monkeypatch.setattr(answering, "LONG_TOKENS", 40)
    assert model.ask(clip, talk, max_new_tokens=6) == one


def test_int8_in_blocks_is_int8_whole(small, monkeypatch):
    model = tiny_model("pal")
    clip = model.index((noise(5.3, 1).numpy(), 16_000)).quantized()
    found = model.ask(clip, ASKED, max_new_tokens=6)
    monkeypatch.setattr(answering, "LONG_TOKENS", 10_000)
    assert model.ask(clip, ASKED, max_new_tokens=6) == found


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"stop_strings": ["yes"]}, {"repetition_penalty": 1.2}],
    ids=str,
)
def test_other_options_and_clips_go_another_way(options, small, monkeypatch):
    model = tiny_model("lal")
    clip = (noise(5.3, 1).numpy(), 16_000)
    monkeypatch.setattr(Session, "hear", lambda self, chunk, **more: pytest.fail("in blocks"))
    assert isinstance(model.ask(clip, QUESTION, max_new_tokens=3, **options), str) or options.get(
        "cache_implementation"
    )
    two = [clip, (noise(5.0, 2).numpy(), 16_000)]
    assert len(model.ask(two, QUESTION, max_new_tokens=3)) == 2
    with model.hiding(with_spans=True):
        assert isinstance(model.ask(clip, QUESTION, max_new_tokens=3), str)


def test_decoded_parts_are_the_whole(tmp_path):
    samples = noise(9.0, 5, rate=44_100)
    for name in ("a.wav", "a.flac", "a.mp3", "a.ogg"):
        soundfile.write(tmp_path / name, samples.numpy(), 44_100)
        parts: list[np.ndarray] = []
        seconds, shown, note = audio.load_into(parts, tmp_path / name, 16_000)
        whole = audio.load(tmp_path / name, 16_000)
        assert len(parts) > 3 and np.array_equal(np.concatenate(parts), whole.samples_N.numpy())
        assert (seconds, shown, note) == (whole.seconds, whole.name, None)


def test_chunks_of_a_stream_do_not_matter_to_its_session(small):
    """`listen` and `index` take the same way."""
    model = tiny_model("pal")
    samples = noise(5.3, 1)
    live = model.listen()
    for chunk in chunks(samples, 5, 2):
        live.append(chunk)
    assert live.ask(ASKED, max_new_tokens=5) == model.ask((samples.numpy(), 16_000), ASKED, max_new_tokens=5)
