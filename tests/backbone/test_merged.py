"""Attention taken apart and merged equals attention under one mask, in values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.backbone.merged import BLOCK, SMALL, AttentionTile, TiledKeys, masked, merged_attention, prefixes

CPU = torch.device("cpu")


def plain(q_BHQC, sets, scale=None):
    """Softmax over all keys at once, by matrix products; sets of (k, v, seen [B, 1, Q, K])."""
    repeat = q_BHQC.shape[1] // sets[0][0].shape[1]
    k, v = (torch.cat([one[i] for one in sets], 2).repeat_interleave(repeat, 1) for i in (0, 1))
    seen_B1QK = torch.cat([one[2] for one in sets], 3)
    scores = q_BHQC @ k.mT * (q_BHQC.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.masked_fill(~seen_B1QK, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def rectangles(tiles, B, Q, K):
    """Which keys each query sees [B, Q, K], and that no piece counts one twice."""
    seen = torch.zeros(B, Q, K, dtype=torch.long)
    for tile in tiles:
        part = seen[slice(*tile.rows), slice(*tile.queries), slice(*tile.keys)]
        if tile.mask is not None:
            part += (tile.mask[:, 0] == 0).long()
        elif tile.causal:
            part += torch.ones(part.shape[1:], dtype=torch.long).tril()
        else:
            part += 1
    assert (seen <= 1).all()
    return seen.bool()


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def counted(counts_BQ, K):
    return torch.arange(K) < torch.tensor(counts_BQ)[..., None]


CASES = {
    "before and after": [[0] * 3 + [9] * 6],
    "two clips": [[0, 0, 4, 4, 4, 9, 9, 9, 9]],
    "staircase": [[0, 1, 2, 3, 4, 5, 6, 7, 9]],
    "batch": [[0] * 3 + [9] * 6, [0] * 5 + [4] * 4, [0] * 9],
    "alike": [[0] * 3 + [9] * 6] * 3,
}


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("counts", CASES.values(), ids=CASES)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("small", [0, SMALL])
def test_values_and_gradients(counts, heads, scale, small, monkeypatch):
    monkeypatch.setattr("pal.backbone.merged.SMALL", small)
    B, (H, G), C, Q, A = len(counts), heads, 8, 9, 9
    q, k, v, ka, va = (random(B, n, x, C, seed=i) for i, (n, x) in enumerate([(H, Q), (G, Q), (G, Q), (G, A), (G, A)]))
    text = (AttentionTile((0, B), (0, Q), (0, Q), causal=True),)
    causal = torch.ones(B, 1, Q, Q, dtype=torch.bool).tril()
    ours = merged_attention(q, [TiledKeys(k, v, text), TiledKeys(ka, va, prefixes(counts, CPU))], scale)
    theirs = plain(q, [(k, v, causal), (ka, va, counted(counts, A)[:, None])], scale)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for mine, reference in zip(
        torch.autograd.grad(ours, (q, k, v, ka, va), grad),
        torch.autograd.grad(theirs, (q, k, v, ka, va), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)


def test_gradients_against_differences():
    q, k, v, ka, va = (random(1, n, x, 4, seed=i) for i, (n, x) in enumerate([(4, 3), (2, 3), (2, 3), (2, 5), (2, 5)]))
    text = (AttentionTile((0, 1), (0, 3), (0, 3), causal=True),)

    def run(q, k, v, ka, va):
        return merged_attention(q, [TiledKeys(k, v, text), TiledKeys(ka, va, prefixes([[0, 2, 5]], CPU))], None)

    assert torch.autograd.gradcheck(run, (q, k, v, ka, va))


def test_a_query_that_sees_none_of_a_set():
    q, k, v, ka, va = (random(1, 2, x, 4, seed=i) for i, x in enumerate([2, 2, 2, 5, 5]))
    seen = torch.tensor([[False] * 5, [True] * 5])[None, None]
    text = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    ours = merged_attention(q, [TiledKeys(k, v, masked(text)), TiledKeys(ka, va, masked(seen))], None)
    torch.testing.assert_close(ours, plain(q, [(k, v, text), (ka, va, seen)]))
    grads = torch.autograd.grad(ours[:, :1].sum(), (q, ka, va))
    assert grads[0].isfinite().all() and not grads[1].any() and not grads[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions(dtype):
    q, k, v, ka, va = (random(2, 4, x, 16, seed=i, dtype=torch.float32) for i, x in enumerate([7, 7, 7, 30, 30]))
    counts = [[0] * 3 + [30] * 4, [0] * 2 + [12] * 5]
    text = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    low = [x.to(dtype) for x in (q, k, v, ka, va)]
    # keys of another precision than the queries follow them
    ours = merged_attention(
        low[0], [TiledKeys(*low[1:3], masked(text)), TiledKeys(ka, va, prefixes(counts, CPU))], None
    )
    theirs = plain(q, [(k, v, text), (ka, va, counted(counts, 30)[:, None])])
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), theirs, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2)


steps = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, min_size=1, max_size=3), st.sampled_from([0, SMALL]))
def test_rectangles_are_what_is_seen(rows, small):
    """Whatever the runs of queries that see the same, their rectangles say exactly what they see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pal.backbone.merged.SMALL", small)
        counts = []
        for row in rows:
            seen, count = [], 0
            for length, more in row:
                count += more
                seen += [count] * length
            counts.append(seen)
        Q = max(map(len, counts))
        counts = [seen + [seen[-1]] * (Q - len(seen)) for seen in counts]
        K = max(row[-1] for row in counts)
        tiles = prefixes(counts, CPU)
        assert torch.equal(rectangles(tiles, len(counts), Q, K), counted(counts, K))


def test_what_is_seen_alike_is_one_rectangle_without_a_mask():
    assert prefixes([[0] * 20 + [1500] * 128] * 4, CPU) == (AttentionTile((0, 4), (20, 148), (0, 1500)),)
    two = prefixes([[0] * 40 + [1500] * 128, [0] * 20 + [700] * 148], CPU)
    assert two == (AttentionTile((0, 1), (40, 168), (0, 1500)), AttentionTile((1, 2), (20, 168), (0, 700)))


def test_a_staircase_has_small_masks():
    """The hybrid's summary rows: each sees three keys more than the one before."""
    Q = 5 * BLOCK
    tiles = prefixes([[3 * (i + 1) for i in range(Q)] + [3 * Q] * 50], CPU)
    assert max(tile.mask.numel() for tile in tiles if tile.mask is not None) <= 3 * BLOCK * BLOCK
    assert sum(tile.mask is None for tile in tiles) == 5  # four whole parts under the stairs, and the text
    cells = sum((p.queries[1] - p.queries[0]) * (p.keys[1] - p.keys[0]) for p in tiles)
    assert cells < 0.65 * (Q + 50) * 3 * Q
