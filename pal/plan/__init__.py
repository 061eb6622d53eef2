"""Cost estimates of a recipe, without loading anything: `plan(load_recipe("recipes/paper/llama-3.2-1b/pal.yaml"))`.

The model is built on torch's meta device, where weights have shapes and no data, so parameters are counted and not
estimated. FLOPs of the LLM and of the integrations are closed forms (`pal/backbone/cost.py` and
`pal/integrations/cost.py`); those of encoders and connectors are counted on that model, as is memory for activations.
The time of a step is an estimate and labelled as such.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pal.plan.estimate import Plan
    from pal.train.recipe import Recipe

__all__ = ["plan"]


def plan(recipe: Recipe, gpu: str = "H100", seconds: float = 10.0, text_tokens: int = 128, turns: int = 1) -> Plan:
    """The plan of a recipe; see `pal.plan.estimate.make`."""
    from pal.plan.estimate import make

    return make(recipe, gpu=gpu, seconds=seconds, text_tokens=text_tokens, turns=turns)
