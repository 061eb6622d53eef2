"""The models that ship with the package: `smol`, parts for two pretrained models; `tiny`, `tiny-causal`, complete."""

from __future__ import annotations

from pathlib import Path

from pal import pretrained

_ASSETS = Path(__file__).parent / "assets"
TINY = _ASSETS / "tiny"
"""Folder of the toy, which needs nothing else."""
TINY_CAUSAL = _ASSETS / "tiny-causal"
"""The toy with an encoder that hears nothing ahead, for streams."""
TINY_LM = _ASSETS / "tiny-lm"
"""Its text-only LLM before training on audio, with the tokenizer: a folder that transformers loads."""
SMOL = _ASSETS / "smol"
"""Folder of the parts trained for SmolLM2-135M-Instruct and Whisper tiny.en, which `pal models get smol` downloads."""
RECORDING = _ASSETS / "dog.ogg"
"""A real recording that no model here was trained on; `recordings.md` beside it has its author and licence."""

FOLDERS = {"smol": SMOL, "tiny": TINY, "tiny-causal": TINY_CAUSAL}
"""Shipped models by name."""


def default() -> str:
    """Name of the model that is used where none is given: `smol` if its pretrained models are cached, else `tiny`."""
    there = SMOL.is_dir() and all(pretrained.is_cached(name) for name in pretrained.KNOWN)
    return "smol" if there else "tiny"


def explain(name: str) -> str:
    """Sentence on the model taken by `default`."""
    if name == "smol":
        return "model: smol, SmolLM2-135M with the ears of Whisper tiny.en (--model takes another)"
    return f"model: tiny, a toy; {pretrained.GET} gets what smol needs, which knows English and is then the default"
