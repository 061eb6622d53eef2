"""Axes of an ablation, and the grid of recipes that they span.

An axis is one entry of `AXES`. It turns a value into overrides of a recipe, as for `pal train --set`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import yaml

from pal.errors import ConfigError, PalError
from pal.integrations.projector import ProjectorOptions
from pal.model_config import ModelConfig, Part
from pal.plan.skeleton import skeleton
from pal.registry import lookup, names
from pal.train.recipe import Recipe, load_recipe
from pal.train.stages import freeze

Changes = dict[str, Any]
"""Dotted key of a recipe -> its value."""


@dataclass(frozen=True)
class Axis:
    """Property of a recipe that an ablation varies."""

    values: tuple[Any, ...]
    """Default values."""
    change: Callable[[Any, Recipe], Changes]
    """(value, recipe) -> overrides of the recipe; raises ConfigError if the value is unknown or does not fit."""
    accepts: str
    """Description of its values, for error messages."""
    bare: bool = False
    """True for values whose labels do not need the name of the axis."""


@dataclass(frozen=True)
class GridCell:
    """Recipe of the grid, with one run for each seed."""

    name: str
    """Name of its folder."""
    label: str
    """Label in tables and plots."""
    values: Mapping[str, str]
    """Axis -> name of its value."""
    path: Path
    """File of the original recipe."""
    overrides: tuple[str, ...]

    def recipe(self, seed: int) -> Recipe:
        """Recipe of the run with this seed."""
        return load_recipe(self.path, [*self.overrides, f"seed={seed}"])

    def check(self) -> None:
        """Raise ConfigError if the recipe is invalid; builds its model without weights."""
        try:
            recipe = self.recipe(1)
            model = skeleton(recipe)
            with torch.device("meta"):
                for stage in recipe.stages:
                    freeze(model, stage.train)
        except PalError as error:
            raise ConfigError(f"{self.label}: {error}") from None


def grid(path: Path, axes: Sequence[str], settings: Sequence[str] = ()) -> list[GridCell]:
    """All combinations of values; the last axis varies fastest.

    A value that does not change the recipe is left out of the folder's name, unless the name would be empty. So a
    larger grid reuses the runs of a smaller one.

    Args:
        path: file of the recipe.
        axes: `NAME` or `NAME=VALUES`, where VALUES is a YAML list, with or without brackets.
        settings: overrides for all cells.

    Raises:
        ConfigError: no axis, or an axis or value that is unknown or does not fit the recipe.
    """
    if any(setting.partition("=")[0] == "seed" for setting in settings):
        raise ConfigError("--set seed: all cells share the seeds 1, 2, ...; set their number by --seeds")
    chosen: dict[str, list[Any]] = {}
    for text in axes:
        name, values = _parsed(text)
        if name in chosen:
            raise ConfigError(f"axis '{name}' is given twice; put its values into one list")
        chosen[name] = values
    if not chosen:
        raise ConfigError(f"nothing to vary; give --axis NAME; known: {', '.join(AXES)}")
    if {"integration", "queries"} <= set(chosen):
        raise ConfigError("axes 'queries' and 'integration' both set the integration; give one of them")
    value_names = {name: _names(name, values) for name, values in chosen.items()}
    cells = []
    for places in itertools.product(*(range(len(values)) for values in chosen.values())):
        at = dict(zip(chosen, places, strict=True))
        overrides = list(settings)
        changed = []
        # in the order of AXES: an axis that sets a part comes before those that set options of the part
        for name in (name for name in AXES if name in at):
            recipe = load_recipe(path, overrides)
            changes = AXES[name].change(chosen[name][at[name]], recipe)
            overrides += [f"{key}={json.dumps(value)}" for key, value in changes.items()]
            if changes:
                changed.append(name)
        named = {name: value_names[name][place] for name, place in at.items()}
        shown = changed or [name for name in AXES if name in at]
        cells.append(
            GridCell(
                name="_".join(f"{name}-{_slug(named[name])}" for name in shown),
                label=_label([value if AXES[name].bare else f"{name} {value}" for name, value in named.items()]),
                values=named,
                path=path,
                overrides=tuple(overrides),
            )
        )
    return cells


def _label(words: Sequence[str]) -> str:
    """Label of a cell, without commas, since labels are listed in sentences."""
    return words[0] + (f" with {' and '.join(words[1:])}" if len(words) > 1 else "")


def _parsed(text: str) -> tuple[str, list[Any]]:
    name, equals, listed = text.partition("=")
    if name not in AXES:
        raise ConfigError(f"unknown axis '{name}'; known: {', '.join(AXES)}")
    if not equals:
        return name, list(AXES[name].values)
    try:
        values = yaml.safe_load(f"[{listed}]")
    except yaml.YAMLError:
        raise ConfigError(f"axis '{name}': '{listed}' is not a YAML list, such as [a, b]") from None
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if not values or None in values:
        raise ConfigError(f"axis '{name}' has an empty value; it takes {AXES[name].accepts}")
    return name, values


def _names(axis: str, values: Sequence[Any]) -> list[str]:
    """Distinct names of values."""
    found = []
    for value in values:
        if AXES[axis].bare and _part(value).get("name"):
            alike = [part for part in map(_part, values) if part.get("name") == _part(value)["name"]]
            found.append(_part_name(_part(value), alike))
        else:
            found.append(_slug(value) if isinstance(value, dict | list) else str(value))
    duplicate = next((name for name in found if found.count(name) > 1), None)
    if duplicate is not None:
        raise ConfigError(f"axis '{axis}': '{duplicate}' is given twice; give it once")
    return found


def _part_name(part: Part, alike: Sequence[Part]) -> str:
    """Name of a part, with the options that distinguish it from others of the same name."""
    differing = [key for key in part if key != "name" and any(other.get(key) != part[key] for other in alike)]
    return "-".join([_slug(part["name"]), *(f"{_slug(key)}-{_slug(part[key])}" for key in differing)])


def _part(value: Any) -> Part:
    return {"name": value} if isinstance(value, str) else value if isinstance(value, dict) else {}


def _slug(value: Any) -> str:
    """File name for a value, of letters, digits and "._-" only."""
    if isinstance(value, dict):
        return "-".join(f"{_slug(key)}-{_slug(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "-".join(map(_slug, value))
    return re.sub(r"[^A-Za-z0-9._]+", "-", str(value).replace("/", "of")).strip("-")


# Overrides for a value


def _integration(value: Any, recipe: Recipe) -> Changes:
    _model(recipe)
    return {"model.integration": _known_part("integration", value)}


def _connector(value: Any, recipe: Recipe) -> Changes:
    _model(recipe)
    return {"model.connector": _known_part("connector", value)}


def _queries(value: Any, recipe: Recipe) -> Changes:
    name = _of("queries", value, {"without": "lal", "with": "lal_audio_query"})
    return {"model.integration": {**_model(recipe).integration, "name": name}}


def _depth(value: Any, recipe: Recipe) -> Changes:
    part = _having("layers", recipe)
    share = _share(value, most=1)
    if share is not None:
        value = {"first": float(share)}
    elif not isinstance(value, dict | list) and value not in ("all", "first_third"):
        raise ConfigError(f"axis 'depth': unknown value '{value}'; it takes {AXES['depth'].accepts}")
    return {"model.integration": {**part, "layers": value}}


def _stride(value: Any, recipe: Recipe) -> Changes:
    return {"model.integration": {**_having("stride", recipe), "stride": value}}


def _width(value: Any, recipe: Recipe) -> Changes:
    part = _having("projector", recipe)
    options: dict[str, Any]
    if isinstance(value, dict):
        options = value
    elif isinstance(value, int):
        options = {"hidden": value}
    elif value in ("mlp", "residual", "low_rank", "linear"):
        options = {"projector": value}
    elif (share := _share(value)) is not None:
        options = {"hidden": max(1, round(share * skeleton(recipe).llm.width))}
    else:
        raise ConfigError(f"axis 'width': unknown value '{value}'; it takes {AXES['width'].accepts}")
    kind = options.get("projector", "low_rank" if "rank" in options else "mlp")
    if kind != part.get("projector", "mlp"):
        # options of another kind of projector would be errors
        part = {key: option for key, option in part.items() if key not in ProjectorOptions.model_fields}
    return {"model.integration": {**part, "projector": kind, **options}}


def _ffn(value: Any, recipe: Recipe) -> Changes:
    llm = _of("ffn", value, {"trained": "full", "frozen": "no_ffn"})
    whole = [number for number, stage in enumerate(recipe.stages) if stage.train.llm == "full"]
    if not whole:
        raise ConfigError("axis 'ffn': no stage of the recipe trains the LLM in full; set stages.0.train.llm=full")
    return {} if llm == "full" else {f"stages.{number}.train.llm": llm for number in whole}


def _model(recipe: Recipe) -> ModelConfig:
    if recipe.model is None:
        raise ConfigError(
            "the recipe trains a bundle further, whose parts are fixed; give it a 'model' instead of 'bundle'"
        )
    return recipe.model


def _known_part(kind: str, value: Any) -> Part:
    part = _part(value)
    lookup(kind, str(part.get("name", value)))
    return part


def _having(option: str, recipe: Recipe) -> Part:
    """The recipe's integration. Raises ConfigError if it does not have the option."""
    part = _model(recipe).integration

    def has(name: str) -> bool:
        config: Any = lookup("integration", name).Config  # type: ignore[attr-defined]
        return option in config.model_fields

    if not has(part["name"]):
        able = ", ".join(name for name in names("integration") if has(name))
        raise ConfigError(f"integration '{part['name']}' has no option '{option}'; integrations with it: {able}")
    return part


