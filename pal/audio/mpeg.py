"""Frames of an MPEG audio file (MP3, and layers I and II). Decoders skip damaged frames; this detects them."""

import itertools
import re
from dataclasses import dataclass, replace

from pal.audio import mpeg_frames
from pal.audio.mpeg_frames import LAYER_3, Header, Info
from pal.audio.stream_info import DecodeError, StreamInfo

_DECODER_DELAY = 529
"""Decoder delay of layer III in samples; mpg123 drops them if it knows the number of frames."""
_SURE = 4
"""Consecutive frames that do not occur by chance."""
_FAR = 1 << 16
"""Bytes searched for the first frame, and for the next after a hole."""
_NEAR = 2
"""Most changed bits of a damaged frame header; of the 19 compared, random bytes change nine."""
_TAGS = 1000
"""Most ID3 tags before the sound; files have one or two."""
TRIES = 1 << 16
"""Most frame candidates before a search ends; random bytes have one in some 5000."""
_MAYBE = re.compile(
    rb"\xff[%s][%s]"
    % (
        b"".join(re.escape(bytes([byte])) for byte in range(0xE0, 0x100) if byte & 0x18 != 0x08 and byte & 6),
        b"".join(re.escape(bytes([byte])) for byte in range(0xF0) if byte & 0x0C != 0x0C),
    ),
    re.DOTALL,
)
"""Possible first bytes of a frame header, for a fast search."""
_SPLIT = "split it there, or re-encode it: ffmpeg -i IN OUT.wav"


@dataclass(frozen=True)
class _Run:
    """Consecutive frames of one stream."""

    start: int
    end: int
    count: int
    first: Header
    missing: int = 0
    """Missing bytes of a truncated frame that begins at `end`."""


def read_header(data: bytes) -> StreamInfo:
    """Walk the frames from the first to the last.

    There may be tags and other bytes before the first and behind the last frame. Between frames there may be tags, and
    zeros if all frames counted by the Info frame are present; other bytes are a hole. If the first frame is a Xing,
    Info or VBRI frame, the number of frames must be the one it declares. A file that ends inside a frame has lost
    sound, unless by that count it is the last frame and only stuffing or the encoder's padding is missing.

    Without such a frame, a file cut exactly between two frames is indistinguishable from a whole one, as is a file
    whose last frame was overwritten. A changed byte inside a frame changes the sound but not the length.

    Raises:
        DecodeError: no frames, a hole, or a stream that changes.
    """
    runs = _runs(data, _first_frame(data))
    first, last = runs[0].first, runs[-1]
    parts = [data[run.start : run.end] for run in runs]
    count = sum(run.count for run in runs)
    info = mpeg_frames.info(data[runs[0].start : runs[0].start + first.bytes], first)
    if info is not None:
        count -= 1  # the Info frame itself has no sound
    doubt = None
    if info is not None and info.frames is not None:
        claimed = _claimed(info, count, parts, first, len(data))
        if claimed == count + 1 and (_is_stuffing(data, last) or (last.missing and _dropped(info) >= first.samples)):
            parts.append(data[last.end :] + bytes(last.missing))
            count += 1
        if claimed != count:
            doubt = f"it is cut or damaged: it declares {claimed} frames and holds {count}"
            if count > claimed:
                doubt = f"it holds {count} frames, more than the {claimed} its Info frame counts (several MP3s joined?)"
            elif last.missing:
                doubt = (
                    f"it is cut: it declares {claimed} frames and ends {last.missing} bytes before number {count + 1}"
                )
    elif last.missing:
        # other frames may have followed this one
        doubt = f"it is cut: its last frame needs {last.missing} more bytes"
    elif _is_near(data[last.end : last.end + 4], data[last.start : last.start + 4]):
        doubt = f"it is cut or damaged: its last bytes, from {last.end}, look like a frame"
    _check_holes(data, runs, whole=info is not None and info.frames == count)
    if count < 1:
        raise DecodeError("it holds no frame of sound", "record or export it again")
    if first.layer != LAYER_3:
        return _of_low_layer(parts, first, count, doubt)
    if doubt is None and info is not None and info.frames == count and info.delay is not None:
        frames = count * first.samples - info.delay - _DECODER_DELAY - _dropped(info)
        if frames > 0:
            return StreamInfo(frames, first.rate, first.channels, payload=b"".join(parts))
    if info is not None:
        parts[0] = parts[0][first.bytes :]
    # without a count mpg123 estimates the length from the size: prepend an Info frame
    joined = b"".join(parts)
    skip = (info.delay or 0) if doubt is not None and info is not None else 0
    return StreamInfo(
        count * first.samples - _DECODER_DELAY - skip,
        first.rate,
        first.channels,
        payload=mpeg_frames.info_frame(joined[:4], count) + joined,
        skip=skip,
        doubt=doubt,
    )


