"""A recipe's model on torch's meta device: shapes without data."""

from __future__ import annotations

from typing import Any, cast

import torch

from pal import bundle, hub_configs
from pal.audio_tower import check_audio_tower
from pal.backbone.llm import Backbone
from pal.config import StrictConfig
from pal.model import PalModel
from pal.model_config import LLMConfig, Part
from pal.registry import check, lookup
from pal.train.recipe import Recipe


def skeleton(recipe: Recipe) -> PalModel:
    """Initial model of a recipe, without tokenizer. Reads no weights and downloads nothing.

    Raises:
        ConfigError: a part is unknown, or the shape of one is not known on this machine.
        BundleError: the recipe's bundle cannot be read.
    """
    lora = None
    if recipe.bundle is not None:
        config, lora = bundle.read_architecture(recipe.bundle)
    else:
        assert recipe.model is not None
        config = recipe.model
    check_audio_tower(config)
    check("integration", config.integration)
    config = config.model_copy(update={"encoders": [_bare(part) for part in config.encoders]})
    with torch.device("meta"):
        llm = Backbone.load(_fields(config.llm), dtype=getattr(torch, config.llm.dtype))
        model = PalModel(config, llm, cast(Any, None))
        if lora is not None:
            llm.add_lora(lora)
    return model.eval()


def _fields(llm: LLMConfig) -> dict[str, Any]:
    """Fields of a fresh LLM's transformers configuration, with the vocabulary size of its future tokenizer."""
    size = {} if llm.vocabulary is None else {"vocab_size": llm.vocabulary}
    return size | llm.fields()


def _bare(part: Part) -> Part:
    """Options of an encoder with its architecture, from which it is built without reading weights."""
    encoder: Any = lookup("encoder", part["name"])
    options = encoder.Config.model_fields
    if "architecture" not in options or part.get("architecture") is not None or part.get("path") is None:
        return part
    fields = hub_configs.config_of(part["path"], part.get("revision"))
    # an encoder inside a larger model has its fields below this key
    fields = dict(fields.get("audio_config", fields))
    sizes = next((t for t in _types(options["architecture"].annotation) if issubclass(t, StrictConfig)), None)
    if sizes is not None:
        fields = {name: value for name, value in fields.items() if name in sizes.model_fields}
    return {**part, "architecture": fields}


def _types(annotation: Any) -> list[type]:
    return [one for one in (annotation, *getattr(annotation, "__args__", ())) if isinstance(one, type)]
