"""Cost estimates of a recipe, without loading anything: `plan(load_recipe("recipes/paper/llama-3.2-1b/pal.yaml"))`.

The model is built on torch's meta device, where weights have shapes and no data, so parameters are counted and not
estimated. FLOPs of the LLM and of the integrations are closed forms (`pal/backbone/cost.py` and
`pal/integrations/cost.py`); those of encoders and connectors are counted on that model, as is memory for activations.
The time of a step is an estimate and labelled as such.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pal.plan.estimate import Plan
    from pal.train.recipe import Recipe

__all__ = ["plan"]


def plan(recipe: Recipe, **options: Any) -> Plan:
    """The plan of a recipe; `options` are those of `pal.plan.estimate.make`."""
    from pal.plan.estimate import make

    return make(recipe, **options)
