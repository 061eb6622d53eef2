"""Enters the model and the processor in the tables of transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pal.hf.config import PalConfig
from pal.hf.model import PalForConditionalGeneration
from pal.hf.processor import PalProcessor


def register() -> None:
    """All of them; again does no harm."""
    AutoConfig.register(PalConfig.model_type, PalConfig, exist_ok=True)
    AutoProcessor.register(PalConfig, PalProcessor, exist_ok=True)
    for auto in (AutoModel, AutoModelForMultimodalLM):
        auto.register(PalConfig, PalForConditionalGeneration, exist_ok=True)
    # the Trainer looks the class up here to see that column t predicts id t + 1, when it makes a smoothed loss itself
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[PalConfig.model_type] = PalForConditionalGeneration.__name__
