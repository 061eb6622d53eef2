"""Seeded synthetic scenes with questions: unlimited data with known answers.

`waves` has the building blocks of sounds, `events` a synthesiser for each kind, `scene` the plan of events,
`questions` the questions about it. `synthesise` writes audio and manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pal.data.manifest import Record

# Workers import this package without torch, hence the imports inside functions.

_CHUNK = 32
"""Scenes rendered by a worker between two steps of the progress bar."""
_ALONE = 200
"""Most scenes rendered without workers, whose start would cost more than it saves."""


def synthesise(
    out: str | Path,
    scenes: int,
    seed: int,
    seconds: float = 4.0,
    questions_per_scene: int = 6,
    workers: int | None = None,
) -> Path:
    """Write `scenes` scenes as `out/audio/NNNNNN.wav` (16 kHz, mono, 16 bit) and `out/manifest.jsonl`.

    The same arguments give the same bytes, whatever `workers` is; more scenes begin with the fewer.
    Other seeds give other scenes. Workers are processes that import the calling script, which
    therefore needs `if __name__ == "__main__":` when it asks for more than 200 scenes.

    Args:
        out: folder to write into; made if missing.
        scenes: number of scenes, at least 1.
        seed: at least 0.
        seconds: length of a scene, 1.5 to 60; at most one event begins per second of it.
        questions_per_scene: most records of a scene; one with few events may have fewer.
        workers: processes; None takes every core this process may use.

    Returns:
        The manifest's path.

    Raises:
        ConfigError: a value outside its range.
    """
    from tqdm import tqdm

    from pal.data.manifest import write_manifest

    out = Path(out)
    _check(scenes, seed, seconds, questions_per_scene, workers)
    (out / "audio").mkdir(parents=True, exist_ok=True)
    chunks = [range(start, min(start + _CHUNK, scenes)) for start in range(0, scenes, _CHUNK)]
    workers = min(workers or _cores(), len(chunks))
    with tqdm(total=scenes, desc="scenes", unit="scene") as bar:
        if workers == 1 or scenes <= _ALONE:
            for chunk in chunks:
                bar.update(_render(out, chunk, seed, seconds))
        else:
            # spawn: a fork would copy the locks of torch's and tqdm's threads
            with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
                jobs = [pool.submit(_render, out, chunk, seed, seconds) for chunk in chunks]
                for job in jobs:
                    bar.update(job.result())
    manifest = out / "manifest.jsonl"
    write_manifest(manifest, _records(out, scenes, seed, seconds, questions_per_scene))
    return manifest


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check(scenes: int, seed: int, seconds: float, questions: int, workers: int | None) -> None:
    from pal.errors import ConfigError

    for name, value, low, high in (
        ("scenes", scenes, 1, 999_999),
        ("seed", seed, 0, 2**32 - 1),
        ("seconds", seconds, 1.5, 60.0),
        ("questions_per_scene", questions, 1, 24),
        ("workers", 1 if workers is None else workers, 1, 1024),
    ):
        if not low <= value <= high:
            raise ConfigError(f"synth: {name} is {value}; use {low} to {high}")


def audio_path(out: Path, index: int) -> Path:
    """Path of the audio of scene `index`."""
    return out / "audio" / f"{index:06d}.wav"


def _render(out: Path, indices: range, seed: int, seconds: float) -> int:
    import numpy as np
    import soundfile

    from pal.data.synth.scene import plan, sound
    from pal.data.synth.waves import RATE

    for index in indices:
        x_N = np.round(sound(plan(seed, index, seconds)) * 32767).astype(np.int16)
        soundfile.write(audio_path(out, index), x_N, RATE, subtype="PCM_16")
    return len(indices)


def _records(out: Path, scenes: int, seed: int, seconds: float, number: int) -> Iterator[Record]:
    from pal.data.manifest import Record, Turn
    from pal.data.synth.questions import Chooser, question_rng, spans
    from pal.data.synth.scene import plan
    from pal.types import TagSpan

    chooser = Chooser()
    for index in range(scenes):
        scene = plan(seed, index, seconds)
        tags = tuple(TagSpan(*span) for span in spans(scene))
        for i, question in enumerate(chooser.choose(scene, number, question_rng(scene))):
            yield Record(
                id=f"synth-{seed}-{index:06d}-{i}",
                clips=(str(audio_path(out, index)),),
                turns=(Turn(question.text, question.answer),),
                task=question.task,
                dataset="synth",
                choices=question.choices,
                tags=tags,
            )
