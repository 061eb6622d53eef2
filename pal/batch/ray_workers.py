"""Workers of `pal batch` as actors of Ray Data, each with its own model.

Ray moves tasks and reports alone. Answers are in the workers' parts (`pal.batch.parts`), so a worker that ends loses
none; Ray restarts it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal.batch.parts import AnswerParts
from pal.batch.tasks import ClipTask
from pal.batch.worker import ClipWorker, TaskReport, WorkerOptions
from pal.errors import ConfigError, PalError, first_sentence

if TYPE_CHECKING:
    import pyarrow as pa

INSTALL = "pip install 'pal-audio[ray]'"
_BLOCKS = 2000
"""Most blocks that the tasks are divided into; Ray's own work grows with their number."""
_STORE_BYTES = 100 * 2**20
"""Ray's store of objects, for tasks and reports; about its minimum."""
_LONGEST_FOLDER = 40
"""Longest path of a temporary folder in which the paths of Ray's sockets keep within their 107 bytes."""
_STARTS = 3
"""Tries to start Ray on this machine."""
_ADDRESS = "RAY_ADDRESS"
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""No statistics on usage are sent, and Ray's processes print nothing."""


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
    try:
        import ray.data  # noqa: F401
    except ImportError:
        raise ConfigError(f"several workers need Ray; {INSTALL}, or leave out --workers") from None
    found = os.environ.get(_ADDRESS)
    if address is None and found not in (None, "", "local"):
        raise ConfigError(f"{_ADDRESS} is set to '{found}'; give --address {found} to use this cluster, or unset it")


def shared_gpus(workers: int) -> float:
    """GPUs of each worker where they share those of this machine; 0 without any."""
    import torch

    devices = torch.cuda.device_count()
    return 0.0 if not devices else 1.0 if workers <= devices else 1.0 / -(-workers // devices)


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
    with _started(address, workers * each + 1, options.gpus * workers, parts):
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


@contextmanager
def _started(address: str | None, cpus: int, gpus: float, parts: AnswerParts) -> Iterator[None]:
    """Ray, on this machine or connected to a cluster; ended, and its files removed, at the end."""
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ.update(_QUIET)
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    temporary: Path | None = None
    try:
        if address is None:
            # Ray's own folder would stay
            base = tempfile.gettempdir()
            temporary = Path(tempfile.mkdtemp(prefix="pal-ray-", dir=base if len(base) <= _LONGEST_FOLDER else "/tmp"))
            parts.temporary(temporary)
            _check_gpus(gpus)
            quiet |= {"num_cpus": cpus, "include_dashboard": False, "_temp_dir": str(temporary)}
            quiet |= {"object_store_memory": _STORE_BYTES}
        _init(address, quiet)
        yield
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _init(address: str | None, options: dict[str, Any]) -> None:
    """Start Ray or connect to it; raises ConfigError where that fails."""
    import ray

    tries = _STARTS if address is None else 1
    for left in reversed(range(tries)):
        try:
            with _without_stderr():
                ray.init(address or "local", **options)
            return
        except Exception as error:  # Ray raises bare ones, such as where a busy machine takes over 30 s to start it
            ray.shutdown()
            if not left:
                what = f"Ray could not be started at {address}" if address else "Ray could not be started here"
                raise ConfigError(f"{what}: {first_sentence(error)}; give --workers 1 to do without it") from None


@contextmanager
def _without_stderr() -> Iterator[None]:
    """What native code writes to stderr is dropped: Ray says there that it was told to be quiet."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_gpus(gpus: float) -> None:
    """Raise ConfigError where this machine has fewer; Ray would wait for them."""
    import torch

    if gpus > torch.cuda.device_count():
        raise ConfigError(
            f"the workers need {gpus:g} GPUs, and there are {torch.cuda.device_count()}; give a smaller --num-gpus, or "
            "fewer --workers"
        )
