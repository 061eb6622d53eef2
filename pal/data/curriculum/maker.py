"""Renders a planned curriculum in several processes, and writes its manifests and its summary."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pal.data.curriculum.plans import Clip, Curriculum
    from pal.data.manifest import Record

_CHUNK = 12
"""Clips rendered by a worker between two steps of the progress bar."""
_ALONE = 60
"""Most clips rendered without workers, whose start would cost more than it saves."""
SUMMARY = "curriculum.json"
_UNFINISHED = "unfinished.json"
_HELD_OUT_TASKS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "scenes": {"scene-pairs": None},
    "digits": {"digit-strings": None},
    "speech": {
        "speech-transcribe": ("transcription",),
        "speech-word-present": ("word present",),
        "speech-other": ("first word", "last word", "word count", "request"),
    },
    "music": {
        "instruments": ("instrument",),
        "families": ("instrument family",),
        "music-other": (
            *("instrument present", "higher or lower", "up or down", "note count", "tempo"),
            *("instruments in order", "instruments at once"),
        ),
    },
}
"""Held-out manifests of each group, with their tasks; None for all."""


def make(
    out: str | Path,
    seed: int,
    clips: int = 6000,
    esc10: str | Path | None = None,
    fsdd: str | Path | None = None,
    workers: int | None = None,
    held_out: float = 1.0,
) -> dict[str, Any]:
    """Write a curriculum, and return its summary.

    The folder holds `audio/`, `train.jsonl`, one `train-GROUP.jsonl` for each group, `held_out/NAME.jsonl` and
    `curriculum.json`, which is written last. The same arguments give the same bytes, whatever `workers` is, on machines
    with the same programs. A run that was killed goes on where it was; the manifests are written when all audio is
    there.

    Args:
        out: folder to write into; made if missing.
        seed: at least 0.
        clips: number of clips for training, over all groups.
        esc10: folder of ESC-10 in the layout of ESC-50; None leaves the environmental scenes out.
        fsdd: folder of FSDD; None leaves the digits out.
        workers: processes; None takes every core this process may use.
        held_out: size of the held-out parts, relative to the usual one.

    Raises:
        ConfigError: a value outside its range, a missing program, or a folder that holds another curriculum.
        ManifestError: a data set's folder is not laid out as expected.
    """
    from pal.data.curriculum import plans, programs
    from pal.files import write_json

    out = Path(out)
    _check(seed, clips, workers)
    programs.require()
    versions = programs.versions()
    curriculum = plans.plan(seed, clips, _path(esc10), _path(fsdd), held_out)
    digest = plans.digest(curriculum, json.dumps(versions))
    if (done := _resume(out, digest)) is not None:
        return done
    jobs = [
        (audio_path(folder, group, at), clip)
        for folder, groups in ((out, curriculum.training), (out / "held_out", curriculum.held_out))
        for group, planned in groups.items()
        for at, clip in enumerate(planned)
    ]
    _render_all(jobs, workers)
    training = {
        group: list(_records(out, f"curriculum-{seed}", group, planned))
        for group, planned in curriculum.training.items()
    }
    tests = _write_held_out(out / "held_out", seed, curriculum)
    _write_training(out, training)
    summary = {
        "seed": seed,
        "clips": clips,
        "left_out": [name for name, root in (("esc10", esc10), ("fsdd", fsdd)) if root is None],
        "versions": versions,
        "digest": digest,
        **summarise(out, curriculum, training, tests),
    }
    write_json(out / SUMMARY, summary)
    (out / _UNFINISHED).unlink()
    return summary


def _path(folder: str | Path | None) -> Path | None:
    return None if folder is None else Path(folder).expanduser()


def _check(seed: int, clips: int, workers: int | None) -> None:
    from pal.errors import ConfigError

    for name, value, low, high in (
        ("seed", seed, 0, 2**32 - 1),
        ("clips", clips, 10, 99_999),
        ("workers", 1 if workers is None else workers, 1, 1024),
    ):
        if not low <= value <= high:
            raise ConfigError(f"curriculum: {name} is {value}; use {low} to {high}")


def _resume(out: Path, digest: str) -> dict[str, Any] | None:
    """The summary of the same curriculum if it is there and complete; else mark the folder as unfinished."""
    from pal.errors import ConfigError
    from pal.files import write_json

    for name in (_UNFINISHED, SUMMARY):
        if (out / name).is_file():
            found = json.loads((out / name).read_text())
            if found.get("digest") != digest:
                raise ConfigError(
                    f"{out}: holds another curriculum (other options, recordings or versions); give another folder"
                )
            if name == SUMMARY:
                return found
            return None
    write_json(out / _UNFINISHED, {"digest": digest})
    return None


def audio_path(folder: Path, group: str, index: int) -> Path:
    """Path of the audio of a group's clip."""
    return folder / "audio" / f"{group}-{index:05d}.flac"


