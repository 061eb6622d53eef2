"""Engines: how the processes of a run share a stage's work and memory.

One process and DDP hold the whole model in each process (`TrainingEngine`); `FullyShardedEngine` cuts weights,
gradients and optimizer state among them. `pal.train.zero` has DeepSpeed's, and `pal.train.launcher` chooses one. An
engine also has those methods of `accelerate.Accelerator` that a step needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pal.model import PalModel
from pal.train import optim
from pal.train.distributed import ALONE, HostReduce, Writers
from pal.train.master_weights import MasterWeights, Parts, masters_of
from pal.train.objectives import MicroBatch, Objective
from pal.train.recipe import Stage
from pal.train.sharding import gathered, local, shard, sharded_modules, unsharded, with_silence, without_weights
from pal.train.shards import Shard, StoredTensors, rows_of


class TrainingEngine:
    """One process, or several with the whole model in each, which average their gradients (DDP)."""

    shards = False
    """True if processes hold shards of the weights during a stage."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.num_processes: int = accelerator.num_processes
        self.name = "ddp" if accelerator.num_processes > 1 else "one process"
        """Name in the run's report."""
        self.host_reduce = HostReduce(accelerator.num_processes)
        self.writers: Writers | None = ALONE if accelerator.is_main_process else None
        """Processes that write checkpoints; None: this one writes nothing."""

    def place(self, model: PalModel) -> None:
        """Move the model to where a stage is set up."""
        model.to(self.device)

    def prepare(
        self, objective: Objective, parameters: Parts, stage: Stage
    ) -> tuple[nn.Module, dict[str, dict[str, nn.Parameter]]]:
        """The objective for the steps of a stage, and the parameters that the optimizer updates.

        Args:
            objective: objective of the stage, whose weights are set.
            parameters: part -> name -> parameter that the stage trains.
            stage: stage of the recipe.
        """
        objective.to(self.device)
        return self.accelerator.prepare(objective), {part: dict(named) for part, named in parameters.items()}

    def optimizer(self, parameters: Parts, stage: Stage) -> tuple[MasterWeights, torch.optim.Optimizer]:
        """Master weights and optimizer of a stage.

        Args:
            parameters: those that `prepare` gave.
            stage: stage of the recipe.

        Raises:
            ConfigError: the stage's master weights are not possible.
        """
        masters = masters_of(parameters, stage, self.take_gradients)
        return masters, optim.adamw(optim.parameter_groups(masters.parts, stage), stage)

    def release(self, model: PalModel) -> PalModel:
        """The whole model after a stage."""
        return model

    # One step

    def aligned(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches, such that all processes run the same modules, if the engine needs that."""
        return micro_batches

    def no_sync(self, objective: nn.Module) -> AbstractContextManager[None]:
        """Context manager in which the backward pass need not average gradients."""
        context: AbstractContextManager[None] = self.accelerator.no_sync(objective)
        return context

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        loss.backward()

    def take_gradients(self) -> None:
        """Complete the gradients of the parameters that `prepare` gave."""

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        """All-reduce over the processes."""
        reduced: Tensor = self.accelerator.reduce(tensor, reduction=reduction)
        return reduced

    def finish_gradients(self, parameters: list[nn.Parameter], scale: float, max_norm: float) -> Tensor:
        """Multiply the gradients by `scale`, then clip their norm; returns it as it was before."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for dtype in {gradient.dtype for gradient in gradients}:  # one kernel for each dtype
            torch._foreach_mul_([gradient for gradient in gradients if gradient.dtype == dtype], scale)
        return self.clip_grad_norm_(parameters, max_norm)

    def clip_grad_norm_(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Clip the gradients' norm, which is returned."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update what `optimizer` holds, and clear the gradients."""
        optimizer.step()
        optimizer.zero_grad()

    # Between steps

    def whole(self) -> AbstractContextManager[None]:
        """Context manager in which each process has all weights on its device; all enter and leave it together."""
        return nullcontext()

    def settle(self) -> None:
        """Make weights and optimizer state those that checkpoints hold."""

    def weight_shards(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor | Shard]:
        """The part of some weights that this process holds."""
        return weights

    def optimizer_shards(
        self, optimizer: torch.optim.Optimizer, names: Mapping[int, str], masters: MasterWeights
    ) -> Mapping[str, Tensor | Shard]:
        """The part of the optimizer's state that this process writes, as `optim.optimizer_tensors` names it.

        Args:
            optimizer: optimizer that `optimizer` gave.
            names: id of each parameter that it updates -> its name.
            masters: master weights that `optimizer` gave.
        """
        return self.with_places(optim.optimizer_tensors(optimizer, names, masters.copies))

    def load_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        masters: MasterWeights,
        tensors: StoredTensors,
    ) -> None:
        """Restore the state from a checkpoint, written by any engine and number of processes.

        Raises:
            BundleError: the state belongs to other parameters.
        """
        optim.load_optimizer_tensors(optimizer, parameters, self.own_part(tensors))
        masters.give_weights()

    def with_places(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor | Shard]:
        """Tensors of the optimizer with their places in the whole ones."""
        return tensors

    def own_part(self, tensors: StoredTensors) -> Mapping[str, Tensor]:
        """The part of stored tensors of the optimizer that this process needs."""
        return tensors


class FullyShardedEngine(TrainingEngine):
    """FSDP2: each process holds some rows of all weights, gradients and optimizer state.

    A stage starts from the whole model in host memory. `prepare` shards it group by group (`pal.train.sharding`), and
    the optimizer gets the rows of this process as ordinary parameters. `release` gathers the model in host memory
    again, so that the next stage can freeze other parts and add adapters.
    """

    shards = True

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.name = "fsdp2"
        # of modules that return views, which nothing here changes in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        from torch.distributed.device_mesh import init_device_mesh

        self.writers = Writers.of_all(accelerator.process_index, accelerator.num_processes)
        self.mesh = init_device_mesh(self.device.type, (self.num_processes,))
        self._objective: Any = None
        self._stage: Stage | None = None
        self._bare: PalModel | None = None
        """The model without its weights and without hooks."""
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        """Sharded parameters that train, and their rows of this process."""
        self._whole: list[nn.Parameter] = []
        """Trained parameters that are not sharded."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        """Whole shape of each sharded parameter that trains, by name."""

    def place(self, model: PalModel) -> None:
        """Stay in host memory: `prepare` moves group by group."""

    def prepare(
        self, objective: Objective, parameters: Parts, stage: Stage
    ) -> tuple[nn.Module, dict[str, dict[str, nn.Parameter]]]:
        """See `TrainingEngine.prepare`."""
        self._stage = stage
        places = {id(p): name for name, p in objective.named_parameters()}
        self._bare = without_weights(objective.model)
        shard(objective, self.mesh, with_encoders=stage.cache is None)
        objective.to(self.device)  # buffers, and what is not sharded
        self._objective = objective
        self._pairs, self._whole, self._shapes = [], [], {}
        held: dict[str, dict[str, nn.Parameter]] = {}
        for part, named in parameters.items():
            held[part] = {}
            for name, before in named.items():
                weight = objective.get_parameter(places[id(before)])
                own = local(weight)
                held[part][name] = own
                if own is weight:
                    self._whole.append(weight)
                else:
                    self._pairs.append((weight, own))
                    self._shapes[name] = tuple(weight.shape)
        return objective, held

    def release(self, model: PalModel) -> PalModel:
        """The whole model in host memory; a device never holds more than one weight of it."""
        assert self._bare is not None
        whole = unsharded(self._objective.model, self._bare)
        self._objective, self._bare, self._pairs, self._whole = None, None, [], []
        return whole

    def aligned(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """See `TrainingEngine.aligned`: gathering weights and reducing gradients take all processes."""
        assert self._stage is not None
        return aligned(micro_batches, self._objective.model, self._stage, self.host_reduce)

    def no_sync(self, objective: nn.Module) -> AbstractContextManager[None]:
        """Nothing: gradients that are not reduced at once would not be sharded."""
        return nullcontext()

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Hand the gradients of the sharded parameters to the rows of this process."""
        for weight, own in self._pairs:
            if weight.grad is not None:
                sharded: Any = weight.grad
                more = sharded.to_local()
                own.grad = more if own.grad is None else own.grad.add_(more)
                weight.grad = None
        if self._whole:
            used = self.host_reduce.sum(*(weight.grad is not None for weight in self._whole))
            for weight, count in zip(self._whole, used, strict=True):
                if count:
                    weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    torch.distributed.all_reduce(weight.grad.div_(self.num_processes))

    @torch.no_grad()
    def clip_grad_norm_(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """See `TrainingEngine.clip_grad_norm_`; the norm is that over all processes."""
        # all that trains is sharded, but numbers without a dimension
        sharded, once = (
            [p.grad for p in parameters if p.grad is not None and (p.ndim > 0) == kind] for kind in (True, False)
        )
        square = nn.utils.get_total_norm(sharded).to(self.device).square()
        torch.distributed.all_reduce(square)
        norm = (square + nn.utils.get_total_norm(once).to(self.device).square()).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def whole(self) -> AbstractContextManager[None]:
        """See `TrainingEngine.whole`: answers of different lengths take different numbers of forward passes."""
        return gathered(self._objective)

    def settle(self) -> None:
        """Free gathered weights, which may be left from a forward pass without a backward pass."""
        for module in sharded_modules(self._objective):
            module.reshard()

    def weight_shards(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor | Shard]:
        """See `TrainingEngine.weight_shards`."""
        return {name: self._shard(tensor.detach(), None) for name, tensor in weights.items()}

    def with_places(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor | Shard]:
        """See `TrainingEngine.with_places`."""
        return {key: self._shard(tensor.detach(), self._shape(key)) for key, tensor in tensors.items()}

    def own_part(self, tensors: StoredTensors) -> Mapping[str, Tensor]:
        """See `TrainingEngine.own_part`."""
        found = {}
        for key in tensors:
            shape = self._shape(key)
            found[key] = tensors[key] if shape is None else tensors.rows(key, *self._rows(shape))
        return found

    def _shard(self, tensor: Any, shape: tuple[int, ...] | None) -> Tensor | Shard:
        if hasattr(tensor, "to_local"):
            tensor, shape = tensor.to_local(), tuple(tensor.shape)
        return tensor if shape is None else Shard(tensor, self._rows(shape)[0], shape)

    def _shape(self, key: str) -> tuple[int, ...] | None:
        """Whole shape of a sharded tensor of the optimizer, `name/entry`; None of one that each process holds."""
        name, _, entry = key.rpartition("/")
        return None if entry == "step" else self._shapes.get(name)

    def _rows(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return rows_of(shape[0], self.accelerator.process_index, self.num_processes)


def aligned(
    micro_batches: list[MicroBatch], model: PalModel, stage: Stage, host_reduce: HostReduce
) -> list[MicroBatch]:
    """The micro-batches, with a second of silence in each where this process has no clip but another one does."""
    if stage.objective != "answers":  # the only one whose batches mix conversations with clips and without
        return micro_batches
    heard = host_reduce.sum(*(len(one.batch.clips) > 0 for one in micro_batches))
    return [
        one if not count or len(one.batch.clips) else with_silence(one, model, stage.cache is not None)
        for one, count in zip(micro_batches, heard, strict=True)
    ]
