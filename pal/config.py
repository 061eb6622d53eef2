"""Strict, typed configuration: an unknown key is an error that names the known ones."""

from collections.abc import Mapping
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pal.errors import ConfigError


class StrictConfig(BaseModel):
    """Base of every configuration class. The string below a field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def toy(self) -> Self:
        """Options of a small version with random weights, for `pal train --smoke`.

        Parts that are large or load weights override this; the default is the same options.
        """
        return self


C = TypeVar("C", bound=StrictConfig)


def parse(cls: type[C], data: Mapping[str, Any], where: str) -> C:
    """Validate `data` as a `cls`.

    Args:
        cls: the configuration class.
        data: the user's values, by key.
        where: name of the data in the message ("recipe r.yaml", "encoder 'tiny'").

    Raises:
        ConfigError: one line with the first fault, its key, and for an unknown key the known ones.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        fault = error.errors()[0]
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = ", ".join(_known_keys(cls, fault["loc"][:-1]))
            raise ConfigError(f"{where}: unknown key '{path}'; known: {known}") from None
        if fault["type"] == "missing":
            raise ConfigError(f"{where}: missing key '{path}'") from None
        raise ConfigError(f"{where}: {path}: {fault['msg']}") from None


def _known_keys(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the configuration class at `path` inside `cls`."""
    for part in path:
        if isinstance(part, int):
            continue
        field = cls.model_fields.get(str(part))
        nested = _model_inside(field.annotation) if field else None
        if nested is None:
            break
        cls = nested
    return sorted(cls.model_fields)


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_inside(argument)
        if found is not None:
            return found
    return None
