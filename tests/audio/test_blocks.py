"""A clip does not depend on how many samples are decoded at a time."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.audio import Limits, load
from tests.audio.programs import by_av, run, sound, wav
from tests.audio.test_load import encoded

RATE = 16_000
KINDS = [
    ("WAV", "PCM_16", {}),
    ("WAV", "IMA_ADPCM", {}),
    ("FLAC", "PCM_24", {}),
    ("MP3", "MPEG_LAYER_III", {"bitrate_mode": "CONSTANT"}),
    ("MP3", "MPEG_LAYER_III", {"bitrate_mode": "VARIABLE", "compression_level": 0.7}),
    ("OGG", "VORBIS", {}),
    ("OGG", "OPUS", {}),
]
FILES = [encoded(sound(RATE, 1.2), RATE, format, subtype, **options) for format, subtype, options in KINDS]


@settings(max_examples=8, deadline=None)
@given(block=st.one_of(st.integers(300, 30_000), st.sampled_from([576, 1151, 1152, 1153, 4096, 1 << 20])))
@pytest.mark.parametrize("data", FILES, ids=lambda data: data[:4].hex())
def test_every_block_size_gives_the_same_samples(data: bytes, block: int) -> None:
    assert torch.equal(
        load(data, RATE, Limits(block=block)).samples_N, load(data, RATE, Limits(block=1 << 24)).samples_N
    )


@pytest.mark.parametrize("kind", KINDS[3:], ids=str)
def test_blocks_of_one_sample(kind: tuple[str, str, dict[str, object]]) -> None:
    data = encoded(sound(RATE, 0.1), RATE, kind[0], kind[1])
    assert torch.equal(load(data, RATE, Limits(block=1)).samples_N, load(data, RATE).samples_N)


def fading(rate: int, frames: int, channels: int) -> np.ndarray:
    """Bursts that fade [N, channels]: quiet frames are so small that what they need lies many frames before."""
    rng, time = np.random.default_rng(0), np.arange(frames) / rate
    burst_N = 0.8 * np.exp(-(time % 0.61) * rng.uniform(8, 16)) * np.sin(2 * np.pi * (200 + 800 * (time % 1.7)) * time)
    return np.stack([burst_N + 0.0005 * rng.standard_normal(frames)] * channels, 1)


@pytest.mark.parametrize(
    ("rate", "channels", "mode", "frames"),
    [(16_000, 1, "VARIABLE", 350_000), (22_050, 2, "VARIABLE", 350_000), (48_000, 2, "CONSTANT", 70_000)],
)
def test_mp3_in_blocks_is_what_one_read_and_ffmpeg_give(rate: int, channels: int, mode: str, frames: int) -> None:
    # with the default block, since users have no other
    samples_NC = np.clip(fading(rate, frames, channels), -0.95, 0.95)
    data = encoded(samples_NC, rate, "MP3", "MPEG_LAYER_III", bitrate_mode=mode, compression_level=0.7)
    samples_N = load(data, rate).samples_N.numpy()
    once_NC, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    np.testing.assert_allclose(samples_N, once_NC.mean(1, dtype=np.float32), atol=1e-6)
    other_N = by_av(data, "mp3")
    np.testing.assert_allclose(samples_N[: len(other_N)], other_N[: len(samples_N)], atol=1e-4)


@pytest.mark.parametrize("options", [["-V5"], ["-b", "24"], ["-b", "64", "-m", "j"], ["-b", "320"], ["--abr", "70"]])
def test_lame_in_blocks(options: list[str]) -> None:
    data = run("lame", "--quiet", *options, "IN", "OUT", data=wav(sound(22_050, 3.5), 22_050))
    rate = soundfile.info(io.BytesIO(data)).samplerate
    block_N, whole_N = (load(data, rate, Limits(block=size)).samples_N for size in (1 << 16, 1 << 24))
    assert torch.equal(block_N, whole_N)
    np.testing.assert_allclose(block_N[: len(whole_N)].numpy(), by_av(data, "mp3")[-len(block_N) :], atol=1e-4)


def test_an_array_in_blocks(tmp_path: Path) -> None:
    samples_N = np.random.default_rng(0).uniform(-1, 1, 9_000).astype(np.float32)
    waves = [load((samples_N, 22_050), RATE, Limits(block=block)).samples_N for block in (999, 1 << 20)]
    torch.testing.assert_close(*waves, atol=1e-6, rtol=0)
