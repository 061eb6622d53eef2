"""Projectors P from audio features to the LLM's width, for all integrations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pal.backbone.fused_kv import FusedKV, unhooked
from pal.backbone.llm import Backbone
from pal.config import StrictConfig
from pal.errors import ConfigError


class ProjectorOptions(StrictConfig):
    """Shape of the projectors; the paper only says that each P_l is a small MLP."""

    projector: Literal["mlp", "residual", "low_rank", "linear"] = "mlp"
    """`mlp`: linear layers with GELUs between. `residual`: its input plus an `mlp` that gives zero at first, for
    connectors of the LLM's width that were trained with the objective `ctc`. `low_rank`: two linear layers, narrow
    between. `linear`: one."""
    hidden: int | None = Field(default=None, ge=1)
    """Width between the layers of `mlp` and `residual`; None: the LLM's width."""
    depth: int = Field(default=2, ge=2)
    """Number of linear layers of `mlp` and `residual`."""
    rank: int = Field(default=64, ge=1)
    """Width between the layers of `low_rank`."""

    @model_validator(mode="after")
    def _only_what_is_used(self) -> ProjectorOptions:
        layers = {"hidden", "depth"}
        used = {"mlp": layers, "residual": layers, "low_rank": {"rank"}, "linear": set()}[self.projector]
        for option in sorted({"hidden", "depth", "rank"} & self.model_fields_set - used):
            if getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"'{option}' is not used by the projector '{self.projector}'; leave it out")
        return self

    def toy(self) -> Self:
        """Toy size: given widths become small."""
        sizes = {"hidden": 24} if self.hidden else {}
        return self.model_copy(update={**sizes, "rank": min(self.rank, 4)} if self.projector == "low_rank" else sizes)


class LayerProjectorOptions(ProjectorOptions):
    """Options of the projectors of several layers."""

    shared: bool = False
    """True: one projector for all layers; False: one for each."""


class Residual(nn.Module):
    """x at the size of the LLM's embeddings, plus inner(x); the last linear layer of `inner` is zero at first.

    Args:
        inner: ends with a linear layer.
        rms: root mean square of x's elements at first; learned.
    """

    def __init__(self, inner: nn.Sequential, rms: float) -> None:
        super().__init__()
        self.inner = inner
        self.rms = nn.Parameter(torch.tensor(rms))
        for parameter in inner[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.rms * F.rms_norm(x.float(), x.shape[-1:]).to(x.dtype) + self.inner(x)


def projector(options: ProjectorOptions, in_width: int, llm: Backbone) -> nn.Module:
    """Build a projector of features [..., in_width] to rows of the LLM [..., D].

    Raises:
        ConfigError: `residual` with two different widths.
    """
    out_width = llm.width
    if options.projector == "residual" and in_width != out_width:
        raise ConfigError(
            f"projector 'residual' needs features of the LLM's width {out_width}, but the connector's are "
            f"{in_width} wide; give the connector width: {out_width}"
        )
    if options.projector == "linear":
        return nn.Linear(in_width, out_width)
    if options.projector == "low_rank":
        return nn.Sequential(nn.Linear(in_width, options.rank, bias=False), nn.Linear(options.rank, out_width))
    hidden = options.hidden or out_width
    widths = [in_width, *[hidden] * (options.depth - 1), out_width]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.GELU()]
    whole = nn.Sequential(*layers[:-1])
    return Residual(whole, llm.embedding_rms) if options.projector == "residual" else whole


class LayerProjectors(nn.ModuleDict):
    """P_l by the number of the layer, or one for all layers."""

    def __init__(self, options: LayerProjectorOptions, layers: Sequence[int], in_width: int, llm: Backbone) -> None:
        names = ["shared"] if options.shared else [str(layer) for layer in layers]
        super().__init__({name: projector(options, in_width, llm) for name in names})
        self.is_shared = options.shared
        self.options = options
        self.widths = (in_width, llm.width)
        self._folds: dict[int, FusedKV] = {}

    def of(self, layer: int) -> nn.Module:
        """P of one layer."""
        return self["shared" if self.is_shared else str(layer)]

    def inside(self, layer: int) -> nn.Module:
        """P of one layer without its last linear layer."""
        whole = self.of(layer)
        return whole[:-1] if isinstance(whole, nn.Sequential) else nn.Identity()

    def fold(self, llm: Backbone, layers: Sequence[int]) -> int:
        """Fuse P's last linear layer with the layer's norm and projections, in layers where that saves work.

        Returns the number of these layers.
        """
        self._folds = {}
        for layer in layers:
            last = self._last(layer)
            folded = None if last is None else llm.fold_kv(layer, last)
            if folded is not None:
                self._folds[layer] = folded
        return len(self._folds)

    def folded(self, layer: int, llm: Backbone) -> FusedKV | None:
        """Fused layer from `fold`, if no gradients are needed and no fused weight or module has changed since."""
        found = None if torch.is_grad_enabled() else self._folds.get(layer)
        last = None if found is None else self._last(layer)
        return found if found is not None and last is not None and llm.holds(layer, found, last) else None

    def _last(self, layer: int) -> nn.Module | None:
        """Last linear layer of P; None if P was replaced or has hooks."""
        whole = self.of(layer)
        if type(whole) is nn.Sequential and unhooked(whole):
            return whole[-1]
        return whole if type(whole) is nn.Linear else None
