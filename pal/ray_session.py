"""Ray: on this machine alone, or on a cluster that is named; ended, with its temporary files, at the end."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pal.errors import ConfigError, first_sentence

INSTALL = "pip install 'pal-audio[ray]'"
_LONGEST_FOLDER = 40
"""Longest path of a temporary folder in which the paths of Ray's sockets keep within their 107 bytes."""
_STARTS = 3
"""Tries to start Ray on this machine."""
_ADDRESS = "RAY_ADDRESS"
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""No statistics on usage are sent, and Ray's own processes print nothing."""


def need(module: str, what: str, option: str) -> None:
    """Raise ConfigError where Ray, or this part of it, is missing.

    Args:
        module: of Ray, such as `ray.data`.
        what: needs Ray, such as "several workers need".
        option: of the command that asks for it, such as `--workers`.
    """
    try:
        importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"{what} Ray; {INSTALL}, or leave out {option}") from None


def refuse_cluster(use: str) -> None:
    """Raise ConfigError where the environment names a cluster, which nobody asked for.

    Args:
        use: how to use it, such as "give --address {address}".
    """
    found = os.environ.get(_ADDRESS)
    if found not in (None, "", "local"):
        raise ConfigError(
            f"{_ADDRESS} is set to '{found}'; {use.format(address=found)} to use this cluster, or unset it"
        )


def shared_gpus(workers: int) -> float:
    """GPUs of each worker where they share those of this machine; 0 without any."""
    import torch

    devices = torch.cuda.device_count()
    return 0.0 if not devices else 1.0 if workers <= devices else 1.0 / -(-workers // devices)


def check_gpus(gpus: float, fewer: str) -> None:
    """Raise ConfigError where this machine has fewer GPUs than are asked for, on which Ray would wait.

    Args:
        gpus: that are needed.
        fewer: another remedy beside a smaller --num-gpus, such as "fewer --workers".
    """
    import torch

    devices = torch.cuda.device_count()
    if gpus > devices:
        raise ConfigError(f"{gpus:g} GPUs are needed, and there are {devices}; give a smaller --num-gpus, or {fewer}")


@contextmanager
def ray_session(
    address: str | None,
    *,
    cpus: int,
    store_bytes: int,
    remedy: str,
    note: Callable[[Path], None] | None = None,
    show: bool = False,
) -> Iterator[None]:
    """Ray while it is needed.

    Args:
        address: of a cluster; None starts Ray on this machine, and ends it.
        cpus: processor cores that it may divide among its processes, on this machine.
        store_bytes: of its store of objects, on this machine.
        remedy: where it cannot be started.
        note: is told the temporary folder, for another run to remove it where this one is killed.
        show: what Ray's workers print is shown.

    Raises:
        ConfigError: Ray cannot be started.
    """
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ.update(_QUIET)
    import ray

    options: dict[str, Any] = {"log_to_driver": show, "logging_level": logging.ERROR}
    temporary: Path | None = None
    try:
        if address is None:
            # Ray's own folder would stay
            base = tempfile.gettempdir()
            temporary = Path(tempfile.mkdtemp(prefix="pal-ray-", dir=base if len(base) <= _LONGEST_FOLDER else "/tmp"))
            if note is not None:
                note(temporary)
            options |= {"num_cpus": cpus, "include_dashboard": False, "_temp_dir": str(temporary)}
            options |= {"object_store_memory": store_bytes}
        _init(address, options, remedy)
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


def _init(address: str | None, options: dict[str, Any], remedy: str) -> None:
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
                raise ConfigError(f"{what}: {first_sentence(error)}; {remedy}") from None


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
