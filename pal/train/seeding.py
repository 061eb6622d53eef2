"""Seeds of a run, made from what they are for."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_everything(*key: object) -> None:
    """Seed Python, numpy and torch from `key`.

    Called before every step, so that dropout needs no saved generator states to go on as it would have.
    """
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
