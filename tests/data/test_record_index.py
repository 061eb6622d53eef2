"""The index of a large manifest says what the manifest says, and is never used when it does not."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.data import manifest as manifests
from pal.data.manifest import Manifest
from pal.data.record_index import RowGroups
from pal.errors import ManifestError

ITEM = {"instruction": "?", "output": "!"}
ITEMS = st.lists(
    st.fixed_dictionaries(
        {
            "audio_id": st.sampled_from(
                ["a.wav", "./a.wav", "b.wav", ["a.wav", "b.wav"], ["b.wav", "a.wav"], [], "ü.wav"]
            )
        },
        optional={"task": st.sampled_from("xyz"), "dataset": st.sampled_from("uv")},
    ),
    max_size=12,
)


@pytest.fixture
def always_indexed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(manifests, "LARGE", 0)
    monkeypatch.setenv("PAL_CACHE", str(tmp_path / "cache"))


def written(path: Path, items: list[dict[str, Any]], as_list: bool = False) -> Path:
    records = [ITEM | item for item in items]
    lines = json.dumps(records) if as_list else "\n".join(["", *map(json.dumps, records), ""])
    path.write_text(lines, encoding="utf-8")
    return path


def facts(opened: Manifest) -> Any:
    columns = opened.columns
    return (
        [
            (columns.tasks[task], columns.datasets[of])
            for task, of in zip(columns.task_R, columns.dataset_R, strict=True)
        ],
        [list(group) for group in columns.groups],
        list(opened),
        opened.digest,
        opened.is_list,
        list(opened.raw()),
    )


@settings(max_examples=40, deadline=None)
@given(items=ITEMS, as_list=st.booleans(), keep=st.sets(st.integers(0, 11)))
def test_an_index_says_what_the_records_say(
    tmp_path_factory: pytest.TempPathFactory, items: list[dict[str, Any]], as_list: bool, keep: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("index")
    path = written(folder / "m.json", items, as_list or not items)  # an empty file is refused
    plain = Manifest(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "LARGE", 0)
        made, opened = Manifest(path), Manifest(path)
    assert (folder / "m.json.index" / "starts.npy").is_file()
    assert facts(made) == facts(opened) == facts(plain)
    records = list(plain)
    assert facts(opened)[0] == [(record.task, record.dataset) for record in records]
    for kept in (set(range(len(records))), keep):
        groups: dict[Any, list[int]] = {}
        for row, record in enumerate(records):
            if row in kept:
                groups.setdefault(record.clips or row, []).append(row)
        keep_R = np.array([row in kept for row in range(len(records))], bool)
        assert [list(group) for group in opened.columns.groups.only(keep_R)] == list(groups.values())


def test_groups_of_one_row() -> None:
    groups = RowGroups(np.arange(4))
    assert (
        groups.single
        and list(groups) == [(0,), (1,), (2,), (3,)]
        and groups[-1] == (3,)
        and groups[1:3] == [(1,), (2,)]
    )
    assert list(groups.only(np.array([True, False, False, True]))) == [(0,), (3,)]
    with pytest.raises(IndexError):
        groups[4]


@pytest.mark.usefixtures("always_indexed")
def test_it_is_made_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = written(tmp_path / "m.jsonl", [{"audio_id": "a.wav"}] * 3)
    expected = facts(Manifest(path))
    assert "indexed" in caplog.text
    caplog.clear()
    before = (path.with_name("m.jsonl.index") / "starts.npy").stat()
    assert facts(Manifest(path)) == expected
    assert not caplog.text and (path.with_name("m.jsonl.index") / "starts.npy").stat() == before


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def change_header(folder: Path, **fields: Any) -> None:
    """A header that the index's digests vouch for, as another program could write it."""
    from pal.files import amend

    amend(folder, {"index.json": json.dumps(json.loads((folder / "index.json").read_text()) | fields).encode()})


