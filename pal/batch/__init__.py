"""Many clips, many questions (`pal batch`).

`read_input` makes tasks of a manifest or folder, `run` asks them. A worker (`ClipWorker`) asks each clip as `pal ask`
does and writes the outcome into a part (`AnswerParts`); at the end the parts are joined. Several workers are actors of
Ray Data.
"""

from pal.batch.run import BatchReport, run
from pal.batch.tasks import BatchInput, ClipQuestion, ClipTask, read_input

__all__ = ["BatchInput", "BatchReport", "ClipQuestion", "ClipTask", "read_input", "run"]
