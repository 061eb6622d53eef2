"""Manifests of published data sets: whole records from small folders in the official layouts, and their faults."""

import pytest

from pal.data.manifest import Manifest, Record, Turn
from pal.data.prepare import clotho as clotho_reader
from pal.data.prepare import names, prepare, read
from pal.errors import ConfigError, ManifestError
from pal.types import TagSpan
from tests import published


def one(name, root, **options):
    (record,) = read(name, root, **options)
    return record


def answers(name, root, **options):
    return [record.turns[0].answer for record in read(name, root, **options)]


@pytest.mark.parametrize("name", sorted(set(published.BENCHMARKS) & set(names())))
def test_the_default_is_a_training_manifest_that_can_be_read_again(name, tmp_path):
    root = published.BENCHMARKS[name](tmp_path / name)
    manifest = Manifest(
        prepare(name, root, tmp_path / "m.jsonl", **({"split": "training"} if name == "dcase2017" else {}))
    )
    manifest.validate(files=True)
    assert list(manifest) == read(name, root)
    assert {record.dataset for record in manifest} == {name}
    asked = {record.turns[0].question for record in manifest}
    if name != "clothoaqa":  # whose questions are its own
        assert len(asked) == 1
        again = prepare(name, root, tmp_path / "p.jsonl", paraphrase="true")
        assert [r.id for r in Manifest(again)] == [r.id for r in manifest]


def test_dcase2017(tmp_path):
    root = published.dcase2017(tmp_path)
    record = read("dcase2017", root, split="evaluation")[0]
    assert record == Record(
        id="dcase2017/-a_30.000_40.000",
        clips=(str(root / "evaluation/Y-a_30.000_40.000.wav"),),
        turns=(Turn("Which warning or vehicle sounds are in this recording?", "Train horn; Train"),),
        task="tagging",
        dataset="dcase2017",
        tags=(TagSpan("Train horn", 0.0, 4.5), TagSpan("Train", 1.0, 10.0)),
    )
    assert answers("dcase2017", root, split="evaluation")[1:] == ["Air horn, truck horn", "Car"]
    # the times of weak labels are the clip's place in its video, not the sound's in the clip
    assert one("dcase2017", root).tags == (TagSpan("Bus"),)
    with pytest.raises(ManifestError, match=r"neither groundtruth_strong_label_testing_set\.csv"):
        read("dcase2017", root, split="testing")
    for line, fault in (("d_1.wav\t0\t1\tViolin", "line 1: 'Violin' is none"), ("d_1.wav\t0\t1", "a column is empty")):
        published.text(root / "metadata/groundtruth_weak_label_training_set.csv", line)
        with pytest.raises(ManifestError, match=fault):
            read("dcase2017", root)
    published.text(root / "groundtruth_strong_label_training_set.csv", "d_1.wav\tone\ttwo\tBus")
    with pytest.raises(ManifestError, match="start and end must be seconds"):
        read("dcase2017", root)


def test_vggsound(tmp_path):
    root = published.vggsound(tmp_path)
    record = one("vggsound", root, choices="true")
    assert (record.id, record.turns[0].answer) == ("vggsound/--0PQM4-hqg_000030", "waterfall burbling, splashing")
    assert record.clips == (str(root / "audio/--0PQM4-hqg_000030.flac"),)
    assert record.choices == ("people marching", "playing tennis", "waterfall burbling, splashing")
    assert one("vggsound", root).choices is None
    assert answers("vggsound", root, split="test") == ["people marching", "playing tennis"]
    (root / "audio/--56QUhyDQM_185.wav").unlink()
    with pytest.raises(ManifestError, match=r"--56QUhyDQM_000185: missing, but vggsound.csv lists it"):
        read("vggsound", root, split="test")
    assert answers("vggsound", root, split="test", missing="skip") == ["people marching"]


