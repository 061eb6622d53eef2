"""Objectives against a reference written with loops."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pal.data.manifest import Record, Turn
from pal.errors import ConfigError
from pal.train.objectives import MicroBatch, TagLoss, build_objective, dataset_labels
from pal.train.recipe import Stage
from pal.types import AudioFeatures, Batch, TagSpan

RATE = 100


class Encoder(nn.Module):
    """One token for each 10 samples: their mean and their largest."""

    width = 2

    def encode(self, waveforms: list[Tensor]) -> AudioFeatures:
        tokens = tuple(-(-len(x) // 10) for x in waveforms)
        x_BAE = torch.zeros(len(waveforms), max(tokens), 2)
        for i, x_N in enumerate(waveforms):
            for j, piece in enumerate(x_N.split(10)):
                x_BAE[i, j] = torch.stack([piece.mean(), piece.max()])
        return AudioFeatures(x_BAE, tokens, 0.1)


class Ears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([Encoder()])

    def encoder(self, index: int) -> Any:
        return self.encoders[index]

    def encode_with(self, index: int, waveforms: list[Tensor]) -> AudioFeatures:
        return self.encoder(index).encode(waveforms)  # type: ignore[no-any-return]


class Model(nn.Module):
    sampling_rate = RATE

    def __init__(self) -> None:
        super().__init__()
        self.ears = Ears()


LABELS = {"a": {"bell", "dog"}, "b": {"cat", "dog"}}


def tags(**options: Any) -> TagLoss:
    torch.manual_seed(0)
    objective = TagLoss(Model(), TagLoss.Config(**options), LABELS)  # type: ignore[arg-type]
    nn.init.normal_(objective.linear.weight)
    return objective


def a_micro_batch() -> MicroBatch:
    torch.manual_seed(1)
    waveforms = [torch.randn(n) / 10 for n in (100, 60, 40, 80)]
    spans = [
        [TagSpan("bell", 0.15, 0.4), TagSpan("dog", 0.5, 0.6)],
        [TagSpan("cat")],
        None,
        [TagSpan("cat"), TagSpan("dog", 0.0, 0.3)],
    ]
    return MicroBatch(Batch(waveforms, [], [], spans), ["a", "b", "a", "b"], seed=3)


def bce(p: float, y: float) -> float:
    return -math.log(p) if y else -math.log(1 - p)


def reference(objective: TagLoss, micro_batch: MicroBatch, frame_weight: float) -> float:
    names = ["bell", "cat", "dog"]
    total = 0.0
    for x_N, spans, dataset in zip(
        micro_batch.batch.waveforms, micro_batch.batch.tags or [], micro_batch.datasets, strict=True
    ):
        if spans is None:
            continue
        features = objective.model.ears.encoder(0).encode([x_N])
        p_AJ = objective.linear(features.x_BAE[0]).sigmoid().tolist()
        clip, frames = [], []
        for label in LABELS[dataset]:
            p_A = [p_J[names.index(label)] for p_J in p_AJ]
            mine = [span for span in spans if span.label == label]
            clip.append(bce(_pool(p_A), bool(mine)))
            timed = any(span.start is not None for span in spans) and all(span.start is not None for span in mine)
            for j, p in enumerate(p_A if timed else []):
                inside = any(s.start < 0.1 * (j + 1) - 1e-9 and s.end > 0.1 * j + 1e-9 for s in mine)  # type: ignore[operator]
                frames.append(bce(p, inside))
        total += sum(clip) / len(clip) + (frame_weight * sum(frames) / len(frames) if frames else 0.0)
    return total


def right(objective: TagLoss, micro_batch: MicroBatch) -> tuple[int, int]:
    names = ["bell", "cat", "dog"]
    hits = 0
    for x_N, spans, dataset in zip(
        micro_batch.batch.waveforms, micro_batch.batch.tags or [], micro_batch.datasets, strict=True
    ):
        if spans is not None:
            p_AJ = objective.linear(objective.model.ears.encoder(0).encode([x_N]).x_BAE[0]).sigmoid()
            pooled = {label: _pool(p_AJ[:, names.index(label)].tolist()) for label in LABELS[dataset]}
            hits += max(pooled, key=pooled.__getitem__) in {span.label for span in spans}
    return hits, 3


def _pool(p_A: list[float]) -> float:
    return sum(p * p for p in p_A) / sum(p_A)


@pytest.mark.parametrize("frame_weight", [0.0, 1.0, 0.5])
def test_tags_against_loops(frame_weight: float) -> None:
    objective = tags(frame_weight=frame_weight)
    loss, count, hits = objective(a_micro_batch())
    assert hits == right(objective, a_micro_batch())
    assert count == 4
    assert loss.item() == pytest.approx(reference(objective, a_micro_batch(), frame_weight), rel=1e-5)


def test_tags_mixup_adds_sound_and_labels() -> None:
    objective = tags(mixup=1.0, mixup_db=0.0).train()
    given = a_micro_batch()
    waveforms, spans, known_BJ = objective.mix(given)
    again = objective.mix(given)
    assert all(torch.equal(x, y) for x, y in zip(waveforms, again[0], strict=True))
    mixed = 0
    for i, x_N in enumerate(given.batch.waveforms):
        assert len(waveforms[i]) == len(x_N)
        rest = waveforms[i] - x_N
        if not rest.any():
            continue
        mixed += 1
        # as loud as the clip itself, since `mixup_db` is 0
        others = [
            j
            for j, y_N in enumerate(given.batch.waveforms)
            if j != i and _is_start(rest / loud(x_N), y_N / loud(y_N[: len(x_N)]))
        ]
        assert len(others) == 1
        (other,) = others
        labels = {span.label for span in spans[i]}
        expected = {s.label for j in (i, other) for s in (given.batch.tags or [])[j] or () if not _late(s, x_N)}
        assert labels == expected
        names = ["bell", "cat", "dog"]
        used = [set() if (given.batch.tags or [])[j] is None else LABELS[given.datasets[j]] for j in (i, other)]
        assert {names[j] for j in known_BJ[i].nonzero()[:, 0]} == used[0] & used[1]
    assert mixed
    objective.eval()
    assert torch.equal(objective.mix(given)[0][0], given.batch.waveforms[0])


def loud(x_N: Tensor) -> float:
    """Rms of the frames of 2 samples (20 ms) within 20 dB of the loudest, by loops."""
    powers = [(a * a + b * b) / 2 for a, b in x_N[: len(x_N) // 2 * 2].reshape(-1, 2).tolist()]
    kept = [power for power in powers if power >= max(powers) / 100]
    return math.sqrt(sum(kept) / len(kept))


@pytest.mark.parametrize("quieter", [1.0, 1e-3])
def test_mixing_leaves_both_sounds_within_the_bound(quieter: float) -> None:
    """However unlike the clips' levels are, neither is more than `mixup_db` below the other."""
    objective = tags(mixup=1.0, mixup_db=6.0).train()
    given = a_micro_batch()
    given.batch.waveforms[0] *= quieter
    waveforms, _, _ = objective.mix(given)
    mixed = 0
    for x_N, sum_N in zip(given.batch.waveforms, waveforms, strict=True):
        rest = sum_N - x_N
        if rest.any():
            mixed += 1
            assert abs(20 * math.log10(loud(rest[: int(rest.nonzero()[-1]) + 1]) / loud(x_N))) <= 6.5
    assert mixed


