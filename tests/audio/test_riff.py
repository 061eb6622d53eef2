"""WAV and Wave64 as programs write them: what is wrong in a header and loses nothing is read, what loses sound is not."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pal.audio import load, seconds
from pal.audio.samples import is_placeholder
from pal.errors import AudioError
from tests.audio.corpus import wild

RATE = 16_000
SOUND = np.random.default_rng(0).integers(-9000, 9000, 1600).astype("<i2")
WANTED = torch.from_numpy(SOUND.astype(np.float32) / 32768)
CASES = Path(__file__).parents[3] / "shared" / "cases"


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(content) if size is None else size) + content


def fmt(tag: int = 1, channels: int = 1, rate: int = RATE, bits: int = 16, **wrong: int) -> bytes:
    align = wrong.get("align", channels * bits // 8)
    return chunk(
        b"fmt ", struct.pack("<HHIIHH", tag, channels, rate, wrong.get("byte_rate", rate * align), align, bits)
    )


def wav(*chunks: bytes, outer: int | None = None) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if outer is None else outer) + body


DATA = SOUND.tobytes()
PLAIN = wav(fmt(), chunk(b"data", DATA))


def refusal(data: bytes, **options: bool) -> str:
    with pytest.raises(AudioError) as caught:
        load(data, RATE, **options)
    line = str(caught.value)
    assert line.isprintable() and len(line) <= 300 and "; " in line
    return line


@pytest.mark.parametrize(
    "data",
    [
        PLAIN,
        wav(fmt(byte_rate=0), chunk(b"data", DATA)),
        wav(fmt(byte_rate=RATE), chunk(b"data", DATA)),
        wav(fmt(byte_rate=8 * RATE), chunk(b"data", DATA)),
        wav(fmt(align=1, byte_rate=2 * RATE), chunk(b"data", DATA)),
        wav(fmt(align=0, byte_rate=0), chunk(b"data", DATA)),
        wav(fmt(), chunk(b"data", DATA), outer=0),
        wav(fmt(), chunk(b"data", DATA), outer=36),
        wav(fmt(), chunk(b"data", DATA), outer=100_000),
        wav(fmt(), chunk(b"data", DATA), outer=0xFFFFFFFF),
        wav(fmt(), chunk(b"data", DATA), wild.LIST),
        wav(fmt(), chunk(b"data", DATA), chunk(b"LIST", b"INFO", 4000)),
        wav(fmt(), chunk(b"data", DATA), chunk(b"bext", b"x" * 20, 602)),
        wav(fmt(), chunk(b"data", DATA), chunk(b"LIST", b"INFOISFT\x0e\0\0\0Lavf", 2)),
        wav(fmt(), chunk(b"data", DATA), b"\r\n"),
        wav(fmt(), chunk(b"data", DATA), b"\0"),
        PLAIN + b"bytes that are no chunk",
        PLAIN + bytes(5000),
        PLAIN + wild.ID3V1,
        wav(chunk(b"JUNK", bytes(28)), fmt(), chunk(b"data", DATA)),
        wav(chunk(b"JUNK", b"abc") + b"\0", fmt(), chunk(b"data", DATA)),
        wav(chunk(b"JUNK", b"abc"), fmt(), chunk(b"data", DATA)),
        wav(fmt(), chunk(b"data", DATA), chunk(b"SubT", b"abcdef"))[:-3],
        wav(fmt(), chunk(b"data", DATA), chunk(b"SubT", b"abcde"), b"\0")[:-4],
        wav(fmt(), chunk(b"data", DATA + b"\0")),
        wav(fmt(), chunk(b"fact", struct.pack("<I", 5)), chunk(b"data", DATA)),
    ],
)
def test_what_is_wrong_and_loses_nothing_is_read(data: bytes, tmp_path: Path) -> None:
    assert_close(load(data, RATE).samples_N, WANTED, atol=0, rtol=0)
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    assert seconds(path) == 0.1


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (wav(fmt(), chunk(b"data", DATA, 3190)), "claims 3190 bytes and is followed by 10 that are no chunk"),
        (wav(fmt(), chunk(b"data", DATA, 1600)), "claims 1600 bytes and is followed by 1600 that are no chunk"),
        (wav(fmt(), chunk(b"data", DATA), chunk(b"SubT", b"abcdef", 9)), "followed by 14 that are no chunk"),
        (wav(fmt(), chunk(b"data", DATA + b"\0"), b"\0"), "3201 bytes is no whole number of 2-byte samples"),
        (wav(fmt(), chunk(b"data", DATA + b"\1")), "3201 bytes is no whole number of 2-byte samples"),
        (wav(*[chunk(b"note", b"")] * 10_001, fmt(), chunk(b"data", DATA)), "more than 10000 chunks"),
        (PLAIN[:-2], "it is cut: its data chunk claims 3200 bytes, the file holds 3198"),
        (PLAIN[:1000], "it is cut: its header claims 3244 bytes, the file holds 1000"),
        (wav(fmt(channels=2, align=2, byte_rate=2 * RATE), chunk(b"data", DATA)), "contradicts itself"),
        (wav(fmt(bits=24, align=2, byte_rate=2 * RATE), chunk(b"data", DATA)), "contradicts itself"),
        (wav(fmt(rate=16_064, byte_rate=2 * RATE), chunk(b"data", DATA)), "contradicts itself: 1 channels of 16 bits"),
        (wav(fmt(channels=0, align=2), chunk(b"data", DATA)), "0 channels are not 1 to 8"),
        (wav(fmt(bits=40), chunk(b"data", DATA)), "samples of 40 bits are not supported"),
        (wav(fmt(tag=3), chunk(b"data", DATA)), "floating-point samples of 16 bits"),
        (wav(fmt(tag=0x161), chunk(b"data", DATA)), r"whose codec is not supported \(WMA 2, format 353\); convert it"),
        (wav(fmt(tag=0x1234), chunk(b"data", DATA)), r"whose codec is not supported \(format 4660\)"),
        (wav(fmt(tag=0x11, align=2), chunk(b"data", DATA)), "blocks of 2 bytes are too small"),
        (wav(fmt(tag=0x31, channels=2), chunk(b"data", DATA)), "2 channels are too many"),
        (wav(fmt(), wild.LIST), "no data chunk"),
        (wav(chunk(b"data", DATA), fmt()), "no format chunk before its data"),
        (wav(chunk(b"fmt ", bytes(8)), chunk(b"data", DATA)), "format chunk is too short"),
    ],
)
def test_what_loses_sound_or_cannot_be_told_is_refused(data: bytes, fault: str) -> None:
    import re

    assert re.search(fault, refusal(data))
    assert re.search(fault, refusal(data, read_to_end=True))


PLACEHOLDERS = [
    2_000_000_000,
    1_000_000_000,
    0xFFFFFFFF,
    0x7FFFFFFF,
    0x7FFFF000,
    0x80000000,
    0xFFFFFFFF - 36,
    0x7F000000,
    0,
]


@pytest.mark.parametrize("size", PLACEHOLDERS)
@pytest.mark.parametrize("outer", [36, 44, None])
def test_placeholders_are_no_cut_and_are_read_to_the_end(size: int, outer: int | None) -> None:
    around = None if outer is None else min(size + outer, 0xFFFFFFFF)
    data = wav(fmt(), chunk(b"data", DATA, size), outer=around)
    line = refusal(data)
    assert f"its header gives no length, so a cut could not be noticed (its size of {size} bytes" in line
    assert "3200 are there" in line and "read_to_end" in line and "is cut" not in line
    wave = load(data, RATE, read_to_end=True)
    assert torch.equal(wave.samples_N, WANTED)
    assert "gives no length" in str(wave.note)
    assert len(load(data[:-1], RATE, read_to_end=True).samples_N) == 1599


@pytest.mark.parametrize("outer", [2_000_000_000, 2_000_000_000 - 8, 0x7FFFFFFF])
def test_a_size_made_from_an_outer_placeholder_is_one(outer: int) -> None:
    data = wav(fmt(), chunk(b"data", DATA, outer - 36), outer=outer)
    assert "gives no length" in refusal(data)
    assert torch.equal(load(data, RATE, read_to_end=True).samples_N, WANTED)


def test_a_streamed_file_of_the_public_case() -> None:
    if not CASES.exists():
        pytest.skip("the cases are not here")
    data = (CASES / "wav_placeholder" / "placeholder.wav").read_bytes()
    assert "gives no length" in refusal(data)
    wave = load(data, RATE, read_to_end=True)
    whole = (9000 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(int) / 32768
    assert_close(wave.samples_N, torch.from_numpy(whole.astype(np.float32)), atol=1e-6, rtol=0)


@given(st.integers(45, 10**8 - 1), st.integers(0, 10**8))
@settings(max_examples=300, deadline=None)
def test_a_size_of_a_real_recording_is_no_placeholder(size: int, held: int) -> None:
    assert is_placeholder(size, held) == (size % (1 << 24) == 0 and size > 2 * held)


@pytest.mark.parametrize("size", PLACEHOLDERS[:-1])
def test_a_split_recording_that_was_cut_is_cut(size: int) -> None:
    assert not is_placeholder(size, size // 2 + 1)
    assert is_placeholder(size, 100)


def test_an_empty_data_chunk_before_others_is_empty() -> None:
    assert "holds no samples" in refusal(wav(fmt(), chunk(b"data", b""), wild.LIST))
    assert "holds no samples" in refusal(wav(fmt(), chunk(b"data", b"")))


@pytest.mark.parametrize("bits", [4, 8, 12, 16, 20, 24, 32])
@pytest.mark.parametrize("named", ["container", "valid"])
def test_valid_bits_stand_in_the_upper_part_of_whole_bytes(bits: int, named: str) -> None:
    width = -(-bits // 8)
    top = 2 ** (bits - 1)
    values = np.array([0, 1, -1, top - 1, -top], np.int64)
    raw = (values << 8 * width - bits) + 128 * (width == 1)
    sound = raw.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    if named == "container":
        guid = struct.pack("<HHIH", 22, bits, 4, 1) + bytes.fromhex("0000 0000 1000 8000 00aa 0038 9b71")
        head = struct.pack("<HHIIHH", 0xFFFE, 1, RATE, RATE * width, width, 8 * width) + guid
    else:
        head = struct.pack("<HHIIHH", 1, 1, RATE, RATE * width, width, bits)
    data = wav(chunk(b"fmt ", head), chunk(b"data", sound + bytes(len(sound) % 2), len(sound)))
    assert_close(load(data, RATE).samples_N, torch.from_numpy((values / top).astype(np.float32)), atol=1e-7, rtol=0)


@pytest.mark.parametrize("pad", [b"\0", b""])
@pytest.mark.parametrize("behind", [wild.LIST, b""])
def test_an_odd_data_chunk_with_and_without_its_pad_byte(pad: bytes, behind: bytes) -> None:
    sound = bytes(range(100, 201))
    data = wav(fmt(bits=8), chunk(b"data", sound), pad + behind)
    wanted = torch.tensor([(byte - 128) / 128 for byte in sound])
    assert torch.equal(load(data, RATE).samples_N, wanted)
    assert torch.equal(load(wav(fmt(bits=8), chunk(b"data", sound), outer=36 + 101) + pad, RATE).samples_N, wanted)


def test_rifx_and_its_sizes_have_the_high_byte_first() -> None:
    body = b"WAVEfmt " + struct.pack(">IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    body += b"data" + struct.pack(">I", 3200) + SOUND.astype(">i2").tobytes()
    data = b"RIFX" + struct.pack(">I", len(body)) + body
    assert torch.equal(load(data, RATE).samples_N, WANTED)
    assert "it is cut" in refusal(data[:-100])


@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
def test_sizes_of_64_bits(name: bytes) -> None:
    def big(size: int, held: bytes = DATA) -> bytes:
        ds64 = struct.pack("<QQQI", size + 72, size, size // 2, 0)
        return name + b"\xff" * 4 + b"WAVE" + chunk(b"ds64", ds64) + fmt() + chunk(b"data", held, 0xFFFFFFFF)

    assert torch.equal(load(big(3200), RATE).samples_N, WANTED)
    assert "it is cut: its header claims 8080 bytes, the file holds 3280" in refusal(big(8000))
    assert torch.equal(load(big((1 << 64) - 1 & ~127), RATE, read_to_end=True).samples_N, WANTED)


def mp3() -> bytes:
    file = io.BytesIO()
    tone = 0.5 * np.sin(np.arange(RATE) * 0.2)
    soundfile.write(file, tone, RATE, format="MP3", subtype="MPEG_LAYER_III")
    return file.getvalue()


@pytest.mark.parametrize("tag", [0x50, 0x55])
def test_mpeg_inside_wav_is_what_it_is_by_itself(tag: int, tmp_path: Path) -> None:
    inside = mp3()
    head = chunk(b"fmt ", struct.pack("<HHIIHHHHIHHH", tag, 1, RATE, 8000, 1, 0, 12, 1, 2, 576, 1, 1393))
    data = wav(head, chunk(b"fact", struct.pack("<I", RATE)), chunk(b"data", inside), b"\0" * (len(inside) % 2))
    wanted = load(inside, RATE)
    assert torch.equal(load(data, RATE).samples_N, wanted.samples_N)
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    assert seconds(path) == pytest.approx(wanted.seconds)
    refusal(data[: len(data) // 2])


@pytest.mark.parametrize("subtype", ["IMA_ADPCM", "MS_ADPCM", "GSM610"])
def test_blocks_are_read_with_a_wrong_byte_rate_and_outer_size(subtype: str) -> None:
    file = io.BytesIO()
    rate = 8000
    soundfile.write(file, SOUND.astype(np.float32) / 32768, rate, format="WAV", subtype=subtype)
    data = bytearray(file.getvalue())
    # of GSM libsndfile takes the pad byte for a block of 320 samples that are no sound; FFmpeg and SoX do not
    wanted_N = soundfile.read(io.BytesIO(bytes(data)), dtype="float32")[0]
    wanted = torch.from_numpy(wanted_N[:1600] if subtype == "GSM610" else wanted_N)
    data[28:32] = struct.pack("<I", 1)
    data[4:8] = bytes(4)
    assert_close(load(bytes(data), rate).samples_N, wanted, atol=1e-6, rtol=0)
    refusal(bytes(data[:-100]))


def w64(sound: bytes = DATA, bits: int = 16, size: int | None = None) -> bytes:
    tail = b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
    head = struct.pack("<HHIIHH", 1, 1, RATE, RATE * bits // 8, bits // 8, bits)
    body = b"wave" + tail + b"fmt " + tail + struct.pack("<Q", 40) + head
    body += b"junk" + tail + struct.pack("<Q", 27) + b"abc" + bytes(5)
    body += b"data" + tail + struct.pack("<Q", len(sound) + 24 if size is None else size) + sound
    outer = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
    return outer + struct.pack("<Q", len(body) + 24) + body


def test_wave64() -> None:
    assert torch.equal(load(w64(), RATE).samples_N, WANTED)
    assert "it is cut: its data chunk claims 3200 bytes, the file holds 3100" in refusal(w64()[:-100])
    for size in (0, 24, (1 << 63) - 1, (1 << 64) - 1):
        assert "gives no length" in refusal(w64(size=size))
        assert torch.equal(load(w64(size=size), RATE, read_to_end=True).samples_N, WANTED)
    refusal(w64()[:60])
    # FFmpeg counts the bytes that fill up the last eight
    padded = w64(bytes(range(30)) + bytes(2), bits=24)
    assert len(load(padded, RATE).samples_N) == 10


def test_headers_alone_give_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(PLAIN)
    monkeypatch.setattr("pal.audio.sndfile.opened", None)
    assert seconds(path) == 0.1


def test_an_odd_chunk_without_its_pad_byte_before_data_of_any_size() -> None:
    sound = DATA + bytes(0x6060 - len(DATA))  # "ata`" could be a name, too
    waveform = load(wav(fmt(), chunk(b"note", b"abc"), chunk(b"data", sound)), RATE)
    assert_close(waveform.samples_N[:1600], WANTED, atol=0, rtol=0)
    assert len(waveform.samples_N) == 0x6060 // 2


def test_a_pad_byte_that_was_counted_is_no_sample() -> None:
    sound = np.repeat(SOUND, 2).tobytes() + b"\0"
    waveform = load(wav(fmt(channels=2), chunk(b"data", sound), b"\0"), RATE)
    assert_close(waveform.samples_N, WANTED, atol=0, rtol=0)


def test_placeholders_may_be_rounded_down_to_whole_samples() -> None:
    assert is_placeholder(0x7F000000 - 4, 1000, 12) and not is_placeholder(0x7F000000 - 4, 1000, 4)
    assert is_placeholder(2_000_000_000 - 2, 1000, 6) and not is_placeholder(2_000_000_000 + 2, 1000, 6)


def test_wave64_from_a_stream_has_its_header_in_it_again() -> None:
    for size in (24, (1 << 63) - 9977):
        head = w64(b"", size=size)
        data = head + head + DATA + head
        assert "gives no length" in refusal(data)
        assert_close(load(data, RATE, read_to_end=True).samples_N, WANTED, atol=0, rtol=0)


def test_wave64_of_too_many_chunks() -> None:
    head = w64()
    junk = b"junk" + head[28:40] + struct.pack("<Q", 24)
    assert "more than 10000 chunks" in refusal(head[:40] + junk * 10_001 + head[40:])
