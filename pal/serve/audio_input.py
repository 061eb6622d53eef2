"""The one way by which bytes of a request become samples."""

from __future__ import annotations

from pal.audio import Limits, Waveform, load
from pal.serve.decode_process import DecodeProcesses


def decode_request_audio(
    data: bytes, format: str, rate: int, limits: Limits, processes: DecodeProcesses | None = None
) -> Waveform:
    """Samples of an audio file that a client sent.

    Nothing else in the server looks at such bytes.

    Args:
        data: the bytes of an audio file.
        format: as the client named it, for messages; the bytes decide what the file is.
        rate: of the samples in Hz.
        limits: on seconds, bytes, rates and channels.
        processes: that decode; None decodes here, where a fault of a decoder ends the server.

    Raises:
        AudioError: the file cannot be used, in one line.
    """
    name = f"the {format} clip" if format else "the clip"
    if processes is None:
        return load(data, rate, limits, name)
    return processes.load(data, rate, limits, name)
