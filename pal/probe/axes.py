"""Axes of an ablation, whose values change a recipe, and the grid of recipes that they span.

An axis is one entry of `AXES`; a value becomes overrides, as `pal train --set` takes them.
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
    """Axis: one property of a recipe that is varied."""

    values: tuple[Any, ...]
    """Default values."""
    change: Callable[[Any, Recipe], Changes]
    """What a value changes in a recipe; ConfigError for one that it does not know or that does not fit."""
    says: str
    """Description of its values."""
    bare: bool = False
    """Show values without the axis' name, which they do not need."""


@dataclass(frozen=True)
class GridCell:
    """One recipe of the grid; it becomes a run with each seed."""

    name: str
    """Name of its folder."""
    label: str
    """Label in tables and plots."""
    values: Mapping[str, str]
    """Axis -> name of the value."""
    path: Path
    """The recipe's file."""
    overrides: tuple[str, ...]

    def recipe(self, seed: int) -> Recipe:
        """Recipe of the run with a seed."""
        return load_recipe(self.path, [*self.overrides, f"seed={seed}"])

    def check(self) -> None:
        """Raises ConfigError where the recipe cannot be carried out; builds its model without weights."""
        try:
            recipe = self.recipe(1)
            model = skeleton(recipe)
            with torch.device("meta"):
                for stage in recipe.stages:
                    freeze(model, stage.train)
        except PalError as error:
            raise ConfigError(f"{self.label}: {error}") from None


def grid(path: Path, axes: Sequence[str], settings: Sequence[str] = ()) -> list[GridCell]:
    """Every combination of the axes' values, the last axis changing fastest.

    A value that leaves the recipe as it is does not appear in the folder's name, unless the name would be empty. So a
    larger grid finds the runs of a smaller one.

    Args:
        path: the recipe.
        axes: `NAME` or `NAME=VALUES`, the values a YAML list, with or without its brackets.
        settings: overrides for all cells.

    Raises:
        ConfigError: an unknown axis or value, or one that does not fit the recipe; nothing to vary.
    """
    if any(setting.partition("=")[0] == "seed" for setting in settings):
        raise ConfigError("--set seed: all cells share the seeds 1, 2, ...; say by --seeds how many")
    chosen: dict[str, list[Any]] = {}
    for text in axes:
        name, values = _parsed(text)
        if name in chosen:
            raise ConfigError(f"axis '{name}' is given twice; put its values into one list")
        chosen[name] = values
    if not chosen:
        raise ConfigError(f"nothing to vary; give --axis NAME, of {', '.join(AXES)}")
    if {"integration", "queries"} <= set(chosen):
        raise ConfigError("axis 'queries' chooses the integration, as axis 'integration' does; give one of them")
    called = {name: _names(name, values) for name, values in chosen.items()}
    cells = []
    for places in itertools.product(*(range(len(values)) for values in chosen.values())):
        at = dict(zip(chosen, places, strict=True))
        overrides = list(settings)
        changed = []
        # in the table's order: which part it is comes before the options of the part
        for name in (name for name in AXES if name in at):
            recipe = load_recipe(path, overrides)
            changes = AXES[name].change(chosen[name][at[name]], recipe)
            overrides += [f"{key}={json.dumps(value)}" for key, value in changes.items()]
            if changes:
                changed.append(name)
        named = {name: called[name][place] for name, place in at.items()}
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
    """Label of a value without commas, since tables and sentences list cells."""
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
        raise ConfigError(f"axis '{name}' has an empty value; it takes {AXES[name].says}")
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
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"axis '{axis}': '{twice}' comes twice")
    return found


def _part_name(part: Part, alike: Sequence[Part]) -> str:
    """A part's name, with the options in which it differs from others of the same name."""
    differing = [key for key in part if key != "name" and any(other.get(key) != part[key] for other in alike)]
    return "-".join([_slug(part["name"]), *(f"{_slug(key)}-{_slug(part[key])}" for key in differing)])


def _part(value: Any) -> Part:
    return {"name": value} if isinstance(value, str) else value if isinstance(value, dict) else {}


def _slug(value: Any) -> str:
    """File name of a text: only letters that any file system takes."""
    if isinstance(value, dict):
        return "-".join(f"{_slug(key)}-{_slug(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "-".join(map(_slug, value))
    return re.sub(r"[^A-Za-z0-9._]+", "-", str(value).replace("/", "of")).strip("-")


# What values change


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
        raise ConfigError(f"axis 'depth': unknown value '{value}'; it takes {AXES['depth'].says}")
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
    elif value in ("mlp", "low_rank", "linear"):
        options = {"projector": value}
    elif (share := _share(value)) is not None:
        options = {"hidden": max(1, round(share * skeleton(recipe).llm.width))}
    else:
        raise ConfigError(f"axis 'width': unknown value '{value}'; it takes {AXES['width'].says}")
    kind = options.get("projector", "low_rank" if "rank" in options else "mlp")
    if kind != part.get("projector", "mlp"):
        # the options of another kind of projector would be refused
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
        raise ConfigError("the recipe goes on from a bundle, whose parts are what they are; give it a 'model' instead")
    return recipe.model


def _known_part(kind: str, value: Any) -> Part:
    part = _part(value)
    lookup(kind, str(part.get("name", value)))
    return part


def _having(option: str, recipe: Recipe) -> Part:
    """The recipe's integration; ConfigError where it does not have the option."""
    part = _model(recipe).integration

    def has(name: str) -> bool:
        config: Any = lookup("integration", name).Config  # type: ignore[attr-defined]
        return option in config.model_fields

    if not has(part["name"]):
        able = ", ".join(name for name in names("integration") if has(name))
        raise ConfigError(f"integration '{part['name']}' has no option '{option}'; those that have it: {able}")
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
    "queries": Axis(("without", "with"), _queries, "without, with: whether LAL's audio asks, too"),
    "connector": Axis(
        ("mlp", "strided_conv", "qformer"), _connector, "names of connectors, or {name: ..., option: value}", bare=True
    ),
    "depth": Axis(
        ("1/4", "1/3", "1/2", "all"), _depth, "shares of the layers such as 1/4, all, or what the option 'layers' takes"
    ),
    "stride": Axis((2, 3, 5), _stride, "audio tokens a summary token"),
    "width": Axis(
        ("1/4", "1/2", "1/1", "2/1"),
        _width,
        "widths inside the projector, as shares of the LLM's such as 1/2 or in units, mlp, low_rank, linear, or "
        "options such as {rank: 16}",
    ),
    "ffn": Axis(("trained", "frozen"), _ffn, "trained, frozen: the LLM's feed-forward networks"),
}
"""By name, in the order in which they change a recipe."""
