"""What a stage minimises. An objective is the module that is run in parallel: it holds the model."""

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
from pal.data.augment import heard_within, loudness
from pal.data.manifest import Record
from pal.errors import ConfigError
from pal.model import PalModel
from pal.train.recipe import Stage
from pal.train.tag_targets import tag_targets
from pal.train.transcript import TranscriptRoute
from pal.transfer import to_device
from pal.types import Batch, Frames, TagSpan


class MixedClips(NamedTuple):
    """Clips and what sounds in them, after some were added to others."""

    clips: list[Tensor] | Frames
    """Waveforms, or what the encoder's front-end made of them."""
    tags: list[list[TagSpan]]
    known_BJ: Tensor
    """Of which labels it is known whether they hold."""


@dataclass(frozen=True)
class MicroBatch:
    """One process's part of a step."""

    batch: Batch
    datasets: list[str]
    """Per clip of the batch, the dataset it comes from."""
    seed: int
    counts: bool = True
    """False for a repeated part whose loss is multiplied by 0."""
    mixed: MixedClips | None = None
    """What the objective `tags` trains on, once its `prepare` has mixed clips."""


class LossOutput(NamedTuple):
    """Summed loss of a micro-batch, so that a step can take the mean over all of them."""

    sum: Tensor
    """On the device."""
    items: int
    """What it is a sum over: trained tokens, or clips."""
    hits: tuple[Tensor | int, Tensor | int] = (0, 0)
    """Right, of how many: the accuracy that the log shows, where an objective has one. What the device counts stays
    there."""


class Objective(nn.Module, ABC):
    """Training loss of a micro-batch, as a sum and the number of its items."""

    unit = "tokens"
    """What the items of its loss are."""
    with_audio = True
    """Whether its batches have the clips."""

    def __init__(self, model: PalModel) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def forward(self, micro_batch: MicroBatch) -> LossOutput:
        """The loss of a step is the sum of all sums by the number of all items."""

    def prepare(self, micro_batch: MicroBatch) -> MicroBatch:
        """What can be done on the host before `forward`, in the threads that load; it works without, too."""
        return micro_batch

    def head(self) -> dict[str, nn.Parameter]:
        """Weights that belong to the objective alone: kept in checkpoints, not in bundles."""
        return {}


class AnswerLoss(Objective):
    """Next-token cross-entropy on the answers, given audio and question."""

    class Config(StrictConfig):
        """Options of the objective."""

        per: Per = "token"
        """What counts alike: every token, as usual, or every answer, so that long ones weigh no more."""

    def __init__(self, model: PalModel, config: Config) -> None:
        super().__init__(model)
        self.per = config.per
        self.unit = f"{config.per}s"

    def prepare(self, micro_batch: MicroBatch) -> MicroBatch:
        """The encoders' front-ends."""
        batch = micro_batch.batch
        return replace(
            micro_batch, batch=replace(batch, prepared=self.model.ears.prepare(batch.encoded or batch.waveforms))
        )

    def forward(self, micro_batch: MicroBatch) -> LossOutput:
        """As `PalModel.loss`."""
        return LossOutput(*self.model.loss(micro_batch.batch, self.per))


class TextLoss(AnswerLoss):
    """The same without the audio: the LLM learns the language of questions and answers, and to guess."""

    with_audio = False


class TranscriptLoss(Objective):
    """The same with the clip's tags in the place of its sound, which the LLM reads as words."""

    def __init__(self, model: PalModel, config: TranscriptRoute.Config, labels: dict[str, set[str]]) -> None:
        """`labels`: dataset -> the labels it uses."""
        super().__init__(model)
        self.per = config.per
        self.unit = f"{config.per}s"
        self.transcript = TranscriptRoute(config, model, set().union(*labels.values()))

    def forward(self, micro_batch: MicroBatch) -> LossOutput:
        """The LLM's loss on the answers."""
        features = self.transcript.features(micro_batch.batch)
        inputs = self.transcript(features, micro_batch.batch.conversations, self.model.llm, self.model.llm.side)
        return LossOutput(*self.model.llm.loss(inputs, self.per))


