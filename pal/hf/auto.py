"""Register configuration, model and processor with transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pal.hf.config import PalConfig
from pal.hf.model import PalForConditionalGeneration
from pal.hf.processor import PalProcessor


def register() -> None:
    """Register all classes; calling it again changes nothing."""
    AutoConfig.register(PalConfig.model_type, PalConfig, exist_ok=True)
    AutoProcessor.register(PalConfig, PalProcessor, exist_ok=True)
    for auto in (AutoModel, AutoModelForMultimodalLM):
        auto.register(PalConfig, PalForConditionalGeneration, exist_ok=True)
    # with label smoothing, Trainer computes the loss itself, and shifts labels only for the classes of this table
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[PalConfig.model_type] = PalForConditionalGeneration.__name__
