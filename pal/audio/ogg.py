"""Pages of Ogg files (Vorbis, Opus, FLAC). Decoders skip a damaged page; this refuses the file."""

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pal.audio import flac, opus
from pal.audio.stream_info import CONVERT, DecodeError, StreamInfo

_FIRST, _LAST = 2, 4
_NO_PACKET = (1 << 64) - 1
"""Granule position of a page on which no packet ends."""
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_SOUND = {
    b"\x01vorbis": "Vorbis",
    b"OpusHead": "Opus",
    b"\x7fFLAC": "FLAC",
    b"fLaC": "FLAC",
    b"Speex   ": "Speex",
    b"PCM     ": "PCM",
    b"CELT    ": "CELT",
}
_OTHER = {
    b"fishead\0": "Skeleton",
    b"fisbone\0": "Skeleton",
    b"\x80theora": "Theora",
    b"\x80kate": "Kate",
    b"BBCD\0": "Dirac",
    b"\x80daala": "Daala",
    b"OggMIDI\0": "MIDI",
    b"Annodex\0": "Annodex",
}
_LONGEST_VORBIS = 8192
"""Samples of the largest Vorbis block."""


@dataclass(frozen=True)
class OggPage:
    """Ogg page with a verified checksum."""

    data: bytes
    """The whole page."""
    number: int

    @property
    def flags(self) -> int:
        """Bits: continues a packet (1), first page (2), last page (4) of its stream."""
        return self.data[5]

    @property
    def granule(self) -> int:
        """Granule position at the end of the page, in units of the codec, mostly samples."""
        return int.from_bytes(self.data[6:14], "little")

    @property
    def lengths(self) -> bytes:
        """Lengths of the segments; a packet continues after a segment of 255."""
        return self.data[27 : 27 + self.data[26]]

    @property
    def body(self) -> bytes:
        """Bytes of all segments."""
        return self.data[27 + self.data[26] :]

    def packets(self) -> Iterator[tuple[bytes, bool]]:
        """(bytes, whether the packet ends here) of each packet that has bytes on this page."""
        lengths, body = self.lengths, self.body
        start = at = 0
        for length in lengths:
            at += length
            if length < 255:
                yield body[start:at], True
                start = at
        if lengths[-1:] == b"\xff":
            yield body[start:at], False

    def changed(self, granule: int | None = None, last: bool | None = None, body: bytes | None = None) -> "OggPage":
        """Copy with another granule position, last-page flag or body of the same size, and a new checksum."""
        page = bytearray(self.data)
        if granule is not None:
            page[6:14] = granule.to_bytes(8, "little")
        if last is not None:
            page[5] = page[5] & ~_LAST | _LAST * last
        if body is not None:
            page[27 + page[26] :] = body
        page[22:26] = bytes(4)
        page[22:26] = _checksum(bytes(page)).to_bytes(4, "little")
        return replace(self, data=bytes(page))


def read_header(data: bytes) -> StreamInfo:
    """Verify every page (checksum, number) and select the pages of the audio stream (RFC 3533).

    Other multiplexed streams without audio are left out; links of a chained file are read one after another. Programs
    that stream a voice message omit the last-page flag. Such a file counts as whole if its pages and its last packet
    are; a file cut exactly between two pages is indistinguishable from it.

    Raises:
        DecodeError: damaged, several multiplexed audio streams, or an unsupported codec.
    """
    pages, fault = _pages(data)
    found = [_of_link(link) for link in _links(pages)]
    doubts = [link.doubt for link in found if link.doubt is not None]
    if fault is not None and not pages[-1].flags & _LAST:
        doubts.append(fault)
    return replace(found[0], rest=tuple(found[1:]), doubt=doubts[0] if doubts else None)


