"""MPEG audio as it is found: tags and other bytes around the frames, layers I and II, cut ends, counts that are wrong."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.audio import load, mpeg, mpeg_frames
from pal.errors import AudioError
from tests.audio.programs import by_av, mpg123, run, sound, wav
from tests.audio.test_load import encoded

RATE = 16_000
MP3 = encoded(sound(RATE, 0.5, 1), RATE, "MP3", "MPEG_LAYER_III")
APE = b"APETAGEX" + (2000).to_bytes(4, "little") + (32).to_bytes(4, "little") + bytes(4) + b"\0\0\0\xa0" + bytes(8)


def frames_of(data: bytes) -> list[bytes]:
    """The frames of a file that has nothing else, by their headers."""
    frames, start = [], 0
    while start < len(data):
        header = mpeg_frames.header(data, start)
        assert header is not None
        frames.append(data[start : start + header.bytes])
        start += header.bytes
    return frames


def bare(data: bytes = MP3) -> bytes:
    """The file without its first frame, which counts the others."""
    return b"".join(frames_of(data)[1:])


def id3(body: bytes = b"", padding: int = 20) -> bytes:
    size = len(body) + padding
    return b"ID3\x03\0\0" + bytes([0, size >> 14, size >> 7 & 127, size & 127]) + body + bytes(padding)


WILD: dict[str, Callable[[bytes], bytes]] = {
    "two tags": lambda data: id3() + id3(b"TIT2\0\0\0\x03\0\0\0ab") + data,
    "a picture in the second tag": lambda data: id3() + id3(b"\xff\xd8", 100_000) + data,
    "three tags": lambda data: id3() * 3 + data,
    "a tag of too small a size": lambda data: b"ID3\x03\0\0\0\0\0\x05" + bytes(20) + data,
    "a tag, then junk": lambda data: id3() + b"XXXXX" * 7 + data,
    "junk first": lambda data: b"junk before the first frame " * 4 + data,
    "junk with signs of frames first": lambda data: b"\xff\xfb\x90\x64 no frame \xff\xe3" * 3 + data,
    "zeros first": lambda data: bytes(64) + data,
    "an APE tag first": lambda data: APE + data,
    "an APE tag last": lambda data: data + APE + b"TAG".ljust(128, b"x"),
    "lyrics last": lambda data: data + b"LYRICSBEGININD0000200LYR00005hello000041LYRICS200" + b"TAG".ljust(128, b"x"),
    "MusicMatch last": lambda data: data + b"18273645" + b" " * 240 + b"Brava Software Inc.".ljust(32),
    "a newline last": lambda data: data + b"\r\n",
    "junk last": lambda data: data + bytes(range(1, 65)),
    "zeros last": lambda data: data + bytes(5000),
    "a picture last": lambda data: data + b"\x89PNG\r\n" + random.Random(0).randbytes(3000),
}


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("kind", WILD)
def test_bytes_around_the_frames_change_nothing(kind: str, counted: bool) -> None:
    data = MP3 if counted else bare()
    wave = load(WILD[kind](data), RATE)
    assert torch.equal(wave.samples_N, load(data, RATE).samples_N)
    assert wave.note is None


@pytest.mark.parametrize("kind", ["two tags", "zeros first", "an APE tag last", "junk first"])
def test_what_mpg123_hears(kind: str) -> None:
    data = WILD[kind](MP3)
    np.testing.assert_allclose(load(data, RATE).samples_N.numpy(), mpg123(data), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(before=st.binary(max_size=300), after=st.binary(max_size=300))
def test_any_bytes_around_the_frames_lose_nothing(before: bytes, after: bytes) -> None:
    try:
        samples_N = load(before + MP3 + after, RATE).samples_N
    except AudioError:
        return  # such as bytes that name another kind of file
    assert torch.equal(samples_N, load(MP3, RATE).samples_N)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("hole", [b"junk between", b"\xff" * 40, bytes(30)])
def test_bytes_between_frames_are_a_hole(hole: bytes, counted: bool) -> None:
    frames = frames_of(MP3)[0 if counted else 1 :]
    middle = len(frames) // 2
    holed = b"".join(frames[:middle]) + hole + b"".join(frames[middle:])
    if counted and not hole.strip(b"\0"):
        assert torch.equal(load(holed, RATE).samples_N, load(MP3, RATE).samples_N)
        return
    with pytest.raises(AudioError, match=f"damaged: the {len(hole)} bytes at"):
        load(holed, RATE)
    with pytest.raises(AudioError, match="damaged"):
        load(holed, RATE, read_to_end=True)


def test_a_hole_before_the_last_frames_is_seen() -> None:
    frames = frames_of(bare())
    with pytest.raises(AudioError, match="damaged"):
        load(b"".join(frames[:-2]) + bytes(100_000) + b"x" + b"".join(frames[-2:]), RATE)


def test_joined_files_are_read_across_their_tags() -> None:
    joined = bare() + b"TAG".ljust(128, b"x") + id3() + bare()
    assert torch.equal(load(joined, RATE).samples_N, load(bare() + bare(), RATE).samples_N)
    with pytest.raises(
        AudioError, match=r"holds 33 frames, more than the 16 its Info frame counts .*joined.*; .*read_to_end"
    ):
        load(MP3 + MP3, RATE)
    other = encoded(sound(48_000, 0.3, 1), 48_000, "MP3", "MPEG_LAYER_III")
    with pytest.raises(AudioError, match="changes at byte"):
        load(bare() + other, RATE)


def counted(frames: list[bytes], number: int) -> bytes:
    """The first frames of a file whose first one then says that there are `number`, and nothing of delays."""
    at = frames[0].index(b"Xing") + 8
    first = frames[0][:at] + number.to_bytes(4, "big") + frames[0][at + 4 :].replace(b"LAME", b"none")
    return first + b"".join(frames[1 : number + 1])


def sound_ends(frame: bytes) -> int:
    header = mpeg_frames.header(frame)
    assert header is not None
    end = mpeg_frames.main_data_end(frame, header)
    assert end is not None
    return end


@pytest.mark.parametrize("lost", [1, 3, 20, 60])
@pytest.mark.parametrize("has_count", [True, False])
def test_a_last_frame_that_is_cut_is_refused_with_the_option(lost: int, has_count: bool) -> None:
    frames = frames_of(encoded(sound(RATE, 0.5, 1), RATE, "MP3", "MPEG_LAYER_III"))
    number = max(range(4, len(frames)), key=lambda i: sound_ends(frames[i]))
    whole = counted(frames, number) if has_count else b"".join(frames[1 : number + 1])
    cut = whole[: len(whole) - len(frames[number]) + sound_ends(frames[number]) - lost]
    with pytest.raises(AudioError, match=r"it is cut: .* read_to_end=True"):
        load(cut, RATE)
    wave = load(cut, RATE, read_to_end=True)
    whole_N = load(whole, RATE).samples_N
    assert wave.note is not None
    assert "it is cut" in wave.note
    assert len(wave.samples_N) == len(whole_N) - 576
    torch.testing.assert_close(wave.samples_N, whole_N[:-576], atol=1e-6, rtol=0)


def test_stuffing_that_is_cut_is_no_loss() -> None:
    frames = frames_of(encoded(sound(48_000, 0.5, 1), 48_000, "MP3", "MPEG_LAYER_III"))
    tried = 0
    for number in range(2, len(frames)):
        whole, size, end = counted(frames, number), len(frames[number]), max(sound_ends(frames[number]), 60)
        if end < size - 4:
            tried += 1
            data = whole[: end - size]
            assert torch.equal(load(data, 48_000).samples_N, load(whole, 48_000).samples_N)
            with pytest.raises(AudioError, match=r"it is cut: .*read_to_end"):
                load(data[len(frames[0]) :], 48_000)  # nobody says that it was the last frame
        if end > 60:
            with pytest.raises(AudioError, match=r"it is cut: .*read_to_end"):
                load(whole[: end - size - 1], 48_000)
    assert tried > 4


def test_a_frame_of_padding_that_is_cut_is_no_loss() -> None:
    frames = frames_of(MP3)
    at = MP3.index(b"LAME")
    padding = 529 + 576 + 300
    first = bytearray(frames[0])
    packed = int.from_bytes(first[at + 21 : at + 24], "big") & 0xFFF000 | padding
    first[at + 21 : at + 24] = packed.to_bytes(3, "big")
    first[at + 34 : at + 36] = bytes(2)  # without a checksum
    whole = bytes(first) + b"".join(frames[1:])
    assert torch.equal(load(whole[:-10], RATE).samples_N, load(whole, RATE).samples_N)


def test_a_last_header_with_a_changed_bit_is_no_tail() -> None:
    frames = frames_of(bare())
    for bit in (1, 4, 12, 20):
        last = bytearray(frames[-1])
        last[bit // 8] ^= 0x80 >> bit % 8
        with pytest.raises(AudioError, match="cut or damaged"):
            load(b"".join(frames[:-1]) + bytes(last), RATE)


def test_a_first_header_with_a_changed_bit_is_no_junk() -> None:
    frames = frames_of(bare())
    first = bytearray(frames[0])
    first[1] ^= 0x10
    with pytest.raises(AudioError, match=r"damaged|changes"):
        load(id3() + bytes(first) + b"".join(frames[1:]), RATE)


@pytest.mark.parametrize("count", [None, 0])
def test_a_count_that_was_never_filled_in(count: int | None) -> None:
    frames = frames_of(MP3)
    flags = b"Info" + (0).to_bytes(4, "big") if count is None else b"Info" + (1).to_bytes(4, "big") + bytes(4)
    first = (frames[1][:4] + bytes(9 if mpeg_frames.header(MP3).channels == 1 else 17) + flags).ljust(  # type: ignore[union-attr]
        len(frames[1]), b"\0"
    )
    assert torch.equal(load(first + bare(), RATE).samples_N, load(bare(), RATE).samples_N)
    with pytest.raises(AudioError, match="no frame of sound"):
        load(first, RATE)


def test_delays_that_are_longer_than_the_sound_are_not_believed() -> None:
    frames = frames_of(MP3)
    at = MP3.index(b"LAME")
    first = bytearray(frames[0])
    first[at + 21 : at + 24] = b"\xff\xff\xff"
    first[at + 34 : at + 36] = bytes(2)
    first[MP3.index(b"Xing") + 8 : MP3.index(b"Xing") + 12] = (8).to_bytes(4, "big")
    assert len(load(bytes(first) + b"".join(frames[1:9]), RATE).samples_N) == 8 * 576 - 529


@pytest.mark.parametrize("layer", ["mp2", "mp1"])
@pytest.mark.parametrize(("rate", "options"), [(44_100, []), (22_050, []), (48_000, ["-b", "384"]), (44_100, ["-p"])])
def test_layers_one_and_two(layer: str, rate: int, options: list[str]) -> None:
    if layer == "mp2":
        data = run("twolame", "--quiet", *options, "IN", "OUT", data=wav(sound(rate, 0.5), rate))
    else:
        data = layer_one(rate)
    for block in (data, data[: len(data) // 2]):
        whole = b"".join(whole_frames(block))
        samples_N = load(whole, rate).samples_N.numpy()
        assert len(samples_N) == len(whole_frames(block)) * (384 if layer == "mp1" else 1152)
        np.testing.assert_allclose(samples_N, by_av(whole, "mp3"), atol=1e-4)
        np.testing.assert_allclose(samples_N, mpg123(whole), atol=1e-5)


def test_layer_two_of_a_changing_bit_rate() -> None:
    # libsndfile takes the length from the first frame's bit rate, and would stop there
    small, big = (
        whole_frames(run("twolame", "--quiet", "-b", rate, "IN", "OUT", data=wav(sound(44_100, 0.5), 44_100)))
        for rate in ("384", "192")
    )
    data = b"".join(small[:5] + big[5:])
    samples_N = load(data, 44_100).samples_N.numpy()
    assert len(samples_N) == len(big) * 1152
    np.testing.assert_allclose(samples_N, mpg123(data), atol=1e-5)
    with pytest.raises(AudioError, match=r"it is cut: .*read_to_end"):
        load(data[:-3], 44_100)


@pytest.mark.parametrize("options", [["-b", "160"], ["-t", "-b", "400"]])
def test_a_free_bit_rate(options: list[str]) -> None:
    data = run("lame", "--quiet", "--freeformat", *options, "IN", "OUT", data=wav(sound(44_100, 0.5), 44_100))
    samples_N, heard_N = load(data, 44_100).samples_N.numpy(), mpg123(data)
    np.testing.assert_allclose(samples_N, heard_N[len(heard_N) - len(samples_N) :], atol=1e-5)
    with pytest.raises(AudioError, match="damaged"):
        load(data[:3_000] + b"hole" + data[3_000:], 44_100)
    with pytest.raises(AudioError, match=r"it is cut: .*read_to_end"):
        load(data[:5_000], 44_100)


def whole_frames(data: bytes) -> list[bytes]:
    frames = []
    start = 0
    while (header := mpeg_frames.header(data, start)) is not None and start + header.bytes <= len(data):
        frames.append(data[start : start + header.bytes])
        start += header.bytes
    return frames


def layer_one(rate: int) -> bytes:
    """Frames of layer I, mono at 448 kbit/s: two subbands of random four-bit samples, the others empty."""
    rng = random.Random(0)
    generation = 1 if rate >= 32_000 else 2
    code = {44_100: 0, 48_000: 1, 32_000: 2, 22_050: 0, 24_000: 1, 16_000: 2}[rate]
    head = bytes([0xFF, 0xFF if generation == 1 else 0xF7, 0xE0 | code << 2, 0xC0])
    size = mpeg_frames.header(head)
    assert size is not None
    out = b""
    for _ in range(40):
        bits = "00110011" + "0000" * 30 + f"{20:06b}" * 2
        bits += "".join(f"{rng.randrange(15):04b}" for _ in range(24))
        out += (head + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")).ljust(
            size.bytes, b"\0"
        )
    return out


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_change_of_bytes_raises_anything_else(data: st.DataObject) -> None:
    mutant = bytearray(data.draw(st.sampled_from([MP3, bare(), id3() + MP3, layer_one(44_100)]), "file")[:4000])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(0, min(200, len(mutant) - 1)), st.integers(0, len(mutant) - 1)))
        mutant[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
        if not mutant:
            break
    for read_to_end in (False, True):
        try:
            load(bytes(mutant), RATE, read_to_end=read_to_end)
        except AudioError as error:
            assert len(str(error)) <= 300


def test_what_only_looks_like_frames_at_its_start_is_named_truly() -> None:
    noise = random.Random(1).randbytes(200_000)
    assert not mpeg.looks_like_frames(b"RMF" + noise)
    with pytest.raises(AudioError, match="it is no WAV"):
        load(b"xyz" + noise, RATE)


@pytest.mark.parametrize("fill", [b"\xff", b"\xff\xfb\x90\x00"])
def test_bytes_that_look_like_frames_take_no_time(fill: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: set[int] = set()
    header = mpeg_frames.header

    def remembered(data: bytes, start: int = 0) -> mpeg_frames.Header | None:
        if start > len(MP3):
            tried.add(start)
        return header(data, start)

    monkeypatch.setattr(mpeg_frames, "header", remembered)
    monkeypatch.setattr(mpeg, "TRIES", 500)
    data = MP3 + fill * (20_000 // len(fill))
    if fill == b"\xff":
        assert torch.equal(load(data, RATE).samples_N, load(MP3, RATE).samples_N)
        assert len(tried) < 10
    else:
        with pytest.raises(AudioError, match=rf"500 places behind byte {len(MP3)} look like MP3 frames, and none is"):
            load(data, RATE)
        assert len(tried) < 2 * 510  # a frame of these bytes, and none behind it


def test_the_number_of_tags_is_limited() -> None:
    tag = id3(padding=0)
    assert torch.equal(load(tag * 900 + MP3, RATE).samples_N, load(MP3, RATE).samples_N)
    with pytest.raises(AudioError, match="begins with 1000 ID3 tags or more; remove them"):
        load(tag * 3000 + MP3, RATE)


def test_a_tag_with_a_footer_is_as_long_as_both() -> None:
    body = bytes(20)
    tag = b"ID3\x04\0\x10\0\0\0\x14" + body + b"3DI\x04\0\x10\0\0\0\x14"
    assert mpeg.tags_end(tag + MP3) == len(tag)


def test_vbri_stands_at_one_place() -> None:
    frame = bytearray(frames_of(MP3)[0])
    header = mpeg_frames.header(bytes(frame))
    assert header is not None
    frame = bytearray(frame.ljust(200, b"\0"))
    frame[4:200] = bytes(196)
    frame[36:40], frame[46:50], frame[50:54] = b"VBRI", (1234).to_bytes(4, "big"), (77).to_bytes(4, "big")
    assert mpeg_frames.info(bytes(frame), header) == mpeg_frames.Info(77, 1234)


def test_delays_are_believed_where_the_checksum_of_the_info_frame_is_right() -> None:
    frame = frames_of(MP3)[0]
    header = mpeg_frames.header(frame)
    assert header is not None
    at = frame.index(b"Info") if b"Info" in frame else frame.index(b"Xing")
    start = frame.index(b"LAME", at)
    right = mpeg_frames.info(frame, header)
    assert right is not None and right.delay is not None
    changed = bytearray(frame)
    changed[start + 22] ^= 1
    found = mpeg_frames.info(bytes(changed), header)
    assert found is not None and found.frames == right.frames and found.delay is None


def test_an_info_mark_may_stand_behind_a_checksum() -> None:
    frame = bytearray(frames_of(MP3)[0])
    at = frame.index(b"Info") if b"Info" in frame else frame.index(b"Xing")
    moved = bytearray(frame[:at] + b"\0\0" + frame[at:-2])
    moved[1] &= 0xFE  # with a checksum
    header = mpeg_frames.header(bytes(moved))
    own = mpeg_frames.info(bytes(frame), mpeg_frames.header(bytes(frame)) or header)
    found = mpeg_frames.info(bytes(moved), header)
    assert found is not None and own is not None and found.frames == own.frames
