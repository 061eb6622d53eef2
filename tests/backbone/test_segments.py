"""Segments against the rule of who sees whom, pair by pair."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.backbone.segments import BRIDGE, COPIES, Conversation, crossing_segments, segments_of, where


def seen_by_rule(one, streams, window):
    """[T, T + A]: which rows and which audio keys each row sees."""
    T = len(one.positions_T)
    keys, places = (np.concatenate([np.zeros(0, int), *(of[s] for s in streams)]) for of in (one.keys, one.key_order))
    seen = np.zeros((T, T + len(keys)), bool)
    for q in range(T):
        text = [s for s in range(q) if one.text_T[s]]
        for s in range(q + 1):
            hidden = s != q and one.repeats_T[s]
            repeated = one.repeats_T[q] and text and s == text[-1]
            near = window is None or one.positions_T[q] - one.positions_T[s] < window
            seen[q, s] = not hidden and not repeated and near
        near = True if window is None else one.positions_T[q] - keys < window
        seen[q, T:] = (places <= one.order_T[q]) & near
    return seen


def seen_in_segments(segments, sources, window=None, causal=True):
    """[N, sources]: the same, read off what the kernel is given."""
    rows = segments.outs_N if segments.outs_N is not None else np.arange(segments.cu_seqlens_q[-1])
    keys = np.arange(sources) if segments.keys_K is None else segments.keys_K
    seen = np.zeros((len(rows), sources), int)
    for row, place in enumerate(rows):
        segment = np.searchsorted(segments.cu_seqlens_q, place, side="right") - 1
        own = keys[segments.cu_seqlens_k[segment] : segments.cu_seqlens_k[segment + 1]]
        queries = segments.cu_seqlens_q[segment + 1] - segments.cu_seqlens_q[segment]
        last = place - segments.cu_seqlens_q[segment] + len(own) - queries + 1 if causal else len(own)
        first = 0 if window is None else max(0, last - window)
        np.add.at(seen[row], own[first:last], 1)
    return seen


@st.composite
def conversations(draw, streams=1):
    """Text, clips with keys and summaries, and rows that ask again, as the hybrid lays them out.

    Clips reserve position ids, or share those of the text: keys stand at the next text, rows right before it.
    """
    order, positions, text, repeats = [], [], [], []
    key_order, keys = ([[] for _ in range(streams)] for _ in range(2))
    place = now = 0
    reserves = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(0, 4))
        order += range(place, place + count)
        positions += range(now, now + count)
        text += [True] * count
        repeats += [False] * count
        place, now = place + count, now + count
        for stream in range(streams):
            groups = draw(st.integers(0, 2 * BRIDGE))
            stride, summaries = draw(st.sampled_from([(1, 0), (3, 1), (BRIDGE + 1, 1)]))
            groups = groups if stride < BRIDGE else min(groups, 3)
            total = groups * (stride + summaries)
            shift = now - place - (0 if reserves else total)
            for _ in range(groups):
                key_order[stream] += range(place, place + stride)
                keys[stream] += [at + shift if reserves else now for at in range(place, place + stride)]
                place += stride
                if summaries:
                    order.append(place)
                    positions.append(place + shift)
                    text.append(False)
                    repeats.append(False)
                    place += 1
            now += total * reserves
        if positions and draw(st.booleans()):
            order.append(place - 1)
            positions.append(now - 1)
            text.append(False)
            repeats.append(True)
    if not positions:
        order, positions, text, repeats = [place], [now], [True], [False]
    as_ints, places = ([np.array(x, np.int64) for x in each] for each in (keys, key_order))
    return Conversation(
        np.array(positions, np.int64),
        np.array(text),
        np.array(repeats),
        tuple(as_ints),
        np.array(order),
        tuple(places),
        np.array(text) - 1,
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(conversations(streams=2), min_size=1, max_size=3), st.sampled_from([(), (0,), (1,), (0, 1)]))
def test_each_row_sees_what_the_rule_says_and_once(batch, streams):
    segments = segments_of(batch, streams)
    rows = sum(len(one.positions_T) for one in batch)
    counts = {s: [len(one.keys[s]) for one in batch] for s in streams}
    sources = rows + sum(map(sum, counts.values()))
    expected = np.zeros((rows, sources), int)
    first = 0
    starts, at = {}, rows
    for s in streams:
        starts[s] = at
        at += sum(counts[s])
    for number, one in enumerate(batch):
        T = len(one.positions_T)
        seen = seen_by_rule(one, streams, None)
        expected[first : first + T, first : first + T] = seen[:, :T]
        behind = T
        for s in streams:
            at = starts[s] + sum(counts[s][:number])
            expected[first : first + T, at : at + counts[s][number]] = seen[:, behind : behind + counts[s][number]]
            behind += counts[s][number]
        first += T
    np.testing.assert_array_equal(seen_in_segments(segments, sources), expected)


@settings(max_examples=150, deadline=None)
@given(conversations(), st.integers(2, 40))
def test_windows_are_right_or_refused(one, window):
    segments = segments_of([one], (0,), window)
    if segments is not None:
        sources = len(one.positions_T) + len(one.keys[0])
        np.testing.assert_array_equal(seen_in_segments(segments, sources, window), seen_by_rule(one, (0,), window))


def plain(positions, keys=(), repeats=()):
    positions = np.array(positions)
    again = np.isin(np.arange(len(positions)), repeats)
    keys = (np.array(keys, np.int64),)
    return Conversation(positions, ~again, again, keys, positions, keys, positions * 0 - 1)


def test_windows_of_ordinary_clips_are_not_refused():
    whole = plain([0, 1, 2, *range(30, 40)], range(3, 30))
    assert segments_of([whole], (0,), 7) is not None
    # a layer without the audio's keys sees a gap wider than its window
    assert segments_of([whole], (), 7) is not None
    # and one that the window reaches over cannot be counted in keys
    assert segments_of([plain([0, 1, 2, 6, 7, 8, 9, 10])], (), 7) is None


def test_text_alone_needs_no_index():
    segments = segments_of([plain(range(5)), plain(range(3))], ())
    assert segments.keys_K is None and segments.queries_Q is None and segments.back == ()
    assert segments.cu_seqlens_q.tolist() == segments.cu_seqlens_k.tolist() == [0, 5, 8]
    assert segments.longest == (5, 5)


def test_one_clip_makes_two_segments_and_repeats_only_the_text_before_it():
    segments = segments_of([plain([0, 1, 102, 103, 104], range(2, 102))], (0,))
    assert np.diff(segments.cu_seqlens_q).tolist() == [2, 3]
    assert np.diff(segments.cu_seqlens_k).tolist() == [2, 105]
    assert segments.queries_Q is None and len(segments.back) == 2
    assert segments.longest == (3, 105)  # for which the kernel on a GPU makes room, and reads no key beyond


def test_summaries_make_one_segment_without_copies():
    S, r = 50, 3
    rows = [0, 1, *(2 + (i + 1) * r + i for i in range(S)), 2 + S * (r + 1)]
    keys = [2 + j + j // r for j in range(S * r)]
    segments = segments_of([plain(rows, keys)], (0,))
    assert len(segments.cu_seqlens_q) == 2 and len(segments.keys_K) == len(rows) + len(keys)
    assert len(segments.back) == 1 and segments.unused_Q.sum() == len(keys)


def test_where_finds_every_place():
    places = where(np.array([2, 0, 2, 1]), 4)
    assert [x.tolist() for x in places] == [[1, 3, 0, 4], [4, 4, 2, 4]]
    assert where(np.repeat(0, COPIES + 1), 1) == ()


@settings(max_examples=60, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=3))
def test_rows_look_through_blocks_at_all_keys_before_them(batch):
    segments = crossing_segments(batch, 0)
    total = sum(len(one.keys[0]) for one in batch)
    expected = np.zeros((len(segments.queries_with_keys()), total), int)
    row = first = 0
    for one in batch:
        T, A = len(one.positions_T), len(one.keys[0])
        # a later row never sees less
        seen = np.maximum.accumulate(seen_by_rule(one, (0,), None)[:, T:], axis=0)
        expected[row : row + T, first : first + A] = seen
        row, first = row + T, first + A
    np.testing.assert_array_equal(seen_in_segments(segments, total, causal=False), expected)
    np.testing.assert_array_equal(segments.queries_with_keys(), expected.any(1))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_streams_count_in_the_order_they_are_given(order):
    rows, keys = np.array([0, 40]), (np.arange(1, 20), np.arange(20, 40))
    one = Conversation(rows, np.ones(2, bool), np.zeros(2, bool), keys, rows, keys, rows * 0 - 1)
    segments = segments_of([one], order)
    last = segments.keys_K[segments.cu_seqlens_k[-2] :]
    sizes = [len(one.keys[s]) for s in order]
    assert sorted(last.tolist()) == list(range(2 + sum(sizes)))
    first_of_second = 2 + sizes[0]
    assert (last.tolist().index(2) < last.tolist().index(first_of_second)) == (order == [0, 1])
