"""Training losses. An objective wraps the model and is the module that DDP parallelises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pal.backbone.loss import Per
from pal.config import StrictConfig, parse
from pal.data.augment import audible_tags, loudness
from pal.data.manifest import Record
from pal.errors import ConfigError
from pal.model import PalModel
from pal.train.ctc import Alignment, answers_of
from pal.train.quarantine import LeftOut
from pal.train.recipe import Stage
from pal.train.tag_targets import tag_targets
from pal.train.transcript import TranscriptRoute
from pal.transfer import to_device
from pal.types import Batch, Frames, TagSpan


class MixedClips(NamedTuple):
    """Clips and their tags after mixup."""

    clips: list[Tensor] | Frames
    """Waveforms, or their front-end frames."""
    tags: list[list[TagSpan]]
    known_BJ: Tensor
    """Mask of the labels that are annotated, as present or absent."""


@dataclass(frozen=True)
class MicroBatch:
    """Micro-batch: one forward and backward pass of one process in a step."""

    batch: Batch
    datasets: list[str]
    """Dataset of each clip of the batch."""
    seed: int
    """Seed of mixup."""
    counts: bool = True
    """False for a repeated micro-batch whose loss is multiplied by 0."""
    mixed: MixedClips | None = None
    """Inputs of the objective `tags`, set by its `prepare`."""
    left_out: tuple[LeftOut, ...] = ()
    """Records that are not in the batch, since their clips cannot be used."""


class LossOutput(NamedTuple):
    """Summed loss of a micro-batch and its item count; a step takes the mean over all micro-batches."""

    sum: Tensor
    """On the device."""
    items: int
    """Number of summands: trained tokens, answers or clips."""
    hits: tuple[Tensor | int, Tensor | int] = (0, 0)
    """Numerator and denominator of the accuracy in the log, for objectives that have one. Tensors stay on the
    device."""


class Objective(nn.Module, ABC):
    """Training loss of a micro-batch, as a sum and the number of its items."""

    unit = "tokens"
    """Unit of the loss's items."""
    with_audio = True
    """True if its batches include clips."""

    def __init__(self, model: PalModel) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def forward(self, micro_batch: MicroBatch) -> LossOutput:
        """Summed loss. A step's loss is the sum over its micro-batches divided by their number of items."""

    def prepare(self, micro_batch: MicroBatch) -> MicroBatch:
        """Host-side preprocessing in the loader's threads; `forward` also accepts unprepared micro-batches."""
        return micro_batch

    def head(self) -> dict[str, nn.Parameter]:
        """Weights of the objective itself, which are saved in checkpoints but not in bundles."""
        return {}


class AnswerLoss(Objective):
    """Next-token cross-entropy on the answers, given audio and question."""

    class Config(StrictConfig):
        """Options of the objective."""

        per: Per = "token"
        """Unit of the mean: tokens, as usual, or answers, so that long answers do not weigh more."""

    def __init__(self, model: PalModel, config: Config) -> None:
        super().__init__(model)
        self.per = config.per
        self.unit = f"{config.per}s"

    def prepare(self, micro_batch: MicroBatch) -> MicroBatch:
        """Compute the encoders' front-end frames."""
        return _with_frames(self.model, micro_batch)

    def forward(self, micro_batch: MicroBatch) -> LossOutput:
        """See `PalModel.loss`."""
        return LossOutput(*self.model.loss(micro_batch.batch, self.per))


class TextLoss(AnswerLoss):
    """Cross-entropy on answers without audio: trains the LLM on the language of questions and answers."""

    with_audio = False


class TranscriptLoss(Objective):
    """Cross-entropy on answers, with label embeddings of the clip's tags in place of its audio."""

    def __init__(self, model: PalModel, config: TranscriptRoute.Config, labels: dict[str, set[str]]) -> None:
        """`labels`: dataset -> labels that it uses."""
        super().__init__(model)
        self.per = config.per
        self.unit = f"{config.per}s"
        self.transcript = TranscriptRoute(config, model, set().union(*labels.values()))

    def forward(self, micro_batch: MicroBatch) -> LossOutput:
        """The LLM's loss on the answers."""
        features = self.transcript.features(micro_batch.batch)
        inputs = self.transcript(features, micro_batch.batch.conversations, self.model.llm, "any")
        return LossOutput(*self.model.llm.loss(inputs, self.per))


class CTCLoss(Objective):
    """CTC loss of the connectors' tokens against the answer, which is what is heard, in order.

    A hit is an answer that is the best path of its clip.
    """

    unit = "tokens"

    def __init__(self, model: PalModel, answers: Iterable[str]) -> None:
        super().__init__(model)
        self.alignment = Alignment(model, answers)

    def head(self) -> dict[str, nn.Parameter]:
        """The linear maps and the blank."""
        return dict(self.alignment.named_parameters(prefix="alignment"))

    def prepare(self, micro_batch: MicroBatch) -> MicroBatch:
        """Compute the encoders' front-end frames."""
        return _with_frames(self.model, micro_batch)

    def forward(self, micro_batch: MicroBatch) -> LossOutput:
        """Summed loss of the target tokens. The LLM's layers are not run."""
        batch, llm = micro_batch.batch, self.model.llm
        targets = self.alignment.targets(batch.conversations)
        embedded_VD = llm.embed(to_device(self.alignment.vocabulary, llm.device))
        return LossOutput(*self.alignment(self.model.features(batch.clips), embedded_VD, targets))


