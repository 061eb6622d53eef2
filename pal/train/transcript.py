"""Integration of tag embeddings in place of audio, to train an LLM on sounds from text alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from pydantic import Field

from pal.backbone.llm import Backbone
from pal.backbone.loss import Per
from pal.backbone.stream_kv import Layout
from pal.config import StrictConfig
from pal.errors import ConfigError
from pal.integrations.base import IntegrationOutput, Route
from pal.model import PalModel
from pal.train.tag_targets import tag_targets
from pal.transfer import to_device
from pal.types import AudioFeatures, Batch


class TranscriptRoute(Route):
    """Rows of summed label embeddings, one for each time step: the output of an ideal encoder.

    Rows have the positions of audio tokens, one row for several tokens, so that the LLM learns the position distances
    of real audio. The route has no weights and uses no audio.
    """

    class Config(StrictConfig):
        """Options of the objective `transcript`."""

        per: Per = "token"
        """See `AnswerLoss.Config.per`."""
        seconds_per_row: float = Field(default=0.2, gt=0)
        """Time between two rows, in seconds."""

    def __init__(self, config: Config, model: PalModel, labels: Iterable[str]) -> None:
        super().__init__()
        names = sorted(labels)
        if not names:
            raise ConfigError("objective 'transcript': no record of the stage's data has tags; use sources with tags")
        self.numbers = {name: i for i, name in enumerate(names)}
        words = [model.tokenizer(" " + name, add_special_tokens=False)["input_ids"] for name in names]
        self._ids_X = torch.tensor([token for ids in words for token in ids])
        self._label_X = torch.repeat_interleave(torch.tensor([len(ids) for ids in words]))
        self._counts_J = torch.tensor([len(ids) for ids in words])
        self._rate = model.sampling_rate
        self._seconds_per_token = model.ears.encoder(0).seconds_per_token
        self.tokens = max(1, round(config.seconds_per_row / self._seconds_per_token))

    def features(self, batch: Batch) -> AudioFeatures:
        """Tags of a batch, [U, S, J]: 1 where a label is active; a label without times is active throughout.

        Raises:
            ConfigError: a clip has no tags.
        """
        known_tags = batch.tags or [None] * len(batch.waveforms)
        if any(spans is None for spans in known_tags):
            raise ConfigError("objective 'transcript': a clip has no tags; leave its source out of the stage's data")
        seconds = self.tokens * self._seconds_per_token
        rows = tuple(math.ceil(clip / seconds) for clip in batch.durations(self._rate))
        S = max(rows)
        held = []
        for spans in known_tags:
            clip_J, held_SJ, timed_J = tag_targets(list(spans or ()), self.numbers, S, seconds)
            held.append(torch.where(timed_J, held_SJ, clip_J))
        return AudioFeatures(torch.stack(held), rows, seconds)

    def inject(self, features: AudioFeatures, llm: Backbone) -> IntegrationOutput:
        """One row for each `seconds_per_row` of the clip."""
        embedded_XD = llm.embed(to_device(self._ids_X, llm.device))
        sums_JD = embedded_XD.new_zeros(len(self.numbers), llm.width)
        counts_J = to_device(self._counts_J, llm.device)
        means_JD = sums_JD.index_add(0, to_device(self._label_X, llm.device), embedded_XD) / counts_J[:, None]
        return IntegrationOutput(
            lengths=[rows * self.tokens for rows in features.lengths],
            layout=Layout(self._seconds_per_token, tokens=self.tokens, rows=1),
            rows_USD=to_device(features.x_BAE, llm.device).to(means_JD) @ means_JD,
        )
