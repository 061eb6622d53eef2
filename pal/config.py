"""Strict, typed configuration: an unknown key is an error that names the known ones."""

from collections.abc import Mapping
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pal.errors import ConfigError


class StrictConfig(BaseModel):
    """Base of every configuration class. The help of a field stands under it as a string."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def toy(self) -> Self:
        """A small version of what this configures, built from random weights alone; for `pal train --smoke`.

        Parts that are large, or read weights, say here what a small one looks like; the others stay as they are.
        """
        return self


C = TypeVar("C", bound=StrictConfig)


def parse(cls: type[C], data: Mapping[str, Any], where: str) -> C:
    """Check `data` against `cls`.

    Args:
        cls: the configuration class.
        data: what the user wrote.
        where: what the data is, for the message ("recipe r.yaml", "encoder 'tiny'").

    Raises:
        ConfigError: one line with the first fault, where it is, and the known keys.
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
    """Field names of the model that `path` leads to inside `cls`."""
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
