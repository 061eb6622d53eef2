"""The plan of a whole curriculum: the clips of each group for training, and the held-out ones."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pal.data.curriculum import digits, music, programs, scenes, speech
from pal.data.curriculum.digits import DigitClip
from pal.data.curriculum.effects import Samples
from pal.data.curriculum.music import MusicClip
from pal.data.curriculum.recordings import esc10, fsdd, lengths
from pal.data.curriculum.scenes import SceneClip
from pal.data.curriculum.speech import SpeechClip
from pal.data.curriculum.splits import HELD_OUT_FOLD, HELD_OUT_SPEAKER, TRAINING_FOLDS
from pal.data.manifest import Record

Clip = SceneClip | DigitClip | SpeechClip | MusicClip

SHARES = {"scenes": 0.2, "digits": 0.22, "speech": 0.4, "music": 0.18}
"""Share of each group in the clips for training."""
SINGLE_SCENES, SINGLE_DIGITS = 0.6, 2 / 3
"""Shares of clips with one recording in their groups."""
HELD_OUT_CLIPS = {"scenes": 80, "digits": 70, "speech": 200, "music": 240}
"""Held-out clips of each group, besides the recordings of the held-out fold and speaker as they are."""
_STREAMS = {"scenes": 1, "digits": 2, "speech": 3, "music": 4}


@dataclass
class Curriculum:
    """Planned clips by group, and the records of real recordings that are judged as they are."""

    training: dict[str, list[Clip]] = field(default_factory=dict)
    held_out: dict[str, list[Clip]] = field(default_factory=dict)
    recordings: dict[str, list[Record]] = field(default_factory=dict)
    """Records of held-out recordings, by the name of their manifest."""


def plan(seed: int, clips: int, esc10_root: Path | None, fsdd_root: Path | None, held_out: float = 1.0) -> Curriculum:
    """Plan a curriculum; the same arguments give the same plan.

    Args:
        seed: at least 0.
        clips: for training, over all groups; a group without its recordings is left out, and the others stay as they
            are.
        esc10_root: folder of ESC-10 in the layout of ESC-50; None leaves the scenes out.
        fsdd_root: folder of FSDD; None leaves the digits out.
        held_out: size of the held-out parts, relative to `HELD_OUT_CLIPS`.

    Raises:
        ManifestError: a folder is not laid out as expected.
    """
    made = Curriculum()
    count = {group: max(1, round(share * clips)) for group, share in SHARES.items()}
    tests = {group: max(1, round(number * held_out)) for group, number in HELD_OUT_CLIPS.items()}

    def rng(group: str, stream: int) -> np.random.Generator:
        return np.random.default_rng((seed, _STREAMS[group], stream))

    if esc10_root is not None:
        known, _ = esc10(esc10_root, TRAINING_FOLDS)
        unknown, made.recordings["esc10-fold4"] = esc10(esc10_root, (HELD_OUT_FOLD,))
        labels = made.recordings["esc10-fold4"][0].choices or ()
        single = round(SINGLE_SCENES * count["scenes"])
        made.training["scenes"] = [*scenes.plan(rng("scenes", 1), known, labels, single, count["scenes"] - single)]
        made.held_out["scenes"] = [*scenes.plan(rng("scenes", 2), unknown, labels, 0, tests["scenes"], plain=True)]
    if fsdd_root is not None:
        known, _ = fsdd(fsdd_root, exclude=HELD_OUT_SPEAKER)
        unknown, made.recordings["fsdd-theo"] = fsdd(fsdd_root, speakers=HELD_OUT_SPEAKER)
        seconds = lengths([*known, *unknown])
        single = round(SINGLE_DIGITS * count["digits"])
        made.training["digits"] = [*digits.plan(rng("digits", 1), known, single, count["digits"] - single, seconds)]
        made.held_out["digits"] = [*digits.plan(rng("digits", 2), unknown, 0, tests["digits"], seconds, plain=True)]
    made.training["speech"] = [*speech.plan(rng("speech", 1), count["speech"])]
    made.held_out["speech"] = [*speech.plan(rng("speech", 2), tests["speech"], held_out=True)]
    made.training["music"] = [*music.plan(rng("music", 1), count["music"], programs.TRAINING_FONT)]
    made.held_out["music"] = [*music.plan(rng("music", 2), tests["music"], programs.HELD_OUT_FONT, plain=True)]
    return made


def render(clip: Clip) -> Samples:
    """The sound of a clip before its effects [N], at 16 kHz."""
    content: Any = clip.content
    topic: Any = {SceneClip: scenes, DigitClip: digits, SpeechClip: speech, MusicClip: music}[type(clip)]
    return topic.render(content)


def digest(curriculum: Curriculum, *more: str) -> str:
    """SHA-256 of a plan, of the code of this package and of `more`, wherever the recordings lie."""
    names_only = re.compile(r"(PosixPath|clips=)\(?'[^']*?([^'/]*)'")
    text = names_only.sub(r"\1'\2'", repr((curriculum.training, curriculum.held_out, curriculum.recordings)))
    hashed = hashlib.sha256("\n".join([text, *more]).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        hashed.update(file.read_bytes())
    return hashed.hexdigest()
