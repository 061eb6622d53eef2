"""What of the LLM trains: low-rank adapters beside frozen weights, or a part of the weights.

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
"""A part of the LLM that trains while the rest is frozen.

"full": everything. "no_ffn": everything but the feed-forward networks (the paper's frozen FFN). "lora": the adapters.
"attention": the attention blocks alone, their adapters included. "none": nothing.
"""


class LoRA(StrictConfig):
    """Low-rank adapters of the LLM (arXiv 2106.09685); the defaults are LTU's."""

    r: int = Field(default=8, gt=0)
    """Rank: the width between an adapter's two matrices."""
    alpha: int = 16
    """What an adapter adds is scaled by alpha / r."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Of an adapter's input, while it trains."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that get one."""


def insert_lora(lm: nn.Module, options: LoRA) -> None:
    """Put adapters beside the named layers.

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
    """Let one part require gradients and nothing else; returns its parameters."""
    chosen = []
    for name, parameter in lm.named_parameters():
        train = _belongs(name.split("."), part)
        parameter.requires_grad_(train)
        if train:
            chosen.append(parameter)
    return chosen


def keep_frozen_in_evaluation(parts: Iterable[nn.Module]) -> None:
    """Put what does not train into evaluation mode, where the rest is in training mode.

    Otherwise the dropout of a frozen part would stay on. Batch statistics move only where the layer's own weights are
    trained: where adapters are, beside frozen weights, nothing that is saved with them would hold the statistics.
    """
    for part in parts:
        if not any(p.requires_grad for p in part.parameters()):
            part.eval()
        for layer in part.modules():
            if getattr(layer, "track_running_stats", False) and not _trains(layer, part):
                layer.eval()


def _trains(layer: nn.Module, part: nn.Module) -> bool:
    """Whether a layer with batch statistics is trained: itself, or, where it has no weights, its part."""
    own = list(layer.parameters(recurse=False))
    return all(weight.requires_grad for weight in own or part.parameters())


def _belongs(path: list[str], part: LLMPart) -> bool:
    """Whether the parameter with this name, split at its dots, is one of the part's."""
    found: dict[LLMPart, Any] = {
        "full": True,
        "no_ffn": "mlp" not in path,
        "lora": any(name.startswith("lora_") for name in path),
        "attention": "self_attn" in path,
        "none": False,
    }
    return bool(found[part])
