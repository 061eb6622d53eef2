"""`run`: asks all tasks with one worker or several, and joins their answers in the order of the input."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal.batch.parts import AnswerParts
from pal.batch.tasks import BatchInput, ClipTask
from pal.batch.worker import ClipWorker, TaskReport, WorkerOptions
from pal.errors import ConfigError, PalError
from pal.files import writing

if TYPE_CHECKING:
    from pal.model import PalModel

FORMATS = (".jsonl", ".parquet")
"""Suffixes of an output file."""
_ROWS = 10_000
"""Rows of a row group of Parquet."""


@dataclass
class BatchReport:
    """What `run` did."""

    out: Path
    clips: int = 0
    answers: int = 0
    """Rows with an answer."""
    asked: int = 0
    """Clips of this call, bad ones included."""
    resumed: int = 0
    """Clips that an earlier call had answered."""
    audio_seconds: float = 0.0
    seconds: float = 0.0
    """Wall-clock time of this call."""
    failed: dict[str, str] = field(default_factory=dict)
    """Bad clips, and why."""
    failed_list: Path | None = None
    """File that lists them."""
    notes: list[str] = field(default_factory=list)


def run(
    given: BatchInput,
    out: Path,
    model: PalModel | str,
    *,
    other_weights: bool = False,
    max_new_tokens: int = 64,
    read_to_end: bool = False,
    workers: int = 1,
    gpus: float = 0.0,
    address: str | None = None,
    overwrite: bool = False,
    progress: Callable[[Iterator[TaskReport], int, int], Iterator[TaskReport]] = lambda reports, done, all_: reports,
) -> BatchReport:
    """Ask all that is asked, and write it to `out`; goes on where an earlier call was stopped.

    Args:
        given: clips and questions.
        out: file to write, .jsonl or .parquet.
        model: loaded, or the folder or Hub id of a bundle. Several workers need the latter.
        other_weights: as in `pal.load`.
        max_new_tokens: most tokens of an answer.
        read_to_end: as in `PalModel.ask`.
        workers: 1 asks in this process; more are actors of Ray.
        gpus: GPUs of a worker; 0 asks on the CPU.
        address: of a Ray cluster; None starts Ray on this machine. With an address, one worker is an actor, too.
        overwrite: ask all anew, and replace `out`.
        progress: wraps the reports of the tasks; also takes the number of those done before, and of all.

    Raises:
        ConfigError: an output that is there, or is of another run; Ray or pyarrow is missing.
        PalError: the model cannot be loaded.
    """
    begun = time.monotonic()
    _check_format(out)
    _check_not_taken(out, given)
    parts = AnswerParts(out)
    with parts.open(
        _settings(given, max_new_tokens, read_to_end), {t.key: t.clips for t in given.tasks}, overwrite=overwrite
    ):
        waiting = [task for task in given.tasks if task.key not in parts.kept]
        report = BatchReport(out, clips=len(given.tasks), resumed=len(given.tasks) - len(waiting))
        if parts.damaged:
            report.notes.append(f"{parts.folder}: {parts.damaged} damaged lines; their clips were asked again")
        options = WorkerOptions(
            model if isinstance(model, str) else "",
            parts.folder.absolute(),
            other_weights,
            max_new_tokens,
            read_to_end,
            gpus,
            parts.model,
        )
        if not waiting:
            reports: Iterator[TaskReport] = iter(())
        elif workers == 1 and address is None:
            reports = _in_this_process(waiting, options, None if isinstance(model, str) else model)
        else:
            from pal.batch import ray_workers

            assert isinstance(model, str), "a worker loads its model itself"
            reports = ray_workers.ask(waiting, options, workers, address, parts)
        for done in progress(reports, report.resumed, len(given.tasks)):
            if done.fatal is not None:
                raise PalError(done.fatal)
            report.asked += 1
            report.notes += [line for line in done.notes if line not in report.notes]
        parts.reload()
        _join(given, parts, report)
        if not report.failed:
            parts.remove()
    report.seconds = time.monotonic() - begun
    return report


def failed_list(out: Path) -> Path:
    """File that lists the bad clips of an output."""
    return out.with_name(f"{out.name}.failed.jsonl")


def _check_not_taken(out: Path, given: BatchInput) -> None:
    """Refuse to write over the input, or over a file that is no list of bad clips."""
    listed = failed_list(out)
    for path in (out, listed):
        if path.exists() and path.samefile(given.path):
            raise ConfigError(f"{path}: is the input; give another --out")
    try:
        lines = [json.loads(line) for line in listed.read_bytes().splitlines()]
        ours = all(isinstance(line, dict) and line.keys() == {"clip", "error"} for line in lines)
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ConfigError(f"{listed}: is there, and is no list of bad clips; move it, or give another --out")


def _check_format(out: Path) -> None:
    if out.suffix not in FORMATS:
        raise ConfigError(f"{out}: the output ends in {' or '.join(FORMATS)}; give such a name")
    if out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ConfigError(f"{out}: Parquet needs pyarrow; pip install 'pal-audio[ray]', or write .jsonl") from None


def _settings(given: BatchInput, max_new_tokens: int, read_to_end: bool) -> dict[str, Any]:
    import torch
    import transformers

    import pal

    questions = None if given.from_manifest else [question.text for question in given.tasks[0].questions]
    return {
        "input": str(given.folder.absolute()),
        "questions": questions,
        "max_new_tokens": max_new_tokens,
        "read_to_end": read_to_end,
        "pal": pal.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _in_this_process(tasks: Sequence[ClipTask], options: WorkerOptions, model: PalModel | None) -> Iterator[TaskReport]:
    worker = ClipWorker(options, model)
    try:
        yield from map(worker, tasks)
    finally:
        worker.close()


def _join(given: BatchInput, parts: AnswerParts, report: BatchReport) -> None:
    """Write the output and the list of bad clips, in the order of the input."""
    lines: list[str] = []

    def rows() -> Iterator[dict[str, Any]]:
        for task in given.tasks:
            outcome = parts.outcome(task.key)
            report.audio_seconds += outcome["audio_seconds"] or 0.0
            failed = outcome["failed"]
            if failed is not None:
                name = ", ".join(given.names(task))
                report.failed[name] = failed
                lines.append(_json({"clip": name, "error": failed}))
            else:
                report.answers += len(task.questions)
            yield from given.rows(task, outcome)

    write = _write_jsonl if report.out.suffix == ".jsonl" else _write_parquet
    write(report.out, rows(), given)
    if lines:
        report.failed_list = failed_list(report.out)
        with writing(report.failed_list) as file:
            file.write("".join(lines).encode("utf-8", "backslashreplace"))
    else:
        failed_list(report.out).unlink(missing_ok=True)


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write_jsonl(out: Path, rows: Iterator[dict[str, Any]], given: BatchInput) -> None:
    with writing(out) as file:
        for row in rows:
            file.write(_json(row).encode("utf-8", "backslashreplace"))


def _write_parquet(out: Path, rows: Iterator[dict[str, Any]], given: BatchInput) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"clips": pa.list_(pa.string()), "audio_seconds": pa.float64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in given.columns()])
    with writing(out) as file, pq.ParquetWriter(file, schema) as writer:
        waiting: list[dict[str, Any]] = []
        for row in rows:
            waiting.append(row)
            if len(waiting) == _ROWS:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, schema))
