"""`start_engine`: joins the processes of a run, and chooses the engine by the recipe and by what launched them."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from pal.errors import ConfigError
from pal.train import zero
from pal.train.engines import FullyShardedEngine, TrainingEngine
from pal.train.recipe import EngineName

_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
"""Variables of the environment by which `accelerate launch` says what it is configured for."""


def start_engine(name: EngineName) -> TrainingEngine:
    """Join the processes of the run, as `accelerate launch` or `torchrun` started them.

    Args:
        name: engine of the recipe; `auto`: the one that `accelerate launch` was configured for, else DDP.

    Raises:
        ConfigError: the engine cannot run here.
    """
    if name == "auto":
        name = _asked_by_launcher()
    if name == "zero2":
        zero.check_installed()
    # the engine does what accelerate would do by these
    asked = {variable: os.environ.pop(variable) for variable in (_FSDP, _DEEPSPEED) if variable in os.environ}
    try:
        accelerator = Accelerator(
            # unless told so, accelerate takes each of several processes without an accelerator for the only one
            cpu=int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available(),
            mixed_precision="no",  # that of the stages holds, not the launcher's
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    finally:
        os.environ.update(asked)
    if accelerator.num_processes == 1 or name == "ddp":
        return TrainingEngine(accelerator)
    return zero.ZeroEngine(accelerator) if name == "zero2" else FullyShardedEngine(accelerator)


def _asked_by_launcher() -> EngineName:
    if os.environ.get(_DEEPSPEED, "false").lower() == "true":
        _check_deepspeed()
        return "zero2"
    if os.environ.get(_FSDP, "false").lower() == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError("accelerate is configured for FSDP 1; give it --fsdp_version 2, or set keep.engine=fsdp2")
        return "fsdp2"
    return "ddp"


def _check_deepspeed() -> None:
    """Raise ConfigError if DeepSpeed is configured for more than ZeRO stage 2."""
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() != "none":
        raise ConfigError(
            "accelerate is configured with a file for DeepSpeed, which training does not read; configure it without, "
            "and set keep.engine=zero2 for ZeRO stage 2"
        )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage != "2":
        instead = "keep.engine=fsdp2, which shards the same" if stage == "3" else "keep.engine=zero2"
        raise ConfigError(
            f"accelerate is configured for ZeRO stage {stage}, of which only stage 2 runs; configure it without, and "
            f"set {instead}"
        )
    for what in ("OPTIMIZER", "PARAM"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none").lower() != "none":
            raise ConfigError(
                "accelerate is configured for DeepSpeed's offloading, which training does not support; set "
                "keep.engine=zero2, or keep.engine=fsdp2 for less memory"
            )
