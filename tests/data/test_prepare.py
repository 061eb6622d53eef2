"""Data sets laid out by hand, and what their manifests must say."""

from pathlib import Path

import pytest

from pal.data.manifest import Manifest, Record, Turn
from pal.data.prepare import esc50, fsdd, names, prepare
from pal.errors import ConfigError, ManifestError
from pal.types import TagSpan

HEADER = "filename,fold,target,category,esc10,src_file,take"
ROWS = (
    "1-100-A-0.ogg,1,0,dog,True,100,A",
    "1-200-A-20.ogg,1,20,crying_baby,True,200,A",
    "2-300-B-30.ogg,2,30,door_wood_knock,False,300,B",
    "3-400-A-0.ogg,3,0,dog,True,400,A",
)


def esc(root: Path, table: str = "esc50.csv", suffix: str = ".ogg") -> Path:
    (root / table).parent.mkdir(parents=True, exist_ok=True)
    (root / table).write_text("\n".join((HEADER, *ROWS)) + "\n")
    (root / "audio").mkdir()
    for row in ROWS:
        (root / "audio" / row.split(",")[0]).with_suffix(suffix).touch()
    return root


def digits(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for speaker in ("anna", "bert", "cleo"):
        for digit in (0, 7):
            (folder / f"{digit}_{speaker}_3.wav").touch()
    return folder


def test_known_data_sets():
    assert names() == [
        *("audiocaps", "clotho", "clothoaqa", "dcase2017", "esc50", "folder", "fsd50k", "fsdd", "gtzan"),
        *("librispeech", "musiccaps", "nsynth", "vggsound"),
    ]


def test_esc50_record(tmp_path):
    out = prepare("esc50", esc(tmp_path / "esc"), tmp_path / "esc" / "m.jsonl")
    assert out == tmp_path / "esc" / "m.jsonl"
    records = list(Manifest(out))
    assert records[1] == Record(
        id="esc50/1-200-A-20",
        clips=(str(tmp_path / "esc/audio/1-200-A-20.ogg"),),
        turns=(Turn("What sound is this?", "crying baby"),),
        task="classification",
        dataset="esc50",
        choices=("crying baby", "dog", "door wood knock"),
        tags=(TagSpan("crying baby"),),
    )
    assert [record.turns[0].answer for record in records] == ["dog", "crying baby", "door wood knock", "dog"]
    Manifest(out).validate(files=True)


def test_esc50_folds_keep_all_choices(tmp_path):
    root = esc(tmp_path / "esc", "meta/esc50.csv", ".wav")
    records = list(Manifest(prepare("esc50", root, tmp_path / "m.jsonl", folds="2, 3")))
    assert [record.id for record in records] == ["esc50/2-300-B-30", "esc50/3-400-A-0"]
    assert records[0].choices == ("crying baby", "dog", "door wood knock")
    assert records[0].clips[0].endswith("2-300-B-30.wav")
    ten = list(Manifest(prepare("esc50", root, tmp_path / "ten.jsonl", esc10="true")))
    assert len(ten) == 3
    assert ten[0].choices == ("crying baby", "dog")


def test_paraphrases_hang_on_the_id_only(tmp_path):
    root = digits(tmp_path / "fsdd" / "recordings").parent
    asked = {
        record.id: record.turns[0].question
        for record in Manifest(prepare("fsdd", root, tmp_path / "all.jsonl", paraphrase="true"))
    }
    assert set(asked.values()) <= set(fsdd.QUESTIONS)
    assert len(set(asked.values())) > 1
    some = Manifest(prepare("fsdd", root, tmp_path / "some.jsonl", paraphrase=True, speakers="cleo"))
    assert all(asked[record.id] == record.turns[0].question for record in some)
    esc50_asked = Manifest(prepare("esc50", esc(tmp_path / "esc"), tmp_path / "e.jsonl", paraphrase=True))
    assert {record.turns[0].question for record in esc50_asked} <= set(esc50.QUESTIONS)


def test_fsdd_record_with_and_without_the_folder(tmp_path):
    folder = digits(tmp_path / "fsdd" / "recordings")
    records = list(Manifest(prepare("fsdd", tmp_path / "fsdd", tmp_path / "m.jsonl")))
    assert len(records) == 6
    assert records[-1] == Record(
        id="fsdd/7_cleo_3",
        clips=(str(folder / "7_cleo_3.wav"),),
        turns=(Turn("Which digit is spoken?", "seven"),),
        task="spoken digit",
        dataset="fsdd",
        choices=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        tags=(TagSpan("digit seven"),),
    )
    assert list(Manifest(prepare("fsdd", folder, tmp_path / "m2.jsonl"))) == records


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"speakers": "anna,bert"}, {"anna", "bert"}),
        ({"exclude": "bert"}, {"anna", "cleo"}),
        ({"speakers": "anna,bert", "exclude": "bert"}, {"anna"}),
    ],
)
def test_fsdd_speakers(tmp_path, options, left):
    digits(tmp_path / "fsdd")
    manifest = Manifest(prepare("fsdd", tmp_path / "fsdd", tmp_path / "m.jsonl", **options))
    assert {record.id.split("_")[1] for record in manifest} == left


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("esc", {}, "unknown data set 'esc'; known: audiocaps, clotho, clothoaqa, dcase2017, esc50, folder"),
        ("esc50", {"fold": "1"}, "data set 'esc50': unknown key 'fold'; known: esc10, folds, paraphrase"),
        ("esc50", {"folds": "1,9"}, "unknown fold '9'; known: 1, 2, 3"),
        ("fsdd", {"speakers": "dora"}, "unknown speaker 'dora'; known: anna, bert, cleo"),
        ("fsdd", {"speakers": "anna", "exclude": "anna"}, "no speaker is left; known: anna, bert, cleo"),
    ],
)
def test_options_that_do_not_fit(tmp_path, name, options, message):
    esc(tmp_path)
    digits(tmp_path / "recordings")
    with pytest.raises(ConfigError) as caught:
        prepare(name, tmp_path, tmp_path / "m.jsonl", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "m.jsonl").exists()


