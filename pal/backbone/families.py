"""The supported families of LLMs, and the facts in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from pal.errors import PalError

FAMILIES = ("gemma", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""transformers' `model_type` of the supported LLMs (Qwen2.5 is qwen2)."""


def check_family(config: PreTrainedConfig) -> None:
    """Check that an LLM is supported.

    Raises:
        PalError: another family, or rotary embeddings that change with the length of the text.
    """
    _check_name(config.model_type)
    kinds = _rope_kinds(getattr(config, "rope_parameters", None) or {})
    changing = sorted(kinds & {"dynamic", "longrope"})
    if changing:
        # their frequencies depend on the longest position of a call, so cached keys would become wrong
        raise PalError(f"rope type '{changing[0]}' is not supported: it changes with the length of the text")


def config_from(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' configuration of the given fields, `model_type` among them.

    Raises:
        PalError: as `check_family`.
    """
    fields = dict(deepcopy(fields))  # transformers changes nested ones, such as `rope_scaling`, in place
    family = fields.pop("model_type", None)
    _check_name(family)
    config = AutoConfig.for_model(family, **fields)
    check_family(config)
    return config


def layer_types(config: PreTrainedConfig) -> tuple[str, ...]:
    """Per layer, the key of its rotary embedding; "all" in the families that have one for all layers."""
    return tuple(config.layer_types) if has_typed_rope(config) else ("all",) * int(config.num_hidden_layers)


def has_typed_rope(config: PreTrainedConfig) -> bool:
    """Whether layers of different types have rotary embeddings of their own (Gemma3)."""
    return bool(config.model_type == "gemma3_text")


def window(attention: Any) -> int | None:
    """How many positions back the queries of an attention module see, themselves included; None means all."""
    # Mistral's is in the configuration; other families have it in the attention module
    if attention.config.model_type == "mistral":
        found: int | None = attention.config.sliding_window
    else:
        found = getattr(attention, "sliding_window", None)
    return found


def plain_rms_norm(norm: Any, family: str) -> tuple[nn.Parameter, float] | None:
    """Weight and epsilon of a norm that multiplies by its weight; None for other norms.

    Gemma's weights are stored around 0, and transformers adds the 1 in float32.
    """
    if not type(norm).__name__.endswith("RMSNorm") or family.startswith("gemma"):
        return None
    return norm.weight, norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def set_checkpointing(lm: Any, on: bool) -> None:
    """Turn transformers' gradient checkpointing of layers on or off."""
    if not on:
        _renamed(lm, "activation_checkpointing_disable", "gradient_checkpointing_disable")()
        return
    # the reentrant kind raises on arguments such as `attention_metadata`
    _renamed(lm, "activation_checkpointing_enable", "gradient_checkpointing_enable")({"use_reentrant": False})
    # only the reentrant kind needs gradients of the embeddings: with a frozen LLM the backward pass would go
    # through layers that no trained part comes before
    lm.disable_input_require_grads()


def checkpoints(lm: Any) -> bool:
    """True if transformers recomputes layers in the backward pass."""
    name = "is_activation_checkpointing"
    return bool(lm.training and getattr(lm, name if hasattr(lm, name) else "is_gradient_checkpointing"))


def _renamed(lm: Any, new: str, old: str) -> Callable[..., None]:
    """A method of transformers, by the name that this version has for it."""
    return getattr(lm, new if hasattr(lm, new) else old)


def _check_name(family: str | None) -> None:
    if family not in FAMILIES:
        raise PalError(f"LLM family '{family}' is not supported; supported: {', '.join(FAMILIES)}")


def _rope_kinds(parameters: Mapping[str, Any]) -> set[str]:
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return {str(entry.get("rope_type", "default")) for entry in [*nested, parameters]}
