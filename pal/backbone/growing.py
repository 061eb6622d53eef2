"""Tensors and keys and values that grow at their end, without a copy at each step."""

from __future__ import annotations

from torch import Tensor


class GrowingTensor:
    """Tensor that grows along an axis; its storage is twice as large as needed when it is full."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.first = self.used = 0
        self._storage: Tensor | None = None

    def append(self, x: Tensor) -> None:
        """Add entries at the end."""
        added = x.shape[self.axis]
        if self._storage is None or self.first + self.used + added > self._storage.shape[self.axis]:
            shape = list(x.shape)
            shape[self.axis] = 2 * (self.used + added)
            grown = x.new_empty(shape)
            if self.used:
                grown.narrow(self.axis, 0, self.used).copy_(self.view())
            self._storage, self.first = grown, 0
        self._storage.narrow(self.axis, self.first + self.used, added).copy_(x)
        self.used += added

    def drop(self, count: int) -> None:
        """Forget entries at the beginning."""
        self.first += count
        self.used -= count

    def keep(self, count: int) -> None:
        """Forget entries at the end: all but the first `count`."""
        self.used = min(self.used, count)

    def view(self) -> Tensor:
        """The entries, without a copy."""
        assert self._storage is not None
        return self._storage.narrow(self.axis, self.first, self.used)


class GrowingKeys:
    """Keys and values of one layer, [1, G, K, C] each."""

    def __init__(self) -> None:
        self.k, self.v = GrowingTensor(2), GrowingTensor(2)

    def __len__(self) -> int:
        return self.k.used

    def append(self, k_1GKC: Tensor, v_1GKC: Tensor) -> None:
        """Add keys and values at the end."""
        self.k.append(k_1GKC)
        self.v.append(v_1GKC)

    def drop(self, count: int) -> None:
        """Forget the first `count`."""
        self.k.drop(count)
        self.v.drop(count)

    def keep(self, count: int) -> None:
        """Forget all but the first `count`."""
        self.k.keep(count)
        self.v.keep(count)

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values, without a copy."""
        return self.k.view(), self.v.view()
