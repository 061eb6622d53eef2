"""Every benchmark from its published layout to a score: items as they must be, and a deaf model at its baseline."""

import inspect
from dataclasses import replace
from string import ascii_uppercase

import pytest
import soundfile

from pal.audio import load
from pal.errors import ConfigError, ManifestError
from pal.evaluate import evaluate, open_task
from pal.evaluate.tasks.base import ask_by_letter
from pal.registry import names
from tests import published

SCORES = {
    **dict.fromkeys(("esc50", "vggsound", "gtzan", "nsynth", "mmau", "mmar"), "accuracy"),
    **dict.fromkeys(("mmsu", "air_bench", "muchomusic"), "accuracy"),
    **dict.fromkeys(("audiocaps", "clotho", "musiccaps"), "CIDEr-D"),
    "dcase2017": "micro_f1",
    "fsd50k": "mAP",
    "clothoaqa": "exact_match",
    "librispeech": "wer",
}
COUNTS = {
    "esc50": 4,
    "dcase2017": 3,
    "vggsound": 2,
    "fsd50k": 2,
    "gtzan": 11,
    "nsynth": 3,
    "audiocaps": 2,
    "clotho": 2,
    "clothoaqa": 2,
    "musiccaps": 2,
    "librispeech": 2,
    "mmau": 2,
    "mmar": 2,
    "mmsu": 2,
    "air_bench": 2,
    "muchomusic": 2,
}


def items(name, root, **options):
    return open_task(name, published.BENCHMARKS[name](root), options).items


def test_all_of_them_are_known():
    assert names("task") == sorted(published.BENCHMARKS) == sorted(SCORES)


class Listener:
    """The model, answering right where it recognises the clip, else what it always says."""

    def __init__(self, model, benchmark, recognises):
        self._model, self.recognises = model, recognises
        letters = benchmark.rule["name"] == "letters"
        right = [
            "ABCD"[item.choices.index(item.references[0])] if letters else item.references[0]
            for item in benchmark.items
        ]
        known = [
            recognises(model.encode_clip(load(item.clips[0], model.sampling_rate).samples_N))
            for item in benchmark.items
        ]
        assert len(set(known)) == len(known)
        self.right = dict(zip(known, right, strict=True))
        self.always = min("ABCD", key=right.count) if letters else "nothing"

    def __getattr__(self, name):
        return getattr(self._model, name)

    def generate(self, clips, rows, **options):
        return [
            self.right.get(self.recognises(clips[row.clips[0]]), self.always) if row.clips else self.always
            for row in rows
        ]


def by_sound(heard):
    return heard.x_AE[0].numpy().tobytes()


def by_length(heard):
    return heard.seconds


