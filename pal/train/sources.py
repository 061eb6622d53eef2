"""Data of a run: its sources, which are opened, generated or prepared, and the data set of each stage."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from torch import Tensor

from pal import audio
from pal.config import parse
from pal.data.augment import Augment, cut_fault
from pal.data.collate import Collator, WaveformCache
from pal.data.manifest import Manifest, Record
from pal.data.record_index import RowGroups
from pal.data.record_source import RecordSource
from pal.data.tabular import TableRecords
from pal.errors import AudioError, ConfigError
from pal.features import FeatureCache
from pal.model import PalModel
from pal.train.held_out import held_out
from pal.train.objectives import MicroBatch, Objective
from pal.train.quarantine import LeftOut
from pal.train.recipe import Recipe
from pal.train.sampler import Group, Pool, Sampler, share
from pal.train.skips import rows_to_skip
from pal.train.source_config import Source
from pal.types import IGNORE, Batch, EncodedClip, Tokens

logger = logging.getLogger(__name__)

_TRIED = 1000
"""Maximum number of groups tried until one can be read."""


def open_sources(recipe: Recipe, made: Path) -> dict[str, RecordSource]:
    """Name -> manifest of the recipe's sources, without optional ones whose files are missing.

    Args:
        recipe: recipe of the run.
        made: folder for generated scenes and prepared manifests, which are written once.

    Raises:
        ConfigError, ManifestError: a required source is missing or unusable.
    """
    manifests: dict[str, RecordSource] = {}
    for name, source in recipe.data.items():
        missing = _missing(source)
        if missing and source.optional:
            logger.info("data '%s' is left out: no '%s'", name, missing)
            continue
        if missing:
            raise ConfigError(f"data '{name}': no '{missing}'; correct the path, or set 'optional: true'")
        if source.skip_clips is not None and not source.skip_clips.is_file():
            raise ConfigError(f"data '{name}': no list '{source.skip_clips}'; correct 'skip_clips', or remove it")
        if source.table is not None:
            manifests[name] = TableRecords(source.table)
        else:
            manifests[name] = Manifest(_manifest_path(name, source, made), root=source.root)
    if not manifests:
        raise ConfigError("all data sources of the recipe are missing; correct their paths")
    _check_cuts(recipe, manifests)
    return manifests


def _check_cuts(recipe: Recipe, manifests: dict[str, RecordSource]) -> None:
    """Raise ConfigError if an augmentation may cut off the sound of a label without times."""
    for stage in recipe.stages:
        for name, source in recipe.stage_sources(stage).items():
            if source.augment is None or name not in manifests or stage.objective == "text":
                continue
            config = parse(Augment.Config, source.augment, where=f"data.{name}.augment")
            if config.cuts is None:
                continue
            for record in manifests[name]:
                taken = source.takes(record.task, record.dataset)
                label = _untimed(record, stage.objective == "tags") if taken else None
                if label is not None:
                    raise ConfigError(f"data '{name}', record '{_short(record.id)}': {cut_fault(config.cuts, label)}")


def _untimed(record: Record, tags_alone: bool) -> str | None:
    """Description of a label without times, for a message; None if all labels have times."""
    if not record.clips:
        return None
    if not tags_alone:
        return f"the answer '{_short(record.turns[0].answer)}'"
    if record.tags is None or len(record.clips) > 1:
        return "a clip without tags"
    tag = next((tag for tag in record.tags if tag.start is None or tag.end is None), None)
    return None if tag is None else f"the label '{_short(tag.label)}'"


def _short(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:29]}…"


def _missing(source: Source) -> Path | None:
    if source.table is not None:
        return None if source.table.files() else source.table.path
    needed = [source.manifest, source.prepare.root if source.prepare else None, source.root]
    return next((path for path in needed if path is not None and not path.exists()), None)


def _manifest_path(name: str, source: Source, made: Path) -> Path:
    if source.manifest is not None:
        return source.manifest
    folder = made / name
    path = folder / "manifest.jsonl"
    if path.exists():
        return path
    if source.synth is not None:
        from pal.data.synth import synthesise

        logger.info("data '%s': making %d scenes", name, source.synth.scenes)
        return synthesise(folder, **source.synth.model_dump())
    assert source.prepare is not None
    from pal.data import prepare

    return prepare.prepare(source.prepare.name, source.prepare.root, path, **source.prepare.options)


class StageData:
    """Data set of one stage: the micro-batches of each step.

    Args:
        recipe: recipe of the run.
        index: index of the stage.
        manifests: manifests of all sources of the recipe, without missing optional ones.
    """

    def __init__(self, recipe: Recipe, index: int, manifests: dict[str, RecordSource]) -> None:
        self.stage = recipe.stages[index]
        sources = {name: s for name, s in recipe.stage_sources(self.stage).items() if name in manifests}
        self.manifests = [manifests[name] for name in sources]
        self.sources = list(sources.values())
        self.names = list(sources)
        batch = self.stage.batch
        if self.stage.by_clip:
            batch = batch.model_copy(update={"rows_per_clip": 1})
        pools = []
        for name, source in sources.items():
            skipped = rows_to_skip(name, source, manifests[name]) | held_out(recipe, manifests[name])
            groups = _groups(manifests[name], source, batch.grouped, skipped)
            if not groups:
                raise ConfigError(f"data '{name}': 'tasks', 'datasets' and 'skip_clips' leave no record; change them")
            seconds = None
            if batch.by_length:
                seconds = _GroupSeconds(manifests[name], groups, source.read_to_end)
            weight = source.weight
            if self.stage.temperature is not None:
                weight = len(groups) ** (1 / self.stage.temperature)
            pools.append(Pool(groups, weight, source.repeat, seconds))
        if not pools:
            raise ConfigError(f"stage '{self.stage.name}': all its data sources are missing; correct their paths")
        self.pools = pools
        self.sampler = Sampler(pools, batch, recipe.seed, index)
        self.steps = self.stage.steps or self.sampler.steps(self.stage.epochs or 0)
        self.bad_clips: Mapping[str, Mapping[str, AudioError]] = {}
        """Source -> clips known to be unusable, which are not read again; set it before `start`. It may grow at any
        time, in this process."""
        self._loader: GroupLoader | None = None
        self._prepare: Callable[[MicroBatch], MicroBatch] = lambda micro_batch: micro_batch

    def records(self) -> Iterator[Record]:
        """All records of the stage."""
        for manifest, pool in zip(self.manifests, self.pools, strict=True):
            for rows in pool.groups:
                for row in rows:
                    yield manifest[row]

    def start(self, model: PalModel, objective: Objective, waveforms: WaveformCache) -> None:
        """Set up loading for a model and an objective, whose `prepare` runs in the loader threads of this process.

        Args:
            model: sets tokenizer, sampling rate and encoders of the feature cache.
            objective: objective of the stage.
            waveforms: cache of decoded clips.
        """
        self._prepare = objective.prepare
        encode_clip = None
        if self.stage.cache is not None:
            encode_clip = FeatureCache(self.stage.cache, model.ears, self.stage.precision)
        collators = []
        for source in self.sources:
            augment = None
            if source.augment is not None:
                augment = Augment(parse(Augment.Config, source.augment, where="augment"))
            collator = Collator(
                model.tokenizer,
                model.sampling_rate,
                augment if objective.with_audio else None,
                with_audio=objective.with_audio,
                style=model.config.style,
                encode_clip=None if encode_clip is None else partial(encode_clip, read_to_end=source.read_to_end),
                read_to_end=source.read_to_end,
            )
            collator.cache = waveforms
            collators.append(collator)
        self._loader = GroupLoader(
            self.names, self.manifests, collators, self.stage.batch.turns, waveforms, self.bad_clips
        )

    @property
    def loader(self) -> GroupLoader:
        """Loads micro-batches, after `start`."""
        assert self._loader is not None, "start was not called"
        return self._loader

    def micro_batches(
        self,
        step: int,
        part: int,
        parts: int,
        load: Callable[[int, Sequence[tuple[Sequence[Group], bool]]], list[MicroBatch]] | None = None,
    ) -> list[MicroBatch]:
        """Micro-batches of process `part` of `parts` at a step, one for each accumulation step.

        Args:
            step: of the stage.
            part: index of the process.
            parts: number of processes.
            load: loads the micro-batches elsewhere, from the step and the arguments of `loader` for each.

        Records about clips that cannot be used are left out and listed in the micro-batch. If none is left, it holds
        another group of the stage that does not count.

        Raises:
            AudioError: no clip of the stage can be used.
        """
        groups, mine = share(self.sampler[step], part, parts)
        requests = []
        for i in range(self.stage.batch.accumulate):
            some, counts = share(groups, i, self.stage.batch.accumulate)
            requests.append((some, mine and counts))
        made = [self.loader(*request) for request in requests] if load is None else load(step, requests)
        return [self._prepare(self._completed(micro_batch, step)) for micro_batch in made]

    def _completed(self, made: MicroBatch, step: int) -> MicroBatch:
        """A micro-batch with conversations: its own, else those of the first group from this step on that has any."""
        if made.batch.conversations:
            return made
        first, tried = None, 0
        while True:
            for group in self.sampler[step]:
                other = self.loader([group], True)
                if other.batch.conversations:
                    return replace(made, batch=other.batch, datasets=other.datasets, counts=False)
                first, tried = first or other.left_out[0], tried + 1
                if tried == min(_TRIED, sum(len(pool.groups) for pool in self.pools)):
                    raise AudioError(f"stage '{self.stage.name}': {tried} clips were tried in vain: {first.reason}")
            step += 1


class GroupLoader:
    """Loads micro-batches: records, clips, augmentation, tokens. Copies in other processes load the same.

    Args:
        names: names of the sources.
        manifests: their records.
        collators: their collators, which share `waveforms` as cache.
        turns: `BatchSize.turns`.
        waveforms: cache of decoded clips.
        bad_clips: source -> clips known to be unusable, which are not read again.
    """

    def __init__(
        self,
        names: Sequence[str],
        manifests: Sequence[RecordSource],
        collators: Sequence[Collator],
        turns: int,
        waveforms: WaveformCache,
        bad_clips: Mapping[str, Mapping[str, AudioError]],
    ) -> None:
        self.names = names
        self.manifests = manifests
        self.collators = collators
        self.turns = turns
        self.waveforms = waveforms
        self.bad_clips = bad_clips

    def __call__(self, groups: Sequence[Group], counts: bool) -> MicroBatch:
        """The micro-batch of some groups, before `Objective.prepare`; without conversations if no clip can be used.

        Raises:
            ManifestError, PromptError: a record is unusable.
        """
        batches = []
        datasets: list[str] = []
        left_out = []
        for source in sorted({group.source for group in groups}):
            records, seeds = [], []
            for group in groups:
                if group.source == source:
                    mine = in_turns([self.manifests[source][row] for row in group.rows], self.turns)
                    records += mine
                    seeds += [group.seed] * len(mine)
            bad = dict(self.bad_clips.get(self.names[source], {}))
            batch = self.collators[source](records, seeds, bad)
            if len(batch.conversations) < len(records):
                left_out += _left_out(records, bad, self.names[source])
                records = [record for record in records if bad.keys().isdisjoint(record.clips)]
            if records:
                batches.append(batch)
                datasets += _clip_datasets(batch, records)
        # another process or part has the groups that do not count, and lists what is left out
        listed = tuple(left_out) if counts else ()
        return MicroBatch(join(batches), datasets, groups[0].seed, counts, left_out=listed)


def _left_out(records: Sequence[Record], bad: Mapping[str, AudioError], source: str) -> list[LeftOut]:
    """Records about unusable clips, by the first such clip of each."""
    by_clip: dict[str, list[str]] = {}
    for record in records:
        clip = next((clip for clip in record.clips if clip in bad), None)
        if clip is not None:
            by_clip.setdefault(clip, []).append(record.id)
    return [LeftOut(clip, str(bad[clip]), source, tuple(ids)) for clip, ids in by_clip.items()]


def in_turns(records: Sequence[Record], turns: int) -> list[Record]:
    """Conversations of up to `turns` consecutive records about the same clips.

    Later questions then follow earlier answers, as in a real conversation.
    """
    out: list[Record] = []
    joined = 0
    for record in records:
        if out and joined < turns and record.clips and record.clips == out[-1].clips:
            out[-1] = replace(out[-1], id=f"{out[-1].id}+{record.id}", turns=out[-1].turns + record.turns, choices=None)
            joined += 1
        else:
            out.append(record)
            joined = 1
    return out


class _GroupSeconds:
    """Length of a group's audio in seconds: the clips of its first record. NaN if a header cannot be read."""

    def __init__(self, manifest: RecordSource, groups: Sequence[Sequence[int]], read_to_end: bool) -> None:
        self.manifest, self.groups, self.read_to_end = manifest, groups, read_to_end

    def __call__(self, index: int) -> float:
        try:
            return sum(_seconds(path, self.read_to_end) for path in self.manifest[self.groups[index][0]].clips)
        except AudioError:  # listed when the clip itself is read
            return math.nan


