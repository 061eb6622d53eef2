"""AIFF, AU, CAF, NIST SPHERE and older containers: samples, lengths, cuts, and names of unsupported files."""

import io
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.testing import assert_close

from pal.audio import load, seconds
from pal.errors import AudioError
from tests.audio.corpus import wild

RATE = 16_000
SOUND = np.random.default_rng(0).integers(-9000, 9000, 1600).astype("<i2")
WANTED = torch.from_numpy(SOUND.astype(np.float32) / 32768)
BIG, LITTLE = SOUND.astype(">i2").tobytes(), SOUND.tobytes()
CASES = Path(__file__).parents[3] / "shared" / "cases"


def refusal(data: bytes) -> str:
    with pytest.raises(AudioError) as caught:
        load(data, RATE)
    line = str(caught.value)
    assert line.isprintable() and len(line) <= 300 and "; " in line
    return line


def same(data: bytes, read_to_end: bool = False) -> None:
    assert torch.equal(load(data, RATE, read_to_end=read_to_end).samples_N, WANTED)


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    return name + struct.pack(">I", len(content) if size is None else size) + content


RATE_80 = struct.pack(">HQ", 16383 + 13, RATE << 50)


def comm(frames: int = 1600, bits: int = 16, codec: bytes = b"", channels: int = 1) -> bytes:
    name = codec + b"\x05names" if codec else b""
    return chunk(b"COMM", struct.pack(">HIH", channels, frames, bits) + RATE_80 + name)


def ssnd(sound: bytes = BIG, size: int | None = None, offset: int = 0) -> bytes:
    whole = struct.pack(">II", offset, 0) + bytes(offset) + sound
    return chunk(b"SSND", whole, size)


def aiff(*chunks: bytes, outer: int | None = None, form: bytes = b"AIFF") -> bytes:
    body = form + b"".join(chunks)
    return b"FORM" + struct.pack(">I", len(body) if outer is None else outer) + body


@pytest.mark.parametrize(
    "data",
    [
        aiff(comm(), ssnd()),
        aiff(ssnd(), comm()),
        aiff(comm(), ssnd(), outer=0),
        aiff(comm(), ssnd(), outer=0xFFFFFFFF),
        aiff(comm(), ssnd(offset=6)),
        aiff(comm(), ssnd(size=0)),
        aiff(chunk(b"ANNO", b"abc") + b"\0", comm(), ssnd()),
        aiff(chunk(b"ANNO", b"abc"), comm(), ssnd()),
        aiff(comm(), ssnd(), chunk(b"NAME", b"ab")),
        aiff(comm(), ssnd()) + b"junk behind",
        aiff(comm(codec=b"NONE"), ssnd(), form=b"AIFC"),
        aiff(comm(codec=b"twos"), ssnd(), form=b"AIFC"),
        aiff(comm(codec=b"sowt"), ssnd(LITTLE), form=b"AIFC"),
    ],
)
def test_aiff(data: bytes, tmp_path: Path) -> None:
    same(data)
    path = tmp_path / "a.aiff"
    path.write_bytes(data)
    assert seconds(path) == 0.1


@pytest.mark.parametrize(
    ("codec", "bits", "order", "scale"),
    [
        (b"in24", 24, ">", 2**23), (b"42ni", 24, "<", 2**23), (b"in32", 32, ">", 2**31), (b"23ni", 32, "<", 2**31),
        (b"NONE", 8, ">", 2**7), (b"NONE", 24, ">", 2**23), (b"sowt", 24, "<", 2**23), (b"NONE", 32, ">", 2**31),
    ],
)  # fmt: skip
def test_aiff_integers(codec: bytes, bits: int, order: str, scale: int) -> None:
    values = np.array([0, 1, -1, scale - 1, -scale], np.int64)
    width = bits // 8
    raw = values.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width]
    sound = (raw if order == "<" else raw[:, ::-1]).tobytes()
    data = aiff(comm(5, bits, codec), ssnd(sound), form=b"AIFC")
    assert_close(load(data, RATE).samples_N, torch.from_numpy((values / scale).astype(np.float32)), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("codec", "kind"), [(b"fl32", ">f4"), (b"FL32", ">f4"), (b"fl64", ">f8")])
