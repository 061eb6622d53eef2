"""Every kind of source becomes the waveform it holds."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pal.audio import load, seconds
from pal.errors import AudioError

LOSSLESS = [
    ("WAV", "PCM_U8", 1 / 100),
    ("WAV", "PCM_16", 1e-4),
    ("WAV", "PCM_24", 1e-6),
    ("WAV", "FLOAT", 0.0),
    ("WAV", "DOUBLE", 0.0),
    ("WAVEX", "PCM_32", 1e-6),
    ("RF64", "PCM_16", 1e-4),
    ("FLAC", "PCM_S8", 1 / 100),
    ("FLAC", "PCM_16", 1e-4),
    ("FLAC", "PCM_24", 1e-6),
]
LOSSY = [("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")]


def sine(rate: int, seconds: float, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, format: str = "WAV", subtype: str = "PCM_16", **options: object) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype, **options)
    return file.getvalue()


@pytest.mark.parametrize(("format", "subtype", "tolerance"), LOSSLESS)
@pytest.mark.parametrize("channels", [1, 2])
def test_lossless_files_give_their_samples(format: str, subtype: str, tolerance: float, channels: int) -> None:
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (70_000, channels)).astype(np.float32)
    wave = load(encoded(samples, 16_000, format, subtype), 16_000)
    assert wave.samples_N.dtype == torch.float32
    assert wave.seconds == 70_000 / 16_000
    assert_close(wave.samples_N, torch.from_numpy(samples.mean(1)), atol=tolerance + 1e-7, rtol=0)


@pytest.mark.parametrize(("format", "subtype"), LOSSY)
@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_lossy_files_give_their_sound(format: str, subtype: str, rate: int) -> None:
    samples = sine(rate, 1.0)
    wave = load(encoded(samples, rate, format, subtype), rate)
    assert abs(len(wave.samples_N) - rate) <= (2040 if subtype == "IMA_ADPCM" else 0)
    middle = slice(rate // 4, rate // 4 * 3)
    assert np.corrcoef(wave.samples_N[middle].numpy(), samples[middle])[0, 1] > 0.98


def test_resampling_moves_a_tone_in_time_not_in_pitch() -> None:
    wave = load((sine(44_100, 2.0), 44_100), 16_000)
    assert wave.seconds == 2.0
    assert_close(wave.samples_N[1000:-1000], torch.from_numpy(sine(16_000, 2.0))[1000:-1000], atol=1e-4, rtol=0)


def test_blocks_are_resampled_as_one_piece() -> None:
    samples = np.random.default_rng(1).uniform(-1, 1, 200_000).astype(np.float32)
    expected = soxr.resample(samples, 22_050, 16_000)
    assert_close(load((samples, 22_050), 16_000).samples_N, torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_every_kind_of_source_is_the_same_clip(tmp_path: Path) -> None:
    data = encoded(sine(16_000, 0.5), 16_000)
    path = tmp_path / "tone.wav"
    path.write_bytes(data)
    waves = [load(source, 8_000) for source in (path, str(path), data, bytearray(data), io.BytesIO(data))]
    with path.open("rb") as stream:
        waves.append(load(stream, 8_000))
    for wave in waves:
        assert torch.equal(wave.samples_N, waves[0].samples_N)
    assert [wave.name for wave in waves] == [str(path), str(path), "bytes", "bytes", "audio", str(path)]
    assert load(data, 8_000, name="upload").name == "upload"


@pytest.mark.parametrize(
    "array",
    [
        np.array([0, 16384, -32768], np.int16),
        np.array([0, 1 << 30, -(1 << 31)], np.int32),
        np.array([128, 192, 0], np.uint8),
        np.array([0.0, 0.5, -1.0]),
        [0.0, 0.5, -1.0],
        torch.tensor([0.0, 0.5, -1.0]),
        np.array([[0.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], np.float32),
    ],
    ids=["int16", "int32", "uint8", "float64", "list", "tensor", "stereo"],
)
def test_arrays_are_scaled_by_their_type_and_mixed_down(array: object) -> None:
    wave = load((array, 16_000), 16_000)
    assert_close(wave.samples_N, torch.tensor([0.0, 0.5, -1.0]))
    assert (wave.name, wave.seconds) == ("array", 3 / 16_000)


def test_an_array_is_not_changed() -> None:
    array = np.array([0.25, 0.5], np.float32)
    load((array, 16_000), 16_000).samples_N.mul_(0)
    assert array.tolist() == [0.25, 0.5]


@pytest.mark.parametrize("tag", [b"ID3\x04\0\0\0\0\0\x0a" + bytes(10), b"ID3\x04\0\0\0\0\0\x02ab" + bytes(7)])
def test_tags_around_an_mp3_are_no_damage(tag: bytes) -> None:
    data = encoded(sine(16_000, 1.0), 16_000, "MP3", "MPEG_LAYER_III")
    tagged = load(tag + data + b"TAG".ljust(128, b"x"), 16_000)
    assert torch.equal(tagged.samples_N, load(data, 16_000).samples_N)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("header", ["none", "vbri"])
def test_an_mp3_without_a_xing_header_is_whole(mode: str, header: str) -> None:
    # libsndfile guesses the length of such a file from its size, and cuts or overruns
    rate = 22_050
    loud_then_silent = np.concatenate([np.random.default_rng(0).uniform(-0.5, 0.5, 30_000), np.zeros(50_000)])
    data = encoded(loud_then_silent, rate, "MP3", "MPEG_LAYER_III", bitrate_mode=mode)
    frames, start = [], 0
    kbps = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160]  # of MPEG 2
    while start < len(data):
        size = 72_000 * kbps[data[start + 2] >> 4] // rate + (data[start + 2] >> 1 & 1)
        frames.append(data[start : start + size])
        start += size
    assert start == len(data)
    first = b""
    if header == "vbri":
        first = frames[0][:4] + bytes(32) + b"VBRI" + bytes(6) + bytes(4) + (len(frames) - 1).to_bytes(4, "big")
        first = first.ljust(len(frames[0]), b"\0")
    wave = load(first + b"".join(frames[1:]), rate)
    assert len(wave.samples_N) == (len(frames) - 1) * 576 - 529
    offset = len(wave.samples_N) - load(data, rate).samples_N.shape[0]
    assert 0 < offset < 3 * 1152  # what the encoder padded, which only a Xing header can tell
    if header == "vbri":
        with pytest.raises(AudioError, match=f"declares {len(frames) - 1} frames and holds {len(frames) - 2}"):
            load(first + b"".join(frames[1:-1]), rate)


@settings(max_examples=40, deadline=None)
@given(
    rate=st.one_of(st.integers(4_000, 192_000), st.sampled_from([8_000, 16_000, 44_100, 48_000])),
    channels=st.integers(1, 8),
    length=st.integers(200, 9_000),
    kind=st.sampled_from([("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), None]),
    target=st.sampled_from([8_000, 16_000, 48_000]),
)
def test_length_and_mean_survive(
    rate: int, channels: int, length: int, kind: tuple[str, str] | None, target: int
) -> None:
    samples = np.full((length, channels), 0.25, np.float32) * np.arange(1, channels + 1) / channels
    if kind is not None and kind[0] == "FLAC" and rate > 65_535:
        rate = rate // 10 * 10  # the format has no others
    wave = load((samples, rate) if kind is None else encoded(samples, rate, *kind), target)
    assert wave.seconds == length / rate
    assert abs(len(wave.samples_N) - length * target / rate) <= 1
    middle = wave.samples_N[len(wave.samples_N) // 3 : -len(wave.samples_N) // 3 or None]
    if len(wave.samples_N) > 600:
        assert_close(middle.mean().item(), float(samples.mean()), atol=2e-3, rtol=0)


@settings(max_examples=15, deadline=None)
@given(
    rate=st.sampled_from([8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000]),
    channels=st.integers(1, 2),
    length=st.integers(1, 20_000),
    mode=st.sampled_from(["CONSTANT", "AVERAGE", "VARIABLE"]),
)
def test_mp3_has_its_exact_length(rate: int, channels: int, length: int, mode: str) -> None:
    samples = np.random.default_rng(length).uniform(-0.5, 0.5, (length, channels))
    data = encoded(samples, rate, "MP3", "MPEG_LAYER_III", bitrate_mode=mode)
    assert load(data, rate).samples_N.shape == (length,)


@pytest.mark.parametrize(("format", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_24"), *LOSSY])
def test_the_length_is_known_from_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, subtype: str
) -> None:
    path = tmp_path / "clip"
    path.write_bytes(encoded(sine(16_000, 1.5), 16_000, format, subtype))
    given = load(path, 16_000).seconds
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    assert seconds(path) == pytest.approx(given, abs=0.05)


@pytest.mark.parametrize(("content", "fault"), [(None, "no such file"), (b"", "empty"), (b"RIFF....WAVE", "cut")])
def test_a_length_that_cannot_be_known_is_an_error(tmp_path: Path, content: bytes | None, fault: str) -> None:
    path = tmp_path / "clip.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AudioError, match=rf"clip\.wav: it is {fault}|clip\.wav: there is {fault}"):
        seconds(path)
