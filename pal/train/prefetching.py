"""`PrefetchLoader`: the micro-batches of each step, loaded ahead in threads or processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pal.train.loader_process import LoaderProcesses
from pal.train.objectives import MicroBatch
from pal.train.sources import StageData


class PrefetchLoader:
    """Data loader with prefetching threads or processes; yields the micro-batches of each step, in order.

    Args:
        data: data of the stage, after its `start`.
        first: first step to load.
        part: index of this training process.
        parts: number of training processes.
        workers: number of threads or processes; 0 loads when a step is asked for.
        prefetch: number of steps to load ahead, at least one for each worker.
        processes: True loads in processes, each served by a thread; False in threads.
    """

    def __init__(
        self,
        data: StageData,
        first: int,
        part: int,
        parts: int,
        workers: int,
        prefetch: int,
        processes: bool = False,
    ) -> None:
        self._data = data
        self._steps = iter(range(first, data.steps))
        self._place = (part, parts)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pal-data") if workers else None
        self._ahead: deque[Future[list[MicroBatch]]] = deque()
        self._prefetch = max(prefetch, workers)
        self.processes = LoaderProcesses(data.loader, workers) if processes and workers else None
        """The processes; None with threads."""

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        try:
            if self._pool is None:
                for step in self._steps:
                    yield self._data.micro_batches(step, *self._place)
                return
            while self._fill(self._pool):
                yield self._ahead.popleft().result()
        finally:
            self.close()

    def close(self) -> None:
        """Stop loading."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self.processes is not None:
            self.processes.close()

    def _fill(self, pool: ThreadPoolExecutor) -> bool:
        for step in self._steps:
            self._ahead.append(pool.submit(self._data.micro_batches, step, *self._place, self.processes))
            if len(self._ahead) >= self._prefetch:
                break
        return bool(self._ahead)