def test_fsd50k(tmp_path):
    root = published.fsd50k(tmp_path)
    record = read("fsd50k", root, split="eval")[0]
    assert record.turns[0].answer == "Electric guitar; Dog"
    assert record.tags == (TagSpan("Electric guitar"), TagSpan("Dog"))
    assert record.clips == (str(root / "FSD50K.eval_audio/37199.wav"),)
    assert answers("fsd50k", root) == ["Electric guitar"]
    assert answers("fsd50k", root, split="val") == ["Dog"]
    published.text(root / "FSD50K.ground_truth/eval.csv", "fname,labels,mids", "37199,Cat,/m/c")
    with pytest.raises(ManifestError, match=r"line 2: 'Cat' is not in vocabulary.csv"):
        read("fsd50k", root, split="eval")


def test_gtzan(tmp_path):
    root = published.gtzan(tmp_path)
    found = read("gtzan", root)
    assert len(found) == 11
    assert (found[-1].id, found[-1].turns[0].answer) == ("gtzan/rock.00001", "rock")
    assert read("gtzan", root / "genres") == found
    with pytest.raises(ManifestError, match="ten folders blues to rock"):
        read("gtzan", root / "genres" / "rock")


def test_nsynth(tmp_path):
    root = published.nsynth(tmp_path)
    assert answers("nsynth", root) == ["bass", "flute", "synth lead"]
    assert answers("nsynth", root, about="source", split="test") == ["acoustic", "electronic", "electronic"]
    assert read("nsynth", root / "nsynth-train") == read("nsynth", root)
    published.text(root / "nsynth-test/examples.json", '{"x": {"instrument_family_str": "kazoo"}}')
    with pytest.raises(ManifestError, match="'x' has no known instrument_family_str: kazoo"):
        read("nsynth", root, split="test")


def test_captions(tmp_path):
    root = published.audiocaps(tmp_path / "audiocaps")
    assert answers("audiocaps", root) == ["A woman talks nearby as water pours"]
    test = read("audiocaps", root, split="test")
    assert [record.id for record in test] == ["audiocaps/103549", "audiocaps/103548", "audiocaps/103541"]
    assert test[0].clips == test[1].clips == (str(root / "audio/test/Y7fmOlUlwoNg.wav"),)
    root = published.clotho(tmp_path / "clotho")
    found = read("clotho", root)
    assert [record.id.split("#")[1] for record in found] == ["1", "2", "3", "4", "5"]
    assert found[4].turns[0] == Turn(clotho_reader.QUESTIONS[0], "Caption 5 of development, with a comma.")
    root = published.musiccaps(tmp_path / "musiccaps")
    assert answers("musiccaps", root) == ["This song features a guitar."]
    evaluation, _ = read("musiccaps", root, split="eval")
    assert evaluation.clips == (str(root / "audio/[-0Gj8-vB1q4]-[30-40].wav"),)


def test_clothoaqa_keeps_what_people_agree_on(tmp_path):
    root = published.clothoaqa(tmp_path)
    assert [(r.id, *vars(r.turns[0]).values()) for r in read("clothoaqa", root, split="test")] == [
        ("clothoaqa/a#1", "Is there a dog?", "yes"),
        ("clothoaqa/b#2", "What is heard?", "rain"),
    ]
    assert answers("clothoaqa", root, split="test", agreement="2") == ["yes", "dog", "rain"]
    # three people, three answers: none is right
    assert answers("clothoaqa", root, split="test", agreement="1") == ["yes", "dog", "rain"]
    with pytest.raises(ConfigError, match="agreement"):
        read("clothoaqa", root, agreement="4")


def test_librispeech(tmp_path):
    root = published.librispeech(tmp_path)
    assert answers("librispeech", root) == ["northanger abbey"]
    both = read("librispeech", root / "LibriSpeech", split="train-clean-100, test-clean")
    assert [record.task for record in both] == ["transcript train-clean-100"] + ["transcript test-clean"] * 2
    with pytest.raises(ManifestError, match=r"dev-clean: no \*.trans.txt"):
        read("librispeech", root, split="dev-clean")
    published.text(root / "LibriSpeech/dev-clean/1/2/1-2.trans.txt", "1-2-0000")
    with pytest.raises(ManifestError, match="line 1: not an utterance's name and its words"):
        read("librispeech", root, split="dev-clean")
