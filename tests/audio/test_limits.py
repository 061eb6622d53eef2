"""What is refused, and that refusing costs nothing."""

import io
import resource
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from pal.audio import Limits, load, load_into, reading
from pal.errors import AudioError
from tests.audio.test_damage import wav
from tests.audio.test_load import encoded, sine

RATE = 16_000


def refusal(source: object, limits: Limits | None = None) -> str:
    with pytest.raises(AudioError) as caught:
        load(source, RATE, limits or Limits())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("rate", [1, 3_999, 192_001, 655_350])
def test_rates(rate: int) -> None:
    assert f"rate of {rate} Hz is not in 4000..192000" in refusal(wav(3200, rate=rate))
    assert f"rate of {rate} Hz" in refusal((np.zeros(100), rate))


@pytest.mark.parametrize("rate", [4_000, 192_000])
def test_extreme_rates_that_are_allowed(rate: int) -> None:
    assert load((sine(rate, 0.5, 200.0), rate), RATE).samples_N.shape == (8_000,)


def test_channels() -> None:
    assert "9 channels are not 1 to 8" in refusal(wav(3600, 3600, channels=9))
    assert "9 channels are not 1 to 8" in refusal((np.zeros((100, 9)), RATE))
    assert "axes swapped" in refusal((np.zeros((2, 100)), RATE))
    assert load((np.zeros((100, 8)), RATE), RATE).samples_N.shape == (100,)


def test_seconds_are_counted_before_and_while_decoding() -> None:
    limits = Limits(max_seconds=1.0)
    for format, subtype in [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS")]:
        assert len(load(encoded(sine(RATE, 1.0), RATE, format, subtype), RATE, limits).samples_N) == RATE
        assert "longer than 1 s" in refusal(encoded(sine(RATE, 1.1), RATE, format, subtype), limits)
    assert "longer than 1 s" in refusal((sine(RATE, 1.1), RATE), limits)


CONTAINERS = [("WAV", "PCM_16"), ("W64", "PCM_24"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "OPUS")]


@pytest.mark.parametrize(("format", "subtype"), CONTAINERS)
def test_mapped_files_give_the_samples_of_their_bytes(tmp_path, monkeypatch, format, subtype):
    """Also with what stands before and behind the sound, and cut."""
    monkeypatch.setattr(reading, "MAP_BYTES", 1)
    data = encoded(sine(RATE, 1.0), RATE, format, subtype)
    path = tmp_path / "a"
    for file in (data, data + b"TAG" + bytes(125), b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + data, data[:-700], b""):
        path.write_bytes(file)
        results = []
        for source in (file, path):
            try:
                results.append(load(source, RATE).samples_N)
            except AudioError as error:
                results.append(str(error).partition(": ")[2])
        of_bytes, of_map = results
        assert of_map == of_bytes if isinstance(of_bytes, str) else torch.equal(of_map, of_bytes)


@pytest.mark.parametrize("format", ["WAV", "FLAC"])
def test_a_large_file_is_not_held(tmp_path, monkeypatch, format):
    """Allocations of Python while a file of 9 MB is decoded stay below a third of that."""
    monkeypatch.setattr(reading, "MAP_BYTES", 1 << 20)
    path = tmp_path / "large"
    with soundfile.SoundFile(path, "w", RATE, 1, format=format, subtype="PCM_24") as file:
        draw = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, 1 << 20, dtype=np.int32)
        for _ in range(3):
            file.write(draw)
    assert path.stat().st_size > 9e6
    parts = Counted()
    tracemalloc.start()
    load_into(parts, path, RATE)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert parts.samples == 3 << 20
    assert most < 3e6


class Counted:
    """Takes parts and keeps their number of samples."""

    samples = 0

    def append(self, part_N: np.ndarray) -> None:
        self.samples += len(part_N)


def test_a_high_limit_allocates_nothing() -> None:
    data = encoded(sine(RATE, 1.0), RATE)
    assert len(load(io.BytesIO(data), RATE, Limits(max_bytes=1 << 50)).samples_N) == RATE


