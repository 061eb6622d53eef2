"""Recipe: the training configuration, in one strict YAML file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from pal.backbone.finetuning import LLMPart, LoRA
from pal.config import StrictConfig, parse
from pal.errors import ConfigError
from pal.model_config import ModelConfig
from pal.train.source_config import Source
from pal.train.tracking import TrackerName
from pal.train.validation import Validation

PARTS = ("encoder", "connector", "projectors", "llm")
"""Parts that a stage can train, as in `PalModel.parts`."""

_WORDS = {"full": True, "none": False}
_Switch = Annotated[bool, BeforeValidator(lambda value: _WORDS.get(value, value) if isinstance(value, str) else value)]
_LLM = Annotated[
    LLMPart,
    BeforeValidator(lambda value: {True: "full", False: "none"}.get(value, value)),
]


class Trained(StrictConfig):
    """Trainable parts of a stage; the rest is frozen."""

    encoder: _Switch | list[int] = False
    """All encoders, or a list of encoder indices, from 0."""
    connector: _Switch = False
    projectors: _Switch = False
    """The integration's own weights."""
    llm: _LLM = "none"
    """"no_ffn" freezes the feed-forward networks, "attention" everything but the attention layers."""
    lora: LoRA = LoRA()

    def part(self, name: str) -> bool:
        """True if the part is trained, completely or in part."""
        return self.llm != "none" if name == "llm" else bool(getattr(self, name))


class BatchSize(StrictConfig):
    """Batch limits. A batch is filled with clips, each with some of its rows, up to the first limit reached."""

    rows: int | None = Field(default=None, gt=0)
    """Maximum number of conversations of a batch, over all processes."""
    clips: int | None = Field(default=None, gt=0)
    """Maximum number of distinct clips of a batch."""
    seconds: float | None = Field(default=None, gt=0)
    """Maximum total length of the distinct clips of a batch, in seconds."""
    rows_per_clip: int | None = Field(default=None, gt=0)
    """Maximum number of questions about one clip in a batch, which share its audio. Default: rows are drawn
    individually."""
    turns: int = Field(default=1, gt=0)
    """Maximum number of questions about one clip to join as turns of one conversation, with the audio only once."""
    accumulate: int = Field(default=1, gt=0)
    """Gradient accumulation: number of micro-batches of a batch, each with its own forward and backward pass."""
    bucket: int | None = Field(default=None, gt=1)
    """Length bucketing: number of batches whose clips are sorted by length and cut into batches again, which are then
    shuffled. This reduces padding: 100 gives about 3 % of padding, random order 70 % (2000 clips of half a second to
    half a minute, 16 per batch). Lengths are those in the files' headers, before augmentation. Default: random
    order."""

    @model_validator(mode="after")
    def _some_limit(self) -> BatchSize:
        if self.rows is None and self.clips is None and self.seconds is None:
            raise ValueError("give at least one of 'rows', 'clips' and 'seconds'")
        return self

    @property
    def grouped(self) -> bool:
        """True if rows about one clip are drawn together."""
        return self.rows_per_clip is not None or self.clips is not None

    @property
    def by_length(self) -> bool:
        """True if batches depend on the lengths of clips."""
        return self.seconds is not None or self.bucket is not None


