"""What is drawn depends on seed, stage and step alone, and covers the data as promised."""

from collections import Counter

import pytest

from pal.errors import ConfigError
from pal.train import sampler as module
from pal.train.recipe import BatchSize
from pal.train.sampler import Pool, Sampler, share


def clips(n: int, rows: int) -> list[list[int]]:
    return [list(range(i * rows, (i + 1) * rows)) for i in range(n)]


def test_an_epoch_has_every_row_once() -> None:
    sampler = Sampler([Pool(clips(37, 1))], BatchSize(rows=5), seed=1, stage=0)
    steps = sampler.steps(3)
    assert steps == 3 * 8
    for epoch in range(3):
        rows = [row for step in range(epoch * 8, epoch * 8 + 8) for group in sampler[step] for row in group.rows]
        assert sorted(rows) == list(range(37))
        assert rows != sorted(rows)


def test_a_fresh_sampler_gives_the_same_batch_at_any_step() -> None:
    pools = [Pool(clips(23, 3), repeat=2), Pool(clips(11, 2))]
    batch = BatchSize(clips=4, rows_per_clip=2)
    whole = Sampler(pools, batch, seed=7, stage=1)
    for step in (41, 0, 17, 30):
        assert Sampler(pools, batch, seed=7, stage=1)[step] == whole[step]
    assert Sampler(pools, batch, seed=8, stage=1)[0] != whole[0]
    assert Sampler(pools, batch, seed=7, stage=0)[0] != whole[0]


def test_rounds_change_nothing_about_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROUND", 10)
    sampler = Sampler([Pool(clips(37, 1)), Pool(clips(8, 1))], BatchSize(rows=4), seed=1, stage=0)
    assert sampler.rounds == 5
    drawn = Counter((g.source, g.rows[0]) for step in range(sampler.steps(2)) for g in sampler[step])
    assert len(drawn) == 45
    assert set(drawn.values()) == {2}


def test_questions_of_a_clip_take_turns() -> None:
    sampler = Sampler([Pool(clips(5, 6))], BatchSize(clips=5, rows_per_clip=2), seed=0, stage=0)
    seen = Counter(row for step in range(3) for group in sampler[step] for row in group.rows)
    assert all(len(group.rows) == 2 for group in sampler[0])
    assert seen == Counter(range(30))


@pytest.mark.parametrize("field", ["weight", "repeat"])
def test_mixture(field: str) -> None:
    pools = [Pool(clips(100, 1), **{field: 3.0}), Pool(clips(100, 1), **{field: 1.0})]
    sampler = Sampler(pools, BatchSize(rows=8), seed=0, stage=0)
    sources = Counter(group.source for step in range(sampler.steps(1)) for group in sampler[step])
    assert sources[0] == 3 * sources[1]
    assert sum(sources.values()) == (200 if field == "weight" else 400)


def test_weights_for_some_sources_only_are_an_error() -> None:
    with pytest.raises(ConfigError, match="all or none"):
        Sampler([Pool(clips(1, 1), weight=1.0), Pool(clips(1, 1))], BatchSize(rows=1), seed=0, stage=0)


def test_batches_in_seconds() -> None:
    lengths = [1.0 + i % 7 for i in range(50)] + [100.0]
    pool = Pool(clips(51, 2), seconds=lengths.__getitem__)
    sampler = Sampler([pool], BatchSize(seconds=12, rows_per_clip=2), seed=0, stage=0)
    batches = [sampler[step] for step in range(sampler.steps(1))]
    for batch in batches:
        total = sum(lengths[group.rows[0] // 2] for group in batch)
        assert total <= 12 or len(batch) == 1
    assert sorted(row for batch in batches for group in batch for row in group.rows) == list(range(102))


def test_shares_make_up_the_batch() -> None:
    batch = Sampler([Pool(clips(9, 1))], BatchSize(rows=5), seed=0, stage=0)[0]
    shares = [share(batch, part, 3) for part in range(3)]
    assert sorted((g for groups, counts in shares for g in groups if counts), key=batch.index) == batch
    assert share(batch, 6, 8) == (batch[:1], False)