class TagLoss(Objective):
    """Supervised pre-training of the encoder: a throw-away linear head says at each token what sounds.

    Clip by clip, binary cross-entropy of the pooled probability `sum p^2 / sum p` (linear softmax
    pooling, Wang, Li and Metze 2019) against the labels that hold anywhere in the clip, plus, where
    the labels of a clip have times, of every token. A label is only wrong for a clip if the clip's
    dataset uses it at all.
    """

    unit = "clips"

    class Config(StrictConfig):
        """Options of the objective."""

        frame_weight: float = Field(default=1.0, ge=0)
        """Weight of the loss at tokens beside that of clips."""
        mixup: float = Field(default=0.0, ge=0, le=1)
        """Share of the clips that another clip of the batch is added to."""
        mixup_db: float = Field(default=10.0, ge=0, le=20)
        """Most that the added clip is louder or softer than the clip itself, in dB, so that neither covers the other. A
        silent clip is not mixed, nor one of which the end would leave too little of a tag to be heard."""
        encoder: int = 0
        """Which of the model's encoders, counted from 0."""

    def __init__(self, model: PalModel, config: Config, labels: dict[str, set[str]]) -> None:
        """`labels`: dataset -> the labels it uses."""
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
        # Most labels are absent most of the time: start from there instead of from one half.
        nn.init.constant_(self.linear.bias, -3.0)

    def head(self) -> dict[str, nn.Parameter]:
        """The linear layer."""
        return dict(self.linear.named_parameters(prefix="linear"))

    def prepare(self, micro_batch: MicroBatch) -> MicroBatch:
        """Mixes clips, and the encoder's front-end."""
        clips, tags, known_BJ = self.mix(micro_batch)
        frames = clips if isinstance(clips, Frames) else self.model.ears.prepare_with(self.config.encoder, clips)
        return replace(micro_batch, mixed=MixedClips(frames, tags, known_BJ))

    def forward(self, micro_batch: MicroBatch) -> LossOutput:
        """Sum over clips of each one's mean loss over its known labels.

        A hit is a clip whose likeliest known label is one of its own.
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
        # Written out, because autocast refuses torch's version on probabilities.
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
        """Clips after mixing, with the seed of the work."""
        given = micro_batch.batch.tags or [None] * len(micro_batch.batch.waveforms)
        unknown_J = torch.zeros(len(self.index), dtype=torch.bool)
        known = [
            self.used.get(dataset, unknown_J) if spans is not None else unknown_J
            for spans, dataset in zip(given, micro_batch.datasets, strict=True)
        ]
        tags = [list(spans or ()) for spans in given]
        waveforms = list(micro_batch.batch.waveforms)
        if self.training and self.config.mixup and len(waveforms) > 1:
            waveforms, tags, known = self._mix(waveforms, tags, known, micro_batch.seed)
        return MixedClips(waveforms, tags, torch.stack(known))

    def _mix(
        self, waveforms: list[Tensor], tags: list[list[TagSpan]], known: list[Tensor], seed: int
    ) -> tuple[list[Tensor], list[list[TagSpan]], list[Tensor]]:
        """Add to some clips another one from its start; both clips' labels hold, if both are known."""
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
                # Only where all of the other clip fits do its labels without a time hold in the mixture.
                if any(span.start is None or span.end is None for span in added):
                    continue
                heard = heard_within(theirs_N.numpy(), rate, added, 0, size)
                if heard is None:
                    continue
                added = heard
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
    """The objective of a stage.

    Args:
        records: everything the stage can draw; read for its labels, where the objective has any.
    """
    where = f"stage '{stage.name}': options of '{stage.objective}'"
    if stage.objective == "tags":
        config = parse(TagLoss.Config, stage.options, where)
        if stage.train.connector or stage.train.projectors or stage.train.llm != "none":
            raise ConfigError(f"stage '{stage.name}': objective 'tags' trains the encoder alone")
        return TagLoss(model, config, dataset_labels(records))
    if stage.objective == "answers":
        return AnswerLoss(model, parse(AnswerLoss.Config, stage.options, where))
    if stage.train.encoder or stage.train.connector or stage.train.projectors:
        raise ConfigError(f"stage '{stage.name}': objective '{stage.objective}' has no audio and trains the LLM alone")
    if stage.objective == "text":
        return TextLoss(model, parse(AnswerLoss.Config, stage.options, where))
    return TranscriptLoss(model, parse(TranscriptRoute.Config, stage.options, where), dataset_labels(records))


def dataset_labels(records: Iterable[Record]) -> dict[str, set[str]]:
    """Labels that each dataset uses."""
    labels: dict[str, set[str]] = {}
    for record in records:
        if record.tags is not None:
            labels.setdefault(record.dataset, set()).update(span.label for span in record.tags)
    return labels


def _mean(loss: Tensor, mask: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean over the masked-in entries of some axes; 0 where there are none."""
    mask = mask.expand_as(loss)
    return (loss * mask).sum(axes) / mask.sum(axes).clamp_min(1)
