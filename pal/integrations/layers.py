"""Layers of the LLM that attend to audio keys: the option `layers` of LAL and the hybrid."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pal.backbone.llm import Backbone
from pal.config import StrictConfig
from pal.errors import ConfigError


class LayerRange(StrictConfig):
    """A stretch of layers; exactly one of the keys is given."""

    first: float | None = Field(default=None, gt=0, le=1)
    """Share of the layers, counted from the input."""
    last: float | None = Field(default=None, gt=0, le=1)
    """Share of the layers, counted from the output."""
    range: tuple[int, int] | None = None
    """From the first number to the second, which is not included, as in Python."""


def _one_key(value: Any) -> Any:
    if isinstance(value, dict) and len(value) != 1:
        raise ValueError("give exactly one of first, last, range")
    return value


Layers = Annotated[Literal["all", "first_third"] | list[int] | LayerRange, BeforeValidator(_one_key)]
"""`all`, `first_third`, `{first: 0.5}`, `{last: 0.25}`, `{range: [4, 16]}`, or a list of layer numbers from 0.

A share is rounded to whole layers, at least one: a third of 16 layers is 5, of 4 is 1.
"""


def chosen_layers(layers: Layers, llm: Backbone) -> tuple[int, ...]:
    """The layer numbers that `layers` means for this LLM, ascending.

    Raises:
        ConfigError: none is left, or one the LLM does not have.
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
    """A share in whole layers, at least one."""
    return max(1, round(share * total))


def toy_layers(layers: Layers) -> Layers:
    """The same for an LLM of few layers: numbers of layers that it may not have become the last half of them."""
    numbered = isinstance(layers, list) or (isinstance(layers, LayerRange) and layers.range is not None)
    return LayerRange(last=0.5) if numbered else layers
