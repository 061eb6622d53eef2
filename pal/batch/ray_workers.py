"""Workers of `pal batch` as actors of Ray Data, each with its own model.

Ray moves tasks and reports alone. Answers are in the workers' parts (`pal.batch.parts`), so a worker that ends loses
none; Ray restarts it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal import ray_session
from pal.batch.parts import AnswerParts
from pal.batch.tasks import ClipTask
from pal.batch.worker import ClipWorker, TaskReport, WorkerOptions
from pal.errors import PalError, first_sentence

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCKS = 2000
"""Most blocks that the tasks are divided into; Ray's own work grows with their number."""
_STORE_BYTES = 100 * 2**20
"""Ray's store of objects, for tasks and reports; about its minimum."""


class RayWorker:
    """`ClipWorker` on the batches of Ray Data.

    Args:
        options: fields of `WorkerOptions`; the path as text.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._worker = ClipWorker(WorkerOptions(**{**options, "parts": Path(options["parts"])}))

    def __call__(self, batch: pa.Table) -> dict[str, list[str]]:
        """Ask the tasks in column "task"; their reports are in column "report"."""
        reports = [self._worker(ClipTask.read(line)) for line in batch["task"].to_pylist()]
        return {"report": [json.dumps(asdict(report)) for report in reports]}


def check(address: str | None) -> None:
    """Raise ConfigError where Ray is missing, or a cluster is set that was not asked for."""
    ray_session.need("ray.data", "several workers need", "--workers")
    if address is None:
        ray_session.refuse_cluster("give --address {address}")


def ask(
    tasks: Sequence[ClipTask], options: WorkerOptions, workers: int, address: str | None, parts: AnswerParts
) -> Iterator[TaskReport]:
    """Ask tasks with workers; yields their reports as they come, in any order.

    Args:
        tasks: what is asked.
        options: of each worker.
        workers: their number.
        address: of a Ray cluster; None starts Ray on this machine, and ends it.
        parts: of the run; notes the temporary folder.

    Raises:
        ConfigError: Ray is missing, or cannot be started; fewer GPUs than the workers need.
        PalError: Ray gave up.
    """
    check(address)
    cores = os.cpu_count() or 1
    each = max(1, cores // workers)
    if address is None:
        ray_session.check_gpus(options.gpus * workers, "fewer --workers")
    cores = workers * each + 1
    remedy = "give --workers 1 to do without it"
    with ray_session.ray_session(address, cpus=cores, store_bytes=_STORE_BYTES, remedy=remedy, note=parts.temporary):
        import ray
        from ray.data import ActorPoolStrategy, DataContext, from_items

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.log_internal_stack_trace_to_stdout = False
        plain = {**asdict(options), "parts": str(options.parts)}
        blocks = min(len(tasks), _BLOCKS)
        reports = from_items([{"task": task.line()} for task in tasks], override_num_blocks=blocks).map_batches(
            RayWorker,
            fn_constructor_args=(plain,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=workers),
            num_cpus=each,
            num_gpus=options.gpus or None,
        )
        try:
            for row in reports.iter_rows():
                report = json.loads(row["report"])
                yield TaskReport(**{**report, "notes": tuple(report["notes"])})
        except ray.exceptions.RayError as error:
            raise PalError(
                f"Ray ended: {first_sentence(error)}; run the same command again to go on, with fewer --workers where "
                "memory was short"
            ) from None