class TagLoss(Objective):
    """Multi-label tagging loss to pre-train the encoder, with a linear head on each token that is not kept.

    For each clip, binary cross-entropy of the pooled probability `sum p^2 / sum p` (linear softmax
    pooling, Wang, Li and Metze 2019) against the clip's labels. Clips whose labels have times add the
    cross-entropy of each token. A label counts as absent from a clip only if the clip's dataset uses it.
    """

    unit = "clips"

    class Config(StrictConfig):
        """Options of the objective."""

        frame_weight: float = Field(default=1.0, ge=0)
        """Weight of the token loss relative to the clip loss."""
        mixup: float = Field(default=0.0, ge=0, le=1)
        """Share of the clips to which another clip of the batch is added."""
        mixup_db: float = Field(default=10.0, ge=0, le=20)
        """Maximum difference in level between the added clip and the clip, in dB, so that both are audible. A clip is
        not added if it is silent, or if cutting it would leave too little of a tag to be audible."""
        encoder: int = 0
        """Index of the model's encoder, from 0."""

    def __init__(self, model: PalModel, config: Config, labels: dict[str, set[str]]) -> None:
        """`labels`: dataset -> labels that it uses."""
        super().__init__(model)
        self.config = config
        names = sorted(set().union(*labels.values()))
        if not names:
            raise ConfigError("objective 'tags': no record of the stage's data has tags; use sources with tags")
        self.index = {name: i for i, name in enumerate(names)}
        self.used = {
            dataset: torch.tensor([name in used for name in names], dtype=torch.bool)
            for dataset, used in labels.items()
        }
        if not 0 <= config.encoder < len(model.ears.encoders):
            raise ConfigError(f"objective 'tags': no encoder {config.encoder} among {len(model.ears.encoders)}, from 0")
        self.linear = nn.Linear(model.ears.encoder(config.encoder).width, len(names))
        # most labels are absent most of the time: initial probability 0.05 instead of 0.5
        nn.init.constant_(self.linear.bias, -3.0)

    def head(self) -> dict[str, nn.Parameter]:
        """The linear layer."""
        return dict(self.linear.named_parameters(prefix="linear"))

    def prepare(self, micro_batch: MicroBatch) -> MicroBatch:
        """Mix clips and compute the encoder's front-end frames."""
        clips, tags, known_BJ = self.mix(micro_batch)
        frames = clips if isinstance(clips, Frames) else self.model.ears.prepare_with(self.config.encoder, clips)
        return replace(micro_batch, mixed=MixedClips(frames, tags, known_BJ))

    def forward(self, micro_batch: MicroBatch) -> LossOutput:
        """Summed loss of the clips; a clip's loss is the mean over its annotated labels.

        A hit is a clip whose most probable annotated label is present.
        """
        clips, tags, known_BJ = micro_batch.mixed or self.mix(micro_batch)
        features = self.model.ears.encode_with(self.config.encoder, clips)
        logits_BAJ = self.linear(features.x_BAE).float()
        mask_BA = features.mask_BA
        times = [tag_targets(spans, self.index, mask_BA.shape[1], features.seconds_per_token) for spans in tags]
        held = [torch.stack(parts) for parts in zip(*times, strict=True)]
        clip_BJ, frames_BAJ, timed_BJ, known_BJ = (to_device(x, logits_BAJ.device) for x in (*held, known_BJ))
        timed_BJ = timed_BJ & known_BJ

        probability_BAJ = logits_BAJ.sigmoid() * mask_BA[..., None]
        pooled_BJ = probability_BAJ.square().sum(1) / probability_BAJ.sum(1).clamp_min(1e-6)
        pooled_BJ = pooled_BJ.clamp(1e-6, 1 - 1e-6)
        # written out, since torch's function on probabilities raises under autocast
        clip_loss_BJ = -torch.where(clip_BJ > 0, pooled_BJ.log(), torch.log1p(-pooled_BJ))
        loss = _mean(clip_loss_BJ, known_BJ, (1,)).sum()
        if self.config.frame_weight:
            frame_loss_BAJ = F.binary_cross_entropy_with_logits(logits_BAJ, frames_BAJ, reduction="none")
            loss = (
                loss
                + self.config.frame_weight * _mean(frame_loss_BAJ, timed_BJ[:, None] & mask_BA[..., None], (1, 2)).sum()
            )
        best_B = pooled_BJ.masked_fill(~known_BJ, 0).argmax(1)
        held_BJ = (clip_BJ > 0) & known_BJ
        right = held_BJ.gather(1, best_B[:, None]).sum()
        return LossOutput(loss, len(tags), (right, held_BJ.any(1).sum()))

    def mix(self, micro_batch: MicroBatch) -> MixedClips:
        """Clips after mixup, seeded by the micro-batch."""
        known_tags = micro_batch.batch.tags or [None] * len(micro_batch.batch.waveforms)
        unknown_J = torch.zeros(len(self.index), dtype=torch.bool)
        known = [
            self.used.get(dataset, unknown_J) if spans is not None else unknown_J
            for spans, dataset in zip(known_tags, micro_batch.datasets, strict=True)
        ]
        tags = [list(spans or ()) for spans in known_tags]
        waveforms = list(micro_batch.batch.waveforms)
        if self.training and self.config.mixup and len(waveforms) > 1:
            waveforms, tags, known = self._mix(waveforms, tags, known, micro_batch.seed)
        return MixedClips(waveforms, tags, torch.stack(known))

    def _mix(
        self, waveforms: list[Tensor], tags: list[list[TagSpan]], known: list[Tensor], seed: int
    ) -> tuple[list[Tensor], list[list[TagSpan]], list[Tensor]]:
        """Add another clip to some of the clips; a mixture has the labels of both.

        Labels that are annotated in both clips are annotated in the mixture.
        """
        generator = torch.Generator().manual_seed(seed)
        mixed = (list(waveforms), list(tags), list(known))
        for i in range(len(waveforms)):
            chance, gain_db = torch.rand(2, generator=generator).tolist()
            other = (i + int(torch.randint(1, len(waveforms), (1,), generator=generator))) % len(waveforms)
            if chance >= self.config.mixup:
                continue
            gain = 10 ** (self.config.mixup_db * (2 * gain_db - 1) / 20)
            mine_N, theirs_N = waveforms[i], waveforms[other]
            size, rate, added = min(len(mine_N), len(theirs_N)), self.model.sampling_rate, tags[other]
            if len(theirs_N) > len(mine_N):
                # a label without times is valid in the mixture only if the whole other clip fits
                if any(span.start is None or span.end is None for span in added):
                    continue
                audible = audible_tags(theirs_N.numpy(), rate, added, 0, size)
                if audible is None:
                    continue
                added = audible
            mine, theirs = (loudness(x_N.numpy(), rate) if len(x_N) else 0.0 for x_N in (mine_N, theirs_N[:size]))
            if mine <= 0 or theirs <= 0:
                continue
            sum_N = mine_N.clone()
            sum_N[:size] += gain * mine / theirs * theirs_N[:size]
            mixed[0][i] = sum_N / max(1.0, float(sum_N.abs().max()))
            mixed[1][i] = tags[i] + added
            mixed[2][i] = known[i] & known[other]
        return mixed


