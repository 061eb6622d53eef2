"""The model that is taken where none is named."""

import pytest

import pal
from pal import audio, bundle, pretrained, shipped


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

    for path in ("smol", "tiny", "tiny-causal", "some/folder", shipped.TINY):
        pal.load(path)
    assert loaded == [shipped.SMOL, shipped.TINY, shipped.TINY_CAUSAL, "some/folder", str(shipped.TINY)]


def test_the_default_is_explained():
    assert "smol" in shipped.explain("smol") and "--model" in shipped.explain("smol")
    assert "tiny" in shipped.explain("tiny") and "pal models get smol" in shipped.explain("tiny")


@pytest.mark.parametrize("name", ["tiny", "tiny-causal"])
def test_the_toys_hear_the_dog_whole_and_in_a_stream(name):
    """The causal one makes no token again when sound follows."""
    model = pal.load(name)
    assert model.ask(shipped.RECORDING, "What sound is this?") == "dog"
    assert (model.ears.encoder(0).ahead_seconds == 0) is (name == "tiny-causal")
    samples_N = audio.load(shipped.RECORDING, model.sampling_rate).samples_N
    with model.listen() as live:
        for part_N in samples_N.split(7_000):
            live.append(part_N)
        assert live.ask("What sound is this?") == "dog"
