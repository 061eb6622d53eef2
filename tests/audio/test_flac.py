"""FLAC of every number of bits, with and without a length, a checksum and other things around it."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from pal.audio import load, seconds
from pal.errors import AudioError
from tests.audio.programs import by_av, run, sound, wav
from tests.audio.test_load import encoded

RATE = 16_000


def crc(data: bytes, width: int, polynomial: int) -> int:
    value = 0
    for byte in data:
        value ^= byte << width - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> width - 1 & 1 else 0)
            value &= (1 << width) - 1
    return value


def flac(samples_NC: np.ndarray, bits: int, named: bool = True, block: int = 192, md5: bool = True) -> bytes:
    """A file of verbatim subframes (RFC 9639, section 9.2), with the bits in each frame's header where it can name them."""
    frames, channels = samples_NC.shape
    code = {8: 1, 12: 2, 16: 4, 20: 5, 24: 6, 32: 7}.get(bits, 0) if named else 0
    size = (bits + 7) // 8
    little = samples_NC.astype("<i8").view(np.uint8).reshape(frames, channels, 8)[:, :, :size].tobytes()
    total = frames.to_bytes(5, "big")
    packed = (RATE << 44 | channels - 1 << 41 | bits - 1 << 36 | int.from_bytes(total, "big")).to_bytes(8, "big")
    digest = hashlib.md5(little).digest() if md5 else bytes(16)
    out = b"fLaC\x80\0\0\x22" + block.to_bytes(2, "big") * 2 + bytes(6) + packed + digest
    for number, start in enumerate(range(0, frames, block)):
        part_NC = samples_NC[start : start + block]
        head = bytes([0xFF, 0xF8, 7 << 4 | 5, channels - 1 << 4 | code << 1]) + chr(number).encode()
        head += (len(part_NC) - 1).to_bytes(2, "big")
        head += bytes([crc(head, 8, 7)])
        subframes = "".join(
            "00000010" + "".join(f"{int(value) & (1 << bits) - 1:0{bits}b}" for value in part_NC[:, channel])
            for channel in range(channels)
        )
        subframes += "0" * (-len(subframes) % 8)
        frame = head + int(subframes, 2).to_bytes(len(subframes) // 8, "big")
        out += frame + crc(frame, 16, 0x8005).to_bytes(2, "big")
    return out


def integers(bits: int, frames: int = 700) -> np.ndarray:
    rng = np.random.default_rng(bits)
    return rng.integers(-(1 << bits - 1), 1 << bits - 1, (frames, 2))


@pytest.mark.parametrize("bits", range(4, 33))
def test_every_number_of_bits(bits: int, tmp_path: Path) -> None:
    if bits not in (8, 12, 16, 20, 24, 32):
        pytest.importorskip("av")  # libsndfile reads the bits that a frame's header can name
    samples_NC = integers(bits)
    data = flac(samples_NC, bits)
    path = tmp_path / "a.flac"
    path.write_bytes(data)
    wave = load(path, RATE)
    expected_N = (samples_NC / 2.0 ** (bits - 1)).mean(1)
    torch.testing.assert_close(wave.samples_N, torch.from_numpy(expected_N).float(), atol=2e-7, rtol=0)
    assert seconds(path) == wave.seconds == 700 / RATE
    np.testing.assert_allclose(wave.samples_N.numpy(), by_av(data, "flac"), atol=2e-7)


@pytest.mark.parametrize("bits", [4, 8, 11, 12, 16, 20, 24, 27, 32])
def test_the_checksum_is_that_of_the_samples(bits: int) -> None:
    if bits not in (8, 12, 16, 20, 24, 32):
        pytest.importorskip("av")
    data = bytearray(flac(integers(bits), bits))
    data[26] ^= 1
    with pytest.raises(AudioError, match="do not have the checksum"):
        load(bytes(data), RATE)
    data[26:42] = bytes(16)  # none given
    assert len(load(bytes(data), RATE).samples_N) == 700


@pytest.mark.parametrize("bits", [16, 20, 32])
def test_the_length_must_be_the_declared(bits: int) -> None:
    for declared, fault in [(699, "checksum"), (701, r"declares 701 samples and 700 can be decoded; .*read_to_end")]:
        data = bytearray(flac(integers(bits), bits))
        data[22:26] = declared.to_bytes(4, "big")
        with pytest.raises(AudioError, match=fault):
            load(bytes(data), RATE)


def test_bits_that_only_av_reads_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(AudioError, match=r"FLAC of 11 bits a sample needs the av package; pip install"):
        load(flac(integers(11), 11), RATE)
    assert len(load(flac(integers(20), 20), RATE).samples_N) == 700


def streamed(data: bytes, md5: bool = False) -> bytes:
    return data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + (data[26:42] if md5 else bytes(16)) + data[42:]


def test_without_a_length_the_end_is_in_doubt(tmp_path: Path) -> None:
    data = encoded(sound(RATE, 1.0), RATE, "FLAC", "PCM_16")
    path = tmp_path / "a.flac"
    path.write_bytes(streamed(data))
    for read in (lambda: load(path, RATE), lambda: seconds(path)):
        with pytest.raises(
            AudioError, match=r"a\.flac: its header gives no length .*; .* read_to_end=True, --read-to-end"
        ):
            read()
    wave = load(path, RATE, read_to_end=True)
    assert torch.equal(wave.samples_N, load(data, RATE).samples_N)
    assert wave.note == (
        "read as far as it goes, since its header gives no length (a FLAC written to a stream), so a cut could not be "
        "noticed"
    )
    assert seconds(path, read_to_end=True) == 1.0
    # the checksum of all samples notices a cut as well
    assert load(streamed(data, md5=True), RATE).note is None
    with pytest.raises(AudioError):
        load(streamed(data, md5=True)[:-2000], RATE)


def test_without_a_length_bits_that_only_av_reads(tmp_path: Path) -> None:
    pytest.importorskip("av")
    path = tmp_path / "a.flac"
    path.write_bytes(streamed(flac(integers(11), 11)))
    with pytest.raises(AudioError, match="gives no length"):
        load(path, RATE)
    assert "gives no length" in (load(path, RATE, read_to_end=True).note or "")
    assert seconds(path, read_to_end=True) == 700 / RATE


def test_a_cut_file_is_read_as_far_as_it_goes_where_that_is_asked_for() -> None:
    data = encoded(sound(RATE, 3.0), RATE, "FLAC", "PCM_16")
    whole_N = load(data, RATE).samples_N
    wave = load(data[: len(data) // 2], RATE, read_to_end=True)
    assert 4096 < len(wave.samples_N) < len(whole_N)
    assert torch.equal(wave.samples_N, whole_N[: len(wave.samples_N)])
    assert wave.note is not None
    assert "declares 48000 samples" in wave.note


def test_tags_before_the_header() -> None:
    data = encoded(sound(RATE, 0.5), RATE, "FLAC", "PCM_24")
    tag = b"ID3\x03\0\0\0\0\0\x14" + bytes(20)
    assert torch.equal(load(tag + tag + data, RATE).samples_N, load(data, RATE).samples_N)


@pytest.mark.parametrize(
    "options", [["-b", "777"], ["-l", "0"], ["--no-md5-sum"], ["--no-seektable"], ["-P", "100000"]]
)
def test_what_the_flac_program_writes(options: list[str]) -> None:
    samples = sound(RATE, 0.6)
    data = run("flac", "--silent", "-f", *options, "IN", "-o", "OUT", data=wav(samples, RATE))
    held_NC = np.round(np.frombuffer(wav(samples, RATE)[44:], "<i2").reshape(-1, 2) / 32768, 7)
    np.testing.assert_allclose(load(data, RATE).samples_N.numpy(), held_NC.mean(1), atol=1e-6)
    assert len(io.BytesIO(data).getvalue()) > 42


def without_md5(data: bytes) -> bytes:
    return data[:26] + bytes(16) + data[42:]


TAILS = {
    "zeros": bytes(5000),
    "two zeros": bytes(2),
    "an APE tag": b"APETAGEX" + bytes(200) + b"APETAGEX" + bytes(24),
    "random bytes": np.random.default_rng(3).bytes(20_000),
    "an ID3v1 tag": b"TAG".ljust(128, b"x"),
    "an ID3v1 tag behind zeros": bytes(50) + b"TAG".ljust(128, b"x"),
}


@pytest.mark.parametrize("md5", [True, False])
@pytest.mark.parametrize("bits", [16, 20])
@pytest.mark.parametrize("kind", TAILS)
def test_bytes_behind_the_end_change_nothing(kind: str, bits: int, md5: bool) -> None:
    data = flac(integers(bits), bits, md5=md5)
    wave = load(data + TAILS[kind], RATE)
    assert torch.equal(wave.samples_N, load(data, RATE).samples_N)
    assert wave.note is None
    live = load(streamed(data) + TAILS[kind], RATE, read_to_end=True)
    assert torch.equal(live.samples_N, wave.samples_N)
    assert live.note is not None
    assert "gives no length" in live.note


@pytest.mark.parametrize("bits", [11, 16, 20])
def test_frames_behind_the_declared_length_are_never_left_out_silently(bits: int, tmp_path: Path) -> None:
    if bits == 11:
        pytest.importorskip("av")
    data = bytearray(flac(integers(bits), bits, md5=False))
    data[22:26] = (600).to_bytes(4, "big")
    path = tmp_path / "a.flac"
    path.write_bytes(data)
    for read in (load, lambda path, _: seconds(path)):
        with pytest.raises(AudioError, match=r"declares 600 samples and its frames hold 700; .*read_to_end"):
            read(path, RATE)
    wave = load(path, RATE, read_to_end=True)
    assert len(wave.samples_N) == 700
    assert wave.note == "read as far as it goes, since it declares 600 samples and its frames hold 700"
    assert seconds(path, read_to_end=True) == 700 / RATE