def build_objective(model: PalModel, stage: Stage, records: Iterable[Record]) -> Objective:
    """Objective of a stage.

    Args:
        model: model to train.
        stage: stage of the recipe.
        records: all records of the stage; read only if the objective uses labels.
    """
    where = f"stage '{stage.name}': options of '{stage.objective}'"
    if stage.objective == "tags":
        config = parse(TagLoss.Config, stage.options, where)
        if stage.train.connector or stage.train.projectors or stage.train.llm != "none":
            raise ConfigError(f"stage '{stage.name}': objective 'tags' trains the encoder alone")
        return TagLoss(model, config, dataset_labels(records))
    if stage.objective == "ctc":
        parse(Alignment.Config, stage.options, where)
        if stage.train.projectors or stage.train.llm != "none":
            raise ConfigError(
                f"stage '{stage.name}': objective 'ctc' trains connectors and encoders, not the LLM or the projectors"
            )
        return CTCLoss(model, answers_of(records))
    if stage.objective == "answers":
        return AnswerLoss(model, parse(AnswerLoss.Config, stage.options, where))
    if stage.train.encoder or stage.train.connector or stage.train.projectors:
        raise ConfigError(f"stage '{stage.name}': objective '{stage.objective}' has no audio and trains the LLM alone")
    if stage.objective == "text":
        return TextLoss(model, parse(AnswerLoss.Config, stage.options, where))
    return TranscriptLoss(model, parse(TranscriptRoute.Config, stage.options, where), dataset_labels(records))


def _with_frames(model: PalModel, micro_batch: MicroBatch) -> MicroBatch:
    batch = micro_batch.batch
    return replace(micro_batch, batch=replace(batch, prepared=model.ears.prepare(batch.encoded or batch.waveforms)))


def dataset_labels(records: Iterable[Record]) -> dict[str, set[str]]:
    """Labels that each dataset uses."""
    labels: dict[str, set[str]] = {}
    for record in records:
        if record.tags is not None:
            labels.setdefault(record.dataset, set()).update(span.label for span in record.tags)
    return labels


def _mean(loss: Tensor, mask: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean over `axes` of the entries in the mask; 0 for an empty mask."""
    mask = mask.expand_as(loss)
    return (loss * mask).sum(axes) / mask.sum(axes).clamp_min(1)
