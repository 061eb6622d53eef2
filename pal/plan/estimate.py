"""Estimates for each stage: parameters, FLOPs, memory, and time of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from pal.audio_tower import AudioTower
from pal.backbone.cost import AddedCost, Cost, StepSize, decoder, kv_bytes, total
from pal.connectors.base import Connector
from pal.errors import ConfigError
from pal.integrations.cost import route_cost
from pal.model import PalModel
from pal.plan.counted import connected, encoded
from pal.plan.gpus import GPU, gpu_of
from pal.plan.parallel import Parallel, Shares, exchange_seconds, shares
from pal.plan.skeleton import skeleton
from pal.train.recipe import BatchSize, Recipe, Stage
from pal.train.stages import freeze
from pal.types import AudioFeatures

ANSWER_SHARE = 0.25
"""Share of the text tokens that belong to answers, which are trained."""
UTILISATION = 0.4
"""MFU of a training step unless one is given; Llama 3's reached 0.38 to 0.43 (arXiv 2407.21783, table 4)."""
RESERVE = 1.5e9
"""Bytes for the CUDA context, kernel workspace and allocator fragmentation."""


@dataclass(frozen=True)
class Memory:
    """Peak memory of a step on one GPU, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Activations saved by one forward pass, of all parts, with the logits."""
    buffers: float = 0.0
    """Buffers for exchanges with other GPUs."""
    reserve: float = RESERVE

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers + self.reserve


@dataclass(frozen=True)
class StagePlan:
    """Estimate of one stage."""

    name: str
    objective: str
    trained: dict[str, int]
    """Part -> number of trained parameters."""
    parameters: dict[str, int]
    """Part -> number of all parameters, with adapters of this stage."""
    clips: int
    """Clips of one forward pass."""
    conversations: int
    """Conversations of one forward pass."""
    passes: int
    """Forward passes of a step."""
    audio_tokens: list[int]
    """Audio tokens of a clip, for each stream."""
    sequence: int
    """Sequence length of a conversation in the LLM."""
    costs: dict[str, Cost]
    """Part -> cost of a step on one GPU; its `saved` is of one forward pass."""
    memory: Memory
    fits: bool
    seconds: float
    """Estimated seconds of a step."""
    exchange_seconds: float
    """Estimated seconds of its exchanges between GPUs, which run while the step computes."""
    steps: int | None
    """Number of steps, if the recipe sets it or the numbers of records are given."""

    @property
    def trained_share(self) -> float:
        """Share of parameters that are trained."""
        return sum(self.trained.values()) / sum(self.parameters.values())

    @property
    def forward(self) -> float:
        """FLOPs of a step's forward passes."""
        return sum(cost.forward for cost in self.costs.values())

    @property
    def backward(self) -> float:
        """FLOPs of a step's backward passes."""
        return sum(cost.backward for cost in self.costs.values())


@dataclass(frozen=True)
class Plan:
    """Estimate of a recipe on one GPU, or on each of several."""

    gpu: GPU
    parallel: Parallel
    utilisation: float
    """MFU of a step."""
    clip_seconds: float
    text_tokens: int
    parameters: dict[str, int]
    """Part -> number of parameters of the initial model."""
    kv_bytes: int
    """KV cache of one clip during generation, in bfloat16."""
    turns: int
    """Turns of a conversation, each a clip, a question and an answer."""
    conversation_bytes: int
    """KV cache of such a conversation (`PalModel.chat`, `PalModel.listen`), in bfloat16; storage that grows may have as
    much room again."""
    stages: list[StagePlan]

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return all(stage.fits for stage in self.stages)


