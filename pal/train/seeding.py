"""Seeding of random number generators by key."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_everything(*key: object) -> None:
    """Seed Python, numpy and torch from `key`.

    Called before every step, so that a resumed run has the same dropout without saved generator states.
    """
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
