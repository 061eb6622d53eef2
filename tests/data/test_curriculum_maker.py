"""Making a curriculum: the files, the programs' sound, and what happens when something is missing or stops."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from pal.app.cli import app
from pal.data.curriculum import grammar, maker, music, plans, programs, speech, voices
from pal.data.curriculum.grammar import Sentence
from pal.data.curriculum.midi import Note
from pal.data.curriculum.speech import Speech
from pal.data.curriculum.voices import Voice
from pal.data.manifest import Manifest
from pal.data.prepare import read
from pal.data.synth.waves import RATE
from pal.errors import ConfigError
from tests.data.test_curriculum import sources

__all__ = ["sources"]

needs_programs = pytest.mark.skipif(
    bool(programs.missing_packages()), reason=f"{', '.join(programs.missing_packages())}: not installed"
)


@pytest.fixture
def silent(monkeypatch):
    """Stands in for the programs: their versions are known, and their sound is a tone."""
    monkeypatch.setattr(programs, "missing_packages", list)
    monkeypatch.setattr(programs, "versions", lambda: {"flite": "0"})
    tone_N = (0.1 * np.sin(np.arange(RATE) * 0.3)).astype(np.float32)
    monkeypatch.setattr(speech, "speak", lambda text, voice: tone_N)
    monkeypatch.setattr(music, "render", lambda content: tone_N)


def make(out: Path, sources: tuple[Path, Path], **options) -> dict:
    return maker.make(
        out, **{"seed": 1, "clips": 20, "workers": 1, "held_out": 0.02} | options, esc10=sources[0], fsdd=sources[1]
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Without the programs -----------------------------------------------------------------------------------------


def test_folder_has_all_manifests_and_a_true_summary(tmp_path, sources, silent):
    summary = make(tmp_path, sources)
    assert summary == json.loads((tmp_path / "curriculum.json").read_text())
    assert not (tmp_path / "unfinished.json").exists()
    whole = Manifest(tmp_path / "train.jsonl")
    whole.validate(files=True)
    parts = [record for group in plans.SHARES for record in Manifest(tmp_path / f"train-{group}.jsonl")]
    assert parts == list(whole)
    assert summary["training"]["questions"] == len(whole)
    assert summary["training"]["clips"] == len({record.clips[0] for record in whole}) == 20
    tasks = Counter(record.task for record in whole)
    assert {task: row["questions"] for task, row in summary["training"]["tasks"].items()} == tasks
    names = {path.stem for path in (tmp_path / "held_out").glob("*.jsonl")}
    assert (
        names
        == set(summary["held_out"])
        == {
            *("esc10-fold4", "fsdd-theo", "scene-pairs", "digit-strings", "speech-transcribe", "speech-word-present"),
            *("speech-other", "instruments", "families", "music-other"),
        }
    )
    for name in names:
        held_out = Manifest(tmp_path / "held_out" / f"{name}.jsonl")
        held_out.validate(files=True)
        assert all(Path(clip).is_relative_to(tmp_path / "held_out") for record in held_out for clip in record.clips)
    for record in whole:
        info = soundfile.info(record.clips[0])
        assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16") and info.duration <= 10


def test_real_recordings_are_judged_as_the_readers_judge_them(tmp_path, sources, silent):
    make(tmp_path, sources)
    for name, kind, root, options in (
        ("esc10-fold4", "esc50", sources[0], {"folds": "4", "esc10": True}),
        ("fsdd-theo", "fsdd", sources[1], {"speakers": "theo"}),
    ):
        ours, theirs = list(Manifest(tmp_path / "held_out" / f"{name}.jsonl")), read(kind, root, **options)
        assert [(one.id, one.turns, one.task, one.choices) for one in ours] == [
            (one.id, one.turns, one.task, one.choices) for one in theirs
        ]
        for one, other in zip(ours, theirs, strict=True):
            assert Path(one.clips[0]).read_bytes() == Path(other.clips[0]).read_bytes()


def test_stopped_run_looks_unfinished_and_goes_on(tmp_path, sources, silent, monkeypatch):
    make(tmp_path / "whole", sources)
    rendered = []

    def render_some(clip):
        if len(rendered) == 15:
            raise KeyboardInterrupt
        rendered.append(clip)
        return plans_render(clip)

    plans_render = plans.render
    monkeypatch.setattr(plans, "render", render_some)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "stopped", sources)
    assert not list((tmp_path / "stopped").rglob("*.jsonl")) and not (tmp_path / "stopped" / "curriculum.json").exists()
    monkeypatch.setattr(plans, "render", lambda clip: rendered.append(clip) or plans_render(clip))
    make(tmp_path / "stopped", sources)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    total = len(list((tmp_path / "whole").rglob("*.flac")))
    assert len(rendered) == total
    # a complete one is left as it is
    make(tmp_path / "stopped", sources)
    assert len(rendered) == total


def test_folder_with_another_curriculum_is_refused(tmp_path, sources, silent):
    make(tmp_path, sources)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="holds another curriculum"):
        make(tmp_path, sources, seed=2)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"clips": 9}, {"workers": 0}])
def test_values_outside_their_range_are_named(tmp_path, sources, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make(tmp_path, sources, **wrong)


def test_recordings_may_be_elsewhere(tmp_path, sources, silent):
    make(tmp_path / "one", sources)
    moved = tmp_path / "moved"
    for name, source in zip(("esc", "fsdd"), sources, strict=True):
        shutil.copytree(source, moved / name)
    make(tmp_path / "two", (moved / "esc", moved / "fsdd"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_missing_programs_are_named_by_their_packages(tmp_path, sources, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"apt-get install flite espeak-ng fluidsynth") as error:
        make(tmp_path / "out", sources)
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_command_says_what_is_left_out_and_help_names_the_packages(tmp_path, silent, monkeypatch):
    monkeypatch.setattr(plans, "HELD_OUT_CLIPS", dict.fromkeys(plans.SHARES, 2))
    made = CliRunner().invoke(app, ["data", "curriculum", "-o", str(tmp_path), "--clips", "10", "--seed", "1"])
    assert made.exit_code == 0, made.output
    assert "no --esc10" in made.output and "no --fsdd" in made.output
    assert json.loads((tmp_path / "curriculum.json").read_text())["left_out"] == ["esc10", "fsdd"]
    assert not (tmp_path / "train-scenes.jsonl").exists() and (tmp_path / "train-music.jsonl").exists()
    shown = CliRunner().invoke(app, ["data", "curriculum", "--help"])
    assert programs.INSTALL in " ".join(shown.output.split())


def test_program_that_fails_is_named():
    with pytest.raises(ConfigError, match=r"sh failed: no such voice; .*apt-get"):
        programs.run(["sh", "-c", "echo no such voice >&2; exit 3"])


def test_counted_words_lie_in_a_clip_of_fixed_length(silent):
    words = Sentence(("one", "two"), "list")
    x_N = speech.render(Speech(words, Voice("flite", "slt"), True, 0.1, 0.3, length=3.0))
    sounding = np.flatnonzero(np.abs(x_N) > 0.01) / RATE
    assert len(x_N) == pytest.approx(3 * RATE, abs=2)
    assert sounding[0] == pytest.approx(0.5, abs=0.01)
    # speech that is too long is played faster
    assert len(speech.render(Speech(words, Voice("flite", "slt"), True, 0.1, 0.3, length=0.6))) <= 0.61 * RATE


# With them ---------------------------------------------------------------------------------------------------


@needs_programs
def test_same_seed_same_bytes_whatever_the_workers(tmp_path, sources, monkeypatch):
    monkeypatch.setattr("pal.data.curriculum.maker._ALONE", 0)
    make(tmp_path / "a", sources, clips=10, workers=1)
    make(tmp_path / "b", sources, clips=10, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@needs_programs
def test_voices_all_speak_and_differ():
    every = [Voice("flite", name) for name in voices.FLITE_VOICES] + voices.held_out_voices()
    every += [Voice("espeak-ng", "en-us", variant) for variant in voices.ESPEAK_VARIANTS]
    every += [Voice("espeak-ng", accent) for accent in sorted({*voices.ESPEAK_ACCENTS} - {"en-us"})]
    spoken = [voices.speak("the red cup", voice) for voice in every]
    assert all(0.3 < len(x_N) / RATE < 2.5 and np.abs(x_N).max() > 0.05 for x_N in spoken)
    assert len({x_N.tobytes() for x_N in spoken}) == len(every)


@needs_programs
@pytest.mark.parametrize("voice", [Voice("flite", "slt"), Voice("espeak-ng", "en-us")])
def test_pace_and_pitch_change_the_speech(voice):
    from dataclasses import replace

    plain_N, fast_N = (voices.speak("open the old window", replace(voice, pace=pace)) for pace in (1.0, 1.3))
    assert 0.65 < len(fast_N) / len(plain_N) < 0.9
    assert not np.array_equal(plain_N, voices.speak("open the old window", replace(voice, pitch=1.2)))


@needs_programs
@pytest.mark.parametrize("font", [programs.TRAINING_FONT, programs.HELD_OUT_FONT])
def test_notes_sound_when_and_as_high_as_written(font):
    notes = (Note(73, 69, 0.2, 0.7), Note(73, 81, 1.0, 1.5))
    x_N = music.render(music.Music(notes, 1.9, str(font), ("flute",)))
    assert len(x_N) == round(1.9 * RATE)
    for start, hz in ((0.3, 440), (1.1, 880)):
        part_N = x_N[round(start * RATE) : round((start + 0.4) * RATE)]
        spectrum = np.abs(np.fft.rfft(part_N * np.hanning(len(part_N)), RATE))
        assert np.argmax(spectrum[hz - 40 : hz + 40]) == pytest.approx(40, abs=8)
        assert spectrum[hz - 40 : hz + 40].max() > 10 * np.median(spectrum)
    assert np.abs(x_N[: round(0.15 * RATE)]).max() < 0.01


@needs_programs
@pytest.mark.parametrize("font", [programs.TRAINING_FONT, programs.HELD_OUT_FONT])
def test_instruments_all_sound_in_both_fonts(font):
    every = list(music.INSTRUMENTS.values())
    sounds = set()
    for twelve in (every[:12], every[12:]):
        notes = tuple(Note(one.programs[0], (one.low + one.high) // 2, at, at + 0.4) for at, one in enumerate(twelve))
        x_N = music.render(music.Music(notes, 12.0, str(font), ()))
        for at, one in enumerate(twelve):
            part_N = x_N[at * RATE : round((at + 0.4) * RATE)]
            assert np.abs(part_N).max() > 0.01, one
            sounds.add(part_N.tobytes())
    assert len(sounds) == len(every) == 24


@needs_programs
def test_words_of_the_grammar_are_spoken_not_spelled():
    # a spelled or skipped word would be much longer or shorter than its letters
    rng = np.random.default_rng(0)
    words = [grammar.vocabulary()[at] for at in rng.integers(len(grammar.vocabulary()), size=12)]
    for voice in (Voice("flite", "slt"), Voice("espeak-ng", "en-us")):
        for word in words:
            assert 0.08 < len(voices.speak(word, voice)) / RATE < 0.35 + 0.11 * len(word), word
