"""What is held out of training: a fold, a speaker, voices, sentences and a sound font."""

from __future__ import annotations

import hashlib

TRAINING_FOLDS = ("1", "2", "3")
"""Folds of ESC-10 whose clips are in training."""
HELD_OUT_FOLD = "4"
HELD_OUT_SPEAKER = "theo"
"""Speaker of FSDD."""
HELD_OUT_SHARE = 0.1
"""Share of all sentences that only held-out clips may use."""


def sentence_is_held_out(text: str) -> bool:
    """Whether a sentence is kept for held-out clips, by its digest, whatever the seed."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64
