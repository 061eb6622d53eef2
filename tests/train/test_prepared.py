"""Front-ends run in the threads that load a batch, not in the one that trains."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pal.data.collate import WaveformCache
from pal.data.manifest import Manifest
from pal.data.synth import synthesise
from pal.encoders.base import Encoder
from pal.encoders.tiny import Tiny
from pal.encoders.whisper import Whisper
from pal.model import PalModel
from pal.registry import toy
from pal.train.objectives import Objective, build_objective
from pal.train.prefetching import PrefetchLoader
from pal.train.sources import StageData
from pal.types import AudioFeatures, Batch, EncodedClip, Frames, Tokens
from tests.models import ENCODER, noise, tiny_model
from tests.train.tiny import recipe

TRAIN = {"train": {"connector": True, "projectors": True}, "lr": 1e-3, "steps": 3}
STAGES: dict[str, dict[str, Any]] = {
    "answers": TRAIN | {"batch": {"clips": 3, "rows_per_clip": 2}},
    "tags": TRAIN | {"objective": "tags", "train": {"encoder": True}, "options": {"mixup": 1.0}, "batch": {"clips": 3}},
    "text": TRAIN | {"objective": "text", "train": {"llm": "full"}, "batch": {"rows": 3}},
    "transcript": TRAIN | {"objective": "transcript", "train": {"llm": "full"}, "batch": {"rows": 3}},
}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scenes")
    for i, (name, seconds) in enumerate({"short": 1.5, "long": 4.6}.items()):
        synthesise(folder / name, scenes=3, seed=i, seconds=seconds, questions_per_scene=2, workers=1)
    return {name: folder / name / "manifest.jsonl" for name in ("short", "long")}


@pytest.fixture
def model() -> PalModel:
    return tiny_model("pal", encoders=[ENCODER, toy("encoder", "whisper")], warm=False)


def feed(model: PalModel, manifests: dict[str, Path], workers: int, **stage: Any) -> tuple[Objective, PrefetchLoader]:
    data = {name: {"manifest": str(path)} for name, path in manifests.items()}
    made = recipe(Path(), [stage], data=data)
    stages = StageData(made, 0, {name: Manifest(path) for name, path in manifests.items()})
    objective = build_objective(model, made.stages[0], stages.records()).train()
    stages.start(model, objective, WaveformCache(1 << 24))
    return objective, PrefetchLoader(stages, 0, 0, 1, workers, 1)


class Threads:
    """In which threads the front-ends ran."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for encoder in (Tiny, Whisper):
            patch.setattr(encoder, "frontends", self._noting(encoder.frontends))

    def _noting(self, made: Any) -> Any:
        def noting(encoder: Any, windows: list[Tensor]) -> list[Tensor]:
            self.names.append(threading.current_thread().name)
            found: list[Tensor] = made(encoder, windows)
            return found

        return noting