def test_folders_that_are_not_the_data_set(tmp_path):
    out = tmp_path / "m.jsonl"
    with pytest.raises(ManifestError, match="no such folder"):
        prepare("esc50", tmp_path / "none", out)
    with pytest.raises(ManifestError, match=r"neither esc50.csv nor meta/esc50.csv"):
        prepare("esc50", tmp_path, out)
    with pytest.raises(ManifestError, match=r"no .wav files"):
        prepare("fsdd", tmp_path, out)
    root = esc(tmp_path / "esc")
    (root / "audio" / "3-400-A-0.ogg").unlink()
    with pytest.raises(ManifestError, match=r"3-400-A-0.ogg: missing, but esc50.csv lists it"):
        prepare("esc50", root, out)
    assert len(Manifest(prepare("esc50", root, out, folds="1,2"))) == 3
    out.unlink()
    for text, message in (
        ("file,fold\n", "no column 'filename'"),
        ("", "no column 'filename'"),
        (f"{HEADER}\na.ogg,1\n", "line 2: a column is empty"),
        (f"{HEADER}\n", "no clip is left"),
    ):
        (root / "esc50.csv").write_text(text)
        with pytest.raises(ManifestError, match=message):
            prepare("esc50", root, out)
    (root / "esc50.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="not a CSV table"):
        prepare("esc50", root, out)
    strange = digits(tmp_path / "fsdd")
    (strange / "seven_anna_0.wav").touch()
    with pytest.raises(ManifestError, match=r"seven_anna_0.wav: the name is not <digit>_<speaker>_<take>.wav"):
        prepare("fsdd", strange, out)
    assert not out.exists()