def test_aiff_floats(codec: bytes, kind: str) -> None:
    data = aiff(comm(1600, 16, codec), ssnd(WANTED.numpy().astype(kind).tobytes()), form=b"AIFC")
    same(data)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (aiff(comm(), ssnd())[:-100], "it is cut: its sound should take 3200 bytes, the file holds 3100"),
        (aiff(comm(4000), ssnd()), "it is cut: its sound should take 8000 bytes, the file holds 3200"),
        (aiff(comm(1500), ssnd()), "contradicts itself: 1500 samples are 3000 bytes, its sound chunk says 3200"),
        (aiff(comm(), ssnd(size=1008)), "contradicts itself: 1600 samples are 3200 bytes, its sound chunk says 1000"),
        (aiff(ssnd()), "no chunk that describes its sound"),
        (aiff(comm()), "it is cut: it has no sound"),
        (aiff(chunk(b"COMM", bytes(10)), ssnd()), "no chunk that describes its sound"),
        (
            aiff(comm(codec=b"QDM2"), ssnd(), form=b"AIFC"),
            r"AIFF-C file whose codec is not supported \(qdm2\); convert it",
        ),
        (aiff(comm(bits=40), ssnd()), "samples of 40 bits"),
        (aiff(comm(channels=0), ssnd()), "0 channels"),
        (aiff(comm(0x7F000000 // 2), ssnd(size=0x7F000008)), "its header gives no length"),
    ],
)
def test_aiff_refused(data: bytes, fault: str) -> None:
    assert re.search(fault, refusal(data))


def test_an_aiff_written_to_a_stream_is_read_to_the_end() -> None:
    same(aiff(comm(0x7F000000 // 2), ssnd(size=0x7F000008)), read_to_end=True)


def au(sound: bytes = BIG, encoding: int = 3, size: int | None = None, note: bytes = b"", order: str = ">") -> bytes:
    start, size = 24 + len(note), len(sound) if size is None else size
    magic = b".snd" if order == ">" else b"dns."
    return magic + struct.pack(order + "5I", start, size, encoding, RATE, 1) + note + sound


@pytest.mark.parametrize(
    "data",
    [
        au(),
        au(note=b"an odd note"),
        au(size=len(au())),
        au() + b"behind",
        au(LITTLE, order="<"),
        au(WANTED.numpy().astype(">f4").tobytes(), 6),
        au(WANTED.numpy().astype(">f8").tobytes(), 7),
    ],
)
def test_au(data: bytes, tmp_path: Path) -> None:
    same(data)
    path = tmp_path / "a.au"
    path.write_bytes(data)
    assert seconds(path) == 0.1


@pytest.mark.parametrize(("encoding", "subtype"), [(1, "ULAW"), (27, "ALAW"), (2, "PCM_S8"), (4, "PCM_24")])
def test_au_encodings_are_those_of_the_format(encoding: int, subtype: str) -> None:
    file = io.BytesIO()
    soundfile.write(file, WANTED.numpy(), RATE, format="AU", subtype=subtype, endian="BIG")
    data = file.getvalue()
    assert data[12:16] == struct.pack(">I", encoding)
    wanted = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    assert_close(load(data, RATE).samples_N, torch.from_numpy(wanted), atol=0, rtol=0)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0, 0x7FFFFFFF])
def test_au_without_a_length(size: int) -> None:
    assert "gives no length" in refusal(au(size=size))
    same(au(size=size), read_to_end=True)


def test_au_refused() -> None:
    assert "it is cut: its sound should take 3200 bytes, the file holds 3100" in refusal(au()[:-100])
    assert "it is cut: its header should take 24 bytes" in refusal(au()[:20])
    assert "should begin at byte 99999 of 3224" in refusal(au()[:4] + struct.pack(">I", 99_999) + au()[8:])
    for encoding, name in ((23, "G.721"), (24, "G.722"), (25, "G.723"), (99, "number 99")):
        assert f"it is an AU file whose codec is not supported ({name}); convert it" in refusal(au(encoding=encoding))
    assert "no whole number of 2-byte samples" in refusal(au(BIG[:-1]))


def caf(sound: bytes = BIG, size: int | None = None, flags: int = 0, bits: int = 16, codec: bytes = b"lpcm") -> bytes:
    width = bits // 8
    desc = struct.pack(">d4s5I", RATE, codec, flags, width, 1, 1, bits)
    data = struct.pack(">I", 0) + sound
    size = len(data) if size is None else size
    parts = [(b"desc", desc, 32), (b"free", bytes(9), 9), (b"data", data, size % (1 << 64))]
    return b"caff\0\1\0\0" + b"".join(name + struct.pack(">Q", size) + part for name, part, size in parts)


@pytest.mark.parametrize(
    "data",
    [
        caf(),
        caf(LITTLE, flags=2),
        caf(WANTED.numpy().astype(">f4").tobytes(), flags=1, bits=32),
        caf(WANTED.numpy().astype("<f8").tobytes(), flags=3, bits=64),
        caf() + b"info" + struct.pack(">Q", 4) + bytes(4),
    ],
)
def test_caf(data: bytes, tmp_path: Path) -> None:
    same(data)
    path = tmp_path / "a.caf"
    path.write_bytes(data)
    assert seconds(path) == 0.1


def test_caf_refused() -> None:
    assert "it is cut: its sound should take 3204 bytes, the file holds 3104" in refusal(caf()[:-100])
    assert "(its size of -1 bytes is a placeholder, 3204 are there)" in refusal(caf(size=-1))
    same(caf(size=-1), read_to_end=True)
    assert "it is a CAF file whose codec is not supported (aac)" in refusal(caf(codec=b"aac "))
    assert "contradicts itself: 1 channels of 24 bits" in refusal(
        caf(bits=24)[:36] + struct.pack(">I", 2) + caf(bits=24)[40:]
    )
    assert "no description" in refusal(caf()[:30])
    assert "a CAF file of an unknown version" in refusal(b"caff\0\2\0\0" + caf()[8:])


@pytest.mark.parametrize("depth", [16, 20, 24, 32])
def test_alac_has_the_length_of_its_packets(depth: int) -> None:
    if depth == 32:
        pytest.importorskip("av")
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 9000)
    file = io.BytesIO()
    soundfile.write(file, sound, RATE, format="CAF", subtype=f"ALAC_{depth}")
    data = file.getvalue()
    wanted = torch.from_numpy(sound.astype(np.float32))
    assert_close(load(data, RATE).samples_N, wanted, atol=2**-14, rtol=0)
    # as FFmpeg writes it: no depth in the flags, whole packets in the table
    desc, table = data.index(b"desc") + 12, data.index(b"pakt") + 12
    assert struct.unpack_from(">qq", data, table) == (3, 9000)
    counts = struct.pack(">qii", 3 * 4096, 0, 0)
    other = data[: desc + 12] + bytes(4) + data[desc + 16 : table + 8] + counts + data[table + 24 :]
    assert_close(load(other, RATE).samples_N, wanted, atol=2**-14, rtol=0)
    assert "it is cut" in refusal(data[:-100]) or "packet table" in refusal(data[:-100])


def nist(sound: bytes = LITTLE, **fields: str) -> bytes:
    values = {
        "channel_count": "-i 1", "sample_count": "-i 1600", "sample_rate": f"-i {RATE}", "sample_n_bytes": "-i 2",
        "sample_byte_format": "-s2 01", "sample_coding": "-s3 pcm", **fields,
    }  # fmt: skip
    lines = "".join(f"{name} {value}\n" for name, value in values.items() if value)
    return f"NIST_1A\n   1024\n{lines}end_head\n".encode().ljust(1024) + sound


def test_nist(tmp_path: Path) -> None:
    same(nist())
    same(nist(BIG, sample_byte_format="-s2 10"))
    same(nist(sample_coding=""))
    same(nist(database_id="-s5 TIMIT", utterance="-s11 a b c d e f"))
    assert "it is cut: its sound should take 3200 bytes, the file holds 3100" in refusal(nist()[:-100])
    assert "NIST header gives no sample_count" in refusal(nist(sample_count=""))
    line = refusal(nist(sample_coding="-s26 pcm,embedded-shorten-v2.00"))
    assert "codec is not supported (pcm,embedded-shorten-v2.00); convert it: sph2pipe" in line
    path = tmp_path / "a.wav"
    path.write_bytes(nist())
    assert seconds(path) == 0.1


@pytest.mark.parametrize("format", ["AVR", "VOC", "SVX", "HTK", "WVE", "NIST"])
def test_old_containers(format: str) -> None:
    subtype = {"WVE": "ALAW"}.get(format, "PCM_16")
    rate = 8_000 if format == "WVE" else RATE
    file = io.BytesIO()
    soundfile.write(file, WANTED.numpy(), rate, format=format, subtype=subtype)
    data = file.getvalue()
    wanted = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    assert len(wanted) == 1600
    assert_close(load(data, rate).samples_N, torch.from_numpy(wanted), atol=0, rtol=0)
    assert re.search("it is cut|it is no WAV", refusal(data[:-100]))


@pytest.mark.parametrize("format", ["IRCAM", "PVF", "PAF"])
@pytest.mark.parametrize("endian", ["LITTLE", "BIG"])
def test_containers_that_give_no_length(format: str, endian: str) -> None:
    if not soundfile.check_format(format, "PCM_16", endian):
        pytest.skip(f"{format} has one byte order")
    file = io.BytesIO()
    soundfile.write(file, WANTED.numpy(), RATE, format=format, subtype="PCM_16", endian=endian)
    assert "its header gives no length" in refusal(file.getvalue())
    same(file.getvalue(), read_to_end=True)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"TTA1" + bytes(40), "a True Audio file"),
        (b"MAC \x96\x0f" + bytes(40), "a Monkey's Audio file"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(40), "a WMA"),
        (b"#!AMR\n" + bytes(40), "an AMR file"),
        (b"RIFF\0\0\0\0AVI LIST" + bytes(40), "an AVI video"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(40), "a RIFF file that is no WAV"),
        (b"MATLAB 5.0 MAT-file" + bytes(200), "a MATLAB file"),
        (b"Extended Instrument: a" + bytes(400), "a FastTracker instrument"),
        (b"MThd" + bytes(40), "a MIDI file"),
        (b"PK\x03\x04" + bytes(40), "a zip archive, which is not supported; unpack it"),
        (b"<!DOCTYPE html><html>", "a web page, which is not supported; download the file itself"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a pointer of Git LFS, which is not supported; fetch the file",
        ),
    ],
)
def test_what_is_not_read_is_called_by_its_name(data: bytes, name: str) -> None:
    line = refusal(data)
    assert f"it is {name}" in line
    assert "damaged" not in line and "cut" not in line


