"""`ZeroEngine`: ZeRO stage 2 of DeepSpeed, as an engine of training.

Each process holds all weights, and a part of the gradients, the float32 weights and the optimizer's state. DeepSpeed
reduces gradients, keeps the float32 weights and gathers the updated ones. Precision, accumulation, clipping, schedule
and checkpoints stay those of the other engines: DeepSpeed gets a module that only holds what trains, and a loss.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pal.errors import BundleError, ConfigError
from pal.model import PalModel
from pal.train import optim
from pal.train.distributed import Writers
from pal.train.engines import TrainingEngine, aligned
from pal.train.master_weights import MasterWeights, Parts, masters_of
from pal.train.objectives import MicroBatch, Objective
from pal.train.recipe import Stage
from pal.train.sharding import share_statistics
from pal.train.shards import Shard, StoredTensors

MISSING = "keep.engine=zero2 needs DeepSpeed: DS_BUILD_OPS=0 pip install 'pal-audio[deepspeed]'"

_SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,  # DeepSpeed needs a number, and only counts by it
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 2, "round_robin_gradients": False, "compute_grad_norm": False},
}
"""With neither bf16 nor fp16, DeepSpeed leaves weights as they are and reduces gradients in float32."""


class Slice(NamedTuple):
    """Elements of a flattened parameter that a process updates."""

    group: int
    """Index of the optimizer's group, which has one flat tensor in each process."""
    first: int
    """Index of the first of them in the parameter."""
    place: int
    """Index of the first of them in the flat tensor."""
    length: int

    @property
    def own(self) -> slice:
        """Where they are in the flattened parameter."""
        return slice(self.first, self.first + self.length)

    @property
    def flat(self) -> slice:
        """Where they are in the flat tensor."""
        return slice(self.place, self.place + self.length)


def slices(lengths: Sequence[int], size: int, part: int, group: int = 0) -> list[Slice]:
    """The elements of each of several parameters in one part of them all, laid end to end and cut every `size`.

    Args:
        lengths: number of elements of each parameter.
        size: number of elements of a part.
        part: index of the part.
        group: that of the result.
    """
    found, end = [], 0
    for length in lengths:
        begin, end = end, end + length
        first = min(max(part * size, begin), end)
        last = max(first, min((part + 1) * size, end))
        found.append(Slice(group, first - begin, max(0, first - part * size), last - first))
    return found


