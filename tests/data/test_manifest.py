"""Manifests against json.loads of the whole file."""

import hashlib
import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.data.manifest import Manifest, Record, Turn, write_manifest
from pal.errors import ManifestError
from pal.types import TagSpan

ITEM = {
    "instruction": "What sound is this?",
    "input": "",
    "audio_id": "x.flac",
    "dataset": "as_strong_train",
    "task": "cla_label",
    "output": "a dog",
}


def lines(path: Path, *items: Any) -> Path:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items), "utf-8")
    return path


def fault(path: Path, index: int = 0, **options: Any) -> str:
    """The message of the record's fault, without the file's name, which must be there."""
    with pytest.raises(ManifestError) as caught:
        Manifest(path, **options)[index]
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path)).lstrip(":, ")


def test_openaqa_record(tmp_path):
    expected = Record(
        "m:1", (str(tmp_path / "x.flac"),), (Turn("What sound is this?", "a dog"),), "cla_label", "as_strong_train"
    )
    assert list(Manifest(lines(tmp_path / "m.jsonl", ITEM))) == [expected]
    (tmp_path / "m.json").write_text(json.dumps([ITEM], indent=2))
    assert list(Manifest(tmp_path / "m.json")) == [expected]


def test_our_keys(tmp_path):
    item = {
        "id": "r1",
        "audio_id": ["a.wav", "/far/b.wav"],
        "turns": [{"question": "<audio> or <audio>?", "answer": "one"}, {"question": "sure?", "answer": "yes"}],
        "choices": ["yes", "no"],
        "tags": [{"label": "dog", "start": 0, "end": 1.5}, {"label": "rain"}],
    }
    assert Manifest(lines(tmp_path / "scenes.jsonl", item))[0] == Record(
        id="r1",
        clips=(str(tmp_path / "a.wav"), "/far/b.wav"),
        turns=(Turn("<audio> or <audio>?", "one"), Turn("sure?", "yes")),
        task="question",
        dataset="scenes",
        choices=("yes", "no"),
        tags=(TagSpan("dog", 0.0, 1.5), TagSpan("rain")),
    )


def test_input_stands_on_its_own_line(tmp_path):
    path = lines(tmp_path / "m.jsonl", ITEM | {"input": "spoken text"})
    assert Manifest(path)[0].turns[0].question == "What sound is this?\nspoken text"


texts = st.text() | st.text(alphabet='{}[]",:\\/\n\t é\U0001f600')
items = st.fixed_dictionaries(
    {
        "instruction": texts.filter(lambda text: text.strip() and "<audio>" not in text),
        "audio_id": st.just("x.wav"),
        "output": texts,
        "id": texts,
    },
    optional={"tags": st.lists(st.fixed_dictionaries({"label": texts}), max_size=2), "choices": st.none()},
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(items, max_size=5),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.sampled_from([(",", ":"), (" , ", " : "), (",\n", ":\t")]),
    st.booleans(),
)
def test_index_finds_the_records_of_any_json(tmp_path_factory, records, ascii_only, indent, separators, as_list):
    path = tmp_path_factory.mktemp("any") / "m.json"
    if as_list:
        text = json.dumps(records, ensure_ascii=ascii_only, indent=indent, separators=separators) + "\n"
    else:
        text = "\n" + "\n \n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
        text = text if records else "{}"
    path.write_bytes(b"\xef\xbb\xbf" * (indent == 1) + text.encode())
    manifest = Manifest(path)
    if not records and not as_list:
        assert len(manifest) == 1
        return
    assert len(manifest) == len(records)
    for at, raw in enumerate(records):
        assert manifest[at].id == raw["id"]
        assert manifest[at].turns == (Turn(raw["instruction"], raw["output"]),)
        tags = manifest[at].tags
        assert (None if tags is None else [tag.label for tag in tags]) == (
            [tag["label"] for tag in raw["tags"]] if "tags" in raw else None
        )
    assert [record.id for record in manifest] == [raw["id"] for raw in records]


def test_a_large_list_on_one_line_is_never_held(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps([ITEM | {"output": "a dog " * 500}] * 3_000))
    tracemalloc.start()
    manifest = Manifest(path)
    assert manifest[2_999].turns[0].answer == "a dog " * 500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 9e6
    assert peak < 3e6


