"""Lists and folders as publishers and systems leave them: both kinds of JSON, any line, files that macOS adds."""

import json
import logging
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.audio import load
from pal.data.manifest import Manifest
from pal.data.prepare import prepare, read
from pal.data.tables import SUFFIXES, files_in, find_clip, is_metadata, json_file, lines_of, records, rows
from pal.errors import AudioError, ManifestError
from pal.evaluate.benchmark import open_task
from tests import published

APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(200)
ENDS = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e"
"""What `str.splitlines` takes for line ends beside line feeds and carriage returns."""

# Lists of records


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.just("k"), st.text() | st.text(ENDS), min_size=1), min_size=1),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]),
    st.booleans(),
)
def test_lines_and_lists_are_the_same_records(tmp_path_factory, items, end, bom):
    folder = tmp_path_factory.getbasetemp()
    mark = "\ufeff" * bom
    texts = [end.join(json.dumps(one, ensure_ascii=False) for one in items), json.dumps(items, ensure_ascii=False)]
    for text in texts:
        for name in ("list.json", "list.jsonl"):
            (folder / name).write_bytes((mark + text).encode(errors="surrogatepass"))
            assert records(folder / name, ("k",), "it") == items


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"k": "\u2028"}\n\n{"k": \n')
    with pytest.raises(ManifestError, match=r"x\.jsonl, line 3: not valid JSON"):
        records(path, ("k",), "it")
    path.write_text('{"k": 1}\n[' + "[" * 100_000)
    with pytest.raises(ManifestError, match=r"x\.jsonl, line 2: not valid JSON"):
        records(path, ("k",), "it")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_utf_16_is_called_so(tmp_path, encoding):
    path = tmp_path / "x.jsonl"
    path.write_bytes('[{"k": "v"}]'.encode(encoding))
    table = tmp_path / "x.csv"
    table.write_bytes("k\nv\n".encode(encoding))
    for reading in (
        lambda: records(path, ("k",), "it"),
        lambda: Manifest(path),
        lambda: rows(table, ("k",), "it"),
        lambda: lines_of(path),
    ):
        with pytest.raises(ManifestError, match=f"it is {encoding[:6].upper()}, not UTF-8; convert it: iconv"):
            reading()
    path.write_bytes(b'{"k": "\xff"}')
    with pytest.raises(ManifestError, match=r"it is not UTF-8 \(at byte 7\)"):
        records(path, ("k",), "it")


def test_manifests_keep_every_character_in_a_line(tmp_path):
    path = tmp_path / "m.jsonl"
    text = json.dumps({"audio_id": [], "instruction": f"a{ENDS[:3]}b", "output": "c"}, ensure_ascii=False)
    path.write_bytes(f"{text}\r\n{text}".encode())
    assert [record.turns[0].question for record in Manifest(path)] == [f"a{ENDS[:3]}b"] * 2


def test_transcripts_keep_every_character_in_a_line(tmp_path):
    folder = tmp_path / "test-clean" / "1" / "2"
    folder.mkdir(parents=True)
    (folder / "1-2.trans.txt").write_bytes("1-2-0 A\u0085B\r\n1-2-1 C\n".encode())
    (folder / "._1-2.trans.txt").write_bytes(APPLE)
    for name in ("1-2-0.flac", "1-2-1.flac"):
        (folder / name).touch()
    assert [r.turns[0].answer for r in read("librispeech", tmp_path, split="test-clean")] == ["a\u0085b", "c"]


def test_a_list_is_found_under_both_names(tmp_path):
    for names in (("a.json",), ("a.jsonl",)):
        for name in ("a.json", "a.jsonl"):
            (tmp_path / name).touch()
            assert json_file(tmp_path, names, "it") == tmp_path / name
            (tmp_path / name).unlink()
    with pytest.raises(
        ManifestError, match=r"neither q/a\.json nor q/a\.jsonl nor b\.jsonl nor b\.json is there; give it"
    ):
        json_file(tmp_path, ("q/a.json", "b.jsonl"), "it")
    with pytest.raises(ManifestError, match=r"no a\.txt is there; give it"):
        json_file(tmp_path, ("a.txt",), "it")


@pytest.mark.parametrize("name", ["mmau", "mmar", "mmsu", "air_bench"])
def test_benchmarks_read_both_kinds_under_both_names(tmp_path, name):
    root = published.BENCHMARKS[name](tmp_path / name)
    expected = open_task(name, root).items
    (path,) = [*root.rglob("*.json"), *root.rglob("*.jsonl")]
    items = records(path, (), name)
    path.unlink()
    for suffix in (".json", ".jsonl"):
        for text in (json.dumps(items), "\n".join(json.dumps(one, ensure_ascii=False) for one in items)):
            path.with_suffix(suffix).write_text("\ufeff" + text, encoding="utf-8")
            assert open_task(name, root).items == expected
        path.with_suffix(suffix).unlink()


# Folders


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        *(("._1.wav", True), ("dog/._1.wav", True), ("__MACOSX/dog/1.wav", True), (".DS_Store", True)),
        *(("Thumbs.db", True), ("Desktop.ini", True), (".AppleDouble/1.wav", True), ("@eaDir/1.wav", True)),
        *(("1.wav", False), ("_1.wav", False), (".hidden.wav", False), ("a._1.wav", False), ("MACOSX/1.wav", False)),
    ],
)
def test_which_files_are_a_systems(path, is_one):
    assert is_metadata(Path(path)) is is_one