def _render_all(jobs: Sequence[tuple[Path, Clip]], workers: int | None) -> None:
    from tqdm import tqdm

    for folder in {path.parent for path, _ in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    left = [job for job in jobs if not job[0].is_file()]
    chunks = [left[start : start + _CHUNK] for start in range(0, len(left), _CHUNK)]
    workers = min(workers or _cores(), max(1, len(chunks)))
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), desc="clips", unit="clip") as bar:
        if workers == 1 or len(left) <= _ALONE:
            for chunk in chunks:
                bar.update(_render(chunk))
            return
        # spawn: a fork would copy the locks of torch's and tqdm's threads
        with ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent) as pool:
            for done in [pool.submit(_render, chunk) for chunk in chunks]:
                bar.update(done.result())


def _end_with_parent() -> None:
    """Make a worker end when the process that started it is killed; it would wait for work for ever."""

    def wait() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _render(jobs: Sequence[tuple[Path, Clip]]) -> int:
    import numpy as np
    import soundfile

    from pal.data.curriculum import effects, plans
    from pal.data.synth.waves import RATE

    for path, clip in jobs:
        x_N = effects.apply(plans.render(clip), clip.effects)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        soundfile.write(temporary, np.round(x_N * 32767).astype(np.int16), RATE, format="FLAC", subtype="PCM_16")
        temporary.replace(path)
    return len(jobs)


def _records(folder: Path, name: str, group: str, clips: Sequence[Clip]) -> Iterator[Record]:
    from pal.data.manifest import Record, Turn

    for at, clip in enumerate(clips):
        for number, question in enumerate(clip.questions):
            yield Record(
                id=f"{name}/{group}-{at:05d}#{number}",
                clips=(str(audio_path(folder, group, at)),),
                turns=(Turn(question.text, question.answer),),
                task=question.task,
                dataset=f"curriculum {group}",
                choices=question.choices,
            )


def _write_training(out: Path, training: dict[str, list[Record]]) -> None:
    from pal.data.manifest import write_manifest

    for group, records in training.items():
        write_manifest(out / f"train-{group}.jsonl", records)
    write_manifest(out / "train.jsonl", (record for records in training.values() for record in records))


def _write_held_out(folder: Path, seed: int, curriculum: Curriculum) -> dict[str, list[Record]]:
    """Write the held-out manifests, with copies of the real recordings; returns their records."""
    from pal.data.manifest import write_manifest

    tests: dict[str, list[Record]] = {}
    for name, records in curriculum.recordings.items():
        tests[name] = [_copied(record, folder / "audio" / name) for record in records]
    for group, planned in curriculum.held_out.items():
        asked = list(_records(folder, f"held-out-{seed}", group, planned))
        for name, tasks in _HELD_OUT_TASKS[group].items():
            tests[name] = [record for record in asked if tasks is None or record.task in tasks]
    for name, records in tests.items():
        write_manifest(folder / f"{name}.jsonl", records)
    return tests


def _copied(record: Record, folder: Path) -> Record:
    source = Path(record.clips[0])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder / source.name)
    return replace(record, clips=(str(folder / source.name),))


def summarise(
    out: Path, curriculum: Curriculum, training: dict[str, list[Record]], tests: dict[str, list[Record]]
) -> dict[str, Any]:
    """Numbers of clips, hours, questions, sentences and words, and how balanced the answers are."""
    import soundfile

    from pal.data.curriculum.speech import SpeechClip

    hours = {}
    for group, planned in curriculum.training.items():
        seconds = [soundfile.info(audio_path(out, group, at)).duration for at in range(len(planned))]
        hours[group] = {"clips": len(planned), "hours": round(sum(seconds) / 3600, 3), "longest_s": max(seconds)}
    spoken = [clip.content.sentence for clip in curriculum.training.get("speech", []) if isinstance(clip, SpeechClip)]
    everything = [record for records in training.values() for record in records]
    return {
        "training": {
            "clips": sum(group["clips"] for group in hours.values()),
            "questions": len(everything),
            "groups": hours,
            "sentences": len({one.text for one in spoken if one.kind != "list"}),
            "words": len({word for one in spoken for word in one.words}),
            "tasks": balance(everything),
        },
        "held_out": {name: {"questions": len(records), "tasks": balance(records)} for name, records in tests.items()},
    }


def balance(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Questions of each task; of closed ones also how frequent the most frequent answer is.

    `over_uniform` is its share relative to that of equally frequent answers: 0.1 is a tenth more.
    """
    answers: dict[str, Counter[str]] = {}
    choices: dict[str, int] = {}
    for record in records:
        answers.setdefault(record.task, Counter())[record.turns[-1].answer] += 1
        if record.choices is not None:
            choices[record.task] = len(record.choices)
    table: dict[str, dict[str, Any]] = {}
    for task, counted in sorted(answers.items()):
        answer, most = counted.most_common(1)[0]
        share = most / counted.total()
        table[task] = {"questions": counted.total(), "answers": len(counted), "most_frequent": answer}
        table[task]["share"] = round(share, 4)
        if task in choices:
            table[task] |= {"choices": choices[task], "over_uniform": round(share * choices[task] - 1, 4)}
    return table