class Stage(StrictConfig):
    """Training stage."""

    name: str = "stage"
    objective: Literal["answers", "ctc", "text", "transcript", "tags"] = "answers"
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the objective, see `pal.train.objectives`."""
    train: Trained
    lr: float | dict[str, float]
    """Maximum learning rate, or one for each part (and for "head", the objective's own weights)."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay of matrices; norms, biases and other vectors have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up of the learning rate from 0."""
    steps: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the stage's data, instead of `steps`."""
    batch: BatchSize
    data: list[str] | dict[str, float] | None = None
    """Names of the sources, or name -> weight; default: all sources."""
    temperature: float | None = Field(default=None, gt=0)
    """Temperature T of the mixture, instead of weights: a source of n clips (or records, if these are drawn one by one)
    has a share proportional to n^(1/T). 1 is the mixture without this key; a large T draws equally from all sources."""
    clip_grad: float | None = Field(default=1.0, gt=0)
    """Gradient clipping: maximum norm of the gradient; None: no clipping."""
    gradient_checkpointing: bool = False
    """Recompute the LLM's layers in the backward pass, from their saved inputs."""
    recompute_audio: bool = True
    """Recompute projector activations and audio K/V in the backward pass, unless `gradient_checkpointing` recomputes
    whole layers. `pal plan` shows the memory saved and the FLOPs added."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of autocast; weights and optimizer state keep their dtype."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the LLM's layers in the first step, which then takes longer. "auto": on CUDA."""
    cuda_graphs: Literal["auto"] | bool = "auto"
    """Replay training steps as CUDA graphs, one for each batch size, rounded up. "auto": on CUDA with one process."""
    master_weights: bool = False
    """Float32 master weights for trained bfloat16 weights (`llm.dtype`), so that updates below the 8 bits of bfloat16
    are not lost. The optimizer then holds 12 bytes per weight instead of 4, and checkpoints include the master
    weights."""
    cache: Path | None = None
    """Folder of the encoder feature cache (`pal.features`), shared by all runs with the same encoders: each clip is
    encoded only once. Needs frozen encoders and sources without augmentation. Losses differ from those without the
    cache in their last bits, since every clip is encoded alone instead of in a batch."""
    save_llm: bool = False
    """Save the LLM and its tokenizer after the stage, in transformers' format, in the run's folder `llm/`."""

    @property
    def by_clip(self) -> bool:
        """True if the objective trains on clips, so that each clip is drawn once, for any number of rows about it."""
        return self.objective == "tags"

    @property
    def runs_llm(self) -> bool:
        """True if the objective runs the LLM's layers."""
        return self.objective not in ("ctc", "tags")

    @property
    def runs_connectors(self) -> bool:
        """True if the objective runs encoders and connectors."""
        return self.objective in ("answers", "ctc")

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either 'steps' or 'epochs'")
        if not any(self.train.part(part) for part in PARTS):
            raise ValueError(f"'train' names no part; set one of {', '.join(PARTS)}")
        if isinstance(self.lr, dict):
            unknown = sorted(set(self.lr) - {*PARTS, "head"})
            if unknown:
                raise ValueError(f"lr for unknown part '{unknown[0]}'; known: {', '.join((*PARTS, 'head'))}")
            missing = [part for part in PARTS if self.train.part(part) and part not in self.lr]
            if missing:
                raise ValueError(f"'lr' has no entry for '{missing[0]}', which the stage trains")
        return self

    @model_validator(mode="after")
    def _has_audio(self) -> Stage:
        if self.batch.bucket is not None and self.objective == "text":
            raise ValueError("objective 'text' has no audio to sort by length; remove 'bucket'")
        return self

    @model_validator(mode="after")
    def _can_cache(self) -> Stage:
        if self.cache is not None and self.train.encoder:
            raise ValueError("'cache' needs frozen encoders, but the stage trains an encoder; remove 'cache'")
        if self.cache is not None and not self.runs_connectors:
            raise ValueError(f"objective '{self.objective}' uses no frozen encoder; remove 'cache'")
        return self


EngineName = Literal["auto", "ddp", "fsdp2", "zero2"]
"""How several processes share the work and the memory of training; see `pal.train.launcher`."""


def _other_stages(name: object) -> object:
    if name == "zero3":
        raise ValueError("of DeepSpeed only ZeRO stage 2 runs; 'fsdp2' shards what stage 3 does")
    if name == "zero1":
        raise ValueError("of DeepSpeed only ZeRO stage 2 runs; 'zero2' shards what stage 1 does, and the gradients")
    return name


class CheckpointConfig(StrictConfig):
    """Checkpoints, log, loading, engine and limits of faults. These settings do not change the result."""

    checkpoint_every: int = Field(default=200, gt=0)
    """Steps between two checkpoints, the maximum that a killed run loses."""
    checkpoint_seconds: float | None = Field(default=None, gt=0)
    """Maximum number of seconds between two checkpoints."""
    checkpoints: int = Field(default=2, gt=0)
    """Number of newest checkpoints to keep."""
    log_every: int = Field(default=10, gt=0)
    """Steps averaged in one line of the log."""
    workers: int | None = Field(default=None, ge=0)
    """Number of loader threads or processes; 0 loads batches in the training thread. Default: 2 with an accelerator or
    with processes, else 0, since threads compete with training on a CPU (docs/experiments.md)."""
    loader: Literal["threads", "processes"] = "threads"
    """Where batches are read, decoded, augmented and tokenised. Processes scale where threads wait for each other, and
    each takes the memory of its imports (docs/data.md)."""
    prefetch: int = Field(default=3, gt=0)
    """Number of batches loaded ahead."""
    engine: Annotated[EngineName, BeforeValidator(_other_stages)] = "auto"
    """With several processes, as `torchrun` or `accelerate launch` start them: `ddp`, the whole model in each; `fsdp2`,
    weights, gradients and optimizer state sharded; `zero2`, gradients and optimizer state sharded, by DeepSpeed.
    `auto`: what `accelerate launch` was configured for, else `ddp`. A run can be resumed with another engine."""
    track: list[TrackerName] = Field(default_factory=list)
    """Programs that show the log while the run trains; each is an extra of this package."""
    max_bad: int = Field(default=100, ge=0)
    """Maximum number of bad clips: records about clips that cannot be used are left out, and listed in the run's
    `quarantine.jsonl`. With more, the run ends. 0: it ends at the first."""
    max_nonfinite: int = Field(default=10, ge=0)
    """Maximum number of steps with a NaN or infinite loss or gradient: they change no weights, and are listed in the
    run's `skipped_steps.jsonl`. With more, the run ends. 0: it ends at the first."""


class Recipe(StrictConfig):
    """Training configuration."""

    seed: int = 0
    model: ModelConfig | None = None
    """Configuration of a new model."""
    bundle: Path | None = None
    """Saved model to train further, instead of `model`."""
    start: dict[Literal["encoder", "connector", "projectors", "llm"], Path] = Field(default_factory=dict)
    """Part of `model` -> bundle with its initial weights."""
    data: dict[str, Source] = Field(min_length=1)
    stages: list[Stage] = Field(min_length=1)
    validation: Validation | None = None
    keep: CheckpointConfig = CheckpointConfig()
    notes: str | None = None
    """Free text that goes into `train.json`."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if (self.model is None) == (self.bundle is None):
            raise ValueError("give either 'model' or 'bundle'")
        for i, stage in enumerate(self.stages):
            for name in stage.data or ():
                if name not in self.data:
                    raise ValueError(f"stages.{i}: no data source '{name}'; known: {', '.join(self.data)}")
            if stage.temperature is not None:
                for name, source in self.stage_sources(stage).items():
                    if source.weight is not None or source.repeat != 1:
                        key = "repeat" if source.weight is None else "weight"
                        raise ValueError(
                            f"stages.{i}: 'temperature' decides the shares, but source '{name}' has '{key}'; remove one"
                        )
            augmented = [name for name, source in self.stage_sources(stage).items() if source.augment is not None]
            if stage.cache is not None and augmented:
                raise ValueError(
                    f"stages.{i}: 'cache' needs clips without augmentation, but source '{augmented[0]}' has 'augment'; "
                    "remove one of them"
                )
            if stage.cache is not None and self.keep.loader == "processes":
                raise ValueError(
                    f"stages.{i}: 'cache' encodes clips in the training process; set keep.loader to 'threads'"
                )
        names = [stage.name for stage in self.stages]
        for name in (self.validation and self.validation.stages) or ():
            if name not in names:
                raise ValueError(f"validation: no stage '{name}'; known: {', '.join(names)}")
        return self

    def stage_sources(self, stage: Stage) -> dict[str, Source]:
        """Sources of a stage, with the weights set by the stage."""
        # sorted, so that the order of the sources in a recipe does not change the batches
        if isinstance(stage.data, dict):
            return {name: self.data[name].model_copy(update={"weight": w}) for name, w in sorted(stage.data.items())}
        names = stage.data if stage.data is not None else self.data
        return {name: self.data[name] for name in sorted(names)}

    def settings(self) -> dict[str, Any]:
        """Settings that determine the result, as plain JSON; without `keep` and `notes`."""
        settings = self.model_dump(mode="json", exclude={"keep", "notes"})
        for source in settings["data"].values():
            if not source["read_to_end"]:
                del source["read_to_end"]  # so that runs of versions without the key can be resumed
            for key in ("skip_clips", "table"):
                if source[key] is None:
                    del source[key]
        if settings["validation"] is None:
            del settings["validation"]
        for stage in settings["stages"]:
            if stage["compile"] == "auto":
                del stage["compile"]
            if stage["cuda_graphs"] == "auto":
                del stage["cuda_graphs"]
            if not stage["master_weights"]:
                del stage["master_weights"]
            if stage["temperature"] is None:
                del stage["temperature"]
        return settings

    @property
    def digest(self) -> str:
        """SHA-256 of `settings`."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and the files that it extends.

    `extends: other.yaml`, or a list, names files relative to the recipe. Later files override earlier ones and the
    recipe overrides all, key by key; a list, or a part with another `name`, is replaced as a whole.

    Args:
        path: YAML file.
        overrides: `key=value` with a dotted path, such as `stages.0.lr=5e-4`; the value is YAML.

    Raises:
        ConfigError: one line with the fault and the known keys.
    """
    path = Path(path)
    data = _read(path, ())
    for override in overrides:
        _override(data, override)
    return parse(Recipe, data, where=f"recipe {path}")


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Keys of a file merged with those it extends; `above` is the chain of files that extend it."""
    if path.resolve() in above:
        raise ConfigError(f"recipe {path}: extends itself; remove one 'extends'")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"recipe {path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {path}: has no keys; known: {', '.join(sorted(Recipe.model_fields))}")
    bases = data.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"recipe {path}: 'extends' takes a file name or a list of them")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merged(merged, _read(path.parent / base, (*above, path.resolve())))
    return _merged(merged, data)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`base` overridden by `own`, key by key."""
    out = dict(base)
    for key, value in own.items():
        old = out.get(key)
        same = isinstance(old, dict) and isinstance(value, dict) and value.get("name", None) in (None, old.get("name"))
        out[key] = _merged(old, value) if same and isinstance(old, dict) else value
    return out


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted keys at which two settings differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        missing = object()
        return [
            key
            for name in keys
            for key in differences(a.get(name, missing), b.get(name, missing), f"{path}.{name}" if path else str(name))
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            key
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for key in differences(x, y, f"{path}.{i}" if path else str(i))
        ]
    return [] if a == b else [path]


def _override(data: dict[str, Any], override: str) -> None:
    """Set one dotted key of the parsed YAML, in place; the strict parser validates the result."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}' is not of the form key=value; write it such as stages.0.lr=5e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': '{text}' is not YAML") from None
    if isinstance(value, str):
        # YAML 1.1 reads 5e-4 as a string
        with suppress(ValueError):
            value = float(value)
    at: Any = data
    *parents, last = key.split(".")
    for name in parents:
        at = at[_index(at, name, override)] if isinstance(at, list) else _child(at, name, override)
    if isinstance(at, list):
        at[_index(at, last, override)] = value
    elif isinstance(at, dict):
        at[last] = value
    else:
        raise ConfigError(f"override '{override}': '{'.'.join(parents)}' has no keys below it")


def _child(at: Any, name: str, override: str) -> Any:
    if not isinstance(at, dict):
        raise ConfigError(f"override '{override}': '{name}' is below a value that has no keys")
    if at.get(name) is None:
        at[name] = {}
    return at[name]


def _index(at: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(at):
        raise ConfigError(f"override '{override}': '{name}' is not an index; the list has 0 to {len(at) - 1}")
    return int(name)