@pytest.mark.parametrize("as_list", [False, True])
def test_a_faulty_record_fails_when_it_is_asked_for(tmp_path, as_list):
    good = json.dumps(ITEM)
    bad = '{"instruction": "a", {"x" "}" }}'
    path = tmp_path / "m.json"
    path.write_text(f"[{good},\n{bad},{good}]" if as_list else f"\n{good}\n\n{bad}\n{good}\n")
    manifest = Manifest(path)
    assert len(manifest) == 3
    assert manifest[0].turns == manifest[-1].turns
    with pytest.raises(ManifestError, match=f"m.json, {'item 2' if as_list else 'line 4'}: not valid JSON"):
        manifest[1]
    with pytest.raises(ManifestError, match="item 2" if as_list else "line 4"):
        manifest.validate()


def test_sequence_manners(tmp_path):
    manifest = Manifest(lines(tmp_path / "m.jsonl", *(ITEM | {"id": str(at)} for at in range(5))))
    assert [record.id for record in manifest[1:4:2]] == ["1", "3"]
    assert manifest[-1].id == "4"
    with pytest.raises(IndexError):
        manifest[5]
    assert manifest.digest == hashlib.sha256((tmp_path / "m.jsonl").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instrucion": "x"}, "unknown key 'instrucion'; known: instruction, input, audio_id"),
        ({"output": 3}, "'output' must be a string, not 3"),
        ({"output": None}, "missing key 'output'"),
        ({"output": "\ud800"}, "'output' holds half a surrogate pair"),
        ({"instruction": " "}, "a question is empty"),
        ({"audio_id": 3}, "'audio_id' must be a path or a list of paths"),
        ({"audio_id": [""]}, "'audio_id' must be a path or a list of paths"),
        ({"audio_id": ["a", "b"], "instruction": "<audio>?"}, "1 '<audio>' in the questions but 2 clips"),
        ({"audio_id": [], "instruction": "<audio>?"}, "1 '<audio>' in the questions but 0 clips"),
        ({"output": "<audio>"}, "an answer holds '<audio>'"),
        ({"choices": ["cat"]}, "the answer 'a dog' is not among the choices"),
        ({"choices": "a dog"}, "'choices' must be a list of strings"),
        ({"choices": ["a dog", "a dog"]}, "'choices' has an answer twice"),
        ({"turns": [{"question": "a", "answer": "b"}]}, "'turns' stands instead of 'instruction'"),
        ({"tags": [{"label": "dog", "start": 2, "end": 1}]}, "a tag ends at 1.0 s, before it starts at 2.0 s"),
        ({"tags": [{"label": "dog", "start": True}]}, "'start' of a tag must be seconds from 0, not true"),
        ({"tags": [{"label": "dog", "end": float("nan")}]}, "'end' of a tag must be seconds from 0, not NaN"),
        ({"tags": [{"label": "dog", "begin": 1}]}, "unknown key 'begin' in 'tags'; known: label, start, end"),
        ({"tags": ["dog"]}, "'tags' must be a list of {label, start, end}"),
    ],
)
def test_faults_name_file_line_and_remedy(tmp_path, change, message):
    assert fault(lines(tmp_path / "m.jsonl", ITEM, "", ITEM | change), 1).startswith(f"line 3: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a", "output": "b"}', "line 1: missing key 'audio_id' (a path, a list of paths"),
        ('{"audio_id": [], "turns": []}', "line 1: 'turns' must be a list of {question, answer}"),
        ('{"audio_id": [], "turns": [{"question": "a", "reply": "b"}]}', "line 1: unknown key 'reply' in 'turns'"),
        ('{"id": "a", "id": "b"}', "line 1: key 'id' comes twice"),
        ("3", "line 1: a record must be a JSON object"),
        ("{" * 9, "line 1: not valid JSON"),
        ('{"a":' * 100_000, "line 1: not valid JSON"),
        ("\x00", "line 1: not valid JSON"),
    ],
)
def test_faulty_lines(tmp_path, line, message):
    assert fault(lines(tmp_path / "m.jsonl", line)).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("[", "item 1: the file ends in the middle"),
        ("[{}", "item 2: the file ends in the middle"),
        ("[{},", "item 2: the file ends in the middle"),
        ('[{"a": "', "item 1: the file ends in the middle"),
        ('[{"a": {"b": "\\', "item 1: the file ends in the middle"),
        ('[{"a": {"b": 1}', "item 1: the file ends in the middle"),
        ("[{},]", "item 2: a list must hold objects"),
        ("[,{}]", "item 1: a list must hold objects"),
        ("[{} {}]", "item 2: a list must hold objects"),
        ("[{}, 3]", "item 2: a list must hold objects"),
        ('["a"]', "item 1: a list must hold objects"),
        ("[[{}]]", "item 1: a list must hold objects"),
        ("[{}] x", "text after the end of the list"),
    ],
)
def test_lists_that_cannot_be_divided(tmp_path, text, message):
    path = tmp_path / "m.json"
    path.write_text(text)
    assert fault(path).startswith(message)


