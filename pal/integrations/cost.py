"""Closed-form cost of each integration in a training step: operations, saved bytes, rows and keys.

Counted by the rules of `pal.backbone.cost`. An integration outside the package registers its cost beside its class:
`@route_cost.register(MyRoute)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatch
from itertools import pairwise

from pal.backbone.cost import (
    AddedCost,
    AddedLayerCost,
    Cost,
    StepSize,
    attention,
    linear,
    project_kv,
    self_attend,
    total,
)
from pal.backbone.llm import Backbone
from pal.backbone.merged import pairs_of
from pal.errors import ConfigError
from pal.integrations.audio_query import LALAudioQuery
from pal.integrations.base import Route
from pal.integrations.flamingo import Flamingo
from pal.integrations.hybrid import PAL
from pal.integrations.lal import LAL
from pal.integrations.plits import PLITS
from pal.integrations.projector import LayerProjectors, ProjectorOptions


@singledispatch
def route_cost(route: Route, step: StepSize, tokens: int, llm: Backbone) -> AddedCost:
    """Cost that a route adds to a training step, for clips of `tokens` tokens.

    Raises:
        ConfigError: no closed form is registered for the class or a base class.
    """
    raise ConfigError(
        f"{type(route).__name__} has no closed form of its cost; register one with "
        "pal.integrations.cost.route_cost.register"
    )


@route_cost.register(PLITS)
def _plits(route: PLITS, step: StepSize, tokens: int, llm: Backbone) -> AddedCost:
    """Cost of A more rows: A + T rows in all products and (A + T)^2 pairs in attention, in each layer."""
    making = projector_cost(route.config, step, step.clips * tokens, route.in_width, llm.width)
    return AddedCost(rows=tokens, rows_grad=step.integration or step.features, making=making)


@route_cost.register(LAL)
def _lal(route: LAL, step: StepSize, tokens: int, llm: Backbone) -> AddedCost:
    """Cost in each of its layers: A rows through P_l, k_proj and v_proj, and T (A + T) pairs in attention."""
    return AddedCost(layers=projected_keys(route.projectors, step, tokens, llm, route.layers))


@route_cost.register(PAL)
def _pal(route: PAL, step: StepSize, tokens: int, llm: Backbone) -> AddedCost:
    """Cost of ceil(A / r) rows through all layers, and of A keys by LAL in the early layers."""
    S, r, E = -(-tokens // route.config.stride), route.config.stride, route.in_width
    rows = step.clips * S
    conv = linear(rows, r * E, E, step.features, step.integration, step.own_bytes)
    # the convolution's output needs gradients if the convolution is trained
    behind = replace(step, features=step.features or step.integration)
    summary = projector_cost(route.config, behind, rows, E, llm.width)
    layers = projected_keys(route.projectors, step, tokens, llm, route.layers)
    seen = [0] * step.before + [min((i + 1) * r, tokens) for i in range(S)] + [tokens] * (step.text - step.before)
    return AddedCost(
        rows=S,
        rows_grad=behind.features,
        making=conv + summary,
        layers={layer: replace(part, pairs=pairs_of(seen)) for layer, part in layers.items()},
    )


@route_cost.register(LALAudioQuery)
def _audio_query(route: LALAudioQuery, step: StepSize, tokens: int, llm: Backbone) -> AddedCost:
    """LAL's cost with one projector, and self-attention of A audio rows, A^2 pairs, before each layer but the last.

    K and V of a layer are projected twice: for the audio's self-attention, and for the text.
    """
    grad = step.integration or step.features
    making = projector_cost(route.config, step, step.clips * tokens, route.in_width, llm.width)
    layers = {}
    for layer in route.layers:
        layers[layer] = project_kv(llm, step, tokens, Cost(), grad)
        if layer != route.layers[-1]:
            updated, grad = self_attend(llm, step, tokens, grad)
            making = making + updated
    return AddedCost(making=making, layers=layers)


@route_cost.register(Flamingo)
def _flamingo(route: Flamingo, step: StepSize, tokens: int, llm: Backbone) -> AddedCost:
    """Cost of each block: A rows through k and v, T rows through q, out and the block's FFN, T A pairs in attention."""
    inner, shared = llm.heads * llm.head_width, llm.kv_heads * llm.head_width
    ffn = route.config.ffn or 4 * llm.width
    own, size = step.integration, step.own_bytes
    keys_grad = own or step.features

    def block(x_grad: bool, rows: int) -> Cost:
        audio = step.clips * tokens
        cost = linear(audio, route.in_width, shared, keys_grad, own, size)
        cost += linear(audio, route.in_width, shared, keys_grad, own, size, kept=True)
        cost += linear(rows, llm.width, inner, x_grad or own, own, size)
        cost += attention(1, llm.heads, rows, tokens, llm.head_width, x_grad or keys_grad)
        mixed = x_grad or keys_grad
        cost += linear(rows, inner, llm.width, mixed, own, size, kept=True)
        cost += linear(rows, llm.width, ffn, mixed, own, size) + linear(rows, ffn, llm.width, mixed, own, size)
        # queries, attention's output, keys and values; the inputs of both gates, both norms and the GELU
        attended = 2 * rows * inner + 2 * (step.rows - step.repeats) * tokens * shared
        kept = attended + rows * (2 * llm.width + ffn) + rows * tokens
        normed = 4 * (2 * rows * llm.width + audio * route.in_width)
        return cost + Cost(saved=(kept * size + normed) * mixed)

    return AddedCost(layers={layer: AddedLayerCost(keys=tokens, grad=keys_grad, block=block) for layer in route.layers})


def projector_cost(
    options: ProjectorOptions, step: StepSize, rows: int, in_width: int, out_width: int, kept: bool = False
) -> Cost:
    """Cost of a projector on `rows` rows; `kept`: True if another layer saves the features for backward already."""
    middle = {"linear": [], "low_rank": [options.rank]}.get(
        options.projector, [options.hidden or out_width] * (options.depth - 1)
    )
    widths = [in_width, *middle, out_width]
    trained, size = step.integration, step.own_bytes
    parts = []
    for i, (a, b) in enumerate(pairwise(widths)):
        x_grad = step.features or (trained and i > 0)
        # autocast copies the features for each product
        parts.append(linear(rows, a, b, x_grad, trained, size, kept=kept and i == 0 and not step.autocast))
        if options.projector in ("mlp", "residual") and i > 0 and (trained or step.features):
            parts.append(Cost(saved=rows * a * size))  # input of the GELU before this layer
    return total(parts)


def projected_keys(
    projectors: LayerProjectors, step: StepSize, tokens: int, llm: Backbone, layers: Sequence[int]
) -> dict[int, AddedLayerCost]:
    """Cost in each layer of keys and values from `LayerProjectors`, for clips of `tokens` tokens."""
    added = {}
    rows = step.clips * tokens
    u_grad = step.integration or step.features
    for layer in layers:
        mapped = projector_cost(projectors.options, step, rows, *projectors.widths, kept=layer != layers[0])
        added[layer] = project_kv(llm, step, tokens, mapped, u_grad)
    return added
