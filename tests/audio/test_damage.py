"""A damaged file is refused or decoded to its full length, never shortened without a word."""

import itertools
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from pal.audio import load, ogg
from pal.errors import AudioError
from tests.audio.test_load import encoded

RATE = 16_000
FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAVEX", "PCM_24"),
    ("RF64", "PCM_16"),
    ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("MP3", "MPEG_LAYER_III"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
]
CHECKED = {"FLAC", "OGG"}
"""Formats with checksums over everything: there a changed byte may not change a sample either."""


def clip(format: str, subtype: str) -> bytes:
    generator = np.random.default_rng(0)
    tone = 0.3 * np.sin(np.arange(8_000) * 0.1)
    return encoded(np.stack([tone, 0.1 * generator.standard_normal(8_000)], 1), RATE, format, subtype)


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_a_cut_file_is_refused_or_whole(format: str, subtype: str) -> None:
    data = clip(format, subtype)
    whole_N = load(data, RATE).samples_N
    chosen = random.Random(0)
    lengths = [1, 2, 4, 8, 44, len(data) // 2, len(data) - 1, len(data) - 2, len(data) - 500]
    for length in lengths + [chosen.randrange(len(data)) for _ in range(30)]:
        try:
            wave = load(data[:length], RATE)
        except AudioError:
            continue
        assert format == "MP3", length  # whose last frame ends in stuffing
        assert torch.equal(wave.samples_N, whole_N), length


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_a_changed_byte_never_shortens(format: str, subtype: str) -> None:
    data = clip(format, subtype)
    whole = load(data, RATE)
    chosen = random.Random(1)
    flips = [(place, 1 << chosen.randrange(8)) for place in range(60)]  # the header, a bit in every byte
    flips += [(place, 255) for place in (len(data) // 2, len(data) - 1)]
    flips += [(chosen.randrange(len(data)), chosen.randrange(1, 256)) for _ in range(60)]
    refused = 0
    for place, change in flips:
        damaged = bytearray(data)
        damaged[place] ^= change
        try:
            wave = load(bytes(damaged), RATE)
        except AudioError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert len(wave.samples_N) >= len(whole.samples_N), (place, change)
        if format in CHECKED:
            assert torch.equal(wave.samples_N, whole.samples_N), (place, change)
        elif format != "MP3":
            assert len(wave.samples_N) == len(whole.samples_N), (place, change)
    assert refused > 0


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_every_changed_byte_of_an_ogg_file_is_seen(subtype: str) -> None:
    data = clip("OGG", subtype)
    for place in range(0, len(data), 97):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        with pytest.raises(AudioError):
            load(bytes(damaged), RATE)


def test_an_mp3_with_a_hole_is_refused() -> None:
    data = clip("MP3", "MPEG_LAYER_III")
    middle = len(data) // 2
    with pytest.raises(AudioError, match=r"damaged|cut"):
        load(data[:middle] + data[middle + 100 :], RATE)
    with pytest.raises(AudioError, match=r"damaged|cut"):
        load(data[:middle] + bytes(300) + data[middle:], RATE)


def test_an_ogg_file_with_a_page_left_out_or_a_second_stream_is_refused() -> None:
    data = encoded(np.random.default_rng(0).standard_normal(160_000) * 0.1, RATE, "OGG", "VORBIS")
    starts = [place for place in range(len(data)) if data[place : place + 4] == b"OggS"]
    assert len(starts) > 4
    with pytest.raises(AudioError, match="page 2 is missing"):
        load(data[: starts[2]] + data[starts[3] :], RATE)
    with pytest.raises(AudioError, match="its beginning is missing"):
        load(data[starts[1] :], RATE)
    with pytest.raises(AudioError, match=r"last page is not whole; .*read_to_end"):
        load(data[:-10], RATE)
    other = bytearray(data)
    for start, end in itertools.pairwise([*starts, len(data)]):
        other[start + 14] ^= 1
        other[start:end] = ogg.OggPage(bytes(other[start:end]), 0).changed().data
    links = [data[: starts[1]] + bytes(other[: starts[1]]) + data[starts[1] :] + bytes(other[starts[1] :])]
    with pytest.raises(AudioError, match="several streams"):
        load(links[0], RATE)


def wav(data_size: int, held: int = 3200, rate: int = RATE, channels: int = 1, riff: int | None = None) -> bytes:
    """A WAV whose data chunk claims `data_size` bytes and holds `held`."""
    fmt = struct.pack("<HHIIHH", 1, channels, rate, rate * 2 * channels, 2 * channels, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", data_size) + bytes(held)
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (wav(6400), "its data chunk claims 6400 bytes, the file holds 3200"),
        (wav(3199), "no whole number of 2-byte samples"),
        (wav(1600), "no chunk"),
        (wav(0xFFFFFFFF, riff=0xFFFFFFFF), "its header gives no length"),
        (wav(0xFFFFFFFF), "its header gives no length"),
        (wav(0, 0), "it holds no samples"),
        (wav(3200)[:36], "it is cut"),
        (wav(3200).replace(b"data", b"dat\0"), "no chunk"),
        (wav(3200).replace(b"fmt ", b"junk"), "no format chunk"),
    ],
)
def test_forged_wav_headers(data: bytes, fault: str) -> None:
    with pytest.raises(AudioError, match=fault):
        load(data, RATE)


@pytest.mark.parametrize("wrong", [0, 1, 8])
def test_a_riff_size_off_by_its_own_header_is_no_damage(wrong: int) -> None:
    assert len(load(wav(3200, riff=3236 + wrong), RATE).samples_N) == 1600


def test_chunks_after_the_data_and_bytes_after_the_file_are_no_damage() -> None:
    data = wav(3200)
    listed = data[:4] + struct.pack("<I", len(data) + 4) + data[8:] + b"LIST" + struct.pack("<I", 4) + b"INFO"
    assert len(load(listed, RATE).samples_N) == 1600
    assert len(load(listed + b"some bytes", RATE).samples_N) == 1600


def test_a_flac_that_declares_no_length_or_another_rate_is_refused() -> None:
    data = bytearray(clip("FLAC", "PCM_16"))
    streamed = data.copy()
    streamed[21] &= 0xF0
    streamed[22:42] = bytes(20)
    with pytest.raises(AudioError, match="gives no length"):
        load(bytes(streamed), RATE)
    shorter = data.copy()
    shorter[22:26] = (4_000).to_bytes(4, "big")
    with pytest.raises(AudioError, match="checksum"):
        load(bytes(shorter), RATE)
    slower = data.copy()
    slower[18:20] = (8_000 >> 4).to_bytes(2, "big")
    with pytest.raises(AudioError, match="8000 Hz, its first frame 16000 Hz"):
        load(bytes(slower), RATE)


def test_messages_are_one_line_with_name_fault_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "half\nof it.wav"
    path.write_bytes(clip("WAV", "PCM_16")[:9_999])
    with pytest.raises(AudioError) as caught:
        load(path, RATE)
    message = str(caught.value)
    assert "\n" not in message
    assert "half?of it.wav: it is cut: its header claims 32044 bytes, the file holds 9999; " in message
    assert "ffmpeg" in message


@pytest.mark.parametrize(("format", "subtype"), [("WAV", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS")])
def test_a_decoder_that_stops_early_is_noticed(format: str, subtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(format, subtype)
    read = soundfile.SoundFile.read
    given = iter([5_000, 0])

    def stops(self: soundfile.SoundFile, *_: object, **options: object) -> np.ndarray:
        return read(self, next(given), **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", stops)
    with pytest.raises(AudioError, match="it declares 8000 samples and 5000 can be decoded"):
        load(data, RATE)