def test_bytes(tmp_path: Path) -> None:
    data = encoded(sine(RATE, 1.0), RATE)
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    for source in (data, path, io.BytesIO(data)):
        assert "larger than 1000 bytes" in refusal(source, Limits(max_bytes=1000))
    assert "decodes to more than 50000 bytes" in refusal(data, Limits(max_decoded_bytes=50_000))


class Endless(io.RawIOBase):
    """A file object without an end, such as a socket; counts what was taken."""

    taken = 0

    def read(self, size: int = -1) -> bytes:
        assert size > 0, "everything at once"
        self.taken += min(size, 1 << 12)
        return bytes(min(size, 1 << 12))


def test_an_endless_stream_is_left_soon() -> None:
    stream = Endless()
    assert "larger than 100000 bytes" in refusal(stream, Limits(max_bytes=100_000))
    assert stream.taken <= 100_001


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_bombs_take_no_memory() -> None:
    silence = np.zeros(RATE * 60, np.int16)
    file = io.BytesIO()
    with soundfile_writer(file) as sound:
        for _ in range(120):
            sound.write(silence)
    bomb = file.getvalue()
    assert len(bomb) < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "longer than 3600 s (7200 s)" in refusal(bomb)
    forged = bytearray(encoded(np.zeros(100), RATE, "FLAC"))
    forged[21] |= 0x0F
    assert "longer than 3600 s" in refusal(bytes(forged))
    big = wav(3200).replace(struct.pack("<I", 3200), struct.pack("<I", 0x7FFFFFF0))
    assert "placeholder" in refusal(big)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def soundfile_writer(file: io.BytesIO) -> soundfile.SoundFile:
    return soundfile.SoundFile(file, "w", RATE, 1, "PCM_16", format="FLAC")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(value: float) -> None:
    samples = sine(RATE, 6.0)
    samples[-3] = value
    assert "not finite" in refusal((samples, RATE))
    assert "not finite" in refusal(encoded(samples, RATE, "WAV", "FLOAT"))
    assert "not finite" in refusal((np.array([0.0, 1e300]), RATE))
    assert "reach 1.0e+30" in refusal((np.array([0.0, 1e30]), RATE))


def test_nothing_to_hear(tmp_path: Path) -> None:
    empty = tmp_path / "empty.wav"
    empty.touch()
    assert "it is empty" in refusal(empty)
    assert "it is empty" in refusal(b"")
    assert "holds no samples" in refusal((np.zeros(0), RATE))
    for format, subtype in [("WAV", "PCM_16"), ("OGG", "VORBIS"), ("FLAC", "PCM_16")]:
        refusal(encoded(np.zeros(0), RATE, format, subtype))
    with pytest.raises(AudioError, match="too short to resample"):
        load((np.zeros(1), 192_000), 4_000)


def test_what_is_no_audio_file(tmp_path: Path) -> None:
    text = tmp_path / "text.wav"
    text.write_text("I am no sound\n" * 100)
    assert f"{text}: it is no WAV" in refusal(text)
    assert "it is a folder" in refusal(tmp_path)
    assert "there is no such file" in refusal(tmp_path / "missing.wav")
    assert "there is no such file" in refusal("a\0b.wav")
    assert "it is a URL" in refusal("https://example.org/a.wav")
    assert "open it with mode 'rb'" in refusal(io.StringIO("RIFF"))
    assert "no source of audio" in refusal(42)
    assert "free bit rate" in refusal(b"\xff\xfb\x00\x00" + bytes(1000))
    assert "no ordinary file" in refusal("/dev/null")


@pytest.mark.parametrize(
    "pair",
    [
        (16_000, np.zeros(10)),
        (np.zeros(10),),
        (np.zeros((2, 2, 2)), 16_000),
        (np.zeros(10), "fast"),
        (np.zeros(10), 16_000.5),
        (np.zeros(10), float("nan")),
        (np.zeros(10, complex), 16_000),
        (np.zeros(10, bool), 16_000),
        (["a", "b"], 16_000),
    ],
    ids=str,
)
def test_pairs_that_are_no_clip(pair: object) -> None:
    refusal(pair)
