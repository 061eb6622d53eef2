"""Clips that the page offers: a recording that ships with the package, and a made-up scene."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

from pal import shipped

_SCENE = (9000, 59, 4.0)
"""Seed, number and seconds of the scene."""
_DOG = {
    "name": "dog.ogg",
    "title": "A dog",
    "question": "What sound is this?",
    "about": "“Big_dog_bark_01.aiff” by pgonsilva (freesound.org/people/pgonsilva/sounds/182395), CC BY 3.0; cut to 5 "
    "seconds for ESC-10 by Karol J. Piczak (doi.org/10.7910/DVN/YDEPUT).",
}


def names() -> list[str]:
    """Names of the examples."""
    return [one["name"] for one in described()]


@cache
def described() -> list[dict[str, Any]]:
    """Name, title, a question and the source of each example."""
    from pal.data.synth.questions import caption
    from pal.data.synth.scene import plan

    scene = {
        "name": "scene.wav",
        "title": "A made-up scene",
        "question": "What is the first sound?",
        "about": f"Synthesised by pal: {caption(plan(*_SCENE))}.",
    }
    return [_DOG, scene]


def audio(name: str) -> tuple[bytes, str] | None:
    """Bytes and media type of an example; None where there is none of this name."""
    if name == "dog.ogg":
        return shipped.RECORDING.read_bytes(), "audio/ogg"
    return (_scene(), "audio/wav") if name == "scene.wav" else None


@cache
def _scene() -> bytes:
    import soundfile

    from pal.data.synth.scene import plan, sound
    from pal.data.synth.waves import RATE

    file = io.BytesIO()
    soundfile.write(file, sound(plan(*_SCENE)), RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()