def test_empty_list_and_missing_file(tmp_path):
    (tmp_path / "m.json").write_text(" [ ] ")
    assert list(Manifest(tmp_path / "m.json")) == []
    assert fault(tmp_path / "none.jsonl").startswith("cannot be read: No such file or directory; give the path of")
    assert fault(tmp_path).startswith("cannot be read: Is a directory; give the path of a manifest")
    (tmp_path / "void.jsonl").write_text("")
    assert fault(tmp_path / "void.jsonl").startswith("is empty; write a record into each of its lines")


def test_a_manifest_that_changes_is_noticed(tmp_path):
    path = lines(tmp_path / "m.jsonl", ITEM)
    manifest = Manifest(path)
    os.utime(path, (time.time() + 5, time.time() + 5))
    with pytest.raises(ManifestError, match="changed since it was opened"):
        manifest[0]
    path.unlink()
    with pytest.raises(ManifestError, match="can no longer be read"):
        manifest[0]


def test_root_takes_the_longest_suffix_that_exists(tmp_path):
    root = tmp_path / "moved"
    for name in ("x.flac", "audio/x.flac", "deep/audio/y.flac"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    given = {
        "/data/as/audio/x.flac": root / "audio/x.flac",
        "/data/x.flac": root / "x.flac",
        "/a/deep/audio/y.flac": root / "deep/audio/y.flac",
        "audio/x.flac": root / "audio/x.flac",
        "audio/../x.flac": root / "x.flac",
        "missing.flac": root / "missing.flac",
    }
    path = lines(tmp_path / "m.jsonl", *(ITEM | {"audio_id": audio_id} for audio_id in given))
    assert [record.clips[0] for record in Manifest(path, root)] == [str(place) for place in given.values()]
    assert [record.clips[0] for record in Manifest(path)][:2] == ["/data/as/audio/x.flac", "/data/x.flac"]
    assert Manifest(path)[3].clips == (str(tmp_path / "audio/x.flac"),)
    lost = lines(tmp_path / "lost.jsonl", ITEM | {"audio_id": "/data/z.flac"})
    assert "no part of the path '/data/z.flac' exists under the root" in fault(lost, root=root)
    assert "is not a folder" in fault(path, root=tmp_path / "nowhere")


def test_relative_paths_do_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = Manifest(lines(Path("m.jsonl"), ITEM))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert manifest.locate("x.flac") == str(tmp_path / "x.flac")


def test_validate_finds_doubles_and_missing_files(tmp_path):
    path = lines(tmp_path / "m.jsonl", ITEM, ITEM)
    Manifest(path).validate()
    with pytest.raises(ManifestError, match=r"line 1: no audio file '.*x.flac'"):
        Manifest(path).validate(files=True)
    twice = lines(tmp_path / "twice.jsonl", ITEM | {"id": "a"}, ITEM | {"id": "a"})
    with pytest.raises(ManifestError, match="line 2: id 'a' is taken by line 1"):
        Manifest(twice).validate()


def test_written_records_are_read_back_and_can_move(tmp_path):
    records = [
        Record("a", (str(tmp_path / "here/audio/é.wav"),), (Turn('q "{"\n', "\u2028"),), "t", "d", ("\u2028", "b")),
        Record("b", ("/far/x.wav", str(tmp_path / "here/y.wav")), (Turn("q", "a"), Turn("r", "")), "t", "d"),
        Record("c", (), (Turn("q", "a"),), "t", "d", tags=(TagSpan("dog", 0.5, 1.0), TagSpan("cat"))),
        Record("d", (str(tmp_path / "here2/x.wav"),), (Turn("q", "a"),), "t", "d", tags=()),
    ]
    assert write_manifest(tmp_path / "here/m.jsonl", iter(records)) == 4
    assert list(Manifest(tmp_path / "here/m.jsonl")) == records
    (tmp_path / "here").rename(tmp_path / "there")
    assert Manifest(tmp_path / "there/m.jsonl")[0].clips == (str(tmp_path / "there/audio/é.wav"),)
    assert list((tmp_path / "there").iterdir()) == [tmp_path / "there/m.jsonl"]


def test_a_failed_write_leaves_the_old_manifest(tmp_path):
    path = lines(tmp_path / "m.jsonl", ITEM)

    def broken():
        yield Record("a", (), (Turn("q", "a"),), "t", "d")
        raise RuntimeError("made to fail")

    with pytest.raises(RuntimeError):
        write_manifest(path, broken())
    assert json.loads(path.read_text()) == ITEM
    assert list(tmp_path.iterdir()) == [path]
