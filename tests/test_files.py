"""Folders that are written whole or not at all."""

import errno
import json
import math
import os
import shutil

import pytest

from pal.errors import BundleError, ConfigError
from pal.files import (
    MANIFEST,
    amend,
    atomic_folder,
    jsonable,
    locked,
    move_into,
    recover,
    unlisted_files,
    verify,
    write_text,
    writing,
)


def write(folder, text="one"):
    with atomic_folder(folder) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "a.txt").write_text(text)
        (temporary / "sub" / "b.txt").write_text(text * 2)


def test_manifest_names_every_file(tmp_path):
    write(tmp_path / "f")
    assert set(verify(tmp_path / "f")) == {"a.txt", "sub/b.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    write(tmp_path / "f")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "f") as temporary:
        (temporary / "a.txt").write_text("half")
        raise RuntimeError
    assert (tmp_path / "f" / "a.txt").read_text() == "one"
    verify(tmp_path / "f")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_replacing(tmp_path):
    write(tmp_path / "f")
    write(tmp_path / "f", "two")
    assert (tmp_path / "f" / "a.txt").read_text() == "two"
    verify(tmp_path / "f")


def test_killed_between_the_two_renames(tmp_path):
    write(tmp_path / "f")
    (tmp_path / "f").rename(tmp_path / "f.old")
    recover(tmp_path / "f")
    assert (tmp_path / "f" / "a.txt").read_text() == "one"
    verify(tmp_path / "f")


@pytest.mark.parametrize("name", ["a.txt", "sub/b.txt"])
def test_one_flipped_byte_is_noticed(tmp_path, name):
    write(tmp_path / "f")
    path = tmp_path / "f" / name
    data = bytearray(path.read_bytes())
    data[1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{name}: its SHA-256"):
        verify(tmp_path / "f")


def test_a_missing_file_is_noticed(tmp_path):
    write(tmp_path / "f")
    (tmp_path / "f" / "a.txt").unlink()
    with pytest.raises(BundleError, match=r"'a.txt' is missing"):
        verify(tmp_path / "f")


@pytest.mark.parametrize("text", ["{", json.dumps({}), json.dumps([1])])
def test_a_damaged_manifest(tmp_path, text):
    write(tmp_path / "f")
    (tmp_path / "f" / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="damaged"):
        verify(tmp_path / "f")


def test_no_manifest(tmp_path):
    with pytest.raises(BundleError, match="not a folder that pal wrote"):
        verify(tmp_path)


def test_write_text_replaces(tmp_path):
    write_text(tmp_path / "x" / "t.txt", "one")
    write_text(tmp_path / "x" / "t.txt", "two")
    assert (tmp_path / "x" / "t.txt").read_text() == "two"
    assert len(list((tmp_path / "x").iterdir())) == 1


def test_files_are_added_and_replaced(tmp_path):
    write(tmp_path / "f")
    amend(tmp_path / "f", {"a.txt": b"new", "c.txt": b"more"})
    assert set(verify(tmp_path / "f")) == {"a.txt", "sub/b.txt", "c.txt"}
    assert (tmp_path / "f" / "a.txt").read_text() == "new"
    (tmp_path / "f" / "c.txt").write_text("changed")
    with pytest.raises(BundleError, match=r"c\.txt"):
        amend(tmp_path / "f", {"d.txt": b""})
    assert set(verify(tmp_path / "f", ["a.txt", "b.txt"])) == {"a.txt", "sub/b.txt", "c.txt"}


def test_files_move_beside_others(tmp_path):
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "old.txt").write_text("old")
        (temporary / "a.txt").write_text("old")
    (tmp_path / "f" / "notes").mkdir()
    (tmp_path / "f" / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "outside.txt").write_text("somebody's")
    manifest = json.loads((tmp_path / "f" / MANIFEST).read_text())
    manifest["sha256"]["../outside.txt"] = ""
    (tmp_path / "f" / MANIFEST).write_text(json.dumps(manifest))
    assert unlisted_files(tmp_path / "f") == {"notes/mine.txt"}
    write(tmp_path / "new")
    move_into(tmp_path / "new", tmp_path / "f")
    assert set(verify(tmp_path / "f")) == {"a.txt", "sub/b.txt"}
    assert unlisted_files(tmp_path / "f") == {"notes/mine.txt"}
    assert not (tmp_path / "f" / "old.txt").exists()
    assert (tmp_path / "outside.txt").read_text() == "somebody's"


def test_json_has_no_nan():
    assert jsonable({"a": (math.nan, 1.5), "b": [math.inf]}) == {"a": [None, 1.5], "b": [None]}


def test_a_lock_is_held_by_one_and_is_free_afterwards(tmp_path):
    def both():
        with locked(tmp_path / "lock", "it is taken"), locked(tmp_path / "lock", "it is taken"):
            raise AssertionError("two hold it")

    with pytest.raises(ConfigError, match="it is taken"):
        both()
    with locked(tmp_path / "lock", "it is taken"):
        pass


def test_a_disk_without_locks_is_no_other_process(tmp_path, monkeypatch, caplog):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path / "lock", "it is taken"):
        assert "cannot be locked (No locks available); let no other process write there" in caplog.text


def test_a_place_that_cannot_be_written_is_named_as_it_was_given(tmp_path):
    place = tmp_path / "folder"
    place.mkdir()
    with pytest.raises(FileNotFoundError) as refused, writing(place / "a.txt"):
        shutil.rmtree(place)
    assert refused.value.filename == str(place / "a.txt")
