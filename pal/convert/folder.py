"""`Converted`: a model read from a foreign checkpoint, and the folder that is written of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pal.encoders import weights
from pal.files import write_tensors


@dataclass(frozen=True)
class Converted:
    """A model read from a foreign checkpoint."""

    config: Mapping[str, Any]
    """Content of `config.json`."""
    tensors: Mapping[str, Tensor]
    """Weights by their names in the folder, each in the type in which it is stored."""
    left_out: int
    """Count of the checkpoint's tensors that the model does not need."""
    others: tuple[Callable[[Path], Any], ...] = field(default=())
    """Writers of further files into the folder, such as the tokenizer's."""


def write(converted: Converted, folder: Path) -> None:
    """Write `config.json`, `model.safetensors` and the further files into an existing folder."""
    # cloned where they share memory, which safetensors refuses
    own = {
        name: tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in converted.tensors.items()
    }
    write_tensors(folder / weights.WEIGHTS, own, {"format": "pt"})
    (folder / weights.CONFIG).write_text(json.dumps(converted.config, indent=1) + "\n")
    for write_others in converted.others:
        write_others(folder)