def more_of(benchmark, folder, least=12):
    """The questions several times over, each about noise of its own length; and the same about silence."""
    copies = -(-least // len(benchmark.items))
    versions = []
    for kind in ("noise", "silence"):
        items = []
        for number, item in enumerate(item for item in benchmark.items for _ in range(copies)):
            path = folder / kind / f"{number}.wav"
            published.clip(path, 0.1 + 0.01 * number)
            if kind == "silence":
                samples, rate = soundfile.read(path)
                soundfile.write(path, 0 * samples, rate)
            items.append(replace(item, id=f"{item.id} {number}", clips=(str(path),)))
        versions.append(replace(benchmark, items=tuple(items), root=folder))
    return versions


@pytest.mark.parametrize("name", names("task"))
def test_without_sound_a_score_is_the_baselines(name, model, tmp_path, monkeypatch):
    """Through silence nothing comes but a clip's length, and only a model that goes by it stays above the baseline."""
    monkeypatch.setattr("shutil.which", lambda name: None)  # Java takes long to start, and test_text.py has it
    monkeypatch.setattr("pal.evaluate.label_metrics.LabelMetric.resamples", 20)
    benchmark = open_task(name, published.BENCHMARKS[name](tmp_path / "data"))
    assert len(benchmark.items) == COUNTS[name]
    noise, silence = more_of(benchmark, tmp_path)
    deaf = evaluate(Listener(model, noise, by_sound), silence, progress=False)
    assert deaf.metric.startswith(SCORES[name])
    assert not deaf.errors
    assert sum(part.n for part in deaf.durations.values()) == deaf.n
    low, high = deaf.overall.no_audio_ci95

    def score(recognises, asked):
        return evaluate(Listener(model, noise, recognises), asked, no_audio=False, progress=False).score

    assert low <= deaf.overall.score <= high
    assert not low <= score(by_sound, noise) <= high
    assert not low <= score(by_length, silence) <= high


def test_esc50(tmp_path):
    found = items("esc50", tmp_path, folds="1,3")
    assert [item.references for item in found] == [("dog",), ("crying baby",), ("dog",)]
    assert found[0].choices == ("crying baby", "dog", "door wood knock")
    assert [item.category["fold"] for item in found] == [("1",), ("1",), ("3",)]
    assert found[0].prompt == "Close-ended question: Write an audio caption describing the sound."


def test_dcase2017_has_all_labels_of_a_clip(tmp_path):
    found = items("dcase2017", tmp_path)
    assert [item.references for item in found] == [("Train horn", "Train"), ("Air horn, truck horn",), ("Car",)]
    assert len(found[0].choices) == 17


def test_fsd50k_ranks_the_whole_vocabulary(tmp_path):
    found = items("fsd50k", tmp_path)
    assert found[0].references == ("Electric guitar", "Dog")
    assert found[0].choices == ("Accelerating and revving and vroom", "Dog", "Electric guitar")


def test_captions_of_a_clip_are_its_references(tmp_path):
    found = items("audiocaps", tmp_path / "a")
    assert found[0].references == (
        "Constant rattling noise and sharp vibrations",
        "A rocket flies by, followed by an explosion",
    )
    found = items("clotho", tmp_path / "c")
    assert [(item.id, len(item.references)) for item in found] == [("clotho/01 A pug struggles", 5), ("clotho/rain", 5)]


def test_nsynth_asks_about_what_it_is_told(tmp_path):
    assert [item.references[0] for item in items("nsynth", tmp_path)] == ["bass", "flute", "synth lead"]
    found = items("nsynth", tmp_path, about="source")
    assert found[0].choices == ("acoustic", "electronic", "synthetic")
    assert "acoustic, electronic or synthetic" in found[0].prompt


def test_mmau(tmp_path):
    first, second = items("mmau", tmp_path)
    assert first.prompt == (
        "What was the last sound in the sequence?\nChoose the right option and answer with its text:\n"
        "- dog\n- a car horn\n- rain\n- footsteps"
    )
    assert first.clips == (str(tmp_path / "test-mini-audios/3fe64f3d.wav"),)
    assert first.category["difficulty"] == ("easy",)
    # 13 items have a list of categories; braces in a question are no template's
    assert second.category["category"] == ("Reasoning", "Information Extraction")
    assert "speaks {first}?" in second.prompt
    (tmp_path / "mmau-test-mini.json").write_text('[{"id": "a"}]')
    with pytest.raises(ManifestError, match="item 1: no key 'audio_id'"):
        open_task("mmau", tmp_path)


def test_letters_are_shown_where_they_are_read(tmp_path):
    (first, _) = items("mmsu", tmp_path / "m")
    assert first.prompt.endswith("Which accent is it?\nA. Scottish\nB. Indian\nC. American\nD. Irish")
    assert first.category["task"] == ("accent_identification",)
    emotion, grounding = items("air_bench", tmp_path / "b")
    assert emotion.choices == ("anger", "joy", "fear", "sadness")
    # two options; its clip is FLAC under a name in .wav
    assert grounding.choices == ("anger", "joy")
    assert grounding.prompt.endswith("A. anger\nB. joy")
    assert grounding.clips[0].endswith("Audio_Grounding_AudioGrounding/2.flac")


def test_no_choice_is_left_out_of_a_prompt_by_letters():
    choices = [f"sound {number}" for number in range(26)]
    lines = ask_by_letter("{question}\n{choices}", "Which?", choices).splitlines()
    assert lines == ["Which?", *(f"{letter}. sound {number}" for number, letter in enumerate(ascii_uppercase))]
    with pytest.raises(ValueError, match="longer"):
        ask_by_letter("{question}\n{choices}", "Which?", [*choices, "one more"])


def test_labels_words_and_transcripts(tmp_path):
    """Those whose readers are tested in tests/data: what the tasks make of the records."""
    marching, tennis = items("vggsound", tmp_path / "v")
    assert (marching.references, tennis.references) == (("people marching",), ("playing tennis",))
    assert marching.choices == ("people marching", "playing tennis", "waterfall burbling, splashing")
    genres = items("gtzan", tmp_path / "g")
    assert (genres[0].references, len(genres[0].choices)) == (("blues",), 10)
    barks, rain = items("clothoaqa", tmp_path / "c")
    assert (barks.prompt, barks.category) == ("Is there a dog? Answer with one word.", {"answers": ("yes or no",)})
    assert (rain.references, rain.category) == (("rain",), {"answers": ("one word",)})
    slow, fast = items("musiccaps", tmp_path / "m")
    assert (slow.references, fast.references) == (("The song is slow, sad.",), ("A fast drum solo.",))
    stew, _ = items("librispeech", tmp_path / "l")
    assert (stew.references, stew.category) == (
        ("he hoped there would be stew for dinner",),
        {"split": ("test-clean",)},
    )
    people, other = items("mmar", tmp_path / "r")
    assert (people.id, other.id, people.references) == ("abc_00-01", "d", ("Two",))
    assert people.category == {
        "modality": ("speech",),
        "category": ("Semantic Layer",),
        "sub-category": ("Counting",),
        "language": ("en",),
    }


def test_muchomusic(tmp_path):
    first, second = items("muchomusic", tmp_path)
    assert sorted(first.choices) == ["Bossa nova", "Choir", "Drums", "Flute"]
    shown = " ".join(f"({'ABCD'[i]}) {choice}" for i, choice in enumerate(first.choices))
    assert first.prompt == f"Question: What drives the beat?\n Options: {shown} \n The correct answer is: "
    assert first.category == {"genre": ("Reggae",), "knowledge": ("instrumentation", "metre and rhythm")}
    assert first.clips[0].endswith("415600.2min.flac")
    assert second.clips[0].endswith("[-0Gj8_vB1q4]-[30-40].wav")
    assert items("muchomusic", tmp_path)[0].choices == first.choices


def test_options_and_rules_are_checked(tmp_path):
    root = published.mmau(tmp_path)
    with pytest.raises(ConfigError, match="task 'mmau': unknown key 'split'; known: file, prompt"):
        open_task("mmau", root, {"split": "test"})
    with pytest.raises(ConfigError, match="unknown rule 'tokens'; known: captions, exact"):
        open_task("mmau", root, rule={"name": "tokens"})
    with pytest.raises(ConfigError, match="unknown task 'mmao'"):
        open_task("mmao", root)
    with pytest.raises(ConfigError, match=r"needs \{question\} in it"):
        open_task("mmau", root, {"prompt": "Say it."})
    assert open_task("mmau", root, rule={"name": "rank"}).ranked
    with pytest.raises(ConfigError, match="questions without 'choices'"):
        open_task("clothoaqa", published.clothoaqa(tmp_path / "q"), rule={"name": "rank"})


def test_every_task_says_what_it_is():
    from pal.registry import lookup

    for name in names("task"):
        task = lookup("task", name)
        assert inspect.getdoc(task) and inspect.getdoc(inspect.getmodule(task))
