"""The plan: for each stage parameters, operations, memory, and how long a step may take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pal.audio_tower import AudioTower
from pal.backbone.cost import AddedCost, Cost, StepSize, decoder, kv_bytes, total
from pal.connectors.base import Connector
from pal.integrations.cost import route_cost
from pal.model import PalModel
from pal.plan.counted import connected, heard
from pal.plan.gpus import GPU, gpu_of
from pal.plan.skeleton import skeleton
from pal.train.recipe import BatchSize, Recipe, Stage
from pal.train.stages import freeze
from pal.types import AudioFeatures

ANSWER_SHARE = 0.25
"""Of the text tokens, those of answers, which are trained."""
UTILISATION = 0.4
"""Of the peak that a training step reaches; Llama 3's reached 0.38 to 0.43 (arXiv 2407.21783, table 4)."""
RESERVE = 1.5e9
"""Bytes for CUDA's context, kernels' workspace, and what the allocator cannot use."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """What one forward pass keeps: of all parts, with the logits."""
    reserve: float = RESERVE

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.reserve


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes."""

    name: str
    objective: str
    trained: dict[str, int]
    """Part -> parameters that the stage trains."""
    parameters: dict[str, int]
    """Part -> all of its parameters, adapters of this stage included."""
    clips: int
    """Of one forward pass."""
    conversations: int
    """Of one forward pass."""
    passes: int
    """Forward passes of a step."""
    audio_tokens: list[int]
    """Of a clip, for each stream."""
    sequence: int
    """Rows of a conversation in the LLM."""
    costs: dict[str, Cost]
    """Part -> of a step; `saved` of one forward pass."""
    memory: Memory
    fits: bool
    seconds: float
    """Of a step: an estimate."""
    steps: int | None
    """Where the recipe gives their number."""

    @property
    def trained_share(self) -> float:
        """Trained parameters by all."""
        return sum(self.trained.values()) / sum(self.parameters.values())

    @property
    def forward(self) -> float:
        """Operations of a step's forward passes."""
        return sum(cost.forward for cost in self.costs.values())

    @property
    def backward(self) -> float:
        """Operations of a step's backward passes."""
        return sum(cost.backward for cost in self.costs.values())


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on one GPU."""

    gpu: GPU
    clip_seconds: float
    text_tokens: int
    parameters: dict[str, int]
    """Part -> parameters of the model that the recipe starts from."""
    kv_bytes: int
    """Of one clip, while an answer about it is made, in bfloat16."""
    stages: list[StagePlan]

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(stage.fits for stage in self.stages)


def make(recipe: Recipe, gpu: str = "H100", seconds: float = 10.0, text_tokens: int = 128) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: what to plan.
        gpu: a name in `GPUS`; one of them does the whole batch.
        seconds: length of each clip.
        text_tokens: of a question and its answer.

    Raises:
        ConfigError: the recipe cannot be built, or the GPU is not known.
    """
    chosen = gpu_of(gpu)
    model = skeleton(recipe)
    parameters = _parameters(model)
    ears = _Listening(model.ears, seconds)
    stages = [_stage(model, stage, chosen, ears, text_tokens) for stage in recipe.stages]
    step = StepSize(clips=1, rows=1, text=text_tokens, targets=1)
    cache = kv_bytes(model.llm, _added(model, step, ears.listen()[0]), size=2)
    return Plan(chosen, seconds, text_tokens, parameters, cache, stages)


