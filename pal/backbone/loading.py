"""Loading an LLM, strictly: no weight missing or unknown; or a new one with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from pal.backbone import gguf
from pal.backbone.attention import NAME
from pal.backbone.causal_lm import class_for
from pal.backbone.families import check_family, config_from
from pal.backbone.sources import more_layers, read_config
from pal.errors import PalError, first_sentence
from pal.pretrained import remedy, source_of


def load_lm(source: str | Path | Mapping[str, Any], revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model whose forward takes `audio_context`; see `Backbone.load`.

    Raises:
        PalError: an unsupported family, not an LLM's folder, or missing weights.
    """
    if isinstance(source, Mapping):
        config = config_from(source)
        fresh: PreTrainedModel = class_for(config)._from_config(config, attn_implementation=NAME, dtype=dtype)
        return fresh
    try:
        config = read_config(source, revision)
        check_family(config)
        # weights of another shape are refused below, by name
        options = {"attn_implementation": NAME, "dtype": dtype, "ignore_mismatched_sizes": True}
        if gguf.is_gguf(source):
            lm, report = gguf.load(class_for(config), source, config=config, **options)
        else:
            lm, report = class_for(config).from_pretrained(
                source_of(source, revision),
                revision=revision or "main",
                use_safetensors=True,  # other formats are pickle
                output_loading_info=True,
                **options,
            )
    except SafetensorError as error:
        reason = first_sentence(error)
        raise PalError(f"cannot load the LLM '{source}': {reason}; copy or download its weights again") from None
    except (OSError, RuntimeError) as error:
        raise PalError(f"cannot load the LLM '{source}': {first_sentence(error)}{remedy(source)}") from None
    _check_complete(source, report, lm)
    loaded: PreTrainedModel = lm
    # the name in place of the folder in the cache, for bundles that move between machines
    loaded.name_or_path = loaded.config._name_or_path = str(source)
    return loaded


def _check_complete(source: str | Path, report: Mapping[str, Any], lm: PreTrainedModel) -> None:
    """Raise where weights do not match the configuration: transformers would use random ones and only log it."""
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise PalError(
            f"the LLM '{source}': its weights are of another model than its config.json: {name} has shape "
            f"{tuple(found)}, not {tuple(expected)}; give both of one model"
        )
    more = more_layers(report["unexpected_keys"], lm.state_dict().keys())
    if more is not None:
        raise PalError(
            f"the LLM '{source}': its weights have more layers than its config.json, such as {more}; "
            "give both of one model"
        )
    if report["missing_keys"]:
        raise PalError(f"the LLM '{source}' lacks weights, such as {sorted(report['missing_keys'])[0]}")
