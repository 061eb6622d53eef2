"""m4a and webm through the optional `av` package."""

import builtins
import io
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pal.audio import load, seconds
from pal.errors import AudioError
from tests.audio.test_load import sine

RATE = 48_000


def encoded(format: str, codec: str, seconds: float = 2.0, tracks: int = 1, **options: str) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    samples = sine(RATE, seconds)
    with av.open(file, "w", format=format, options=options) as container:
        for stream in [container.add_stream(codec, rate=RATE, layout="mono") for _ in range(tracks)]:
            for start in range(0, len(samples), 960):
                frame = av.AudioFrame.from_ndarray(samples[None, start : start + 960], format="fltp", layout="mono")
                frame.sample_rate, frame.pts = RATE, start
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return file.getvalue()


FILES = [("mp4", "aac"), ("matroska", "aac"), ("webm", "libopus"), ("adts", "aac")]


@pytest.mark.parametrize(("format", "codec"), FILES)
def test_the_sound_is_there(format: str, codec: str) -> None:
    wave = load(encoded(format, codec), 16_000)
    assert wave.seconds == pytest.approx(2.0, abs=0.06)
    assert len(wave.samples_N) == pytest.approx(wave.seconds * 16_000, abs=1)
    spectrum = np.abs(np.fft.rfft(wave.samples_N[8_000:24_000].numpy()))
    assert spectrum.argmax() == 440


@pytest.mark.parametrize(("format", "codec"), FILES)
@pytest.mark.parametrize("left", [0.02, 0.5, 0.97])
def test_a_cut_file_is_refused(format: str, codec: str, left: float) -> None:
    data = encoded(format, codec)
    with pytest.raises(AudioError):
        load(data[: int(len(data) * left)], 16_000)


def test_a_browser_recording_declares_nothing_and_is_taken() -> None:
    assert load(encoded("webm", "libopus", live="1"), 16_000).seconds == pytest.approx(2.0, abs=0.03)


@pytest.mark.parametrize(("format", "codec", "live"), [(*file, "") for file in FILES] + [("webm", "libopus", "1")])
def test_the_length_is_known_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, codec: str, live: str
) -> None:
    path = tmp_path / "clip"
    path.write_bytes(encoded(format, codec, **({"live": live} if live else {})))
    monkeypatch.setattr("pal.audio.libav.Track.blocks", None)
    assert seconds(path) == pytest.approx(2.0, abs=0.06)


@pytest.mark.parametrize("rate", [0, 8_000, 44_100])
def test_opus_is_decoded_at_48_khz_whatever_its_header_says(rate: int) -> None:
    data = encoded("webm", "libopus")
    head = data.index(b"OpusHead")
    other = data[: head + 12] + rate.to_bytes(4, "little") + data[head + 16 :]
    place = data.index(b"\xb5\x88")  # SamplingFrequency, a float of 8 bytes
    for changed in (other, other[: place + 2] + struct.pack(">d", rate or 1.0) + other[place + 10 :]):
        wave = load(changed, RATE)
        assert torch.equal(wave.samples_N, load(data, RATE).samples_N)
        assert wave.seconds == load(data, RATE).seconds


@pytest.mark.parametrize(("format", "codec"), [("matroska", "aac"), ("webm", "libopus"), ("adts", "aac")])
def test_a_cut_file_is_read_as_far_as_it_goes_where_that_is_asked_for(format: str, codec: str, tmp_path: Path) -> None:
    data = encoded(format, codec)
    cut, whole_N = data[: len(data) // 2], load(data, RATE).samples_N
    with pytest.raises(AudioError, match=r"read_to_end=True, --read-to-end"):
        load(cut, RATE)
    wave = load(cut, RATE, read_to_end=True)
    assert RATE // 2 < len(wave.samples_N) < len(whole_N)
    assert wave.note is not None
    assert torch.equal(wave.samples_N[: RATE // 2], whole_N[: RATE // 2])
    path = tmp_path / "cut"
    path.write_bytes(cut)
    assert 0 < seconds(path, read_to_end=True) <= wave.seconds + 0.1


def test_opus_of_low_rate_is_what_the_reference_makes_of_the_same_packets() -> None:
    av = pytest.importorskip("av")
    if "libopus" not in av.codecs_available:
        pytest.skip("FFmpeg was built without libopus")
    webm, ogg = io.BytesIO(), io.BytesIO()
    samples = (0.2 * np.random.default_rng(0).standard_normal(RATE).cumsum() / 20).astype(np.float32)
    with av.open(webm, "w", format="webm") as container:
        stream = container.add_stream("libopus", rate=RATE, layout="mono", options={"application": "voip"})
        stream.bit_rate = 8_000
        for start in range(0, len(samples), 960):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 960], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(io.BytesIO(webm.getvalue())) as container, av.open(ogg, "w", format="ogg") as copy:
        stream = copy.add_stream_from_template(container.streams.audio[0])
        for packet in container.demux(audio=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    ours_N, reference_N = (load(file.getvalue(), RATE).samples_N for file in (webm, ogg))
    shorter = min(len(ours_N), len(reference_N))
    assert shorter > RATE - 960
    torch.testing.assert_close(ours_N[:shorter], reference_N[:shorter], atol=1e-6, rtol=0)


def test_eight_planes_are_read_as_eight_channels() -> None:
    av = pytest.importorskip("av")
    # in a process of its own: the bindings would read behind the last plane
    file, layout = io.BytesIO(), "7.1(wide)"
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("alac", rate=RATE, layout=layout, format="s16p")
        samples = np.tile(np.arange(1000, 9000, 1000, dtype=np.int16), 4096)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout=layout)
        frame.sample_rate, frame.pts = RATE, 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    given = "import io, sys; from pal.audio import load; print(load(sys.stdin.buffer.read(), 48000).samples_N.unique())"
    found = subprocess.run([sys.executable, "-c", given], input=file.getvalue(), capture_output=True, check=True)
    assert found.stdout.decode().strip() == f"tensor([{4500 / 32768:.4f}])"


@pytest.mark.parametrize("how", [load, lambda data, rate: load(data, rate, read_to_end=True)])
def test_a_codec_that_nobody_knows_is_named(how: Callable[[bytes, int], object]) -> None:
    data = encoded("matroska", "libopus").replace(b"A_OPUS", b"A_FOO!")
    with pytest.raises(AudioError, match="codec that FFmpeg does not know"):
        how(data, 16_000)


def test_two_tracks_are_refused() -> None:
    with pytest.raises(AudioError, match="2 sound tracks"):
        load(encoded("matroska", "aac", tracks=2), 16_000)


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_av(name: str, *rest: object) -> object:
        if name == "av":
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(AudioError, match=r"call\.m4a: .*pip install 'pal-audio\[av\]'"):
        load(b"\0\0\0\x18ftypM4A ", 16_000, name="call.m4a")
