"""What is drawn depends on seed, stage and step alone, and covers the data as promised."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pal.errors import ConfigError
from pal.train import sampler as module
from pal.train.recipe import BatchSize
from pal.train.sampler import Group, Pool, Sampler, share


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
    monkeypatch.setattr(module, "ROUND", 10)
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


def test_the_order_without_buckets_is_that_of_earlier_versions() -> None:
    """The models and figures that were published came from it."""
    pools = [Pool(clips(9, 3), seconds=lambda i: 1.0 + i % 4), Pool(clips(4, 1), seconds=lambda i: 2.0)]
    sampler = Sampler(pools, BatchSize(clips=3, seconds=6, rows_per_clip=2), seed=7, stage=1)
    assert [[(group.source, group.rows) for group in sampler[step]] for step in range(sampler.steps(1))] == [
        [(0, (11, 9)), (1, (2,))],
        [(0, (18, 20)), (0, (2, 0)), (0, (15, 16))],
        [(1, (3,)), (0, (23, 22))],
        [(0, (14, 12)), (0, (4, 5)), (0, (6, 8))],
        [(0, (25, 24)), (1, (1,)), (1, (0,))],
    ]
    assert [sampler[step][0].seed for step in range(3)] == [51379652430223099, 11879677091601416, 13776186568368340]


def mixed(n: int, seed: int = 0) -> list[float]:
    """Lengths of clips from half a second to half a minute."""
    order = module.permutation(n, seed)
    return [0.5 * 60 ** (place / n) for place in order]


def padding(batches: Sequence[Sequence[Group]], seconds: Sequence[float], parts: int = 1) -> float:
    """Share of the seconds that a padded batch has beyond its clips, over all parts of all batches."""
    real = padded = 0.0
    for batch in batches:
        for part in range(parts):
            groups, counts = share(list(batch), part, parts)
            if counts:
                lengths = [seconds[group.rows[0]] for group in groups]
                real += sum(lengths)
                padded += len(lengths) * max(lengths)
    return 1 - real / padded


def epoch(seconds: Sequence[float], size: BatchSize, **fields: Any) -> list[list[Group]]:
    pool = Pool(clips(len(seconds), 1), seconds=seconds.__getitem__)
    sampler = Sampler([pool], size, seed=3, stage=0, **fields)
    return [sampler[step] for step in range(sampler.steps(1))]


@pytest.mark.parametrize("limit", [{"rows": 16}, {"clips": 16}, {"seconds": 100.0}])
def test_buckets_leave_little_padding(limit: dict[str, Any]) -> None:
    seconds = mixed(2000)
    plain, sorted_ = (epoch(seconds, BatchSize(**limit, bucket=bucket)) for bucket in (None, 100))
    for parts in (1, 2):
        assert padding(plain, seconds, parts) > 0.5
        assert padding(sorted_, seconds, parts) < 0.04
    rows = [[group.rows[0] for batch in batches for group in batch] for batches in (plain, sorted_)]
    assert sorted(rows[0]) == sorted(rows[1]) == list(range(2000))
    # of like length, but not one after the other, and not the same in the next epoch
    longest = [max(seconds[group.rows[0]] for group in batch) for batch in sorted_[:60]]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert len(sorted_) <= 1.05 * len(plain)


@pytest.mark.parametrize("bucket", [4, 100])
def test_who_meets_changes_from_epoch_to_epoch(bucket: int) -> None:
    pool = Pool(clips(64, 1), seconds=mixed(64).__getitem__)
    sampler = Sampler([pool], BatchSize(rows=4, bucket=bucket), seed=0, stage=0)
    first, second = ([{g.rows[0] for g in sampler[e * 16 + i]} for i in range(16)] for e in range(2))
    assert sum(batch in first for batch in second) <= 2


def test_buckets_keep_the_mixture_and_each_groups_seed() -> None:
    """Sources of clips that differ in length: every stretch of `bucket` batches holds what it held of each."""
    pools = [
        Pool(clips(60, 1), weight=3.0, seconds=lambda i: 1.0),
        Pool(clips(60, 1), weight=1.0, seconds=lambda i: 9.0),
    ]
    plain, sorted_ = (Sampler(pools, BatchSize(rows=6, bucket=bucket), seed=0, stage=0) for bucket in (None, 5))
    assert plain.steps(2) == sorted_.steps(2) == 40
    for first in range(0, 40, 5):
        stretches = [[g for step in range(first, first + 5) for g in s[step]] for s in (plain, sorted_)]
        assert sorted(stretches[0], key=lambda g: g.seed) == sorted(stretches[1], key=lambda g: g.seed)


@given(
    lengths=st.lists(st.floats(0.1, 60), min_size=1, max_size=60),
    bucket=st.integers(2, 9),
    limit=st.fixed_dictionaries(
        {}, optional={"rows": st.integers(1, 9), "clips": st.integers(1, 9), "seconds": st.floats(1, 90)}
    ).filter(bool),
    rows=st.integers(1, 3),
    parts=st.integers(1, 3),
    turn=st.integers(0, 2),
)
def test_bucketed_batches_hold_to_the_limits_and_go_on_anywhere(
    lengths: list[float], bucket: int, limit: dict[str, Any], rows: int, parts: int, turn: int
) -> None:
    size = BatchSize(**limit, bucket=bucket, rows_per_clip=rows)
    pool = Pool(clips(len(lengths), 3), seconds=lengths.__getitem__)
    whole = Sampler([pool], size, seed=5, stage=2)
    steps = whole.steps(turn + 1)
    first = whole.steps(turn) if turn else 0
    drawn: Counter[int] = Counter()
    for step in range(first, steps):
        # a process that starts here has the same batch, and all processes have something to do at every step
        batch = Sampler([pool], size, seed=5, stage=2)[step] if step % 7 == 0 else whole[step]
        assert batch == whole[step]
        assert all(share(batch, part, parts)[0] for part in range(parts))
        clips_ = [group.rows[0] // 3 for group in batch]
        drawn.update(clips_)
        if len(batch) > 1:
            assert sum(len(group.rows) for group in batch) <= limit.get("rows", 1e9)
            assert len(batch) <= limit.get("clips", 1e9)
            assert sum(lengths[clip] for clip in clips_) <= limit.get("seconds", 1e9)
    assert drawn == Counter(range(len(lengths)))