def _groups(manifest: RecordSource, source: Source, grouped: bool, skipped: frozenset[int]) -> RowGroups:
    """Rows of the selected records of a manifest, grouped by clip or individually."""
    every_R = np.arange(len(manifest), dtype=np.uint32)
    if not grouped and source.tasks is None and source.datasets is None and not skipped:
        return RowGroups(every_R)
    columns = manifest.columns
    groups = columns.groups if grouped else RowGroups(every_R)
    keep_R = np.ones(len(manifest), bool)
    for wanted, names, codes_R in (
        (source.tasks, columns.tasks, columns.task_R),
        (source.datasets, columns.datasets, columns.dataset_R),
    ):
        if wanted is not None:
            keep_R &= np.isin(codes_R, [code for code, name in enumerate(names) if name in wanted])
    keep_R[list(skipped)] = False
    return groups if keep_R.all() else groups.only(keep_R)


@cache
def _seconds(path: str, read_to_end: bool) -> float:
    return audio.seconds(path, read_to_end=read_to_end)


def _clip_datasets(batch: Batch, records: Sequence[Record]) -> list[str]:
    datasets = [""] * len(batch.clips)
    for row, record in zip(batch.conversations, records, strict=True):
        for clip in row.clips[:1]:
            datasets[clip] = record.dataset
    return datasets


def join(batches: Sequence[Batch]) -> Batch:
    """Concatenation of batches, also of none: clips and rows in order, with the rows' clip indices shifted."""
    if len(batches) == 1:
        return batches[0]
    waveforms: list[Tensor] = []
    encoded: list[EncodedClip] = []
    rows: list[Tokens] = []
    records: list[str] = []
    for batch in batches:
        first = len(encoded) + len(waveforms)
        rows += [Tokens(row.ids, [first + clip for clip in row.clips], row.labels) for row in batch.conversations]
        waveforms += batch.waveforms
        encoded += batch.encoded
        records += batch.records
    tags = None
    if any(batch.tags is not None for batch in batches):
        tags = [spans for batch in batches for spans in batch.tags or [None] * len(batch.clips)]
    return Batch(waveforms, rows, records, tags, encoded)


def trained_tokens(batch: Batch) -> int:
    """Number of labelled tokens."""
    return sum(sum(label != IGNORE for label in row.labels or ()) for row in batch.conversations)