class ZeroEngine(TrainingEngine):
    """ZeRO stage 2: whole weights in each process; gradients, float32 weights and optimizer state in parts."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.name = "zero2"
        self.writers = Writers.of_all(accelerator.process_index, accelerator.num_processes)
        self._deepspeed: Any = None
        self._optimizer: Any = None
        self._objective: Any = None
        self._stage: Stage | None = None
        self._trained: list[list[nn.Parameter]] = []
        """Parameters of each group, in the order in which they lie in its flat tensors."""
        self._slices: dict[int, Slice] = {}
        """Elements of each parameter, by its id, that this process updates."""
        self._used: list[bool] = []
        """For each group, True if a backward pass of this step reached it."""
        self._hooks: list[Any] = []
        self._is_last = True
        """True in the last micro-batch of a step."""

    def prepare(
        self, objective: Objective, parameters: Parts, stage: Stage
    ) -> tuple[nn.Module, dict[str, dict[str, nn.Parameter]]]:
        """See `TrainingEngine.prepare`."""
        self._objective, self._stage = objective, stage
        objective.to(self.device)
        self._hooks = share_statistics(objective)
        return objective, {part: dict(named) for part, named in parameters.items()}

    def optimizer(self, parameters: Parts, stage: Stage) -> tuple[MasterWeights, torch.optim.Optimizer]:
        """See `TrainingEngine.optimizer`; its groups hold flat tensors of this process, in float32."""
        half = [p for named in parameters.values() for p in named.values() if p.dtype != torch.float32]
        if half and not stage.master_weights:
            raise ConfigError(
                f"stage '{stage.name}': keep.engine=zero2 always holds float32 weights; set 'master_weights: true', or "
                "use keep.engine=fsdp2"
            )
        if not half:
            masters_of(parameters, stage)  # which it refuses if the stage asks for some
        groups = [one for group in optim.parameter_groups(parameters, stage) for one in _by_dtype(group)]
        self._trained = [list(group["params"]) for group in groups]
        self._used = [False] * len(groups)
        for index, trained in enumerate(self._trained):
            for parameter in trained:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._noting(index)))
        optimizer = optim.adamw(groups, stage)
        optimizer.register_step_pre_hook(_leave_out_unused)
        self._deepspeed = _started(_Trained(self._trained), optimizer, self.device)
        self._optimizer = optimizer
        self._find_slices()
        return MasterWeights(parameters, on=False), optimizer

    def release(self, model: PalModel) -> PalModel:
        """See `TrainingEngine.release`."""
        self._deepspeed.destroy()
        for hook in self._hooks:
            hook.remove()
        for trained in self._trained:
            for parameter in trained:
                parameter.data = parameter.detach().clone()  # not of the flat tensors, which would stay as a whole
        self._deepspeed, self._optimizer, self._objective = None, None, None
        self._trained, self._slices, self._hooks = [], {}, []
        return model

    # One step

    def aligned(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """See `TrainingEngine.aligned`: reducing gradients takes all processes."""
        assert self._stage is not None
        return aligned(micro_batches, self._objective.model, self._stage, self.host_reduce)

    @contextmanager
    def no_sync(self, objective: nn.Module) -> Iterator[None]:
        """Gradients are reduced in it, too, else they would not be in parts; but the step is not complete."""
        self._is_last = False
        try:
            yield
        finally:
            self._is_last = True

    def backward(self, loss: Tensor) -> None:
        """See `TrainingEngine.backward`."""
        self._deepspeed.set_gradient_accumulation_boundary(self._is_last)
        with torch.autocast(self.device.type, enabled=False):  # DeepSpeed warns of one that it did not set up
            self._deepspeed.backward(self._deepspeed(loss), scale_wrt_gas=False)

    @torch.no_grad()
    def finish_gradients(self, parameters: list[nn.Parameter], scale: float, max_norm: float) -> Tensor:
        """See `TrainingEngine.finish_gradients`; the optimizer multiplies them when it updates."""
        norm: Tensor = self._deepspeed.optimizer.scaled_global_norm() * scale
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self._optimizer.grad_scale = 1 / (scale * clip)
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """See `TrainingEngine.step`."""
        for group, used in zip(optimizer.param_groups, self.host_reduce.sum(*self._used), strict=True):
            group["used"] = used > 0
        self._used = [False] * len(self._used)
        self._deepspeed.step()

    def _noting(self, group: int) -> Any:
        def note(_: Tensor) -> None:
            self._used[group] = True

        return note

    # Checkpoints

    def weight_shards(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor | Shard]:
        """See `TrainingEngine.weight_shards`; each process writes some of them."""
        mine, parts = self.accelerator.process_index, self.num_processes
        return {
            name: _turn(tensor.detach(), place % parts == mine) for place, (name, tensor) in enumerate(weights.items())
        }

    def optimizer_shards(
        self, optimizer: torch.optim.Optimizer, names: Mapping[int, str], masters: MasterWeights
    ) -> Mapping[str, Tensor | Shard]:
        """See `TrainingEngine.optimizer_shards`; each process writes the whole state of some of the parameters."""
        flats: dict[str, tuple[nn.Parameter, Tensor]] = {}
        steps: dict[str, Tensor] = {}
        for index, group in enumerate(optimizer.param_groups):
            (flat,) = group["params"]
            entries = dict(optimizer.state.get(flat, {}))
            step = entries.pop("step", None)
            for parameter in self._trained[index]:
                name = names[id(parameter)]
                own = entries | ({optim.MASTER: flat} if parameter.dtype != torch.float32 else {})
                flats |= {f"{name}/{entry}": (parameter, tensor.detach()) for entry, tensor in own.items()}
                if step is not None:
                    steps[f"{name}/step"] = step
        return _Gathered(flats, steps, self._slices, self.accelerator.process_index, self.num_processes)

    @torch.no_grad()
    def load_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        masters: MasterWeights,
        tensors: StoredTensors,
    ) -> None:
        """See `TrainingEngine.load_optimizer`."""
        for key in tensors:
            name, _, entry = key.rpartition("/")
            parameter = parameters.get(name)
            if parameter is None:
                raise BundleError(
                    f"checkpoint: optimizer state of '{name}' fits no parameter that the recipe trains; start a new run"
                )
            mine = self._slices[id(parameter)]
            (flat,) = optimizer.param_groups[mine.group]["params"]
            state = optimizer.state[flat]
            if entry == "step":
                step = tensors[key].to(flat.device)
                state[entry] = step if entry not in state else torch.maximum(state[entry], step)
                continue
            target = flat if entry == optim.MASTER else state.setdefault(entry, torch.zeros_like(flat))
            if mine.length:
                target[mine.flat] = _elements(tensors, key, tuple(parameter.shape), mine).to(flat.device)

    def _find_slices(self) -> None:
        """Note which elements of each parameter this process updates.

        Raises:
            RuntimeError: DeepSpeed lays them out in another way.
        """
        for index, trained in enumerate(self._trained):
            (flat,) = self._optimizer.param_groups[index]["params"]
            own = slices([p.numel() for p in trained], len(flat), self.accelerator.process_index, index)
            for parameter, mine in zip(trained, own, strict=True):
                if not torch.equal(flat[mine.flat], parameter.detach().flatten()[mine.own].float()):
                    raise RuntimeError("this version of DeepSpeed lays out its flat tensors in a way that is not known")
                self._slices[id(parameter)] = mine


class _Trained(nn.Module):
    """What DeepSpeed takes for the model: the trained parameters, and a forward pass that returns the loss."""

    def __init__(self, trained: Sequence[Sequence[nn.Parameter]]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(nn.ParameterList(group) for group in trained)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class _Gathered(Mapping[str, Tensor | Shard]):
    """State of the optimizer, gathered parameter by parameter when it is read; all processes read it in order.

    Each process gets the whole tensors of some parameters, and nothing of the others.
    """

    def __init__(
        self,
        flats: Mapping[str, tuple[nn.Parameter, Tensor]],
        steps: Mapping[str, Tensor],
        own: Mapping[int, Slice],
        process: int,
        processes: int,
    ) -> None:
        self._flats, self._steps, self._own = flats, steps, own
        self._process = process
        order = {id(parameter): None for parameter, _ in flats.values()}
        self._owners = {identity: place % processes for place, identity in enumerate(order)}

    def __getitem__(self, key: str) -> Tensor | Shard:
        if key in self._steps:
            return self._steps[key]
        parameter, flat = self._flats[key]
        mine = self._own[id(parameter)]
        whole = flat.new_zeros(parameter.numel())
        whole[mine.own] = flat[mine.flat]
        owner = self._owners[id(parameter)] if parameter.ndim else 0
        torch.distributed.reduce(whole, owner)
        return _turn(whole.view(parameter.shape), owner == self._process)

    def __iter__(self) -> Iterator[str]:
        yield from self._flats
        yield from self._steps

    def __len__(self) -> int:
        return len(self._flats) + len(self._steps)


def _turn(whole: Tensor, is_mine: bool) -> Tensor | Shard:
    """A whole tensor as one shard, or no rows of it; a number is no shard, and the first process writes it."""
    return Shard(whole if is_mine else whole[:0], 0, tuple(whole.shape)) if whole.ndim else whole


def _elements(tensors: StoredTensors, key: str, shape: tuple[int, ...], mine: Slice) -> Tensor:
    """The elements of a stored tensor; no more rows of it are read than they lie in."""
    if not shape:
        return tensors[key].flatten()
    width = max(1, torch.Size(shape[1:]).numel())
    row = mine.first // width
    rows = tensors.rows(key, row, -(-(mine.first + mine.length) // width))
    return rows.flatten()[mine.first - row * width :][: mine.length]


def _by_dtype(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group for each dtype of its parameters, since they lie in one tensor."""
    dtypes = dict.fromkeys(p.dtype for p in group["params"])
    return [group | {"params": [p for p in group["params"] if p.dtype == dtype]} for dtype in dtypes]


def _leave_out_unused(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Leave out groups that no backward pass reached in any process, as if they had no gradients."""
    for group in optimizer.param_groups:
        if not group["used"]:
            for flat in group["params"]:
                flat.grad = None


def check_installed() -> None:
    """Raise ConfigError if DeepSpeed is not installed."""
    if find_spec("deepspeed") is None:
        raise ConfigError(MISSING)


def _started(trained: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Any:
    """DeepSpeed's engine; the processes are already connected."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # else it compiles an operation for exchange in shared memory, which takes minutes; torch's is used without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    numbers: list[Any] = [p for p in trained.parameters() if not p.ndim]
    for number in numbers:
        number.ds_optim_param = True  # not broadcast, which fails with what has no dimension; all have the same
    engine, *_ = deepspeed.initialize(
        model=trained, optimizer=optimizer, config=dict(_SETTINGS), dist_init_required=False
    )
    for number in numbers:
        del number.ds_optim_param
    return engine