def make(
    recipe: Recipe,
    gpu: str = "H100",
    seconds: float = 10.0,
    text_tokens: int = 128,
    turns: int = 1,
    parallel: Parallel | None = None,
    utilisation: float = UTILISATION,
    records: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: to estimate.
        gpu: a name in `GPUS`.
        seconds: length of each clip.
        text_tokens: of a question and its answer.
        turns: of a conversation whose keys and values are kept.
        parallel: several GPUs; default: one GPU computes the whole batch.
        utilisation: MFU of a step, such as a measured one.
        records: data source -> number of its records, for stages whose length is set in epochs.

    Raises:
        ConfigError: the recipe cannot be built, or the GPU or a source of `records` is not known.
    """
    chosen, parallel, records = gpu_of(gpu), parallel or Parallel(), records or {}
    for name in records:
        if name not in recipe.data:
            raise ConfigError(f"records: no data source '{name}'; known: {', '.join(recipe.data)}")
    model = skeleton(recipe)
    parameters = _parameters(model)
    ears = _AudioSide(model.ears, seconds)
    setting = _Setting(chosen, parallel, utilisation, text_tokens)
    stages = [_stage(model, stage, setting, ears, _steps(recipe, stage, records)) for stage in recipe.stages]
    step = StepSize(clips=1, rows=1, text=text_tokens, targets=1)
    added = _added(model, step, ears.streams_and_costs()[0])
    clip, turn = (kv_bytes(model.llm, added, 2, text) for text in (0, text_tokens))
    return Plan(chosen, parallel, utilisation, seconds, text_tokens, parameters, clip, turns, turns * turn, stages)


@dataclass(frozen=True)
class _Setting:
    gpu: GPU
    parallel: Parallel
    utilisation: float
    text_tokens: int


def _steps(recipe: Recipe, stage: Stage, records: Mapping[str, int]) -> int | None:
    """Steps of a stage; None if its length is set in epochs and a source's number of records is not known."""
    sources = recipe.stage_sources(stage)
    if stage.steps is not None or any(name not in records for name in sources):
        return stage.steps
    rows = stage.batch.rows or (stage.batch.clips or 0) * (stage.batch.rows_per_clip or 1)
    if not rows or stage.epochs is None:
        return None
    repeats = {name: 1.0 if source.weight is not None else source.repeat for name, source in sources.items()}
    return max(1, round(stage.epochs * sum(repeats[name] * records[name] for name in sources) / rows))


def _stage(model: PalModel, stage: Stage, setting: _Setting, ears: _AudioSide, steps: int | None) -> StagePlan:
    gpu, text_tokens = setting.gpu, setting.text_tokens
    trained = freeze(model, stage.train)
    streams, audio_costs = ears.streams_and_costs()
    batch = _one_pass(stage.batch, ears.seconds, stage.by_clip, setting.parallel.gpus)
    questions = batch.questions
    autocast = stage.precision == "bf16"
    step = StepSize(
        clips=batch.clips,
        rows=batch.conversations,
        text=text_tokens * questions,
        targets=max(1, round(ANSWER_SHARE * text_tokens)) * questions,
        llm=stage.train.llm,
        integration=stage.train.projectors,
        features=any(stream.x_BAE.requires_grad for stream in streams),
        checkpointing=stage.gradient_checkpointing,
        recompute=stage.recompute_audio,
        autocast=autocast,
        shares=model.llm.shares_prefixes,
    )
    # an objective may leave out the LLM (tags, ctc), or the audio (text, transcripts)
    added = _added(model, step, streams) if stage.runs_connectors and stage.runs_llm else []
    costs = {"encoder": Cost(), "connector": Cost(), "llm": Cost()}
    if stage.runs_connectors or stage.by_clip:
        # also with a feature cache: the estimate is of a step without cached clips
        costs["encoder"] = audio_costs["encoder"].times(batch.clips)
    if stage.runs_connectors:
        costs["connector"] = audio_costs["connector"].times(batch.clips)
    if stage.runs_llm:
        costs["llm"] = decoder(model.llm, step, added)
    # the audio parts were counted in float32
    audio_saved = (costs["encoder"].saved + costs["connector"].saved) * (0.5 if autocast else 1.0)
    kept = costs["llm"].saved + costs["llm"].again + audio_saved
    counts = {part: sum(p.numel() for p in weights.values()) for part, weights in trained.items()}
    weights = [p for of_part in trained.values() for p in of_part.values()]
    # master weights have moments and gradients in float32
    sizes = [p.numel() * (4 if stage.master_weights else p.itemsize) for p in weights]
    copies = sum(4 * p.numel() for p in weights if stage.master_weights and p.itemsize < 4)
    alone = Shares(
        weights=sum(tensor.numel() * tensor.itemsize for tensor in (*model.parameters(), *model.buffers())),
        gradients=sum(sizes),
        optimizer=2.0 * sum(sizes) + copies,
        buffers=0.0,
        exchanged=0.0,
    )
    share = shares(setting.parallel, model, stage, alone, batch.passes)
    memory = Memory(share.weights, share.gradients, share.optimizer, activations=kept, buffers=share.buffers)
    exchanging = exchange_seconds(share, setting.parallel, gpu)
    costs = {part: Cost(c.forward * batch.passes, c.backward * batch.passes, c.saved) for part, c in costs.items()}
    return StagePlan(
        name=stage.name,
        objective=stage.objective,
        trained=counts,
        parameters=_parameters(model),
        clips=batch.clips,
        conversations=batch.conversations,
        passes=batch.passes,
        audio_tokens=[stream.lengths[0] for stream in streams],
        sequence=step.text + sum(one.rows for one in added),
        costs=costs,
        memory=memory,
        fits=memory.total <= gpu.memory,
        seconds=max(exchanging, _seconds(total(costs.values()), memory, batch.passes, setting, autocast)),
        exchange_seconds=exchanging,
        steps=steps,
    )


def _parameters(model: PalModel) -> dict[str, int]:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    return {part: count(module) for part, module in model.parts().items()}


class _AudioSide:
    """Streams and costs of encoders and connectors for one clip, cached by which of their parameters train."""

    def __init__(self, ears: AudioTower, seconds: float) -> None:
        self.seconds = seconds
        self._ears = ears
        self._counted: dict[tuple[bool, ...], tuple[list[AudioFeatures], dict[str, Cost]]] = {}

    def streams_and_costs(self) -> tuple[list[AudioFeatures], dict[str, Cost]]:
        """Streams of a clip, and costs of "encoder" and "connector" with their current trainable parameters."""
        trained = tuple(parameter.requires_grad for parameter in self._ears.parameters())
        if trained not in self._counted:
            self._counted[trained] = self._count()
        return self._counted[trained]

    def _count(self) -> tuple[list[AudioFeatures], dict[str, Cost]]:
        ears = self._ears
        features, costs = zip(
            *(encoded(ears.encoder(i), self.seconds) for i in range(len(ears.encoders))),
            strict=True,
        )
        streams, made = zip(
            *(
                connected(one, [features[i] for i in indices])
                for one, indices in zip(ears.connectors, ears.encoder_indices, strict=True)
                if isinstance(one, Connector)
            ),
            strict=True,
        )
        return list(streams), {"encoder": total(costs), "connector": total(made)}


def _added(model: PalModel, step: StepSize, streams: list[AudioFeatures]) -> list[AddedCost]:
    routes = model.integration.routes()
    return [
        route_cost(route, step, stream.lengths[0], model.llm) for route, stream in zip(routes, streams, strict=True)
    ]


@dataclass(frozen=True)
class _ForwardPass:
    clips: int
    conversations: int
    questions: int
    """Questions of a conversation."""
    passes: int


def _one_pass(batch: BatchSize, seconds: float, by_clip: bool, gpus: int) -> _ForwardPass:
    """Contents of one forward pass of a GPU's step, if every clip lasts `seconds` and has enough questions."""
    each = 1 if by_clip else batch.rows_per_clip or 1
    limits = [
        None if batch.rows is None else batch.rows // each,
        batch.clips,
        None if batch.seconds is None else int(batch.seconds / seconds),
    ]
    clips = -(-max(1, min(limit for limit in limits if limit is not None)) // gpus)
    passes = min(batch.accumulate, clips)
    of_pass = -(-clips // passes)
    questions = min(batch.turns, each)
    return _ForwardPass(of_pass, of_pass * -(-each // questions), questions, passes)


def _seconds(cost: Cost, memory: Memory, passes: int, setting: _Setting, autocast: bool) -> float:
    """Seconds of a step: the slower of computation and memory traffic, plus the optimizer's memory traffic."""
    gpu = setting.gpu
    peak = gpu.bf16 if autocast and gpu.bf16 is not None else gpu.fp32
    computing = (cost.forward + cost.backward) / (setting.utilisation * peak)
    # weights are read forward and backward, activations are written and read
    moving = passes * 2 * (memory.weights + memory.activations) / gpu.bandwidth
    # AdamW reads weights, gradients and both moments, and writes all but the gradients
    updating = (4 * memory.gradients + 3 * memory.gradients) / gpu.bandwidth
    return max(computing, moving) + updating