def labelled(root: Path, names=("dog/1.wav", "rain/1.wav")) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def macos(root: Path) -> Path:
    """What an archive made on macOS leaves beside and among the files."""
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        path.with_name(f"._{path.name}").write_bytes(APPLE)
        copy = root / "__MACOSX" / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.with_name(f"._{path.name}").write_bytes(APPLE)
    for folder in (root, *(path for path in root.iterdir() if path.is_dir())):
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (folder / "Thumbs.db").touch()
    (root / "__MACOSX" / "._1.wav").write_bytes(APPLE)
    return root


def test_a_folder_from_macos_is_the_users_clips(tmp_path, caplog):
    expected = read("folder", labelled(tmp_path / "X"))
    with caplog.at_level(logging.WARNING):
        assert read("folder", macos(tmp_path / "X")) == expected
    (line,) = caplog.messages
    assert line.endswith("3 files that macOS or Windows put there are left out, such as '__MACOSX/._1.wav'")


def test_fsdd_and_gtzan_from_macos(tmp_path):
    digits = labelled(tmp_path / "fsdd", ["recordings/0_anna_0.wav", "recordings/1_anna_0.wav"])
    expected = read("fsdd", digits)
    assert read("fsdd", macos(digits)) == expected
    root = published.BENCHMARKS["gtzan"](tmp_path / "gtzan")
    expected = read("gtzan", root)
    assert read("gtzan", macos(root)) == expected


def test_gtzan_as_it_is_distributed(tmp_path):
    genres = ["blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock"]
    root = labelled(tmp_path, [f"genres/{genre}/{genre}.00000.au" for genre in genres])
    assert [Path(record.clips[0]).name for record in read("gtzan", root)] == [f"{genre}.00000.au" for genre in genres]


def test_a_folder_takes_every_format_that_is_read(tmp_path):
    names = [f"{label}/clip{suffix}" for label in ("dog", "rain") for suffix in SUFFIXES]
    assert len(read("folder", labelled(tmp_path, [*names, "dog/notes.txt"]))) == 2 * len(SUFFIXES)
    assert {".wav", ".au", ".aiff", ".caf", ".w64", ".m4a", ".oga"} <= set(SUFFIXES)


def test_a_clip_that_a_table_names_is_never_a_systems(tmp_path):
    (tmp_path / "._a.wav").write_bytes(APPLE)
    with pytest.raises(ManifestError, match=r"t\.csv: lists '\._a\.wav', which macOS put there"):
        find_clip([tmp_path], ["._a.wav"], tmp_path / "t.csv")
    with pytest.raises(ManifestError, match="missing"):
        find_clip([tmp_path], ["a.wav"], tmp_path / "t.csv")


def test_appledouble_that_is_given_as_a_clip_is_called_so(tmp_path):
    path = tmp_path / "._1.wav"
    path.write_bytes(APPLE)
    with pytest.raises(
        AudioError, match=r"\._1\.wav: it is macOS' AppleDouble metadata of another file, not sound; delete it"
    ):
        load(path, 16_000)


# Names


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("listed", ["NFC", "NFD"])
def test_a_listed_clip_is_found_in_either_form_of_its_letters(tmp_path, stored, listed):
    name = "música/été.wav"
    path = labelled(tmp_path, [unicodedata.normalize(stored, name)]) / unicodedata.normalize(stored, name)
    assert find_clip([tmp_path], [unicodedata.normalize(listed, name)], tmp_path / "t.csv").samefile(path)


def test_folders_keep_ids_labels_and_sides_in_either_form(tmp_path):
    names = ["Käse/å.wav", *(f"dog/é {number}.wav" for number in range(20))]
    found = []
    for form in ("NFC", "NFD"):
        root = labelled(tmp_path / form, [unicodedata.normalize(form, name) for name in names])
        out = prepare("folder", root, tmp_path / f"{form}.jsonl", part="train")
        Manifest(out).validate(files=True)
        found.append({record.id: (record.turns, record.choices) for record in Manifest(out)})
    assert found[0] == found[1]
    assert tuple(sorted(next(iter(found[0].values()))[1], key=str.lower)) == ("dog", "Käse")


def test_odd_names_lead_to_their_clips(tmp_path):
    names = ["a dog/1\n2.wav", "a dog/ .wav", "rain/\u2028 'x'\t\".wav", "rain/*?[1].wav", "rain/<\\>.WAV"]
    root = labelled(tmp_path / "X", names)
    manifest = Manifest(prepare("folder", root, tmp_path / "m.jsonl"))
    manifest.validate(files=True)
    assert {record.clips[0] for record in manifest} == {str(root / name) for name in names}


def test_names_that_are_not_utf_8_are_one_line(tmp_path):
    root = labelled(tmp_path / "X", ["dog/1.wav", "rain/\udce9\n.wav"])
    with pytest.raises(ManifestError) as caught:
        prepare("folder", root, tmp_path / "m.jsonl")
    assert str(caught.value).endswith("rain/? .wav: the name is not UTF-8, as a manifest is; rename the file")
    assert not (tmp_path / "m.jsonl").exists()
    other = labelled(tmp_path / "\udce9", ["dog/1.wav", "rain/1.wav"])
    with pytest.raises(ManifestError, match="has a clip whose name is not UTF-8"):
        prepare("folder", other, tmp_path / "m.jsonl")
    assert not (tmp_path / "m.jsonl").exists()


def test_a_link_to_nothing_is_not_left_out(tmp_path):
    labelled(tmp_path)
    (tmp_path / "dog" / "2.wav").symlink_to(tmp_path / "gone.wav")
    assert tmp_path / "dog" / "2.wav" in files_in(tmp_path, "*/*", SUFFIXES)
