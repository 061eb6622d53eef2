"""Header of an Opus stream and length of its packets (RFC 7845, section 5.1; RFC 6716, section 3)."""

from dataclasses import dataclass

from pal.audio.stream_info import CONVERT, DecodeError

RATE = 48_000
"""Decoding rate of Opus in Hz, in which positions and packets are counted."""
LONGEST = 5_760
"""Samples of the longest packet, 120 ms."""


@dataclass(frozen=True)
class Head:
    """OpusHead packet."""

    channels: int
    skip: int
    """Pre-skip: samples before the sound, for the decoder to converge."""
    at_48_khz: bytes
    """The packet with 48 kHz as the rate before encoding, which is only informative."""


def read_head(packet: bytes) -> Head:
    """Parse the first packet. Raises DecodeError on an unknown version or channel mapping family."""
    if len(packet) < 19:
        raise DecodeError("its Opus header is cut")
    if packet[8] >> 4:
        raise DecodeError(f"it is of an unknown version of Opus ({packet[8]})", "convert it with opusdec")
    if packet[18] == 3:
        raise DecodeError("its channels are ambisonics by matrix (family 3)", CONVERT)
    at_48_khz = packet[:12] + RATE.to_bytes(4, "little") + packet[16:]
    return Head(packet[9], int.from_bytes(packet[10:12], "little"), at_48_khz)


def samples(packet: bytes) -> int:
    """Length of a packet in samples at 48 kHz. Raises DecodeError if it is invalid."""
    if not packet:
        raise DecodeError("it is damaged: one of its Opus packets is empty")
    config, code = packet[0] >> 3, packet[0] & 3
    if config < 12:
        frame = (480, 960, 1920, 2880)[config & 3]
    elif config < 16:
        frame = (480, 960)[config & 1]
    else:
        frame = (120, 240, 480, 960)[config & 3]
    count = (1, 2, 2, packet[1] & 63 if len(packet) > 1 else 0)[code]
    if not 0 < count * frame <= LONGEST:
        raise DecodeError("it is damaged: one of its Opus packets has no valid length")
    return count * frame
