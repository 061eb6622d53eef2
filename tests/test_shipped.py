"""The model that is taken where none is named."""

import pytest

from pal import bundle, pretrained, shipped


@pytest.fixture
def loaded(monkeypatch):
    """Folders that `pal.load` opens."""
    folders = []
    monkeypatch.setattr(bundle, "load", lambda path, other_weights=False: folders.append(path))
    return folders


@pytest.mark.parametrize("cached", [(), ("whisper-tiny.en",), ("smollm2-135m-instruct",), tuple(pretrained.KNOWN)])
def test_smol_needs_both_pretrained_models(cached, monkeypatch, tmp_path, loaded):
    import pal

    monkeypatch.setenv("PAL_CACHE", str(tmp_path))
    monkeypatch.setattr(shipped, "SMOL", tmp_path)
    for name in cached:
        folder = pretrained.folder_of(name)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    expected = "smol" if len(cached) == 2 else "tiny"
    assert shipped.default() == expected
    pal.load()
    assert loaded == [shipped.FOLDERS[expected]]


def test_names_and_folders(loaded):
    import pal

    for path in ("smol", "tiny", "some/folder", shipped.TINY):
        pal.load(path)
    assert loaded == [shipped.SMOL, shipped.TINY, "some/folder", str(shipped.TINY)]


def test_the_default_is_explained():
    assert "smol" in shipped.explain("smol") and "--model" in shipped.explain("smol")
    assert "tiny" in shipped.explain("tiny") and "pal models get smol" in shipped.explain("tiny")