def _pages(data: bytes) -> tuple[list[OggPage], str | None]:
    """All pages, and the fault at the end of the file or None."""
    pages: list[OggPage] = []
    offset = 0
    while offset < len(data):
        if data[offset : offset + 5] != b"OggS\0":
            return pages, _tail(data, offset, pages)
        lengths = data[offset + 27 : offset + 27 + data[offset + 26]] if offset + 27 <= len(data) else b""
        end = offset + 27 + len(lengths) + sum(lengths)
        if offset + 27 > len(data) or len(lengths) < data[offset + 26] or end > len(data):
            return pages, _needed(pages, "it is cut: its last page is not whole")
        page = data[offset:end]
        if _checksum(page[:22] + bytes(4) + page[26:]) != int.from_bytes(page[22:26], "little"):
            raise DecodeError(f"it is damaged: the Ogg page at byte {offset} has a wrong checksum")
        pages.append(OggPage(page, int.from_bytes(page[18:22], "little")))
        offset = end
    return pages, None


def _tail(data: bytes, offset: int, pages: list[OggPage]) -> str | None:
    """Fault of the bytes behind the last page, or None."""
    rest = data[offset:]
    if b"OggS" in rest:
        raise DecodeError(f"it is damaged: no Ogg page stands at byte {offset} of {len(data)}")
    if b"OggS".startswith(rest[:4]):
        return _needed(pages, "it is cut: its last page is not whole")
    if not rest.strip(b"\0\r\n") or rest.startswith(b"TAG"):
        return None
    return _needed(pages, f"it is cut or damaged: the last {len(rest)} bytes are no Ogg page")


def _needed(pages: list[OggPage], fault: str) -> str:
    if not pages:
        raise DecodeError(fault)
    return fault


def _links(pages: list[OggPage]) -> list[list[OggPage]]:
    """Pages of each link of a chained file; a link begins with the first pages of its streams."""
    if not pages[0].flags & _FIRST:
        raise DecodeError("its beginning is missing: its first page starts no stream")
    links: list[list[OggPage]] = []
    for before, page in itertools.pairwise([None, *pages]):
        assert page is not None
        if page.flags & _FIRST and (before is None or not before.flags & _FIRST):
            links.append([])
        links[-1].append(page)
    return links


def _of_link(pages: list[OggPage]) -> StreamInfo:
    """Audio stream of a link."""
    streams: dict[bytes, list[OggPage]] = {}
    for page in pages:
        streams.setdefault(page.data[14:18], []).append(page)
    names = {serial: _codec(own[0].body) for serial, own in streams.items()}
    sounds = [serial for serial, name in names.items() if name in _SOUND.values()]
    if len(sounds) > 1:
        raise DecodeError(
            "it holds several streams, of which only one would be heard",
            "write the one you mean to a file of its own: ffmpeg -i IN -map 0:a:0 OUT.wav",
        )
    if not sounds:
        what = ", ".join(sorted(set(names.values())))
        raise DecodeError(f"it holds no sound of a known codec, only {what}", CONVERT)
    own, name = streams[sounds[0]], names[sounds[0]]
    for before, page in itertools.pairwise(own):
        if page.number != before.number + 1 & 0xFFFFFFFF:
            raise DecodeError(f"it is damaged: page {before.number + 1} is missing")
    found = _of_stream(own, name)
    if not own[-1].flags & _LAST and own[-1].lengths[-1:] == b"\xff":
        return replace(found, doubt="it is cut: its last packet goes on in a page that is missing")
    return found


def _codec(body: bytes) -> str:
    for start, name in (_SOUND | _OTHER).items():
        if body.startswith(start):
            return name
    return f"a stream of an unknown kind ({body[:8].decode('ascii', 'replace')!r})"


def _of_stream(pages: list[OggPage], name: str) -> StreamInfo:
    if name == "FLAC":
        packets = b"".join(page.body for page in pages)
        if packets[:5] == b"\x7fFLAC":  # a header of its own, then the header of a FLAC file
            packets = packets[9:]
        found = flac.read_header(packets)
        frames, doubt = found.frames, found.doubt
        if frames is None and pages[-1].granule not in (0, _NO_PACKET):
            frames, doubt = pages[-1].granule, None  # pages count samples, too
        payload = packets if found.payload is None else found.payload
        return replace(found, frames=frames, payload=payload, doubt=doubt)
    if name == "Opus":
        return _of_opus(pages)
    if name == "Vorbis":
        return _of_vorbis(pages)
    raise DecodeError(f"its codec {name} is not supported", CONVERT)


