"""Trainable parts of a stage: freezing, adapters, and the names of the trained weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pal.errors import ConfigError
from pal.model import PalModel
from pal.train.objectives import Objective
from pal.train.recipe import PARTS, Stage, Trained


def freeze(model: PalModel, train: Trained) -> dict[str, dict[str, nn.Parameter]]:
    """Require gradients for exactly the parts in `train`, and add the LLM's adapters if `train` sets them.

    Returns:
        part -> name in the model -> trained parameter.

    Raises:
        ConfigError: a part in `train` has no weights, or there is no such encoder.
    """
    if train.llm == "lora" and model.llm.lora is None:
        model.llm.add_lora(train.lora)
    parts = model.parts()
    chosen = {part: list(parts[part].parameters()) for part in PARTS if part != "llm" and train.part(part)}
    if isinstance(train.encoder, list) and train.encoder:
        encoders = list(model.ears.encoders)
        if not all(0 <= i < len(encoders) for i in train.encoder):
            raise ConfigError(f"train.encoder: {train.encoder}: the model has encoders 0 to {len(encoders) - 1}")
        chosen["encoder"] = [p for i in train.encoder for p in encoders[i].parameters()]
    model.requires_grad_(False)
    if train.llm != "none":
        chosen["llm"] = model.llm.train_only(train.llm)
    part_of = {id(parameter): part for part, parameters in chosen.items() for parameter in parameters}
    trained: dict[str, dict[str, nn.Parameter]] = {part: {} for part in chosen}
    for name, parameter in model.named_parameters():
        if id(parameter) in part_of:
            parameter.requires_grad_(True)
            trained[part_of[id(parameter)]][name] = parameter
    for part, parameters in trained.items():
        if not parameters:
            raise ConfigError(f"'{part}' has no weights in this model; remove it from the stage's 'train'")
    return trained


def set_modes(model: PalModel, stage: Stage) -> None:
    """Set training mode for trained parts and evaluation mode for the rest."""
    model.train()
    if stage.gradient_checkpointing:
        # transformers checkpoints layers only in training mode, and a frozen LLM saves activations, too
        model.llm.train()


def compiles(stage: Stage, device: torch.device, sharded: bool = False) -> bool:
    """True if a stage compiles the LLM's layers: with `auto` on CUDA, unless sharded; never in a stage without the LLM.

    Raises:
        ConfigError: the stage has `compile: true`, but its weights are sharded.
    """
    if sharded and stage.compile is True and stage.runs_llm:
        raise ConfigError(
            f"stage '{stage.name}': compile: true does not work with sharded weights (keep.engine: fsdp2); remove the "
            "key, or use keep.engine=ddp"
        )
    wanted = device.type == "cuda" if stage.compile == "auto" else stage.compile
    return wanted and stage.runs_llm and not sharded


def captures(stage: Stage, device: torch.device, processes: int) -> bool:
    """True if a stage replays its steps as CUDA graphs: with `auto` on CUDA with one process.

    Raises:
        ConfigError: the stage has `cuda_graphs: true`, but graphs are not possible.
    """
    possible = device.type == "cuda" and processes == 1 and stage.runs_llm
    if stage.cuda_graphs is True and not possible:
        raise ConfigError(
            f"stage '{stage.name}': cuda_graphs: true needs CUDA, one process and an objective with the LLM; "
            "remove the key to use graphs only if possible"
        )
    return possible and stage.cuda_graphs is not False


def lasting_name(name: str) -> str:
    """Name of a weight in checkpoints: its name without adapters around its layer."""
    return name.replace(".base_layer.", ".")


def head(objective: Objective) -> dict[str, nn.Parameter]:
    """Weights of the objective itself, by checkpoint name."""
    return {f"head.{name}": parameter for name, parameter in objective.head().items()}


def named_weights(model: PalModel) -> dict[str, Tensor]:
    """All parameters and persistent buffers, by checkpoint name."""
    held = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in held}
    return {lasting_name(name): tensor for name, tensor in [*model.named_parameters(), *buffers.items()]}


def trained_weights(model: PalModel, trained: set[str]) -> dict[str, Tensor]:
    """The parameters in `trained` and all buffers, by checkpoint name."""
    parameters = {lasting_name(name) for name, _ in model.named_parameters()}
    return {name: t for name, t in named_weights(model).items() if name in trained or name not in parameters}
