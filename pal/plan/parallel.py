"""Training on several GPUs of one machine: who holds which weights, and what is exchanged in a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from pal.errors import ConfigError
from pal.model import PalModel
from pal.plan.gpus import GPU
from pal.train.recipe import Stage
from pal.train.sharding import blocks, units

GATHERED = 2
"""Units of sharded weights that are whole on a GPU at a time: the one that computes, and the next one."""


@dataclass(frozen=True)
class Parallel:
    """How a step is divided among GPUs.

    Args:
        gpus: number of GPUs; each computes its share of the batch.
        sharded: weights, gradients and optimizer state are sharded (FSDP2), instead of copied (DDP).

    Raises:
        ConfigError: sharded on a single GPU.
    """

    gpus: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.sharded and self.gpus == 1:
            raise ConfigError("a single GPU has nothing to shard; give --gpus, or remove --shard")


@dataclass(frozen=True)
class Shares:
    """Bytes of weights, gradients and optimizer state on one GPU, and bytes that it exchanges in a step."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    """Buffers of exchanges: gradients in DDP's buckets; in FSDP2 weights and gradients that are whole for a time."""
    exchanged: float
    """Bytes that a GPU sends in a step."""


def shares(parallel: Parallel, model: PalModel, stage: Stage, whole: Shares, passes: int) -> Shares:
    """What is left of `whole`, the sizes on a single GPU, for each of several.

    DDP sends each gradient twice, to add and to distribute the sums (ring all-reduce), in the last pass of a step.
    FSDP2 gathers weights in the forward and in the backward pass and scatters gradients, in every pass. Weights outside
    of the units of `pal.train.sharding` stay whole from the forward to the backward pass.
    """
    n = parallel.gpus
    if n == 1:
        return whole
    ring = (n - 1) / n
    if not parallel.sharded:
        return replace(whole, buffers=whole.gradients, exchanged=2 * ring * whole.gradients)
    sizes = [_sizes(unit, stage) for unit in (*units(model), *blocks(model))]
    weights, gradients = (max((size[i] for size in sizes), default=0.0) for i in range(2))
    rest_weights = whole.weights - sum(size[0] for size in sizes)
    rest_gradients = whole.gradients - sum(size[1] for size in sizes)
    return Shares(
        weights=whole.weights / n,
        gradients=whole.gradients / n,
        optimizer=whole.optimizer / n,
        buffers=rest_weights + rest_gradients + GATHERED * (weights + gradients),
        exchanged=passes * ring * (2 * whole.weights + whole.gradients),
    )


def _sizes(unit: nn.Module, stage: Stage) -> tuple[float, float]:
    """Bytes of a unit's weights, and of its gradients before they are scattered."""
    weights = sum(p.numel() * p.itemsize for p in unit.parameters())
    gradients = sum(
        p.numel() * (4 if stage.master_weights else p.itemsize) for p in unit.parameters() if p.requires_grad
    )
    return weights, gradients


def exchange_seconds(shares: Shares, parallel: Parallel, gpu: GPU) -> float:
    """Seconds that the exchange of a step takes by the data sheet's bandwidth between GPUs."""
    return 0.0 if parallel.gpus == 1 else shares.exchanged / gpu.link
