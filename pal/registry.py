"""Names for the exchangeable parts: encoders, connectors, integrations, benchmarks, scoring rules.

A part is one class in one file with one decorator line. Its options stand beside it as a nested
`Config`, so that a recipe's `{name: lal, layers: all}` is checked against the class it builds.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from pal.config import StrictConfig, parse
from pal.errors import ConfigError

T = TypeVar("T", bound=type)

_PACKAGES = {
    "encoder": "pal.encoders",
    "connector": "pal.connectors",
    "integration": "pal.integrations",
    "task": "pal.evaluate.tasks",
    "rule": "pal.evaluate.rules",
}
_CLASSES: dict[str, dict[str, type]] = {kind: {} for kind in _PACKAGES}


def register(kind: str, name: str) -> Callable[[T], T]:
    """Class decorator that registers a part of a kind under a name."""

    def add(cls: T) -> T:
        config = getattr(cls, "Config", None)
        assert isinstance(config, type) and issubclass(config, StrictConfig), f"{cls} needs a nested Config"
        assert name not in _CLASSES[kind], f"{kind} '{name}' is registered twice"
        _CLASSES[kind][name] = cls
        return cls

    return add


def unregister(kind: str, name: str) -> None:
    """Remove a part, such as one that a test registered; ignores unknown names."""
    _CLASSES[kind].pop(name, None)


def names(kind: str) -> list[str]:
    """The known names of one kind of part, sorted."""
    package = importlib.import_module(_PACKAGES[kind])
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    _load_others(f"{kind}s")
    return sorted(_CLASSES[kind])


@cache
def _load_others(group: str) -> None:
    """Import the entry points of other distributions in a group such as `pal.encoders`, which register parts."""
    for entry in entry_points(group=f"pal.{group}"):
        try:
            entry.load()
        except ImportError as error:
            where = entry.dist.name if entry.dist is not None else "a distribution"
            raise ConfigError(f"{where}: its {group} cannot be imported ({error}); repair or uninstall it") from None


def lookup(kind: str, name: str) -> type:
    """The class registered as `name`. Raises ConfigError that lists the known names."""
    known = names(kind)
    if name not in known:
        raise ConfigError(f"unknown {kind} '{name}'; known: {', '.join(known)}")
    return _CLASSES[kind][name]


def check(kind: str, options: Mapping[str, Any] | str) -> None:
    """Check name and options as `build` does, without building."""
    _resolve(kind, options)


def build(kind: str, options: Mapping[str, Any] | str, **context: Any) -> Any:
    """Build the part that `options` describes: a name, or `{"name": ..., option: value}`.

    `context` has arguments that follow from the rest of the model, such as widths; the class gets them beside the
    checked `config`.
    """
    cls, config = _resolve(kind, options)
    return cls(config, **context)


def _resolve(kind: str, options: Mapping[str, Any] | str) -> tuple[type, StrictConfig]:
    fields = {"name": options} if isinstance(options, str) else dict(options)
    if "name" not in fields:
        raise ConfigError(f"{kind} needs a 'name'; known: {', '.join(names(kind))}")
    name = fields.pop("name")
    cls = lookup(kind, name)
    return cls, parse(cls.Config, fields, where=f"{kind} '{name}'")  # type: ignore[attr-defined]


def toy(kind: str, options: Mapping[str, Any] | str) -> dict[str, Any]:
    """Options of a small version of a part with random weights; see `StrictConfig.toy`."""
    _, config = _resolve(kind, options)
    name = options if isinstance(options, str) else options["name"]
    small = config.toy()
    # without defaults: with a `path`, even None, a bundle would expect a source of weights
    return {"name": name, **small.model_dump(mode="json", exclude_defaults=True)}
