"""Every benchmark from its published layout to a score: items as they must be, and a deaf model at its baseline."""

import inspect

import pytest

from pal.audio import load
from pal.errors import ConfigError, ManifestError
from pal.evaluate.benchmark import open_task
from pal.evaluate.run import run
from pal.registry import names
from pal.types import AUDIO
from tests import published
from tests.models import tiny_model

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
    "musiccaps": 1,
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


@pytest.fixture(scope="module")
def model():
    return tiny_model("lal")


class Deaf:
    """The model with a mouth that goes by the question alone, clip or not."""

    SAID = ("dog", "a dog barks", "yes", "Bossa nova", "a man", "Two", "he hoped there would be stew for dinner")

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def generate(self, clips, rows, **options):
        questions = (self._model.tokenizer.decode([token for token in row.ids if token != AUDIO]) for row in rows)
        return [self.say("".join(question.split())) for question in questions]

    def say(self, question):
        pick = sum(question.encode())
        return "ABCD"[pick % 2] if "A." in question else self.SAID[pick % len(self.SAID)]


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_deaf_model_scores_as_without_audio(name, model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)  # Java takes long to start, and test_text.py has it
    benchmark = open_task(name, published.BENCHMARKS[name](tmp_path / "data"))
    result = run(Deaf(model), benchmark, tmp_path / "run", progress=False)
    assert result.n == COUNTS[name]
    assert result.metric.startswith(SCORES[name])
    assert not result.errors
    low, high = result.overall.ci95
    assert low <= result.overall.no_audio_score <= high
    assert result.overall.gain_ci95 == (0.0, 0.0)
    assert sum(part["n"] for part in result.durations.values()) == result.n


@pytest.mark.parametrize("name", ["mmau", "gtzan", "clothoaqa", "librispeech", "mmsu"])
def test_a_hearing_model_gains(name, model, tmp_path):
    benchmark = open_task(name, published.BENCHMARKS[name](tmp_path / "data"))
    right = {item.clips: item for item in benchmark.items}
    lengths = {}
    for item in benchmark.items:  # a clip is known by its samples
        lengths[float(load(item.clips[0], model.sampling_rate).samples_N.abs().sum())] = item

    class Hearing(Deaf):
        def generate(self, clips, rows, **options):
            return [self.heard(clips, row) if row.clips else "nothing" for row in rows]

        def heard(self, clips, row):
            item = lengths[float(clips[row.clips[0]].abs().sum())]
            return "ABCD"[item.choices.index(item.references[0])] if name == "mmsu" else item.references[0]

    assert len(lengths) == len(right)
    result = run(Hearing(model), benchmark, tmp_path / "run", progress=False)
    assert result.overall.score == (0.0 if name == "librispeech" else 1.0)
    assert result.overall.no_audio_score != result.overall.score


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
    with pytest.raises(ConfigError, match="questions without choices"):
        open_task("clothoaqa", published.clothoaqa(tmp_path / "q"), rule={"name": "rank"})


def test_every_task_says_what_it_is():
    from pal.registry import lookup

    for name in names("task"):
        task = lookup("task", name)
        assert inspect.getdoc(task) and inspect.getdoc(inspect.getmodule(task))
