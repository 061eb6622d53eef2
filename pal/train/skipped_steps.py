"""Steps with a NaN or infinite loss or gradient, which changed nothing: their list, with the records."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pal.train.checkpoint import State
from pal.train.curves import Log
from pal.train.distributed import HostReduce
from pal.train.meter import Meter, NonFiniteStep

logger = logging.getLogger(__name__)

_SHOWN = 8
"""Maximum number of records named in a message."""


class SkippedSteps:
    """The file `skipped_steps.jsonl` of a run.

    It has a line for each skipped step: `step` (counted from 1, over all stages), `stage`, `what` was not finite, and
    the ids of its `records`, over all processes.

    Args:
        path: path of the file. It is created at the first skipped step.
        host_reduce: exchange between the processes, all of which call the same methods.
        writes: True in the one process that writes the file.
    """

    def __init__(self, path: Path, host_reduce: HostReduce, writes: bool) -> None:
        self.path = path
        self._host_reduce = host_reduce
        self._writes = writes
        self._log: Log | None = None

    def restore(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a resumed run repeats."""
        if self._writes and self.path.exists():
            self._log = Log(self.path, step)

    def read(self, meter: Meter, stage: str, state: State) -> str | None:
        """Read the pending steps of a meter, and list those that were skipped.

        Returns:
            Message about a step that is one too many, or None. The state is then that before this step.
        """
        for fault in meter.read():
            told = self._add(state.step + 1 - fault.back, stage, fault)
            if fault.ends:
                state.step -= fault.back
                state.stage_step -= fault.back
                return f"stage '{stage}', step {state.stage_step}: {told}"
            state.nonfinite += 1
        return None

    def _add(self, step: int, stage: str, fault: NonFiniteStep) -> str:
        """List a step; returns its fault and its first records, in words."""
        gathered = self._host_reduce.gather(json.dumps(fault.inputs.records))
        records = list(dict.fromkeys(record for text in gathered for record in json.loads(text)))
        more = len(records) - _SHOWN
        told = f"{fault.what} is not finite; records: {', '.join(records[:_SHOWN])}"
        told += f" and {more} more" if more > 0 else ""
        if self._writes and not fault.ends:
            logger.warning("stage '%s', step %d is skipped: %s", stage, step, told)
            self._log = self._log or Log(self.path, step)
            self._log.write(step=step, stage=stage, what=fault.what, records=records)
        return told

    def close(self) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()