def _of(axis: str, value: Any, known: Mapping[str, str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"axis '{axis}': unknown value '{value}'; known: {', '.join(known)}")
    return known[value]


def _share(value: Any, most: float = float("inf")) -> Fraction | None:
    """Parse a share such as 1/3 or 0.5; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        share = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        return None
    return share if 0 < share <= most else None


AXES: Mapping[str, Axis] = {
    "integration": Axis(
        ("plits", "lal", "pal", "flamingo", "lal_audio_query"),
        _integration,
        "names of integrations, or {name: ..., option: value}",
        bare=True,
    ),
    "queries": Axis(("without", "with"), _queries, "without or with: LAL without or with audio queries"),
    "connector": Axis(
        ("mlp", "strided_conv", "qformer"), _connector, "names of connectors, or {name: ..., option: value}", bare=True
    ),
    "depth": Axis(
        ("1/4", "1/3", "1/2", "all"), _depth, "shares of the layers such as 1/4, all, or values of the option 'layers'"
    ),
    "stride": Axis((2, 3, 5), _stride, "numbers of audio tokens per summary token"),
    "width": Axis(
        ("1/4", "1/2", "1/1", "2/1"),
        _width,
        "hidden widths of the projector, as shares of the LLM's width such as 1/2 or as numbers of units; mlp, "
        "residual, low_rank or linear; or options such as {rank: 16}",
    ),
    "ffn": Axis(("trained", "frozen"), _ffn, "trained or frozen, for the LLM's feed-forward networks"),
}
"""Name -> axis, in the order in which they change a recipe."""