FAULTS: dict[str, Callable[[Path], Any]] = {
    "flipped": lambda folder: flip(folder / "starts.npy"),
    "cut": lambda folder: (folder / "rows.npy").write_bytes((folder / "rows.npy").read_bytes()[:-4]),
    "missing": lambda folder: (folder / "bounds.npy").unlink(),
    "no header": lambda folder: (folder / "index.json").write_text("{"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "another version": lambda folder: change_header(folder, format=0),
    "another manifest": lambda folder: change_header(folder, stem="n"),
    "another length": lambda folder: change_header(folder, records=2),
}


@pytest.mark.usefixtures("always_indexed")
@pytest.mark.parametrize("fault", FAULTS)
def test_one_that_is_damaged_or_foreign_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    path = written(tmp_path / "m.jsonl", [{"audio_id": f"{i}.wav"} for i in range(3)])
    expected = facts(Manifest(path))
    FAULTS[fault](path.with_name("m.jsonl.index"))
    assert facts(Manifest(path)) == expected
    warned = [line for line in caplog.records if line.levelname == "WARNING"]
    assert len(warned) == 1 and "is not used" in warned[0].getMessage()
    caplog.clear()
    assert facts(Manifest(path)) == expected and not caplog.records


@pytest.mark.usefixtures("always_indexed")
def test_a_changed_manifest_is_indexed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = written(tmp_path / "m.jsonl", [{"audio_id": "a.wav"}])
    old = Manifest(path)
    time = path.stat().st_mtime_ns
    text = path.read_text()
    path.write_text(text.replace("a.wav", "b.wav"))
    os.utime(path, ns=(time + 1, time + 1))
    assert Manifest(path)[0].clips[0].endswith("b.wav") and "has changed" in caplog.text
    with pytest.raises(ManifestError, match="changed since"):
        old[0]
    # touched, or copied with its index: the content counts
    caplog.clear()
    os.utime(path, ns=(time + 2, time + 2))
    assert Manifest(path)[0].clips[0].endswith("b.wav") and not caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pal.data.record_index.sha256", None)  # not hashed again
        assert len(Manifest(path)) == 1


@pytest.mark.usefixtures("always_indexed")
@pytest.mark.skipif(os.geteuid() == 0 and not hasattr(os, "chflags"), reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "fixed"
    folder.mkdir()
    path = written(folder / "m.jsonl", [{"audio_id": "a.wav"}])
    folder.chmod(0o500)
    assert len(Manifest(path)) == 1 and len(list((tmp_path / "cache" / "manifests").iterdir())) == 1
    folder.chmod(0o700)


@pytest.mark.usefixtures("always_indexed")
def test_the_cache_has_what_cannot_be_written_beside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = written(tmp_path / "m.jsonl", [{"audio_id": "a.wav"}])
    path.with_name("m.jsonl.index").write_text("in the way")
    expected = facts(Manifest(path))
    (index,) = (tmp_path / "cache" / "manifests").iterdir()
    assert (index / "rows.npy").is_file()
    caplog.clear()
    assert facts(Manifest(path)) == expected and "being indexed" not in caplog.text
    (tmp_path / "cache").rename(tmp_path / "away")
    (tmp_path / "cache").write_text("in the way, too")
    assert facts(Manifest(path)) == expected and "can be written nowhere" in caplog.text


@pytest.mark.parametrize("large", [False, True])
def test_faulty_records_are_named_when_all_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    monkeypatch.setattr(manifests, "LARGE", 0 if large else 1 << 30)
    path = written(tmp_path / "m.jsonl", [{"audio_id": "a.wav"}, {"audio_id": 3}, {"audio_id": "c.wav", "odd": 1}])
    for _ in range(2):
        opened = Manifest(path)
        assert len(opened) == 3 and opened[0].id == "m:1"
        with pytest.raises(ManifestError, match="line 3: 'audio_id' must be"):
            facts(opened)


@pytest.mark.parametrize("large", [False, True])
def test_a_copy_in_another_process_opens_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    monkeypatch.setattr(manifests, "LARGE", 0 if large else 1 << 30)
    path = written(tmp_path / "m.jsonl", [{"audio_id": f"{i}.wav"} for i in range(1000)])
    opened = Manifest(path, root=tmp_path)
    sent = pickle.dumps(opened)
    assert len(sent) < 1000 and list(pickle.loads(sent)) == list(opened)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ManifestError, match="changed since"):
        pickle.loads(sent)


QUIRKS = {
    "twice": '{"instruction": "?", "output": "!", "audio_id": "a.wav", "task": "x", "task": "y"}',
    "twice, apart": '{"instruction" : "?", "output": "!", "audio_id": "a.wav", "task" : "x", "task": "y"}',
    "twice, with quotes": r'{"instruction": "a \"?", "output": "!", "audio_id": "a.wav", "id": "\"", "id": "c"}',
    "no output": '{"instruction": "?", "audio_id": "a.wav"}',
    "blank": '{"instruction": " ", "output": "!", "audio_id": "a.wav"}',
    "no clip": '{"instruction": "?", "output": "!", "audio_id": ""}',
    "two places": '{"instruction": "<audio><audio>?", "output": "!", "audio_id": "a.wav"}',
    "in the answer": r'{"instruction": "?", "output": "\u003caudio>", "audio_id": "a.wav"}',
    "surrogate": r'{"instruction": "?", "output": "\ud800", "audio_id": "a.wav"}',
    "null": '{"instruction": "?", "output": null, "audio_id": "a.wav"}',
    "unknown": '{"instruction": "?", "output": "!", "audio_id": "a.wav", "odd": "x"}',
    "cut": '{"instruction": "?", "output": "!", "audio_id": "a.wav"',
    "list": '["instruction", "output"]',
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_faults_are_those_of_reading_the_record(tmp_path: Path, quirk: str) -> None:
    good = r'{"instruction": "a \"b\\", "input": "c\n", "output": "\u00e9\t", "audio_id": "x//y.wav", "id": "\""}'
    (tmp_path / "m.jsonl").write_text(f"{good}\n{QUIRKS[quirk]}\n")
    opened = Manifest(tmp_path / "m.jsonl")
    messages = set()
    for read in (lambda: opened[1], lambda: opened.columns):
        with pytest.raises(ManifestError) as caught:
            read()
        messages.add(str(caught.value))
    assert len(messages) == 1
    (tmp_path / "m.jsonl").write_text(f"{good}\n")
    assert Manifest(tmp_path / "m.jsonl").columns.faulty is None
