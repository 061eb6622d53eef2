"""Which modules FSDP2 shards together, and the whole model back from its shards.

A group of weights is gathered while its module runs. The LLM's layers, projectors of single layers and cross-attention
blocks are groups of their own. Encoders, connectors and the rest of an integration are gathered from their forward pass
until the end of their backward pass, since the features that they return are no plain tensors, by which FSDP finds the
beginning of a backward pass. Embeddings, LM head and final norm belong to the root group, which stays gathered for all
of a step: the head's weight is used without a call of its module, and may be the embeddings'. So do layers whose
attention an integration runs outside of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pal.integrations.projector import LayerProjectors
from pal.model import PalModel
from pal.train.objectives import MicroBatch, Objective
from pal.types import AUDIO, IGNORE, EncodedClip, Tokens

BLOCK_METHODS = ("keys_values", "packed")
"""Methods of a cross-attention block that are called as its forward pass is."""


def shard(objective: Objective, mesh: Any, with_encoders: bool) -> None:
    """Cut all weights of an objective and its model by rows, in place, over the processes of a mesh.

    Weights are moved to the mesh's device group by group. Numbers without a dimension stay whole.

    Args:
        objective: its weights are on the host.
        mesh: one-dimensional mesh of devices.
        with_encoders: False leaves encoders whole, for loader threads that encode clips by themselves.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = objective.model
    whole = {p for p in objective.parameters() if p.ndim == 0}
    if not with_encoders:
        whole |= set(model.ears.encoders.parameters())
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": whole}
    for module in units(model):
        fully_shard(module, reshard_after_forward=True, **options)
    for block in blocks(model):
        fully_shard(block, reshard_after_forward=True, **options)
        for method in BLOCK_METHODS:
            if hasattr(block, method):
                register_fsdp_forward_method(block, method)
    for module in (*model.ears.encoders, *model.ears.connectors, model.integration):
        if any(p not in whole and not hasattr(p, "to_local") for p in module.parameters()):
            fully_shard(module, reshard_after_forward=False, **options)
    fully_shard(objective, reshard_after_forward=False, **options)
    share_statistics(objective)


def units(model: PalModel) -> Iterator[nn.Module]:
    """Modules that take and return tensors, and whose weights are used in their own forward pass alone."""
    if not any(route.runs_layers for route in model.integration.routes()):
        yield from model.llm.layers
    for module in model.integration.modules():
        if isinstance(module, LayerProjectors):
            yield from module.values()


def blocks(model: PalModel) -> Iterator[Any]:
    """Cross-attention blocks."""
    for route in model.integration.routes():
        yield from (route.blocks() or {}).values()


@contextmanager
def gathered(objective: Objective) -> Iterator[None]:
    """All weights of an objective whole on each device in the block, without exchange in forward passes.

    All processes enter and leave it together.
    """
    modules = list(sharded_modules(objective))
    model = objective.model
    passing = [module for module in (*units(model), *blocks(model)) if module in modules]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module in passing, recurse=False)
            module.reshard()


def sharded_modules(objective: nn.Module) -> Iterator[Any]:
    """Modules that gather a group of weights."""
    from torch.distributed.fsdp import FSDPModule

    return (module for module in objective.modules() if isinstance(module, FSDPModule))


def share_statistics(objective: nn.Module) -> list[Any]:
    """Give all processes the batch statistics of the first before each forward pass, as DDP does.

    Returns:
        Handles whose `remove()` ends that.
    """
    statistics = [
        buffer
        for layer in objective.modules()
        if layer.training and getattr(layer, "track_running_stats", False)
        for buffer in layer.buffers(recurse=False)
    ]

    def broadcast(*_: Any) -> None:
        for buffer in statistics:
            torch.distributed.broadcast(buffer, 0)

    return [objective.register_forward_pre_hook(broadcast)] if statistics else []


def local(weight: nn.Parameter) -> nn.Parameter:
    """This process's rows of a sharded parameter, in the same memory; the parameter itself if it is not sharded."""
    found: Any = weight.detach()
    return nn.Parameter(found.to_local(), weight.requires_grad) if hasattr(found, "to_local") else weight


def with_silence(micro_batch: MicroBatch, model: PalModel, encoded: bool) -> MicroBatch:
    """A micro-batch of conversations without clips, and one more with a second of silence, of which nothing is trained.

    So this process gathers the same weights and reduces the same gradients as those whose conversations have clips.

    Args:
        micro_batch: its batch has no clips.
        model: model that trains.
        encoded: the clips of others are features from the cache.
    """
    silent = Tokens(ids=[0, AUDIO, 0], clips=[0], labels=[IGNORE] * 3)
    batch = replace(micro_batch.batch, conversations=[*micro_batch.batch.conversations, silent], prepared=None)
    if encoded:
        encoders = [model.ears.encoder(i) for i in range(len(model.ears.encoders))]
        tokens = [torch.zeros(max(1, round(1 / one.seconds_per_token)), one.width) for one in encoders]
        return replace(micro_batch, batch=replace(batch, encoded=[EncodedClip(tuple(tokens), 1.0)]))
    return replace(micro_batch, batch=replace(batch, waveforms=[torch.zeros(model.sampling_rate)]))


def without_weights(model: PalModel) -> PalModel:
    """A copy of a model whose parameters have no memory; buffers are copied."""
    known: dict[int, Any] = {id(model.tokenizer): model.tokenizer}
    for parameter in model.parameters():
        known[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(model, known)


@torch.no_grad()
def unsharded(model: PalModel, bare: PalModel) -> PalModel:
    """`bare`, made by `without_weights` of the same model, with the weights and buffers of the sharded one.

    All processes call it. Weights are gathered one after the other and moved to host memory.
    """
    whole: dict[int, nn.Parameter] = {}
    for name, weight in model.named_parameters():
        tensor: Any = weight.detach()
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        empty = bare.get_parameter(name)
        whole[id(empty)] = nn.Parameter(_on_host(tensor), empty.requires_grad)
    for name, empty in list(bare.named_parameters(remove_duplicate=False)):  # tied weights stay tied
        parent, _, last = name.rpartition(".")
        setattr(bare.get_submodule(parent), last, whole[id(empty)])
    for name, buffer in model.named_buffers():
        bare.get_buffer(name).copy_(buffer)
    return bare


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)