def looks_like_frames(data: bytes) -> bool:
    """Whether MPEG audio frames are near the start, behind tags or other bytes."""
    start = tags_end(data)
    return mpeg_frames.header(data, start) is not None or _search(data, start, start + _FAR) is not None


def id3_size(data: bytes, start: int = 0) -> int:
    """Bytes of the ID3v2 tag at `start`; 0 when there is none."""
    head = data[start : start + 10]
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    size = 0
    for byte in head[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size + (10 if head[5] & 0x10 else 0)


def tags_end(data: bytes) -> int:
    """Offset behind all ID3v2 tags at the start. Raises DecodeError if there are too many."""
    start = 0
    for _ in range(_TAGS):
        size = id3_size(data, start)
        if not size:
            return start
        start += size
    raise DecodeError(f"it begins with {_TAGS} ID3 tags or more", "remove them, or re-encode it: ffmpeg -i IN OUT.wav")


def _first_frame(data: bytes) -> int:
    """Offset of the first frame: behind tags, or behind other bytes that are no damaged frame."""
    start = tags_end(data)
    own = mpeg_frames.header(data, start)
    if own is not None and (not own.bytes or _is_sure(data, start, own.stream)):
        return start
    found = _search(data, start, start + _FAR)
    if found is None and own is None:
        raise DecodeError(f"no MP3 frame stands at byte {start}")
    if found is None or _is_near(data[start : start + 4], data[found : found + 4]):
        if own is None:
            raise DecodeError(f"it is damaged: no MP3 frame stands at byte {start}")
        return start
    return found


def _search(data: bytes, start: int, end: int, stream: tuple[int, int, int] | None = None) -> int | None:
    """Offset in [`start`, `end`) of enough consecutive frames; a known stream needs fewer.

    Raises:
        DecodeError: too many frame candidates.
    """
    first = start
    for tries in itertools.count():
        found = _MAYBE.search(data, start, end + 2)
        if found is None or found.start() >= end:
            return None
        if tries == TRIES:
            raise DecodeError(f"{TRIES} places behind byte {first} look like MP3 frames, and none is one")
        if _is_sure(data, found.start(), stream):
            return found.start()
        start = found.start() + 1
    return None


def _is_sure(data: bytes, start: int, stream: tuple[int, int, int] | None) -> bool:
    """Whether enough consecutive frames begin here, or frames of this stream up to the end of the file or a tag."""
    run = _walk(data, start, limit=_SURE)
    if run is None:
        return False
    return run.count >= _SURE or (run.count > 0 and run.first.stream == stream and _ends(data, run.end))


def _ends(data: bytes, offset: int) -> bool:
    rest = data[offset : offset + 11]
    return not rest.strip(b"\0\r\n") or rest.startswith((b"TAG", b"APETAGEX", b"LYRICSBEGIN"))


def _walk(data: bytes, start: int, limit: int | None = None) -> _Run | None:
    """Consecutive frames from `start` on, at most `limit`; None if no frame, whole or truncated, begins there."""
    first = mpeg_frames.header(data, start)
    if first is None or (not first.bytes and limit is not None):
        return None
    free = 0
    if not first.bytes:
        free = mpeg_frames.free_size(data, start)
        if not free:
            raise DecodeError("it is MPEG audio of free bit rate", "convert it: mpg123 -w OUT.wav IN")
        first = replace(first, bytes=free + first.padding)
    end, count, missing = start, 0, 0
    while (header := mpeg_frames.header(data, end)) is not None and count != limit:
        if header.stream != first.stream or (not header.bytes) != bool(free):
            break
        header = replace(header, bytes=free + header.padding) if free else header
        if end + header.bytes > len(data):
            missing = end + header.bytes - len(data)
            break
        end += header.bytes
        count += 1
    return _Run(start, end, count, first, missing)


def _runs(data: bytes, start: int) -> list[_Run]:
    """All runs of frames of the file, from the first frame on."""
    run = _walk(data, start)
    assert run is not None
    runs = [run]
    while not run.missing:
        after = run.end + _tag_size(data, run.end)
        stream = run.first.stream
        begin = after if _is_sure(data, after, stream) else _search(data, run.end, len(data), stream)
        following = None if begin is None else _walk(data, begin)
        if following is None:
            break
        if following.first.stream != stream:
            raise DecodeError(f"its layer, rate or number of channels changes at byte {following.start}", _SPLIT)
        run = following
        runs.append(run)
    own = mpeg_frames.header(data, start)
    if own is not None and not own.bytes and data.find(data[start : start + 2], run.end) >= 0 and not run.missing:
        raise DecodeError(f"it is damaged: the bytes at {run.end} are no MP3 frames")  # of free bit rate, as others are
    if not run.missing and 0 < len(data) - run.end < 4:
        tail, head = data[run.end :], data[run.start : run.start + 4]
        if tail == head[: len(tail)]:  # cut inside the next frame's header
            runs[-1] = _Run(run.start, run.end, run.count, run.first, missing=run.first.bytes - len(tail))
    return runs


def _tag_size(data: bytes, offset: int) -> int:
    """Bytes of a tag between two joined files; 0 if there is none."""
    if data[offset : offset + 3] == b"TAG":
        return 128 + id3_size(data, offset + 128)
    if data[offset : offset + 8] == b"APETAGEX":
        return 32 + int.from_bytes(data[offset + 12 : offset + 16], "little")
    return id3_size(data, offset)


def _check_holes(data: bytes, runs: list[_Run], whole: bool) -> None:
    for run, following in itertools.pairwise(runs):
        gap = following.start - run.end
        if gap == _tag_size(data, run.end) or (whole and not data[run.end : following.start].strip(b"\0")):
            continue
        # the frame before other bytes may be damaged
        raise DecodeError(f"it is damaged: the {gap} bytes at {run.end} are no MP3 frames")


def _claimed(info: Info, count: int, parts: list[bytes], first: Header, size: int) -> int:
    """Declared number of frames, without the Info frame itself.

    Some programs count that frame, too; then their number of bytes must agree.
    """
    held = sum(map(len, parts))
    assert info.frames is not None
    if info.frames == count + 1 and info.bytes in (held, held - first.bytes, size):
        return count
    return info.frames


def _dropped(info: Info) -> int:
    """Samples that the decoder drops at the end."""
    return max(0, (info.padding or 0) - _DECODER_DELAY)


def _is_stuffing(data: bytes, run: _Run) -> bool:
    """Whether the missing bytes of the last frame are only stuffing."""
    frame = data[run.end :] if run.missing else b""
    header = mpeg_frames.header(frame)
    if header is None or header.layer != LAYER_3:
        return False
    end = mpeg_frames.main_data_end(frame, header)
    return end is not None and end <= len(frame)


def _is_near(tail: bytes, head: bytes) -> bool:
    """Whether bytes behind the last frame are a frame header with a few changed bits."""
    if len(tail) < 4:
        return False
    # bit rate, padding and the fields after the channels vary between frames
    mask = 0xFFFE_0CC0
    different = (int.from_bytes(tail, "big") ^ int.from_bytes(head, "big")) & mask
    return different.bit_count() <= _NEAR


def _of_low_layer(parts: list[bytes], first: Header, count: int, doubt: str | None) -> StreamInfo:
    """Layers I and II, whose files do not declare a length.

    libsndfile estimates it from the size and the first frame's bit rate, and stops there. So a silent frame of the
    lowest bit rate is prepended, for an estimate that is too long, and some are appended in place of shorter frames;
    the samples of the first are skipped, and the last are not read.
    """
    joined = b"".join(parts)
    silent = mpeg_frames.silent_frame(joined[:4])
    payload = silent + joined + silent * (2 + count // 16)
    return StreamInfo(
        count * first.samples, first.rate, first.channels, payload=payload, skip=first.samples, doubt=doubt
    )
