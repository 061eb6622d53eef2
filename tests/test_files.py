"""Folders that are written whole or not at all."""

import json

import pytest

from pal.errors import BundleError
from pal.files import MANIFEST, atomic_folder, recover, verify, write_text


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
