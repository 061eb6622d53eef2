"""`CheckpointSaver`: checkpoints written in a thread, from a copy, while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pal.train import checkpoint
from pal.train.distributed import Writers
from pal.train.recipe import Recipe
from pal.train.shards import Shard

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes checkpoints in a thread, one at a time; the caller waits for the copy of the tensors, not for the disk.

    The copy is in the memory of the host, as large as the trained weights and the optimizer's state that this process
    holds.

    Args:
        folder: folder of all checkpoints.
        recipe: recipe of the run.
        after: called in the thread of the first writer when a checkpoint is on disk.
    """

    def __init__(self, folder: Path, recipe: Recipe, after: Callable[[], object] | None = None) -> None:
        self.folder = folder
        self.recipe = recipe
        self._after = after
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pal-checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        state: checkpoint.State,
        weights: Mapping[str, Tensor | Shard],
        optimizer: Mapping[str, Tensor | Shard],
        writers: Writers,
    ) -> Path:
        """Copy state and tensors, and begin to write them; later changes are not seen.

        Waits until the checkpoint before is written, and raises its errors. Returns the folder of the new one, which is
        there after `wait`.
        """
        self.wait()
        self._pending = self._pool.submit(
            self._write,
            deepcopy(state),
            {name: _copied(tensor) for name, tensor in weights.items()},
            {name: _copied(tensor) for name, tensor in optimizer.items()},
            writers,
        )
        return checkpoint.path_of(self.folder, state)

    def _write(
        self,
        state: checkpoint.State,
        weights: Mapping[str, Tensor | Shard],
        optimizer: Mapping[str, Tensor | Shard],
        writers: Writers,
    ) -> None:
        keep = self.recipe.keep.checkpoints
        checkpoint.save(self.folder, state, self.recipe, weights, optimizer, keep, writers)
        if self._after is not None and writers.is_first:
            self._after()

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written; does not wait for one that is being written."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; raises the error of one that could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait as `wait`, when a run ends by another error: that of the checkpoint is only logged."""
        try:
            self.wait()
        except Exception as error:
            logger.error("the last checkpoint could not be written: %s", error)


def _copied(tensor: Tensor | Shard) -> Tensor | Shard:
    """A copy in host memory."""
    if isinstance(tensor, Shard):
        return replace(tensor, rows=tensor.rows.detach().to("cpu", copy=True))
    return tensor.detach().to("cpu", copy=True)
