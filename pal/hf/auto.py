"""Enters the model and the processor in the tables of transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

from pal.hf.config import PalConfig
from pal.hf.model import PalForConditionalGeneration
from pal.hf.processor import PalProcessor


def register() -> None:
    """All of them; again does no harm."""
    AutoConfig.register(PalConfig.model_type, PalConfig, exist_ok=True)
    AutoProcessor.register(PalConfig, PalProcessor, exist_ok=True)
    for auto in (AutoModel, AutoModelForMultimodalLM):
        auto.register(PalConfig, PalForConditionalGeneration, exist_ok=True)