def test_mixing_adds_no_tag_that_the_end_cuts_off() -> None:
    objective = tags(mixup=1.0, mixup_db=0.0).train()
    short, long = torch.full((40,), 0.1), torch.full((100,), 0.1)

    def mixed(*spans: TagSpan) -> list[TagSpan]:
        batch = Batch([short, long], [], [], [[TagSpan("dog")], list(spans)])
        return list(objective.mix(MicroBatch(batch, ["b", "b"], seed=3))[1][0])

    kept, late = TagSpan("cat", 0.1, 0.3), TagSpan("cat", 0.5, 0.9)
    assert mixed(kept, late) == [TagSpan("dog"), kept]
    assert mixed(kept, TagSpan("cat", 0.39, 0.9)) == [TagSpan("dog")]  # too little of it would be left: not mixed
    assert mixed(kept, TagSpan("cat", 0.1)) == [TagSpan("dog")]  # nothing says when it ends


def test_silence_is_not_mixed() -> None:
    objective = tags(mixup=1.0).train()
    batch = Batch([torch.zeros(50), torch.ones(50) / 10], [], [], [[], [TagSpan("cat")]])
    waveforms, spans, _ = objective.mix(MicroBatch(batch, ["b", "b"], seed=3))
    assert torch.equal(waveforms[0], batch.waveforms[0]) and spans == [[], [TagSpan("cat")]]


def _late(span: TagSpan, x_N: Tensor) -> bool:
    return span.start is not None and span.start >= len(x_N) / RATE


def _is_start(rest_N: Tensor, y_N: Tensor) -> bool:
    size = min(len(rest_N), len(y_N))
    return torch.allclose(rest_N[:size], y_N[:size], atol=1e-6) and not rest_N[size:].any()


def record(dataset: str, spans: tuple[TagSpan, ...] | None) -> Record:
    return Record("1", ("x.wav",), (Turn("q", "a"),), "t", dataset, tags=spans)


def test_labels_are_collected_by_dataset() -> None:
    records = [
        record("a", (TagSpan("x"), TagSpan("y"))),
        record("a", None),
        record("b", (TagSpan("y"),)),
        record("c", ()),
    ]
    assert dataset_labels(records) == {"a": {"x", "y"}, "b": {"y"}, "c": set()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "tags", "train": {"encoder": True}}, "no record .* has tags"),
        ({"objective": "tags", "train": {"encoder": True, "llm": "full"}}, "trains the encoder alone"),
        ({"objective": "tags", "train": {"encoder": True}, "options": {"mix": 1}}, "unknown key 'mix'; known: .*mixup"),
        ({"objective": "text", "train": {"encoder": True}}, "trains the LLM alone"),
        ({"objective": "answers", "train": {"encoder": True}, "options": {"mix": 1}}, "unknown key 'mix'"),
    ],
)
def test_stages_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    stage = Stage(lr=1.0, steps=1, batch={"rows": 1}, **fields)
    with pytest.raises(ConfigError, match=message):
        build_objective(SimpleNamespace(ears=Ears()), stage, [record("a", None)])  # type: ignore[arg-type]
