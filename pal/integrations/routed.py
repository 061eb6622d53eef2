"""`pal_routed`: a route for each encoder. Models with several streams use it with any other integration, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pal.backbone.llm import Backbone
from pal.config import StrictConfig
from pal.errors import ConfigError
from pal.integrations.base import Integration, Route
from pal.registry import build, lookup, register, toy

Part = str | dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """Output of one connector: its width, and the names of the encoders whose features it contains."""

    width: int
    encoders: tuple[str, ...]


@register("integration", "pal_routed")
class Routed(Integration):
    """Speech encoders by PLITS and the others by LAL, in one forward pass (paper v2)."""

    class Config(StrictConfig):
        """Options of `pal_routed`."""

        routes: dict[str, Part] = {"whisper": "plits", "af_whisper": "plits"}
        """Integration of a stream, by the name of its encoder."""
        default: Part = "lal"
        """Integration of streams without an entry in `routes`."""

        def toy(self) -> Routed.Config:
            """Toy size of each route."""
            routes: dict[str, Part] = {name: toy("integration", part) for name, part in self.routes.items()}
            return Routed.Config(routes=routes, default=toy("integration", self.default))

    def __init__(self, config: Config, streams: Sequence[Stream], llm: Backbone) -> None:
        super().__init__()
        self.config = config
        parts = [
            next((config.routes[name] for name in stream.encoders if name in config.routes), config.default)
            for stream in streams
        ]
        self.streams = nn.ModuleList(_route(part, stream, llm) for part, stream in zip(parts, streams, strict=True))

    def routes(self) -> Sequence[Route]:
        """Route of each stream, in the order of the streams."""
        return list(self.streams)  # type: ignore[arg-type]


def build_integration(part: Part, streams: Sequence[Stream], llm: Backbone) -> Integration:
    """Build the integration that `part` names; one for a single stream is built once for each of several streams."""
    name = part if isinstance(part, str) else part.get("name", "")
    if issubclass(lookup("integration", name), Route) and len(streams) > 1:
        return Routed(Routed.Config(routes={}, default=part), streams, llm)
    if issubclass(lookup("integration", name), Route):
        return _route(part, streams[0], llm)
    integration: Integration = build("integration", part, streams=streams, llm=llm)
    return integration


def _route(part: Part, stream: Stream, llm: Backbone) -> Route:
    route = build("integration", part, in_width=stream.width, llm=llm) if _is_route(part) else None
    if route is None:
        raise ConfigError("integration 'pal_routed' cannot be a route of itself; name one such as lal or plits")
    return route


def _is_route(part: Part) -> bool:
    return issubclass(lookup("integration", part if isinstance(part, str) else part.get("name", "")), Route)
