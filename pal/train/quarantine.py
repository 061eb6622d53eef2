"""Bad clips: the list of those that a run met, and the limit beyond which it ends.

Records about a clip that cannot be used are left out of their batch. Which these are depends on the data and the step
alone, so loader threads and processes change nothing, and a resumed run meets the same clips at the same steps.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pal.errors import AudioError
from pal.train.curves import Log, read_log
from pal.train.distributed import HostReduce

logger = logging.getLogger(__name__)


class LeftOut(NamedTuple):
    """Records left out of a batch for one clip."""

    clip: str
    reason: str
    """The clip's error, in one line."""
    source: str
    """Name of the data source."""
    records: tuple[str, ...]
    """Ids of the records."""


class Quarantine:
    """Bad clips that a run has met, also in the file `quarantine.jsonl`.

    The file has a line for each clip, in the order of the steps: `step` (counted from 1, over all stages), `source`,
    `clip`, `reason`, and `records`, those that the step would have trained on.

    Args:
        path: path of the file. It is created at the first bad clip.
        max_bad: number of bad clips with which the run still goes on.
        host_reduce: exchange between the processes, all of which call the same methods.
        writes: True in the one process that writes the file.
    """

    def __init__(self, path: Path, max_bad: int, host_reduce: HostReduce, writes: bool) -> None:
        self.path = path
        self.max_bad = max_bad
        self.errors: dict[str, dict[str, AudioError]] = {}
        """Source -> bad clip -> its error. Loaders look there, so that no bad clip is read again and again."""
        self._clips: set[str] = set()
        self._host_reduce = host_reduce
        self._writes = writes
        self._log: Log | None = None

    def __len__(self) -> int:
        return len(self._clips)

    def restore(self, step: int) -> None:
        """Take the clips met in the first `step` steps from the file; the lines of later steps are dropped."""
        if not self.path.exists():
            return
        lines = [line for line in read_log(self.path) if line["step"] <= step]
        for line in lines:
            self._add(line["source"], line["clip"], line["reason"])
        if self._writes:
            self._log = Log(self.path, step)

    def meet(self, step: int, left_out: Iterable[LeftOut]) -> tuple[int, str | None]:
        """List the new bad clips of a step, over all processes.

        Args:
            step: number of the step, counted from 1.
            left_out: records left out of this process's part of the step.

        Returns:
            Number of records left out by all processes; and the message if there are now more than `max_bad` clips.
        """
        mine = [*left_out]
        if not any(self._host_reduce.sum(len(mine))):
            return 0, None
        found = [LeftOut(*one) for text in self._host_reduce.gather(json.dumps(mine)) for one in json.loads(text)]
        new = [clip for clip in dict.fromkeys(one.clip for one in found) if clip not in self._clips]
        for one in found:
            self._add(one.source, one.clip, one.reason)
        for clip in new:
            of_clip = [one for one in found if one.clip == clip]
            first, records = of_clip[0], [record for one in of_clip for record in one.records]
            if self._writes:
                logger.warning("data '%s', step %d, records left out: %s", first.source, step, first.reason)
                self._log = self._log or Log(self.path, step)
                self._log.write(step=step, source=first.source, clip=clip, reason=first.reason, records=records)
        excess = None
        if new and len(self) > self.max_bad:
            last = next(one for one in reversed(found) if one.clip == new[-1])
            excess = (
                f"{last.reason}. {_counted(len(self))} more than keep.max_bad ({self.max_bad}): mend what "
                f"{self.path.name} lists, or raise max_bad, and continue with --resume"
            )
        return sum(len(one.records) for one in found), excess

    def _add(self, source: str, clip: str, reason: str) -> None:
        self.errors.setdefault(source, {}).setdefault(clip, AudioError(reason))
        self._clips.add(clip)

    def close(self) -> None:
        """Close the file, and say how many clips it lists."""
        if self._log is not None:
            self._log.close()
        if self._writes and len(self):
            clips = "1 bad clip was" if len(self) == 1 else f"{len(self)} bad clips were"
            logger.warning("%s left out; %s lists them", clips, self.path)


def _counted(clips: int) -> str:
    return "1 bad clip is" if clips == 1 else f"{clips} bad clips are"
