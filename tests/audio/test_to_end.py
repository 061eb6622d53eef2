"""`read_to_end`: a length that cannot be known is an error that names the option, and with it a note that says why."""

import json
import struct
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import pal
from pal.app.cli import app
from pal.audio import load, seconds
from pal.data.check import check
from pal.data.collate import Collator
from pal.data.manifest import Record, Turn
from pal.errors import AudioError, AudioWarning
from pal.train.recipe import Recipe
from tests.audio.test_damage import wav
from tests.audio.test_load import encoded, sine
from tests.audio.test_mpeg import bare
from tests.audio.test_ogg import OPUS

RATE = 16_000
STREAMED = wav(0xFFFFFFFF, riff=0xFFFFFFFF)
CUT_MP3 = bare(encoded(sine(RATE, 1.0), RATE, "MP3", "MPEG_LAYER_III"))[:-30]
DOUBTED = {"a.wav": STREAMED, "a.mp3": CUT_MP3, "a.opus": OPUS[:-20]}


@pytest.fixture(params=DOUBTED)
def clip(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    path.write_bytes(DOUBTED[request.param])
    return path


def test_the_default_is_an_error_that_names_the_option(clip: Path) -> None:
    for read in (lambda: load(clip, RATE), lambda: seconds(clip)):
        with pytest.raises(AudioError, match=r"read_to_end=True, --read-to-end$") as caught:
            read()
        assert str(caught.value).startswith(f"{clip}: it")
        assert len(str(caught.value)) <= 300


def test_the_note_says_why(clip: Path) -> None:
    wave = load(clip, RATE, read_to_end=True)
    assert wave.note is not None
    assert wave.note.startswith("read as far as it goes, since it")
    assert seconds(clip, read_to_end=True) == pytest.approx(wave.seconds, abs=1e-9)


def test_a_whole_file_has_no_note() -> None:
    for data in (wav(3200), OPUS, encoded(sine(RATE, 0.1), RATE, "FLAC", "PCM_16")):
        assert load(data, RATE, read_to_end=True).note is None
        assert torch.equal(load(data, RATE, read_to_end=True).samples_N, load(data, RATE).samples_N)


def test_damage_stays_an_error() -> None:
    data = bytearray(OPUS)
    data[len(data) // 2] ^= 1
    with pytest.raises(AudioError, match="wrong checksum"):
        load(bytes(data), RATE, read_to_end=True)


def test_a_model_is_asked_and_says_it(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav(0xFFFFFFFF, 32_000, riff=0xFFFFFFFF))
    model = pal.load("tiny")
    with pytest.raises(AudioError, match="read_to_end"):
        model.ask(path, "What is it?")
    with pytest.warns(AudioWarning, match=r"a\.wav: read as far as it goes"):
        answer = model.ask(path, "What is it?", read_to_end=True, max_new_tokens=1)
    with pytest.warns(AudioWarning, match=r"a\.wav: read as far as it goes"):
        assert model.index(path, read_to_end=True).seconds == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detailed = model.ask_detailed(path, "What is it?", read_to_end=True, max_new_tokens=1)[0]
    assert detailed.text == answer
    assert [note.split(":")[0] for note in detailed.notes] == [str(path)]


def test_a_check_lists_it(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(STREAMED)
    record = {"instruction": "What?", "audio_id": "a.wav", "dataset": "d", "task": "t", "output": "That."}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps(record) + "\n")
    assert "read_to_end" in check(manifest).bad[0].reason
    report = check(manifest, read_to_end=True)
    assert not report.bad
    assert "gives no length" in report.notes[0].reason
    assert "note: " in report.to_text()


def test_training_reads_sources_that_ask_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(STREAMED)
    record = Record(id="1", dataset="d", task="t", clips=(str(path),), turns=(Turn("<audio>What?", "That."),))
    tokenizer = AutoTokenizer.from_pretrained(pal.SHIPPED)
    made = [Collator(tokenizer, RATE, read_to_end=read_to_end) for read_to_end in (True, False)]
    made[1].cache = made[0].cache
    with pytest.warns(AudioWarning, match=r"a\.wav: read as far as it goes"):
        assert len(made[0]([record]).waveforms[0]) == 1600
    with pytest.raises(AudioError, match="read_to_end"):  # what another source allowed is no permission
        made[1]([record])


def test_the_key_of_a_recipe_counts_only_where_it_is_set() -> None:
    base = {
        "seed": 1,
        "model": {"llm": {"path": "x/y"}, "encoders": ["tiny"], "integration": "lal"},
        "data": {"clips": {"manifest": "clips.jsonl"}},
        "stages": [{"name": "a", "train": {"connector": True}, "lr": 1e-3, "steps": 1, "batch": {"rows": 1}}],
    }
    recipe = Recipe.model_validate(base)
    asking = Recipe.model_validate({**base, "data": {"clips": {"manifest": "clips.jsonl", "read_to_end": True}}})
    assert "read_to_end" not in recipe.settings()["data"]["clips"]  # runs of earlier versions go on
    assert asking.settings()["data"]["clips"]["read_to_end"]
    assert asking.digest != recipe.digest


def test_an_option_of_commands() -> None:
    from typer.main import get_command

    commands = get_command(app).commands  # type: ignore[attr-defined]
    for command in (commands["ask"], commands["index"], commands["data"].commands["check"]):
        assert "--read-to-end" in [option for parameter in command.params for option in parameter.opts]


def test_sizes_of_other_placeholders_are_a_doubt() -> None:
    data = wav(2_000_000_000, riff=2_000_000_036)
    with pytest.raises(AudioError, match="read_to_end"):
        load(data, RATE)
    assert len(load(data, RATE, read_to_end=True).samples_N) == 1600
    assert struct.unpack_from("<I", data, 4) == (2_000_000_036,)
