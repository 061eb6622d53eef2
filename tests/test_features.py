"""Clips kept as the encoders hear them: the same features, whose they are, and what happens when a byte changes."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pal import audio
from pal.data.manifest import Record, Turn
from pal.encoders.base import Encoder
from pal.encoders.tiny import Tiny
from pal.errors import AudioError, AudioWarning, BundleError
from pal.evaluate import evaluate, from_records
from pal.features import FeatureCache
from pal.model import PalModel
from pal.registry import names, toy
from pal.types import EncodedClip
from tests.models import ENCODER, noise, tiny_model

WHISPER = toy("encoder", "whisper")
SECONDS = (0.7, 2.0, 5.3, 0.2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    paths = [str(folder / f"{i}.wav") for i in range(len(SECONDS))]
    for i, path in enumerate(paths):
        soundfile.write(path, noise(SECONDS[i], i).numpy(), 16_000, subtype="FLOAT")
    return paths


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*"))


def same(a: EncodedClip, b: EncodedClip) -> bool:
    return a.seconds == b.seconds and all(torch.equal(x, y) for x, y in zip(a.x_AE, b.x_AE, strict=True))


@pytest.mark.parametrize("encoder", names("encoder"))
def test_what_is_recalled_is_what_is_heard(encoder: str, clips: list[str], tmp_path: Path) -> None:
    model = tiny_model(warm=False, encoders=[toy("encoder", encoder), ENCODER])
    cache = FeatureCache(tmp_path, model.ears)
    waveforms = [audio.load(path, model.sampling_rate).samples_N for path in clips]
    with torch.no_grad():
        for path, samples_N in zip(clips, waveforms, strict=True):
            for ours, theirs in zip(model.ears.encode([cache(path)]), model.ears.encode([samples_N]), strict=True):
                assert torch.equal(ours.x_BAE, theirs.x_BAE) and torch.equal(ours.mask_BA, theirs.mask_BA)
                assert ours.seconds_per_token == theirs.seconds_per_token
        # in a batch to rounding, and padding is zero
        for ours, theirs in zip(
            model.ears.encode([cache(path) for path in clips]), model.ears.encode(waveforms), strict=True
        ):
            assert torch.equal(ours.mask_BA, theirs.mask_BA)
            assert_close(ours.x_BAE[ours.mask_BA], theirs.x_BAE[theirs.mask_BA], atol=1e-4, rtol=1e-4)
            assert not ours.x_BAE[~ours.mask_BA].any()
    assert [cache(path).seconds for path in clips] == list(SECONDS)
    assert len(entries(tmp_path)) == len(clips)


def test_a_clip_is_encoded_once(clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = (tiny_model(encoders=[ENCODER, WHISPER]) for _ in range(2))
    calls = 0
    encode = Encoder.encode

    def counting(self: Encoder, waveforms: list[Tensor]) -> Any:
        nonlocal calls
        calls += 1
        return encode(self, waveforms)

    monkeypatch.setattr(Encoder, "encode", counting)
    cache = FeatureCache(tmp_path / "cache", model.ears)
    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(cache, clips * 8))
    assert calls == 2 * len(clips)
    # the same sound under another name, and another run with the same encoders
    copy = tmp_path / "copy.wav"
    shutil.copy(clips[0], copy)
    again = FeatureCache(tmp_path / "cache", twin.ears)
    assert same(again(str(copy)), first[0])
    assert all(same(again(path), heard) for path, heard in zip(clips, first, strict=False))
    assert calls == 2 * len(clips)
    # another sound under the same name
    soundfile.write(copy, noise(1.0, 9).numpy(), 16_000)
    assert again(str(copy)).seconds == 1.0
    assert calls == 2 * len(clips) + 2


def other_front_end(patch: pytest.MonkeyPatch) -> PalModel:
    frontend = Tiny.frontend
    patch.setattr(Tiny, "frontend", lambda self, samples_N: frontend(self, samples_N) + 0.01)
    return tiny_model(warm=False)


OTHERS = {
    "with other weights": lambda patch: tiny_model(seed=1, warm=False),
    "with other options": lambda patch: tiny_model(warm=False, encoders=[ENCODER | {"margin": 5}]),
    "with other class": lambda patch: tiny_model(warm=False, encoders=[WHISPER]),
    "1 encoders, not 2": lambda patch: tiny_model(warm=False, encoders=[ENCODER, ENCODER]),
    "with another front-end": other_front_end,
}


@pytest.mark.parametrize("fault", OTHERS)
def test_features_of_other_encoders_are_refused(
    clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    FeatureCache(tmp_path, tiny_model(warm=False).ears)(clips[0])
    with pytest.raises(BundleError, match=f"{fault}; give the cache another folder, or delete this one") as caught:
        FeatureCache(tmp_path, OTHERS[fault](monkeypatch).ears)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_another_precision_and_another_folder_are_refused(clips: list[str], tmp_path: Path) -> None:
    model = tiny_model()
    whole = FeatureCache(tmp_path / "a", model.ears)
    with pytest.raises(BundleError, match="precision fp32, not bf16"):
        FeatureCache(tmp_path / "a", model.ears, "bf16")
    half = FeatureCache(tmp_path / "b", model.ears, "bf16")
    assert not same(half(clips[0]), whole(clips[0]))
    with pytest.raises(BundleError, match=r"holds '0\.wav' and is no feature cache"):
        FeatureCache(Path(clips[0]).parent, model.ears)
    # an entry that was carried over from one to the other
    entry = entries(tmp_path / "a")[0]
    shutil.copy(entry, tmp_path / "b" / entry.parent.name / entry.name)
    with pytest.raises(BundleError, match="was not made for this clip by these encoders; delete it"):
        half(clips[0])


@pytest.mark.parametrize("encoder", names("encoder"))
def test_the_same_encoder_from_a_bundle_is_the_same(encoder: str, clips: list[str], tmp_path: Path) -> None:
    model = tiny_model(warm=False, encoders=[toy("encoder", encoder)])
    FeatureCache(tmp_path / "cache", model.ears)
    model.save_pretrained(tmp_path / "bundle")
    FeatureCache(tmp_path / "cache", PalModel.from_pretrained(tmp_path / "bundle").ears)


def test_the_llm_and_the_connector_do_not_matter(clips: list[str], tmp_path: Path) -> None:
    FeatureCache(tmp_path, tiny_model("lal", warm=False).ears)(clips[0])
    other = tiny_model("plits", warm=False, connector="qformer")
    with torch.no_grad():
        for parameter in other.ears.connectors.parameters():
            parameter.add_(1.0)
    FeatureCache(tmp_path, other.ears)


@pytest.fixture(scope="module")
def kept(clips: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[PalModel, Path, EncodedClip]:
    """A model, a cache with the shortest clip, and that."""
    model, folder = tiny_model(warm=False), tmp_path_factory.mktemp("kept") / "cache"
    return model, folder, FeatureCache(folder, model.ears)(clips[3])


@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans(), entry=st.booleans())
@settings(max_examples=80, deadline=None)
def test_damage_is_never_silent(
    clips: list[str], kept: tuple[PalModel, Path, EncodedClip], at: float, flip: int, cut: bool, entry: bool
) -> None:
    model, folder, before = kept
    file = entries(folder)[0] if entry else folder / "encoders.safetensors"
    whole = file.read_bytes()
    data = bytearray(whole)
    place = int(at * len(data))
    data[place] ^= flip
    file.write_bytes(data[:place] if cut else data)
    try:
        after = FeatureCache(folder, model.ears)(clips[3])
    except BundleError as error:
        assert str(folder) in str(error) and "delete" in str(error)
    else:
        # white space of the header
        assert not cut and same(after, before)
    finally:
        file.write_bytes(whole)


def test_what_cannot_be_heard_or_written(clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path / "cache", tiny_model().ears)
    (tmp_path / "not.wav").write_text("no audio")
    with pytest.raises(AudioError, match=r"not\.wav"):
        cache(str(tmp_path / "not.wav"))
    with pytest.raises(AudioError, match=r"none\.wav: it cannot be read \(No such file or directory\)"):
        cache(str(tmp_path / "none.wav"))

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(BundleError, match=r"cannot be written \(No space left on device\)"):
        cache(clips[0])
    monkeypatch.undo()
    # nothing half-made is left, and the clip is made when there is room
    assert entries(tmp_path / "cache") == []
    assert cache(clips[0]).seconds == SECONDS[0]


@pytest.mark.parametrize("scoring", ["exact", "rank"])
def test_evaluation_from_features(
    clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scoring: Any
) -> None:
    model = tiny_model()
    choices = ("yes", "no", "a loud siren")
    records = [Record(str(i), (path,), (Turn("What?", "yes"),), "t", "d", choices) for i, path in enumerate(clips)]
    cache = FeatureCache(tmp_path, model.ears)
    asked = from_records(records, rule={"name": scoring})
    scores = [evaluate(model, asked, features=how, progress=False) for how in (None, cache)]
    monkeypatch.setattr(Tiny, "forward", None)
    scores.append(evaluate(model, asked, features=cache, progress=False))
    predictions = [[(item.output, item.error) for item in score.items] for score in scores]
    assert predictions[0] == predictions[1] == predictions[2]
    if scoring == "exact":
        assert len({prediction for prediction, _ in predictions[0]}) > 1


def test_a_clip_taken_to_its_end_is_another_entry(clips: list[str], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", tiny_model().ears)
    data = bytearray(Path(clips[0]).read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff" * 4  # as a program writes it that does not know the length
    streamed = tmp_path / "streamed.wav"
    streamed.write_bytes(data)
    with pytest.warns(AudioWarning):
        heard = cache(str(streamed), read_to_end=True)
    assert same(cache(str(streamed), read_to_end=True), heard)
    with pytest.raises(AudioError, match="read_to_end"):
        cache(str(streamed))
