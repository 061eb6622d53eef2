"""Header of NIST SPHERE files, the format of TIMIT and other speech corpora (often named `.wav`)."""

import re

from pal.audio.samples import SampleFormat, cut, pcm
from pal.audio.stream_info import DecodeError, StreamInfo

_LAWS = {"ulaw": "ULAW", "mu-law": "ULAW", "mulaw": "ULAW", "alaw": "ALAW", "a-law": "ALAW"}


def read_header(data: bytes) -> StreamInfo:
    """Read the lines "name -type value" of the header; its second line is its length.

    Raises:
        DecodeError: truncated, without the fields of the sample format, or compressed (shorten).
    """
    found = re.match(rb"NIST_1A\n *(\d{1,7})\n", data[:32])
    if found is None:
        raise DecodeError("its NIST header is damaged")
    start = int(found[1])
    lines = data[found.end() : start].decode("latin-1").split("end_head")[0].splitlines()
    fields = {words[0]: words[2] for line in lines if len(words := line.split(None, 2)) == 3}
    coding = fields.get("sample_coding", "pcm").strip()
    if coding not in _LAWS and coding != "pcm":
        shown = coding if coding.isprintable() and len(coding) < 40 else "unknown"
        what = f"it is a NIST SPHERE file whose codec is not supported ({shown})"
        raise DecodeError(what, "convert it: sph2pipe IN OUT.wav")
    rate, channels = _number(fields, "sample_rate"), _number(fields, "channel_count", 1)
    frames, width = _number(fields, "sample_count"), _number(fields, "sample_n_bytes", 1 if coding in _LAWS else 2)
    subtype = _LAWS[coding] if coding in _LAWS else pcm(8 * width)
    order = "LITTLE" if fields.get("sample_byte_format", "").strip() == "01" else "BIG"
    sample_format = SampleFormat(rate, channels, subtype, order)
    if start + frames * sample_format.align > len(data):
        raise cut(frames * sample_format.align, max(0, len(data) - start))
    return sample_format.stream_info(start, frames * sample_format.align)


def _number(fields: dict[str, str], name: str, default: int | None = None) -> int:
    value = fields.get(name, "" if default is None else str(default)).strip()
    if not re.fullmatch(r"\d{1,12}", value):
        raise DecodeError(f"its NIST header gives no {name}")
    return int(value)