def _stage(model: PalModel, stage: Stage, gpu: GPU, ears: _Listening, text_tokens: int) -> StagePlan:
    trained = freeze(model, stage.train)
    streams, hearing = ears.listen()
    batch = _one_pass(stage.batch, ears.seconds, stage.by_clip)
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
    )
    # an objective may leave out the LLM (tags), or the audio (text, transcripts)
    hears = stage.objective == "answers"
    added = _added(model, step, streams) if hears else []
    costs = {"encoder": Cost(), "connector": Cost(), "llm": Cost()}
    if hears or stage.by_clip:
        # with a cache of features, too: this is a step whose clips are all new
        costs["encoder"] = hearing["encoder"].times(batch.clips)
    if hears:
        costs["connector"] = hearing["connector"].times(batch.clips)
    if not stage.by_clip:
        costs["llm"] = decoder(model.llm, step, added)
    # the audio parts were counted in four bytes a number
    heard = (costs["encoder"].saved + costs["connector"].saved) * (0.5 if autocast else 1.0)
    kept = costs["llm"].saved + costs["llm"].again + heard
    counts = {part: sum(p.numel() for p in weights.values()) for part, weights in trained.items()}
    weights = [p for of_part in trained.values() for p in of_part.values()]
    # float32 copies have both moments and gradients in float32
    sizes = [p.numel() * (4 if stage.master_weights else p.itemsize) for p in weights]
    copies = sum(4 * p.numel() for p in weights if stage.master_weights and p.itemsize < 4)
    memory = Memory(
        weights=sum(tensor.numel() * tensor.itemsize for tensor in (*model.parameters(), *model.buffers())),
        gradients=sum(sizes),
        optimizer=2.0 * sum(sizes) + copies,
        activations=kept,
    )
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
        seconds=_seconds(total(costs.values()), memory, batch.passes, gpu, autocast),
        steps=stage.steps,
    )


def _parameters(model: PalModel) -> dict[str, int]:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    return {part: count(module) for part, module in model.parts().items()}


class _Listening:
    """What encoders and connectors make of a clip and cost; stages that train the same of them share the answer."""

    def __init__(self, ears: AudioTower, seconds: float) -> None:
        self.seconds = seconds
        self._ears = ears
        self._known: dict[tuple[bool, ...], tuple[list[AudioFeatures], dict[str, Cost]]] = {}

    def listen(self) -> tuple[list[AudioFeatures], dict[str, Cost]]:
        """The streams that a clip becomes, and what encoders and connectors cost, as they train now."""
        trained = tuple(parameter.requires_grad for parameter in self._ears.parameters())
        if trained not in self._known:
            self._known[trained] = self._listen()
        return self._known[trained]

    def _listen(self) -> tuple[list[AudioFeatures], dict[str, Cost]]:
        ears = self._ears
        features, costs = zip(
            *(heard(ears.encoder(i), self.seconds) for i in range(len(ears.encoders))),
            strict=True,
        )
        streams, made = zip(
            *(
                connected(one, [features[i] for i in takes])
                for one, takes in zip(ears.connectors, ears.takes, strict=True)
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
    """Of a conversation."""
    passes: int


def _one_pass(batch: BatchSize, seconds: float, by_clip: bool) -> _ForwardPass:
    """What one of a step's forward passes has, where every clip is so long and has questions enough."""
    each = 1 if by_clip else batch.rows_per_clip or 1
    limits = [
        None if batch.rows is None else batch.rows // each,
        batch.clips,
        None if batch.seconds is None else int(batch.seconds / seconds),
    ]
    clips = max(1, min(limit for limit in limits if limit is not None))
    passes = min(batch.accumulate, clips)
    of_pass = -(-clips // passes)
    questions = min(batch.turns, each)
    return _ForwardPass(of_pass, of_pass * -(-each // questions), questions, passes)


def _seconds(cost: Cost, memory: Memory, passes: int, gpu: GPU, autocast: bool) -> float:
    """Of a step: the slower of computing and moving, and the optimizer, which only moves."""
    peak = gpu.bf16 if autocast and gpu.bf16 is not None else gpu.fp32
    computing = (cost.forward + cost.backward) / (UTILISATION * peak)
    # weights are read forward and backward, activations are written and read
    moving = passes * 2 * (memory.weights + memory.activations) / gpu.bandwidth
    # AdamW reads weights, gradients and both moments, and writes all but the gradients
    updating = (4 * memory.gradients + 3 * memory.gradients) / gpu.bandwidth
    return max(computing, moving) + updating
