"""Standard MIDI files of format 0: one track, 480 ticks a quarter note, 120 quarter notes a minute."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

TICKS_PER_QUARTER = 480
TICKS_PER_SECOND = 960
"""At MIDI's default tempo, which needs no event: 500,000 microseconds a quarter note."""
NOTE_OFF, NOTE_ON, CONTROL, PROGRAM = 0x80, 0x90, 0xB0, 0xC0
ALL_NOTES_OFF = 123
END_OF_TRACK = b"\xff\x2f\x00"


@dataclass(frozen=True)
class Note:
    """A note; times in seconds from the start."""

    program: int
    """General MIDI program, from 0."""
    pitch: int
    """MIDI note number; 60 is middle C."""
    start: float
    end: float
    velocity: int = 96


def midi(notes: Sequence[Note], seconds: float) -> bytes:
    """A MIDI file of the notes, `seconds` long; each program plays on a channel of its own, none on that of drums."""
    programs = sorted({note.program for note in notes})
    channels = dict(zip(programs, (at for at in range(16) if at != 9), strict=False))
    events: list[tuple[int, int, bytes]] = []  # tick, order within a tick, message
    for program, channel in channels.items():
        events.append((0, 0, bytes([PROGRAM | channel, program])))
    for note in notes:
        channel = channels[note.program]
        events.append((_tick(note.start), 2, bytes([NOTE_ON | channel, note.pitch, note.velocity])))
        events.append((_tick(note.end), 1, bytes([NOTE_OFF | channel, note.pitch, 0])))
    for channel in channels.values():
        events.append((_tick(seconds), 3, bytes([CONTROL | channel, ALL_NOTES_OFF, 0])))
    track, now = b"", 0
    for tick, _, message in sorted(events):
        track += variable_length(tick - now) + message
        now = tick
    track += variable_length(0) + END_OF_TRACK
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, TICKS_PER_QUARTER)
    return header + struct.pack(">4sI", b"MTrk", len(track)) + track


def variable_length(number: int) -> bytes:
    """MIDI's number of variable length: seven bits a byte, all but the last with the high bit set."""
    out = [number & 0x7F]
    while number := number >> 7:
        out.append(number & 0x7F | 0x80)
    return bytes(reversed(out))


def _tick(seconds: float) -> int:
    return round(seconds * TICKS_PER_SECOND)
