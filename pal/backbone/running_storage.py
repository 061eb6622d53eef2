"""Storage of a `RunningBatch`: keys and values of independent rows, each with a length of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pal.backbone.merged import UNSEEN

_EMPTY = -(1 << 40)
"""Position of a place without a key; before all that any window sees."""
LEAST = 64
"""Places of the smallest storage."""


def _widened(x: Tensor | None, like: Tensor, rows: int, places: int, axis: int = -1, fill: float = 0) -> Tensor:
    """Storage with at least so many rows and places; both double where they do not suffice.

    Args:
        x: [S, ...], or None where nothing is stored yet.
        like: one entry [...], for the other sizes, dtype and device.
        rows: S.
        places: size of the entry's `axis`, counted from the end.
        axis: of the places.
        fill: of new places. It must be finite, since masked values are multiplied, too.
    """
    shape = [rows, *like.shape] if x is None else list(x.shape)
    old_rows, old_places = (0, LEAST) if x is None else (shape[0], shape[axis])
    if x is not None and rows <= old_rows and places <= old_places:
        return x
    shape[0] = max(rows, old_rows if rows <= old_rows else 2 * old_rows)
    shape[axis] = max(places, old_places if places <= old_places else 2 * old_places)
    wide = torch.full(shape, fill, dtype=like.dtype, device=like.device)
    if x is not None:
        wide[tuple(slice(0, size) for size in x.shape)] = x
    return wide


class SlotKeys:
    """Keys and values of all rows in one layer, [S, G, K, C] each."""

    def __init__(self) -> None:
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def put(self, row: int, k_GKC: Tensor, v_GKC: Tensor) -> None:
        """The first keys and values of a row."""
        count = k_GKC.shape[1]
        self.reserve(row + 1, count, k_GKC, v_GKC)
        assert self._k is not None and self._v is not None
        self._k[row, :, :count], self._v[row, :, :count] = k_GKC, v_GKC

    def write(self, rows_R: Tensor, places_R: Tensor, k_RG1C: Tensor, v_RG1C: Tensor) -> None:
        """The next key and value of each row, for which there is room."""
        assert self._k is not None and self._v is not None
        self._k[rows_R, :, places_R], self._v[rows_R, :, places_R] = k_RG1C[:, :, 0], v_RG1C[:, :, 0]

    def reserve(self, rows: int, places: int, k_GKC: Tensor, v_GKC: Tensor) -> None:
        """Make room for rows and places of keys and values like these."""
        self._k = _widened(self._k, k_GKC, rows, places, axis=-2)
        self._v = _widened(self._v, v_GKC, rows, places, axis=-2)

    def add_rows(self, rows: int) -> None:
        """Make room for rows, where there are any."""
        if self._k is not None and self._v is not None:
            self.reserve(rows, 1, self._k[0], self._v[0])

    def move(self, last: int, row: int) -> None:
        """Let the last row take the place of another."""
        for x in (self._k, self._v):
            if x is not None:
                x[row] = x[last]

    def view(self, rows: int, places: int) -> tuple[Tensor, Tensor]:
        """K and V [R, G, K, C] without a copy."""
        assert self._k is not None and self._v is not None
        return self._k[:rows, :, :places], self._v[:rows, :, :places]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return sum(x.nbytes for x in (self._k, self._v) if x is not None)


class SlotBias:
    """Biases on the scores of one layer's keys, [S, H or 1, K]; 0 for keys without one."""

    def __init__(self) -> None:
        self._x: Tensor | None = None

    def put(self, row: int, bias_HK: Tensor | None, device: torch.device) -> None:
        """The biases on the first keys of a row; None clears the row."""
        if bias_HK is None:
            if self._x is not None and row < len(self._x):
                self._x[row] = 0
            return
        if self._x is not None and self._x.shape[1] < len(bias_HK):
            self._x = self._x.expand(-1, len(bias_HK), -1).clone()
        like = bias_HK.to(device) if self._x is None else self._x[0].to(device)
        self._x = _widened(self._x, like, row + 1, bias_HK.shape[-1])
        self._x[row] = 0
        self._x[row, :, : bias_HK.shape[-1]] = bias_HK

    def move(self, last: int, row: int) -> None:
        """Let the last row take the place of another."""
        if self._x is not None:
            full = _widened(self._x, self._x[0], max(last, row) + 1, 1)
            full[row] = full[last]
            self._x = full

    def view(self, rows: int, places: int) -> Tensor | None:
        """The biases [R, H or 1, 1, K]; None where there are none."""
        if self._x is None:
            return None
        self._x = _widened(self._x, self._x[0], rows, places)
        return self._x[:rows, :, None, :places]


class KeyPositions:
    """Positions of the keys in layers that store the same ones, and what a row's next query sees of them.

    Args:
        window: of these layers.
        device: of the LLM.
    """

    def __init__(self, window: int | None, device: torch.device) -> None:
        self.window = window
        self.lengths: list[int] = []
        """Number of keys of each row."""
        self._x_SK = torch.full((1, LEAST), _EMPTY, dtype=torch.long, device=device)

    def split(self) -> KeyPositions:
        """The same positions, to differ from now on."""
        other = KeyPositions(self.window, self._x_SK.device)
        other.lengths, other._x_SK = list(self.lengths), self._x_SK.clone()
        return other

    @property
    def width(self) -> int:
        """Most keys of a row."""
        return max(self.lengths, default=0)

    def put(self, row: int, positions_K: Tensor) -> None:
        """Positions of a new row's first keys."""
        assert row == len(self.lengths)
        count = len(positions_K)
        self._x_SK = _widened(self._x_SK, self._x_SK[0], row + 1, count, fill=_EMPTY)
        self._x_SK[row] = _EMPTY
        self._x_SK[row, :count] = positions_K
        self.lengths.append(count)

    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = len(self.lengths) - 1
        self._x_SK[row] = self._x_SK[last]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def next(self, rows_R: Tensor, places_R: Tensor, query_R: Tensor, dtype: torch.dtype) -> Tensor:
        """Add the position of each row's next key; the additive mask of its query, [R, 1, 1, K]."""
        rows, places = len(self.lengths), self.width + 1
        self._x_SK = _widened(self._x_SK, self._x_SK[0], rows, places, fill=_EMPTY)
        self._x_SK[rows_R, places_R] = query_R
        first_R1 = query_R.new_full((rows, 1), _EMPTY) if self.window is None else query_R[:, None] - self.window
        seen_RK = self._x_SK[:rows, :places] > first_R1
        # finite, since the merge with the keys of a prefix needs a log-sum-exp
        return torch.zeros(seen_RK.shape, dtype=dtype, device=seen_RK.device).masked_fill_(~seen_RK, UNSEEN)[
            :, None, None
        ]


def places_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where each row's next key is stored [R]."""
    return torch.tensor(lengths, dtype=torch.long, device=device)
