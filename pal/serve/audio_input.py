"""The one way by which bytes of a request become samples."""

from __future__ import annotations

from pal.audio import Limits, Waveform, load


def decode_request_audio(data: bytes, format: str, rate: int, limits: Limits) -> Waveform:
    """Samples of an audio file that a client sent.

    Nothing else in the server looks at such bytes, so that decoding can be moved to another process here.

    Args:
        data: the bytes of an audio file.
        format: as the client named it, for messages; the bytes decide what the file is.
        rate: of the samples in Hz.
        limits: on seconds, bytes, rates and channels.

    Raises:
        AudioError: the file cannot be used, in one line.
    """
    return load(data, rate, limits, name=f"the {format} clip" if format else "the clip")