def test_the_public_cases() -> None:
    if not CASES.exists():
        pytest.skip("the cases are not here")
    for path in sorted((CASES / "aiff_au_caf").iterdir()):
        samples_NC, rate = soundfile.read(path, dtype="float32", always_2d=True)
        assert_close(load(path, rate).samples_N, torch.from_numpy(samples_NC.mean(1)), atol=1e-6, rtol=0)


def test_variations_of_the_corpus_are_the_plain_file() -> None:
    for format, vary in (("AIFF", wild.aiff), ("AU", wild.au)):
        file = io.BytesIO()
        soundfile.write(file, WANTED.numpy(), RATE, format=format, subtype="PCM_16")
        for name, data in vary(file.getvalue()):
            if name in ("cut", "more_claimed", "unknown"):
                refusal(data)
            else:
                same(data)


def test_wavpack() -> None:
    pytest.importorskip("av")
    data = (Path(__file__).parent / "corpus" / "files" / "sox_01_16000.wv").read_bytes()
    wave = load(data, RATE)
    assert_close(wave.samples_N, load(data + b"TAG".ljust(128), RATE).samples_N, atol=0, rtol=0)
    assert len(wave.samples_N) == int.from_bytes(data[12:16], "little") == 1600
    assert "it is cut" in refusal(data[:-10])
    assert "it is cut: it declares 9999 samples" in refusal(data[:12] + struct.pack("<I", 9999) + data[16:])
    unknown = data[:12] + b"\xff" * 4 + data[16:]
    assert "its header gives no length" in refusal(unknown)
    assert torch.equal(load(unknown, RATE, read_to_end=True).samples_N, wave.samples_N)
    assert "it is damaged: no WavPack block stands at byte" in refusal(data + b"some junk behind it")


