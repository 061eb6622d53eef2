"""Bundles as transformers models: configuration, model and processor for the Auto classes.

`import pal` is enough for `AutoConfig`, `AutoProcessor`, `AutoModel` and `AutoModelForMultimodalLM` to read bundles;
see `pal.hf.lazy`. The classes are imported on first access, since importing transformers takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pal.hf.config import PalConfig
    from pal.hf.model import PalForConditionalGeneration
    from pal.hf.processor import PalProcessor

__all__ = ["PalConfig", "PalForConditionalGeneration", "PalProcessor"]

_MODULES = {
    "PalConfig": "pal.hf.config",
    "PalForConditionalGeneration": "pal.hf.model",
    "PalProcessor": "pal.hf.processor",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pal.hf' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
