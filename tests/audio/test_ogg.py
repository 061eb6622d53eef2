"""Ogg as it is found: without the last page's mark, chained, multiplexed; Opus at 48 kHz, with its gain and trims."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.audio import load, ogg, opus, seconds
from pal.audio.stream_info import DecodeError
from pal.errors import AudioError
from tests.audio.programs import by_av, opusdec, run, sound, wav
from tests.audio.test_load import encoded

RATE = 16_000
SOUND = sound(RATE, 2.5)
VORBIS = encoded(SOUND, RATE, "OGG", "VORBIS")
OPUS = encoded(sound(48_000, 2.5), 48_000, "OGG", "OPUS")
NO_PACKET = (1 << 64) - 1


def pages_of(data: bytes) -> list[ogg.OggPage]:
    pages, start = [], 0
    while start < len(data):
        segments = data[start + 26]
        end = start + 27 + segments + sum(data[start + 27 : start + 27 + segments])
        pages.append(ogg.OggPage(data[start:end], int.from_bytes(data[start + 18 : start + 22], "little")))
        start = end
    return pages


def joined(pages: list[ogg.OggPage]) -> bytes:
    return b"".join(page.data for page in pages)


def unmarked(data: bytes) -> bytes:
    """Without the mark of the last page, as programs write that send a voice message while it is spoken."""
    *pages, last = pages_of(data)
    return joined([*pages, last.changed(last=False)])


def with_head(data: bytes, at: int, field: bytes) -> bytes:
    """An Opus file with other bytes in its header."""
    first, *rest = pages_of(data)
    body = first.body
    return joined([first.changed(body=body[:at] + field + body[at + len(field) :]), *rest])


def of_serial(data: bytes, serial: int) -> list[ogg.OggPage]:
    return [
        ogg.OggPage(page.data[:14] + serial.to_bytes(4, "little") + page.data[18:], page.number).changed()
        for page in pages_of(data)
    ]


def flac_in_ogg(samples: np.ndarray = SOUND, total: bool = True) -> bytes:
    """Ogg FLAC by its mapping: a header of its own, then each packet a block of metadata or a frame; here one page."""
    data = bytearray(encoded(samples, RATE, "FLAC", "PCM_16"))
    if not total:
        data[21] &= 0xF0
        data[22:42] = bytes(20)
    start, last = 4, False
    while not last:
        last = bool(data[start] & 0x80)
        start += 4 + int.from_bytes(data[start + 1 : start + 4], "big")
    head = b"\x7fFLAC\x01\0\0\x01" + bytes(data[:42])
    pages = [page(head, 0, 2, 0), page(bytes(data[42:start]), 1, 0, 0)]
    body = bytes(data[start:])
    parts = [body[i : i + 235 * 255] for i in range(0, len(body), 235 * 255)]
    for number, part in enumerate(parts, 2):
        is_last = number - 1 == len(parts)
        pages.append(page(part, number, 4 * is_last, len(samples) if is_last else NO_PACKET, ends=is_last))
    return joined(pages)


def page(body: bytes, number: int, flags: int, granule: int, ends: bool = True) -> ogg.OggPage:
    lengths = [255] * (len(body) // 255) + ([len(body) % 255] if ends else [])
    body = body if ends else body[: 255 * len(lengths)]
    head = b"OggS\0" + bytes([flags]) + granule.to_bytes(8, "little") + b"abcd" + number.to_bytes(4, "little")
    return ogg.OggPage(head + bytes(4) + bytes([len(lengths), *lengths]) + body, number).changed()


@pytest.mark.parametrize("rate", [0, 1, 8_000, 12_000, 16_000, 24_000, 44_100, 48_000, 96_000, 4_000_000_000])
def test_opus_is_decoded_at_48_khz_whatever_its_header_says(rate: int, tmp_path: Path) -> None:
    data = with_head(OPUS, 12, rate.to_bytes(4, "little"))
    assert torch.equal(load(data, 48_000).samples_N, load(OPUS, 48_000).samples_N)
    path = tmp_path / "a.opus"
    path.write_bytes(data)
    assert seconds(path) == load(data, 48_000).seconds == 2.5


def test_opus_keeps_what_a_low_rate_would_cut() -> None:
    loud_N = load(with_head(OPUS, 12, bytes(4)), 48_000).samples_N
    assert np.abs(np.fft.rfft(loud_N.numpy()))[len(loud_N) * 5_000 // 48_000 :].max() > 50


@pytest.mark.parametrize("quarters_of_db", [-40, 8])
def test_opus_header_gain_is_applied(quarters_of_db: int) -> None:
    data = with_head(OPUS, 16, (64 * quarters_of_db).to_bytes(2, "little", signed=True))
    factor = 10 ** (quarters_of_db / 4 / 20)
    torch.testing.assert_close(load(data, 48_000).samples_N, load(OPUS, 48_000).samples_N * factor, atol=2e-4, rtol=0)
    np.testing.assert_allclose(load(data, 48_000).samples_N.numpy(), opusdec(data), atol=1e-5)


@pytest.mark.parametrize("skip", [0, 100, 3_840, 30_000])
def test_opus_skips_what_its_header_says(skip: int) -> None:
    data = with_head(OPUS, 10, skip.to_bytes(2, "little"))
    whole_N = load(with_head(OPUS, 10, bytes(2)), 48_000).samples_N
    assert torch.equal(load(data, 48_000).samples_N, whole_N[skip:])
    np.testing.assert_allclose(load(data, 48_000).samples_N.numpy(), opusdec(data), atol=1e-5)


@pytest.mark.parametrize("options", [[], ["--framesize", "2.5"], ["--framesize", "60"], ["--bitrate", "12"]])
@pytest.mark.parametrize("marked", [True, False])
def test_opus_of_another_encoder(options: list[str], marked: bool) -> None:
    data = run("opusenc", "--quiet", *options, "IN", "OUT", data=wav(sound(44_100, 2.2), 44_100))
    data = data if marked else unmarked(data)
    np.testing.assert_allclose(load(data, 48_000).samples_N.numpy(), opusdec(data), atol=1e-5)


def test_without_its_mark_a_file_is_read_to_the_end_of_its_packets() -> None:
    whole_N, bare_N = load(OPUS, 48_000).samples_N, load(unmarked(OPUS), 48_000).samples_N
    assert 0 < len(bare_N) - len(whole_N) < 960  # what the encoder filled the last packet with
    assert torch.equal(bare_N[: len(whole_N)], whole_N)
    assert len(bare_N) == len(by_av(unmarked(OPUS), "ogg"))
    whole_N, bare_N = load(VORBIS, RATE).samples_N, load(unmarked(VORBIS), RATE).samples_N
    assert 0 <= len(bare_N) - len(whole_N) < 2048
    assert torch.equal(bare_N[: len(whole_N)], whole_N)
    np.testing.assert_allclose(bare_N.numpy(), by_av(unmarked(VORBIS), "ogg"), atol=1e-4)


@pytest.mark.parametrize("data", [OPUS, VORBIS], ids=["opus", "vorbis"])
def test_what_a_missing_end_says(data: bytes) -> None:
    pages = pages_of(data)
    # between two pages a cut shows only where a packet goes on
    assert load(joined(pages[:-1]), RATE).note is None
    for rest, fault in [
        (pages[-1].data[:-1], "its last page is not whole"),
        (pages[-1].data[:27], "its last page is not whole"),
        (b"Og", "its last page is not whole"),
        (b"some bytes", "the last 10 bytes are no Ogg page"),
    ]:
        with pytest.raises(AudioError, match=f"{fault}; .*read_to_end=True"):
            load(joined(pages[:-1]) + rest, RATE)
        wave = load(joined(pages[:-1]) + rest, RATE, read_to_end=True)
        assert torch.equal(wave.samples_N, load(joined(pages[:-1]), RATE).samples_N)
        assert wave.note is not None
        assert fault in wave.note
    for rest in (b"", bytes(100), b"\r\n", b"TAG".ljust(128, b"x")):
        assert torch.equal(load(unmarked(data) + rest, RATE).samples_N, load(unmarked(data), RATE).samples_N)
    for rest in (bytes(100), b"any junk"):  # behind the mark nothing can be missing
        assert torch.equal(load(data + rest, RATE).samples_N, load(data, RATE).samples_N)


def test_a_packet_that_goes_on_in_a_page_that_is_missing() -> None:
    pages = pages_of(flac_in_ogg())
    assert len(pages) > 3
    with pytest.raises(AudioError, match=r"can be decoded; .*read_to_end|packet goes on in a page that is missing"):
        load(joined(pages[:-1]), RATE)


def test_positions_may_begin_anywhere() -> None:
    for data, rate in ((OPUS, 48_000), (VORBIS, RATE)):
        moved = [
            p.changed(granule=p.granule + 480_000) if p.granule not in (0, NO_PACKET) else p for p in pages_of(data)
        ]
        assert torch.equal(load(joined(moved), rate).samples_N, load(data, rate).samples_N)


def test_positions_that_leap_are_a_doubt() -> None:
    pages = pages_of(OPUS)
    leap = [*pages[:3], *(p.changed(granule=p.granule + 24_000) for p in pages[3:])]
    with pytest.raises(AudioError, match=r"its positions miss 0.50 s of sound"):
        load(joined(leap), 48_000)
    wave = load(joined(leap), 48_000, read_to_end=True)
    assert torch.equal(wave.samples_N, load(OPUS, 48_000).samples_N)
    np.testing.assert_allclose(wave.samples_N.numpy(), opusdec(joined(leap)), atol=1e-5)


def test_chained_links_are_read_one_after_another(tmp_path: Path) -> None:
    other = encoded(sound(RATE, 1.0, seed=5), RATE, "OGG", "VORBIS")
    expected_N = torch.cat([load(VORBIS, RATE).samples_N, load(other, RATE).samples_N])
    path = tmp_path / "chain.ogg"
    path.write_bytes(VORBIS + other)
    assert torch.equal(load(path, RATE).samples_N, expected_N)
    assert seconds(path) == load(path, RATE).seconds == 3.5
    assert len(load(OPUS + OPUS, 48_000).samples_N) == 2 * len(load(OPUS, 48_000).samples_N)
    two = OPUS + joined(of_serial(OPUS, 9))
    np.testing.assert_allclose(load(two, 48_000).samples_N.numpy(), opusdec(two), atol=1e-5)
    slower = encoded(SOUND, 8_000, "OGG", "VORBIS")
    with pytest.raises(AudioError, match="changes on the way"):
        load(VORBIS + slower, RATE)
    with pytest.raises(AudioError, match=r"not whole; .*read_to_end"):
        load(VORBIS + unmarked(other)[:-10], RATE)


def test_streams_without_sound_are_left_out() -> None:
    own = of_serial(VORBIS, 7)
    skeleton = page(b"fishead\0" + bytes(56), 0, 2, 0)
    video = page(b"\x80theora" + bytes(30), 0, 2, 0)
    mixed = [skeleton, own[0], *own[1:3], page(b"fisbone\0" + bytes(40), 1, 4, 0), *own[3:]]
    assert torch.equal(load(joined(mixed), RATE).samples_N, load(VORBIS, RATE).samples_N)
    with pytest.raises(AudioError, match="several streams"):
        load(joined([own[0], *of_serial(OPUS, 8), *own[1:]]), RATE)
    with pytest.raises(AudioError, match="no sound of a known codec, only Theora"):
        load(video.data, RATE)
    with pytest.raises(AudioError, match="codec Speex is not supported"):
        load(page(b"Speex   1.2" + bytes(60), 0, 2, 0).data, RATE)
    with pytest.raises(AudioError, match="stream of an unknown kind"):
        load(page(b"what\0is this?", 0, 2, 0).data, RATE)
    with pytest.raises(AudioError, match="its beginning is missing"):
        load(joined(own[1:]), RATE)


def test_a_tag_before_the_first_page() -> None:
    assert torch.equal(
        load(b"ID3\x03\0\0\0\0\0\x14" + bytes(20) + VORBIS, RATE).samples_N, load(VORBIS, RATE).samples_N
    )


@pytest.mark.parametrize("total", [True, False])
def test_flac_in_ogg(total: bool, tmp_path: Path) -> None:
    data = flac_in_ogg(total=total)
    path = tmp_path / "a.oga"
    path.write_bytes(data)
    wave = load(path, RATE)
    expected_N = torch.from_numpy((np.round(SOUND * 32768) / 32768).mean(1))
    torch.testing.assert_close(wave.samples_N, expected_N.float(), atol=4e-5, rtol=0)
    assert seconds(path) == wave.seconds == 2.5
    np.testing.assert_allclose(wave.samples_N.numpy(), by_av(data, "ogg"), atol=1e-6)


def test_flac_in_ogg_of_its_own_encoder() -> None:
    data = run("flac", "--silent", "--ogg", "IN", "-o", "OUT", data=wav(SOUND, RATE))
    assert len(load(data, RATE).samples_N) == len(SOUND)


@pytest.mark.parametrize(
    ("packet", "length"),
    [(b"\x00", 480), (b"\x18", 2880), (b"\x60", 480), (b"\x80", 120), (b"\xf9..", 1920), (b"\xfb\x05", 4800)],
)
def test_lengths_of_opus_packets(packet: bytes, length: int) -> None:
    assert opus.samples(packet) == length


@pytest.mark.parametrize("packet", [b"", b"\x03\x00", b"\x03", b"\x1b\x03"])
def test_opus_packets_of_no_length(packet: bytes) -> None:
    with pytest.raises(DecodeError, match="damaged"):
        opus.samples(packet)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_change_of_bytes_raises_anything_else(data: st.DataObject) -> None:
    pages = pages_of(data.draw(st.sampled_from([OPUS, VORBIS, flac_in_ogg()]), "file"))
    pages = pages[: data.draw(st.integers(1, 5))]
    place = data.draw(st.integers(0, len(pages) - 1))
    changed = bytearray(pages[place].data)
    for _ in range(data.draw(st.integers(1, 5))):
        changed[data.draw(st.one_of(st.integers(0, min(90, len(changed) - 1)), st.integers(0, len(changed) - 1)))] = (
            data.draw(st.integers(0, 255))
        )
    mended = data.draw(st.booleans()) and changed[:5] == b"OggS\0"  # with the right checksum it goes deeper
    pages[place] = ogg.OggPage(bytes(changed), 0).changed() if mended else ogg.OggPage(bytes(changed), 0)
    for read_to_end in (False, True):
        try:
            load(joined(pages), RATE, read_to_end=read_to_end)
        except AudioError as error:
            assert len(str(error)) <= 300


@pytest.mark.parametrize("length", [0.05, 0.3, 2.5])
def test_seconds_of_an_unmarked_vorbis_are_those_of_its_sound(length: float, tmp_path: Path) -> None:
    path = tmp_path / "a.ogg"
    path.write_bytes(unmarked(encoded(sound(RATE, length), RATE, "OGG", "VORBIS")))
    assert seconds(path) > 0
    assert abs(seconds(path) - load(path, RATE).seconds) < 2048 / RATE


def test_opus_packets_and_channels_that_are_read() -> None:
    assert [opus.samples(bytes([code, 3, 0])) for code in range(4)] == [480, 960, 960, 1440]
    head = bytearray(b"OpusHead\x01\x02" + bytes(9))
    for family in (0, 1, 2, 4, 255):
        head[18] = family
        assert opus.read_head(bytes(head)).channels == 2
    head[18] = 3
    with pytest.raises(DecodeError, match="ambisonics by matrix"):
        opus.read_head(bytes(head))