def test_a_fractional_rate_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    rate_80 = struct.pack(">HQ", 16383 + 14, round(22254.54 * 2**49))
    caf_rate = struct.pack(">d", 22254.54)
    for data in (aiff(comm(), ssnd()).replace(RATE_80, rate_80), caf()[:20] + caf_rate + caf()[28:]):
        path = tmp_path / "a"
        path.write_bytes(data)
        assert seconds(path) == 1600 / 22255
        assert torch.equal(load(data, 22255).samples_N, WANTED)
    for rate in (float("nan"), float("inf"), 0.0, -8000.0):
        assert "Hz is not a sampling rate" in refusal(caf()[:20] + struct.pack(">d", rate) + caf()[28:])


@pytest.mark.parametrize("frames", [0x7F000000 // 12, 0x7FFFF000 // 12, 0x7FFFF000, 0xFFFFFFFF])
def test_an_aiff_from_a_stream_counts_whole_samples(frames: int) -> None:
    sound = np.repeat(SOUND, 6).astype(">i2").tobytes()
    data = aiff(comm(frames, channels=6), ssnd(sound, size=min(frames * 12 + 8, 0xFFFFFFFF)))
    assert "gives no length" in refusal(data)
    assert_close(load(data, RATE, read_to_end=True).samples_N, WANTED, atol=1e-6, rtol=0)


def test_a_caf_from_a_stream_has_its_header_in_it_again() -> None:
    head = caf(b"", size=4)
    assert "gives no length" in refusal(head + head + BIG + caf(b"", size=4 + len(BIG)))
    for data in (head + head + BIG + caf(b"", size=4 + len(BIG)), head + head + BIG):
        same(data, read_to_end=True)
    assert "holds no samples" in refusal(head)


def test_too_many_chunks_are_an_error() -> None:
    empty = chunk(b"ANNO", b"") * 10_001
    assert "more than 10000 chunks" in refusal(aiff(empty, comm(), ssnd()))
    same(aiff(comm(), ssnd(), empty))
    empty = (b"free" + bytes(8)) * 10_001
    assert "more than 10000 chunks" in refusal(caf()[:8] + empty + caf()[8:])
    same(caf() + empty)


def test_a_packet_table_without_end_is_an_error() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(9000), RATE, format="CAF", subtype="ALAC_16")
    data = file.getvalue()
    table = data.index(b"pakt") + 12
    size = struct.unpack_from(">Q", data, table - 8)[0]
    endless = struct.pack(">Qqqii", 24 + 100_000, 3, 3 * 4096, 0, 0) + b"\xff" * 100_000
    other = data[: table - 8] + endless + data[table + size :]
    assert "its packet table has a number of more than 5 bytes" in refusal(other)


def test_a_file_that_hides_mp3s_from_libsndfile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    soundfile.write(file, WANTED.numpy(), RATE, format="MP3", subtype="MPEG_LAYER_III")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "._").touch()
    assert "a file named ._ in the working directory hides it; remove ._" in refusal(file.getvalue())
    same(au())