@pytest.mark.parametrize("name", STAGES)
def test_they_run_where_batches_are_loaded(
    model: PalModel, manifests: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    threads = Threads(monkeypatch)
    objective, micro_batches = feed(model, manifests, workers=2, **STAGES[name])
    for parts in micro_batches:
        for micro_batch in parts:
            objective(micro_batch).sum.backward()
    assert len(threads.names) == {"answers": 2 * 3, "tags": 3}.get(name, 0)  # once for an encoder and batch
    assert all(thread.startswith("pal-data") for thread in threads.names)


def test_the_loss_is_that_of_the_waveforms(model: PalModel, manifests: dict[str, Path]) -> None:
    objective, micro_batches = feed(model, manifests, workers=0, **STAGES["answers"])
    objective.eval()  # without dropout and hidden bands
    for (micro_batch,) in micro_batches:
        prepared = micro_batch.batch.prepared
        assert prepared is not None and len(prepared) == len(micro_batch.batch.waveforms)
        plain = replace(micro_batch, batch=replace(micro_batch.batch, prepared=None))
        assert torch.equal(objective(micro_batch).sum, objective(plain).sum)
        tiny, whisper = prepared.parts
        assert isinstance(tiny, Frames) and isinstance(whisper, Frames)
        assert len(tiny.blocks_WFM) == 1  # clips of all sources in one batch, as batch statistics want them
        assert sum(whisper.windows) > len(prepared)  # the long ones are cut into windows


def test_clips_are_prepared_after_they_were_changed(model: PalModel, manifests: dict[str, Path]) -> None:
    data = {"short": {"manifest": str(manifests["short"]), "augment": {"gain_db": [20, 20]}}}
    made = recipe(Path(), [STAGES["answers"]], data=data)
    stages = StageData(made, 0, {"short": Manifest(manifests["short"])})
    stages.start(model, build_objective(model, made.stages[0], stages.records()), WaveformCache(1 << 24))
    (micro_batch,) = stages.micro_batches(0, 0, 1)
    assert micro_batch.batch.prepared is not None
    tiny = micro_batch.batch.prepared.parts[0]
    assert isinstance(tiny, Frames)
    assert torch.equal(tiny.blocks_WFM[0], model.ears.encoder(0).prepare(micro_batch.batch.waveforms).blocks_WFM[0])


def test_mixed_clips_give_the_loss_they_gave_unprepared(model: PalModel, manifests: dict[str, Path]) -> None:
    objective, micro_batches = feed(model, manifests, workers=0, **STAGES["tags"])
    objective.eval()  # without dropout and hidden bands
    for (micro_batch,) in micro_batches:
        micro_batch = objective.prepare(micro_batch)  # eval() also leaves clips unmixed
        assert micro_batch.mixed is not None and isinstance(micro_batch.mixed.clips, Frames)
        assert torch.equal(objective(micro_batch).sum, objective(replace(micro_batch, mixed=None)).sum)


def test_known_features_are_padded_ahead(model: PalModel) -> None:
    heard = [model.encode_clip(noise(seconds, at)) for at, seconds in enumerate((0.4, 1.3))]
    prepared = model.ears.prepare(heard)
    for i, part in enumerate(prepared.parts):
        assert isinstance(part, AudioFeatures)
        assert part.lengths == tuple(len(one.x_AE[i]) for one in heard)
        for row, one in enumerate(heard):
            assert torch.equal(part.x_BAE[row, : part.lengths[row]], one.x_AE[i])
            assert not part.x_BAE[row, part.lengths[row] :].any()
    for ours, theirs in zip(model.features(prepared), model.features(heard), strict=True):
        assert torch.equal(ours.x_BAE, theirs.x_BAE) and ours.lengths == theirs.lengths
    # no more than its own tokens are kept of a clip
    assert all(x_AE.untyped_storage().nbytes() == x_AE.nbytes for one in heard for x_AE in one.x_AE)


def test_for_a_gpu_all_is_in_pinned_memory(model: PalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    waves = [noise(0.3), noise(0.5)]
    heard = [model.encode_clip(wave) for wave in waves]
    pinned: list[int] = []

    def pin(x: Tensor) -> Tensor:
        pinned.append(id(x))
        return x

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Encoder, "parameters", lambda self: iter([SimpleNamespace(is_cuda=True)]))
    frames, features = model.ears.prepare(waves), model.ears.prepare(heard)
    made = [x for part in frames.parts if isinstance(part, Frames) for x in part.blocks_WFM]
    made += [part.x_BAE for part in features.parts if isinstance(part, AudioFeatures)]
    assert len(made) == 4 and pinned == [id(x) for x in made]


def test_a_batch_without_clips_has_nothing_to_prepare(model: PalModel) -> None:
    rows = [Tokens([5, 6, 7], [], [-100, 6, 7])]
    batch = Batch([], rows)
    ahead = replace(batch, prepared=model.ears.prepare([]))
    assert ahead.clips == [] and ahead.seconds(16_000) == 0.0
    assert torch.equal(model.loss(ahead).sum, model.loss(batch).sum)


def test_a_batch_keeps_what_its_rows_count_in(model: PalModel) -> None:
    waves = [noise(0.3), noise(0.5)]
    batch = Batch(waves, [], prepared=model.ears.prepare(waves))
    assert len(batch.clips) == 2 and batch.seconds(16_000) == pytest.approx(0.8)
    known = Batch([], [], encoded=[EncodedClip((), 1.5)])
    assert len(known.clips) == 1 and known.seconds(16_000) == 1.5
