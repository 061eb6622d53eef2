"""Trained part of the LLM: low-rank adapters beside frozen weights, or some of the weights.

Reading a recipe imports this file, so it imports neither torch nor PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pal.config import StrictConfig
from pal.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

LLMPart = Literal["none", "full", "no_ffn", "lora", "attention"]
"""Part of the LLM that trains while the rest is frozen.

"full": all weights. "no_ffn": all but the feed-forward networks (the paper's frozen FFN). "lora": the adapters.
"attention": only the attention blocks, with their adapters. "none": nothing.
"""


class LoRA(StrictConfig):
    """Low-rank adapters of the LLM (arXiv 2106.09685); the defaults are LTU's."""

    r: int = Field(default=8, gt=0)
    """Rank: width between an adapter's two matrices."""
    alpha: int = 16
    """An adapter's output is scaled by alpha / r."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout of an adapter's input in training."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that get an adapter."""


def insert_lora(lm: nn.Module, options: LoRA) -> None:
    """Add adapters to the named linear layers.

    Raises:
        ConfigError: no layer has such a name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
    )
    try:
        inject_adapter_in_model(config, lm)
    except ValueError as error:
        raise ConfigError(f"lora: {str(error).splitlines()[0]}") from None


def freeze_except(lm: nn.Module, part: LLMPart) -> list[nn.Parameter]:
    """Freeze all weights but those of one part; returns that part's parameters."""
    chosen = []
    for name, parameter in lm.named_parameters():
        train = _belongs(name.split("."), part)
        parameter.requires_grad_(train)
        if train:
            chosen.append(parameter)
    return chosen


def keep_frozen_in_evaluation(parts: Iterable[nn.Module]) -> None:
    """Put frozen modules into evaluation mode, where the rest is in training mode.

    Otherwise their dropout would stay on. Batch statistics are updated only where the layer's own weights train:
    adapters beside frozen weights are saved without the statistics.
    """
    for part in parts:
        if not any(p.requires_grad for p in part.parameters()):
            part.eval()
        for layer in part.modules():
            if getattr(layer, "track_running_stats", False) and not _trains(layer, part):
                layer.eval()


def _trains(layer: nn.Module, part: nn.Module) -> bool:
    """True if a layer with batch statistics trains: its own weights do, or, where it has none, its part's."""
    own = list(layer.parameters(recurse=False))
    return all(weight.requires_grad for weight in own or part.parameters())


def _belongs(path: list[str], part: LLMPart) -> bool:
    """True if the parameter with this name, split at its dots, belongs to the part."""
    found: dict[LLMPart, Any] = {
        "full": True,
        "no_ffn": "mlp" not in path,
        "lora": any(name.startswith("lora_") for name in path),
        "attention": "self_attn" in path,
        "none": False,
    }
    return bool(found[part])
