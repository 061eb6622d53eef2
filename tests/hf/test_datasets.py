"""Audio as Hugging Face's `datasets` gives it: undecoded, and decoded by torchcodec where that is there."""

import importlib.util
import io

import pytest
import soundfile
import torch

from pal.hf import PalProcessor
from tests.models import noise, tiny_model

datasets = pytest.importorskip("datasets")

decodes = pytest.mark.skipif(importlib.util.find_spec("torchcodec") is None, reason="torchcodec is not installed")
QUESTION = "What sound is this?"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Paths of three clips of 0.1 to 0.3 seconds."""
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(3):
        samples = noise(0.1 + 0.1 * seed, seed).numpy()
        soundfile.write(folder / f"{seed}.wav", samples, 16_000, subtype="FLOAT")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def model():
    return tiny_model("lal")


def by_path(clips):
    return datasets.Dataset.from_dict({"audio": [str(path) for path in clips]})


def by_bytes(clips):
    return datasets.Dataset.from_dict({"audio": [{"bytes": path.read_bytes(), "path": path.name} for path in clips]})


@pytest.mark.parametrize("made", [by_path, by_bytes])
def test_undecoded_features_are_the_files(clips, model, made):
    dataset = made(clips).cast_column("audio", datasets.Audio(decode=False))
    features = [row["audio"] for row in dataset]
    assert set(features[0]) == {"bytes", "path"}
    check(clips, model, features, dataset["audio"])


@decodes
@pytest.mark.parametrize("made", [by_path, by_bytes])
def test_decoded_features_are_the_files(clips, model, made):
    dataset = made(clips).cast_column("audio", datasets.Audio())
    check(clips, model, [row["audio"] for row in dataset], dataset["audio"])


@decodes
def test_a_folder_of_audio_is_read(clips, model, tmp_path):
    (tmp_path / "dog").mkdir()
    for path in clips:
        (tmp_path / "dog" / path.name).write_bytes(path.read_bytes())
    dataset = datasets.load_dataset("audiofolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"]
    dataset = dataset.cast_column("audio", datasets.Audio(decode=False))
    check(clips, model, sorted((row["audio"] for row in dataset), key=lambda audio: audio["path"]))


def test_streamed_features_are_the_files(clips, model):
    dataset = by_bytes(clips).cast_column("audio", datasets.Audio(decode=False)).to_iterable_dataset()
    check(clips, model, [row["audio"] for row in dataset])


def test_a_stand_in_for_torchcodecs_decoder_is_the_file(clips, model):
    class Decoder:
        def __init__(self, path):
            self.path = path

        def get_all_samples(self):
            samples, rate = soundfile.read(io.BytesIO(self.path.read_bytes()), dtype="float32", always_2d=True)
            return type("AudioSamples", (), {"data": torch.from_numpy(samples.T), "sample_rate": rate})()

    check(clips, model, [Decoder(path) for path in clips])


def check(clips, model, features, column=None):
    expected = model.ask([str(path) for path in clips], QUESTION, max_new_tokens=2)
    assert model.ask(features, QUESTION, max_new_tokens=2) == expected
    processor = PalProcessor.of(model)
    values = [soundfile.read(path, dtype="float32")[0] for path in clips]
    for audio in (features, column) if column is not None else (features,):
        found = processor(text=["<audio>?"] * 3, audio=audio)
        assert found["audio_lengths"].tolist() == [len(value) for value in values]
        for row, value in zip(found["input_values"], values, strict=True):
            torch.testing.assert_close(row[: len(value)], torch.from_numpy(value))
    if column is not None:
        assert model.ask(column, QUESTION, max_new_tokens=2) == expected
