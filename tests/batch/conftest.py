"""A model with random weights, a folder of clips of which one is bad, and a count of what is asked."""

from collections import Counter
from types import SimpleNamespace

import pytest
import soundfile

from pal.types import EncodedClip
from tests.models import noise, tiny_model, tone

QUESTIONS = ["What sound is this?", "Which comes first, the dog or the bell?"]


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    for name, samples in {
        "a.wav": noise(0.5, 1),
        "b.wav": tone(0.7, 300.0),
        "sub/c.flac": noise(0.4, 2),
        "sub/d.wav": tone(0.3, 900.0),
    }.items():
        soundfile.write(folder / name, samples.numpy(), 16_000)
    (folder / "bad.wav").write_bytes(b"no audio")
    (folder / "notes.txt").write_text("no clip")
    return folder


@pytest.fixture
def asked(model, monkeypatch):
    """How often each clip was encoded, and how often each (clip, question) was asked."""
    counts = SimpleNamespace(questions=Counter(), encoded=0)
    detailed, encode = type(model).ask_detailed, type(model.ears).encode

    def ask_detailed(self, audio, question, **options):
        for one in question if isinstance(question, list) else [question]:
            counts.questions[str(audio[0]), str(one)] += 1
        return detailed(self, audio, question, **options)

    def count_encoded(self, given):
        counts.encoded += sum(not isinstance(clip, EncodedClip) for clip in given)
        return encode(self, given)

    monkeypatch.setattr(type(model), "ask_detailed", ask_detailed)
    monkeypatch.setattr(type(model.ears), "encode", count_encoded)
    return counts
