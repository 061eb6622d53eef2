"""Trackers: programs that show a run's numbers while it trains. `log.jsonl` has them all, with and without trackers.

A tracker gets the lines of the log. Each start of a run, a resumed one too, gives it the run anew: first the lines that
the log has kept, then those to come. So no step is missing or there twice, whatever was written before a kill. A
tracker that fails is left out for the rest of the run, with one warning.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol

from pal.errors import ConfigError, first_sentence

logger = logging.getLogger(__name__)

TrackerName = Literal["tensorboard", "trackio"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run."""

    folder: Path
    settings: Mapping[str, Any]
    """The recipe, as JSON."""
    started: float
    """Time of the run's first start, in seconds since the epoch."""

    @property
    def name(self) -> str:
        """Name of the folder, and a few digits by which folders of one name differ."""
        place = hashlib.sha256(os.fsencode(self.folder.absolute())).hexdigest()
        return f"{self.folder.name}-{place[:6]}"


class Tracker(Protocol):
    """Interface of a tracker. The constructor raises ConfigError where it cannot work."""

    def start(self, run: TrackedRun) -> None:
        """Begin a run; what an earlier start of the same run wrote is deleted."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add the numbers of a line of the log, by name; `seconds` is the training time."""

    def finish(self) -> None:
        """Write what is left, and end."""


class TensorBoard:
    """Event files for TensorBoard, in the run's folder `tensorboard/`."""

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("keep.track: tensorboard is not installed; pip install 'pal-audio[tensorboard]'")

    def start(self, run: TrackedRun) -> None:
        """Write a new event file in place of the earlier ones."""
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._started = run.started
        self._writer = SummaryWriter(str(folder))
        settings = json.dumps(run.settings, indent=1)
        self._writer.add_text("recipe", f"```json\n{settings}\n```", walltime=run.started)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        time = self._started + numbers.get("seconds", 0.0)
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step, walltime=time)
        self._writer.flush()

    def finish(self) -> None:
        """Close the event file."""
        self._writer.close()


class Trackio:
    """Runs of trackio's project "pal", in its folder on this machine.

    trackio is imported by a process of its own (`pal/train/trackio_process.py`), which may not use the Hub: trackio
    asks it for the user's name, even for a local run.
    """

    NEEDS = (0, 43)
    _ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL", "TRACKIO_BUCKET_ID")
    _SECONDS = 60

    def __init__(self) -> None:
        needed = ".".join(map(str, self.NEEDS))
        try:
            found = version("trackio")
        except PackageNotFoundError:
            raise ConfigError("keep.track: trackio is not installed; pip install 'pal-audio[trackio]'") from None
        if tuple(int(part) for part in found.split(".")[:2]) < self.NEEDS:
            raise ConfigError(f"keep.track: trackio {found} is older than {needed}; pip install 'pal-audio[trackio]'")
        for name in self._ELSEWHERE:
            if os.environ.get(name):
                raise ConfigError(f"keep.track: trackio stays on this machine, but {name} is set; unset it")

    def start(self, run: TrackedRun) -> None:
        """Start the process, which deletes the run of this name if there is one."""
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("trackio_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **quiet},
        )
        assert self._process.stdin is not None
        self._input = self._process.stdin
        self._send({"project": "pal", "name": run.name, "config": {"recipe": run.settings}})

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hand the numbers to the process."""
        self._send({"step": step, "metrics": dict(numbers)})

    def finish(self) -> None:
        """Wait until the process has written all."""
        self._input.close()
        try:
            status = self._process.wait(self._SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        if status:
            raise RuntimeError(f"its process ended with status {status}")

    def _send(self, content: Mapping[str, Any]) -> None:
        self._input.write(json.dumps(content).encode() + b"\n")
        self._input.flush()


TRACKERS: dict[TrackerName, type[TensorBoard] | type[Trackio]] = {"tensorboard": TensorBoard, "trackio": Trackio}


class Trackers:
    """The trackers of a run.

    Args:
        names: of `keep.track`.

    Raises:
        ConfigError: a tracker is not installed, or would not stay on this machine.
    """

    def __init__(self, names: Sequence[TrackerName]) -> None:
        self._trackers: dict[str, Tracker] = {name: TRACKERS[name]() for name in names}

    def start(self, run: TrackedRun, lines: Sequence[Mapping[str, Any]]) -> None:
        """Begin with the lines that the log has."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.start(run))
        for line in lines:
            self.log(line)

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line of the log."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(line["step"], numbers_of(line)))

    def finish(self) -> None:
        """End all; nothing follows."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.finish)
        self._trackers = {}

    def _try(self, name: str, call: Any) -> None:
        try:
            call()
        except Exception as error:  # training goes on, whatever a tracker raises
            del self._trackers[name]
            logger.warning(
                "tracker '%s' failed (%s: %s) and is left out from here on; log.jsonl has all of the run",
                name,
                type(error).__name__,
                first_sentence(error),
            )


def numbers_of(line: Mapping[str, Any], above: str = "") -> dict[str, float]:
    """Numbers of a line of the log, without its step, by name: that of `{"lr": {"llm": 1}}` is "lr/llm"."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{above}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and (above or key != "step"):
            found[f"{above}{key}"] = value
    return found
