"""Sketches of weights against the true distance of the tensors."""

import numpy as np
import pytest
import torch

from pal.sketches import BUCKETS, relative_difference, sketch, sketches


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changed(x_DE: torch.Tensor, kind: str) -> torch.Tensor:
    y_DE = x_DE.clone()
    if kind == "all":
        y_DE += 0.05 * random(*x_DE.shape, seed=1)
    elif kind == "rounded":
        y_DE = x_DE.bfloat16().float()
    elif kind == "scaled":
        y_DE *= 1.03
    elif kind == "shifted":
        y_DE += 0.01
    elif kind == "row":
        y_DE[5] += 1
    elif kind == "column":  # of a matrix whose width divides by no prime but 2 and 3
        y_DE[:, 31] += 1
    else:
        y_DE[3, 7] += 3
    return y_DE


@pytest.mark.parametrize("kind", ["all", "rounded", "scaled", "shifted", "row", "column", "one"])
def test_the_estimate_is_near_the_true_difference(kind: str) -> None:
    x_DE = random(192, 576)
    y_DE = changed(x_DE, kind)
    true = float((x_DE - y_DE).norm() / x_DE.norm())
    assert relative_difference(sketch(x_DE), sketch(y_DE)) == pytest.approx(true, rel=0.35)


def test_the_squared_estimate_is_right_on_average_and_spreads_as_stated() -> None:
    squares = []
    for seed in range(200):
        x_N, d_N = random(4000, seed=seed), random(4000, seed=1000 + seed)
        squares.append((relative_difference(sketch(x_N), sketch(x_N + d_N)) * float(x_N.norm() / d_N.norm())) ** 2)
    # chi squared over its degrees of freedom
    assert np.mean(squares) == pytest.approx(1, abs=4 * (2 / BUCKETS / 200) ** 0.5)
    assert np.std(squares) == pytest.approx((2 / BUCKETS) ** 0.5, rel=0.25)


def test_by_hand() -> None:
    """The signs of 70 values, from numpy's generator."""
    words = np.random.PCG64(0).random_raw(2)
    bits = [int(word) >> (8 * byte) & 0xFF for word in words for byte in range(8)]
    signs = [-1 if byte >> (7 - at) & 1 else 1 for byte in bits for at in range(8)][:70]
    x_N = torch.arange(1.0, 71.0)
    sums = [sum(signs[i] * (i + 1) for i in range(bucket, 70, BUCKETS)) for bucket in range(BUCKETS)]
    assert sketch(x_N)[1:].tolist() == sums
    assert sketch(x_N)[0].item() == pytest.approx(sum(i * i for i in range(1, 71)) ** 0.5)
    assert {1, -1} == set(signs)


def test_blocks_go_on_where_the_last_one_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    x_N = random(64 * BUCKETS * 3 + 5)
    whole = sketch(x_N)
    monkeypatch.setattr("pal.sketches._BLOCK", 64 * BUCKETS)
    torch.testing.assert_close(sketch(x_N), whole)


def test_types_shapes_and_ties() -> None:
    x_DE = random(8, 62)
    assert sketch(x_DE.bfloat16()).equal(sketch(x_DE.bfloat16().float().flatten()))
    assert sketch(x_DE.T).equal(sketch(x_DE.T.contiguous()))
    assert sketch(torch.tensor(3))[0] == 3
    rows = sketches({"b": x_DE, "a": x_DE[:4], "c": x_DE})
    assert rows.shape == (3, 1 + BUCKETS)
    assert rows[0].equal(sketch(x_DE[:4])) and rows[1].equal(rows[2]) and rows[1].equal(sketch(x_DE))
    assert sketches({}).shape == (0, 1 + BUCKETS)


def test_zero() -> None:
    zero = torch.zeros(5)
    assert relative_difference(sketch(zero), sketch(zero)) == 0
    assert relative_difference(sketch(zero), sketch(zero + 1)) == float("inf")
