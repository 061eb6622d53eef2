"""Conversion of published checkpoints to folders of safetensors, which the encoders and transformers read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pal.convert import ctranslate2, gguf, published
from pal.convert.folder import Converted, write
from pal.errors import ConfigError
from pal.files import atomic_folder

__all__ = ["LAYOUTS", "Converted", "convert", "read", "write"]

LAYOUTS: dict[str, Callable[[Path], Converted]] = {
    "beats": published.read_beats,
    "ct2-whisper": ctranslate2.read_whisper,
    "gguf": gguf.read_llm,
    "sslam": published.read_sslam,
}
"""Reader of each layout."""


def read(source: str | Path, layout: str) -> Converted:
    """Read the model of a checkpoint; `write` makes a folder of it. See `convert`."""
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout '{layout}'; known: {', '.join(sorted(LAYOUTS))}")
    return LAYOUTS[layout](Path(source))


def convert(source: str | Path, out: str | Path, layout: str) -> dict[str, Any]:
    """Write the model of a checkpoint as a folder with a manifest, atomically.

    Args:
        source: the checkpoint. `beats`, `sslam`: a file that `torch.save` wrote. `ct2-whisper`: CTranslate2's
            model.bin, or its folder. `gguf`: a GGUF file of a supported LLM.
        out: the folder to make.
        layout: format of the checkpoint, one of `LAYOUTS`.

    Returns:
        `out`, `layout`, `numbers` (count of the weights written) and `left_out` (count of the tensors
        that the model does not need).

    Raises:
        ConfigError: unknown layout, `out` exists, or the file is damaged or of another layout.
        PalError: `gguf`: an LLM of an unsupported family.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out}: exists already; name a folder that does not")
    converted = read(source, layout)
    with atomic_folder(out) as temporary:
        write(converted, temporary)
    return {
        "out": str(out),
        "layout": layout,
        "numbers": sum(tensor.numel() for tensor in converted.tensors.values()),
        "left_out": converted.left_out,
    }
