"""Option `layers` of LAL and the hybrid: the layers of the LLM that attend to audio keys."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pal.backbone.llm import Backbone
from pal.config import StrictConfig
from pal.errors import ConfigError


class LayerRange(StrictConfig):
    """Consecutive layers, by exactly one of the keys."""

    first: float | None = Field(default=None, gt=0, le=1)
    """Share of the layers, counted from the input."""
    last: float | None = Field(default=None, gt=0, le=1)
    """Share of the layers, counted from the output."""
    range: tuple[int, int] | None = None
    """Number of the first layer, and of the layer after the last."""


def _one_key(value: Any) -> Any:
    if isinstance(value, dict) and len(value) != 1:
        raise ValueError("give exactly one of first, last, range")
    return value


Layers = Annotated[Literal["all", "first_third"] | list[int] | LayerRange, BeforeValidator(_one_key)]
"""`all`, `first_third`, `{first: 0.5}`, `{last: 0.25}`, `{range: [4, 16]}`, or a list of layer numbers from 0.

A share is rounded to whole layers, at least one: a third of 16 layers is 5, of 4 is 1.
"""


def chosen_layers(layers: Layers, llm: Backbone) -> tuple[int, ...]:
    """Layer numbers that `layers` means for this LLM, ascending.

    Raises:
        ConfigError: no layers, or a layer that the LLM does not have.
    """
    total = llm.n_layers
    if layers == "all":
        numbers = list(range(total))
    elif layers == "first_third":
        numbers = list(range(share_of_layers(1 / 3, total)))
    elif isinstance(layers, LayerRange):
        if layers.first is not None:
            numbers = list(range(share_of_layers(layers.first, total)))
        elif layers.last is not None:
            numbers = list(range(total - share_of_layers(layers.last, total), total))
        else:
            assert layers.range is not None
            numbers = list(range(*layers.range))
    else:
        assert isinstance(layers, list)
        numbers = sorted(set(layers))
    if not numbers or numbers[0] < 0 or numbers[-1] >= total:
        raise ConfigError(f"layers {numbers or layers} do not fit an LLM with layers 0 to {total - 1}")
    return tuple(numbers)


def share_of_layers(share: float, total: int) -> int:
    """Number of layers that are a share of `total`, rounded, at least one."""
    return max(1, round(share * total))


def toy_layers(layers: Layers) -> Layers:
    """`layers` for a toy LLM: layer numbers, which it may not have, become the last half of its layers."""
    by_number = isinstance(layers, list) or (isinstance(layers, LayerRange) and layers.range is not None)
    return LayerRange(last=0.5) if by_number else layers
