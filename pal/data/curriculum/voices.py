"""Voices of flite and eSpeak NG, and their speech."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

from pal.data.curriculum import programs
from pal.data.curriculum.effects import Samples
from pal.data.curriculum.questions import Rng
from pal.data.synth.waves import RATE

FLITE_VOICES = ("kal16", "awb", "slt", "kal")
"""Voices of flite for training; "kal" has half the rate of "kal16"."""
ESPEAK_ACCENTS = ("en-us", "en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbcwmd")
"""eSpeak NG's kinds of English for training."""
ESPEAK_VARIANTS = (
    *("", "m1", "m2", "m3", "m4", "m6", "m7", "f1", "f2", "f3", "f4", "klatt", "klatt2", "klatt3", "klatt4"),
    *("Alex", "Andrea", "Denis", "Gene", "Michael", "Mike", "ed", "edward", "max", "paul", "rob", "robert"),
)
"""eSpeak NG's variants of a voice for training."""
FLITE_SHARE = 0.5
"""Share of training clips that flite speaks."""
HELD_OUT_FLITE = "rms"
HELD_OUT_ESPEAK = (("en-us-nyc", "steph"), ("en-gb-x-gbclan", "Hugo"))
"""Accents and variants of eSpeak NG that are held out; neither occurs in training, with any other."""


@dataclass(frozen=True)
class Voice:
    """A voice with its manner of speaking."""

    program: Literal["flite", "espeak-ng"]
    name: str
    variant: str = ""
    """Of eSpeak NG."""
    pace: float = 1.0
    """Speed relative to the voice's usual one."""
    pitch: float = 1.0
    """Pitch relative to the voice's usual one."""


def training_voice(rng: Rng) -> Voice:
    """A random voice for training, with random pace and pitch."""
    pace, pitch = float(rng.uniform(0.8, 1.15)), float(rng.uniform(0.85, 1.2))
    if rng.random() < FLITE_SHARE:
        return Voice("flite", FLITE_VOICES[int(rng.integers(len(FLITE_VOICES)))], "", pace, pitch)
    accent = ESPEAK_ACCENTS[int(rng.integers(len(ESPEAK_ACCENTS)))]
    variant = ESPEAK_VARIANTS[int(rng.integers(len(ESPEAK_VARIANTS)))]
    return Voice("espeak-ng", accent, variant, pace, pitch)


def held_out_voices() -> list[Voice]:
    """The held-out voices in their usual manner."""
    return [Voice("flite", HELD_OUT_FLITE), *(Voice("espeak-ng", *names) for names in HELD_OUT_ESPEAK)]


_FLITE_PITCH = {"kal": 105.0, "kal16": 105.0, "awb": 133.0, "rms": 100.0, "slt": 172.0}
"""Mean pitch of flite's voices in Hz, where they ask for none of their own."""
_ESPEAK_PACE, _ESPEAK_PITCH = 155, 50
"""eSpeak NG's words a minute and pitch (0 to 99) at pace and pitch 1."""


def speak(text: str, voice: Voice) -> Samples:
    """Speech [N] at 16 kHz, without the silence around it."""
    with tempfile.TemporaryDirectory() as folder:
        wave = Path(folder, "speech.wav")
        programs.run(_command(text, voice, wave))
        x_N, rate = soundfile.read(wave, dtype="float32")
    return trimmed(np.asarray(soxr.resample(x_N, rate, RATE), np.float32))


def _command(text: str, voice: Voice, wave: Path) -> list[str]:
    if voice.program == "flite":
        command = ["flite", "-voice", voice.name, "--setf", f"duration_stretch={1 / voice.pace:.3f}"]
        if voice.pitch != 1:
            command += ["--setf", f"int_f0_target_mean={_FLITE_PITCH[voice.name] * voice.pitch:.1f}"]
        return [*command, "-t", text, "-o", str(wave)]
    name = f"{voice.name}+{voice.variant}" if voice.variant else voice.name
    pitch = round(min(99.0, max(0.0, _ESPEAK_PITCH + 100 * (voice.pitch - 1))))
    pace = round(_ESPEAK_PACE * voice.pace)
    return ["espeak-ng", "-v", name, "-s", str(pace), "-p", str(pitch), "-w", str(wave), text]


def trimmed(x_N: Samples, margin: float = 0.02) -> Samples:
    """The part from the first to the last 10 ms above a hundredth of the loudest, with a margin in seconds."""
    frame = RATE // 100
    rms_F = np.sqrt(np.mean(np.square(x_N[: len(x_N) // frame * frame].reshape(-1, frame)), axis=1))
    loud = np.flatnonzero(rms_F > 0.01 * rms_F.max()) if len(rms_F) else np.array([], int)
    if not len(loud):
        return x_N
    first = max(0, int(loud[0]) * frame - round(margin * RATE))
    return x_N[first : (int(loud[-1]) + 1) * frame + round(margin * RATE)]