def _of_vorbis(pages: list[OggPage]) -> StreamInfo:
    if pages[-1].flags & _LAST:
        return StreamInfo(None, payload=_joined(pages))
    # without the last-page flag all of the last packet is sound, but libsndfile cuts it at the page's position
    ends = [place for place, page in enumerate(pages) if page.granule != _NO_PACKET]
    if not ends or not pages[ends[-1]].granule:
        raise DecodeError("it holds no samples", "record or export it again")
    last = pages[ends[-1]]
    longer = [*pages[: ends[-1]], last.changed(granule=last.granule + _LONGEST_VORBIS), *pages[ends[-1] + 1 :]]
    # if only one page has a position, vorbisfile derives the start from it, too, and the length from the packets
    is_only = sum(pages[place].granule > 0 for place in ends) == 1
    return StreamInfo(None, payload=_joined(longer), slack=0 if is_only else _LONGEST_VORBIS)


def _of_opus(pages: list[OggPage]) -> StreamInfo:
    """Opus by RFC 7845: 48 kHz, whatever the header's rate before encoding.

    libsndfile would resample to the header's rate and trust positions that do not fit the packets. So its pages are
    rewritten with a rate of 48 kHz and with positions computed from the packets.
    """
    head = opus.read_head(pages[0].body)
    ends: list[tuple[int, int]] = []
    """(page, samples of the packets up to its end) where a packet ends."""
    total = number = 0
    packet = b""
    for place, page in enumerate(pages):
        ended = False
        for part, whole in page.packets():
            packet += part
            if not whole:
                continue
            if number >= 2:  # behind the header and the comments
                total += opus.samples(packet)
                ended = True
            number, packet = number + 1, b""
        if ended:
            ends.append((place, total))
    if not ends:
        raise DecodeError("it holds no samples", "record or export it again")
    first_place, first_total = ends[0]
    last_place = ends[-1][0]
    is_marked = bool(pages[-1].flags & _LAST)
    only = len(ends) == 1 and is_marked
    start = 0 if only else max(0, pages[first_place].granule - first_total)
    off = max((abs(pages[place].granule - start - end) for place, end in ends[:-1]), default=0)
    before, before_given = (ends[-2][1], pages[ends[-2][0]].granule) if len(ends) > 1 else (0, start)
    last_given = pages[last_place].granule - before_given
    off = max(off, last_given - (total - before))
    # the last page may end before its packets do, if the encoder had to pad the last packet
    played = before + last_given if is_marked and 0 <= last_given <= total - before else total
    frames = played - head.skip
    if frames <= 0:
        raise DecodeError("it holds no samples", "record or export it again")
    changed = dict(ends)
    changed[last_place] = played
    new = []
    for place, page in enumerate(pages[: last_place + 1]):
        granule, is_last = changed.get(place, page.granule), place == last_place
        fits = (granule, is_last) == (page.granule, bool(page.flags & _LAST))
        new.append(page if fits else page.changed(granule=granule, last=is_last))
    new[0] = new[0].changed(body=head.at_48_khz)
    doubt = None
    if off > opus.LONGEST:
        doubt = f"its positions miss {off / opus.RATE:.2f} s of sound, which was lost before it was written"
    return StreamInfo(frames, opus.RATE, head.channels, payload=_joined(new), doubt=doubt)


def _joined(pages: list[OggPage]) -> bytes:
    return b"".join(page.data for page in pages)


def _checksum(page: bytes) -> int:
    """Ogg's CRC-32: zlib's polynomial with bits in the other order, start 0 and no final inversion."""
    reflected = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)
