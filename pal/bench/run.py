"""`pal bench`: every variant on the same scenes, in one process, in turns."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pal.backbone.llm import Backbone
from pal.bench.closed_form import OnPaper, on_paper
from pal.bench.machine import check_device, machine, product_rate
from pal.bench.measure import Counts, Seconds, counts, give_back_freed_memory, keep_freed_memory, round_seconds
from pal.bench.peers import Mllama, Plain, Qwen2Audio, plain_lm
from pal.bench.presets import Length, Phase, Place, Preset, Scope
from pal.bench.scene import Scene, make_scene
from pal.bench.subjects import Attached, Reading, Subject, attached
from pal.encoders.base import Encoder
from pal.integrations.plits import PLITS
from pal.registry import build

BASELINES = {"plain": "plits", "plain_text": "text"}
"""The plain LLM on the same rows -> the variant that it checks."""


@dataclass(frozen=True)
class Row:
    """One variant in one phase on one scene. Seconds and FLOPs of `decode` are those of one token."""

    variant: str
    scope: Scope
    phase: Phase
    audio_tokens: Length
    """Of a clip; `text` hears none of them."""
    text_tokens: int
    """Of the longest text."""
    batch: int
    seconds: float | None
    """Median; None where nothing was timed."""
    seconds_spread: float | None
    """Between the quartiles."""
    peak_bytes: int
    saved_bytes: int
    flops: int
    flops_closed_form: float
    kv_bytes: int
    """0 in a training step, which keeps none."""
    parameters: int

    @property
    def place(self) -> tuple[str, str, int, Length]:
        """What rows that can be compared have in common."""
        return self.scope, self.phase, self.batch, self.audio_tokens


@dataclass
class Result:
    """All of a run."""

    preset: Preset
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    baselines: list[Row] = field(default_factory=list)
    """Of the plain LLM."""
    paper: dict[tuple[str, tuple[str, str, int, Length]], OnPaper] = field(default_factory=dict)
    """(variant, place) -> closed forms, those of saved bytes and of keys and values too."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """Rows that were asked for and are not there, and why."""
    interrupted: bool = False
    """Whether it was stopped; what is there is whole all the same."""
    complete: bool = False
    """Whether all places had their turn."""

    @property
    def rate(self) -> float | None:
        """Operations a second of the device's matrix products, where it was measured."""
        found: float | None = self.machine.get("product_flops_per_second")
        return found


def run(preset: Preset, progress: bool = False, keep: Callable[[Result], object] = lambda result: None) -> Result:
    """Measure all that a preset names. Weights are random: time and memory do not depend on them.

    Ctrl-C ends it with the rows that are complete by then.

    Args:
        preset: what to measure.
        progress: whether to draw a bar.
        keep: called with what there is after each place, so that a run that is killed keeps it.

    Raises:
        PalError: the preset needs an accelerator that is not there.
    """
    check_device(preset)
    with opened(preset, progress, keep) as bench:
        try:
            for scope in preset.scopes:
                bench.measure(scope)
            bench.result.complete = True
        except KeyboardInterrupt:
            bench.result.interrupted = True
        return bench.result


@contextmanager
def opened(
    preset: Preset, progress: bool = False, keep: Callable[[Result], object] = lambda result: None
) -> Iterator[Bench]:
    """The models of a run, ready to be measured. Takes what `run` takes."""
    result = Result(preset, machine(preset))
    if preset.device == "cpu" and preset.repeats:
        result.machine["keeps_freed_memory"] = keep_freed_memory()
    torch.manual_seed(0)
    device, dtype = torch.device(preset.device), getattr(torch, preset.dtype)
    if preset.repeats:
        result.machine["product_flops_per_second"] = product_rate(device, dtype)
    with device:
        llm = Backbone.load(preset.llm, dtype=dtype).eval().requires_grad_(False)
    plain = plain_lm(llm)
    with (
        many_graphs() if preset.compiled else nullcontext(),
        tqdm(
            desc="bench", unit="FLOP", unit_scale=True, delay=2, disable=None if progress else True, file=sys.stderr
        ) as bar,
    ):
        yield Bench(preset, llm, plain, result, bar, keep)


class Bench:
    """A run: what all its rows share."""

    def __init__(
        self,
        preset: Preset,
        llm: Backbone,
        plain: Any,
        result: Result,
        bar: Any,
        keep: Callable[[Result], object],
    ) -> None:
        self.preset = preset
        self.llm = llm
        self.plain = plain
        self.result = result
        self.bar = bar
        self.keep = keep
        self.seconds, self.started = preset.seconds, time.monotonic()
        self._scene: tuple[Any, Scene] | None = None
        self._subjects: dict[Encoder | None, list[Subject]] = {}
        self.device = torch.device(preset.device)

    def measure(self, scope: Scope) -> None:
        """All rows of a scope."""
        preset = self.preset
        encoder = self._encoder() if scope == "end_to_end" else None
        subjects = self.subjects(encoder)
        # features alone are ragged
        places = [place for place in preset.places() if encoder is None or place.length != "ragged"]
        papers = {place: self._papers(place, subjects, encoder) for place in places}
        ahead = sum(paper.flops * self._passes(place.phase) for place in places for paper in papers[place].values())
        self.bar.total = (self.bar.total or 0) + ahead
        for place in places:
            scene = self.scene(place, encoder)
            here = _Place(self, scope, scene, place.phase, encoder, papers[place])
            if self.seconds is not None and time.monotonic() - self.started > self.seconds:
                here.leave_out(subjects, f"not begun within {self.seconds:.0f} s")
            else:
                here.measure(subjects)
            self.keep(self.result)

    def scene(self, place: Place, encoder: Encoder | None) -> Scene:
        """What is read at a place; the last one is kept for other phases."""
        about = (place.batch, place.length, encoder)
        if self._scene is None or self._scene[0] != about:
            self._scene = (about, make_scene(self.preset, place.batch, place.length, self.llm.vocab, encoder))
        return self._scene[1]

    def _papers(self, place: Place, subjects: Sequence[Subject], encoder: Encoder | None) -> dict[str, OnPaper]:
        scene = make_scene(self.preset, place.batch, place.length, self.llm.vocab, encoder, shapes=True)
        return {subject.name: on_paper(subject, scene, self.preset, place.phase) for subject in subjects}

    def _passes(self, phase: Phase) -> int:
        """Of a phase: one that is counted, one that warms up, and the timed ones."""
        rounds = self.preset.repeats and 1 + self.preset.repeats
        return 1 + rounds * (self.preset.decode_tokens if phase.startswith("decode") else 1)

    def _encoder(self) -> Encoder:
        with self.device:
            encoder = build("encoder", {"name": "af_whisper", "architecture": self.preset.encoder})
        assert isinstance(encoder, Encoder)
        return encoder.to(getattr(torch, self.preset.dtype)).eval()

    def subjects(self, encoder: Encoder | None) -> list[Subject]:
        """Each variant, and next to `plits` and `text` the plain LLM on the same rows; made once."""
        if encoder not in self._subjects:
            self._subjects[encoder] = self._made(encoder)
        return self._subjects[encoder]

    def give(self, seconds: float) -> None:
        """So much time from now on, in place of the preset's."""
        self.seconds, self.started = seconds, time.monotonic()

    def tidy(self, always: bool = False) -> None:
        """Give memory back to the system where it is scarce."""
        if self.device.type == "cuda":
            # every block that is given back has to be asked for again
            total = torch.cuda.get_device_properties(self.device).total_memory
            if always or torch.cuda.memory_reserved(self.device) > total / 2:
                gc.collect()
                torch.cuda.empty_cache()
        elif self.preset.repeats:
            give_back_freed_memory()

    def _made(self, encoder: Encoder | None) -> list[Subject]:
        preset, llm = self.preset, self.llm
        found: list[Subject] = []
        for variant in preset.variants:
            if variant == "qwen2audio":
                found.append(Qwen2Audio(llm, self.plain, preset, encoder))
            elif variant == "mllama":
                found.append(Mllama(llm, self.plain, preset))
            else:
                found.append(attached(variant, llm, preset))
        for subject in list(found):
            for name, checked in BASELINES.items():
                if subject.name == checked and encoder is None:
                    assert isinstance(subject, Attached)
                    route = subject.integration if name == "plain" else None
                    assert route is None or isinstance(route, PLITS)
                    found.insert(found.index(subject) + 1, Plain(name, llm, self.plain, route))
        for subject in found:
            for parameter in subject.weights():
                parameter.requires_grad_(False)
        if encoder is not None:  # whose weights Qwen2Audio took over as trainable ones
            encoder.requires_grad_(False)
        if preset.compiled:
            for subject in found:
                subject.compile(**({} if preset.compiler is None else {"backend": preset.compiler}))
        return found


class _Place:
    """One phase on one scene: each variant is looked at once, then all are timed in turns."""

    def __init__(
        self,
        bench: Bench,
        scope: Scope,
        scene: Scene,
        phase: Phase,
        encoder: Encoder | None,
        papers: Mapping[str, OnPaper],
    ) -> None:
        self.bench = bench
        self.preset = bench.preset
        self.scope: Scope = scope
        self.scene = scene
        self.phase: Phase = phase
        self.encoder = encoder
        self.papers = papers
        self._readings: dict[str, Reading] = {}
        """Prompts that were read, to be written on."""

    def measure(self, subjects: Sequence[Subject]) -> None:
        """Add a row for each variant that can be measured here."""
        looked: dict[str, tuple[Subject, Counts, int]] = {}
        timed: dict[str, Callable[[], object]] = {}
        for subject in subjects:
            if self.phase == "decode_graph" and not subject.graphs:
                continue
            why = self._obstacle(subject)
            if why is None:
                with self._guard() as guard:
                    looked[subject.name] = (subject, *self._look_at(subject))
                    if self.preset.repeats:
                        timed[subject.name] = self._timed(subject)
                why = guard.why
                self.bench.tidy()
            self._advance(subject, 1 if why is None else self.bench._passes(self.phase))
            if why is not None:
                looked.pop(subject.name, None)
                self.leave_out([subject], why)
        seconds, failed = self._time(timed)
        for name, (subject, found, kv) in looked.items():
            if name in failed:
                self.leave_out([subject], failed[name])
                continue
            row = self._row(subject, found, kv, seconds.get(name))
            (self.bench.result.baselines if name in BASELINES else self.bench.result.rows).append(row)
            self.bench.result.paper[name, row.place] = self.papers[name]
        timed.clear()
        self._readings.clear()
        self.bench.tidy()

    def leave_out(self, subjects: Sequence[Subject], why: str) -> None:
        """Say of these that they are not measured here."""
        for subject in subjects:
            self.bench.result.left_out.append(
                {
                    "variant": subject.name,
                    "scope": self.scope,
                    "phase": self.phase,
                    "audio_tokens": self.scene.length,
                    "batch": self.scene.batch,
                    "why": why,
                }
            )

    def _look_at(self, subject: Subject) -> tuple[Counts, int]:
        """Operations and bytes of the phase, and the bytes of its keys and values."""
        weights = self._weights(subject)
        if self.phase == "train":
            with training(subject, self.preset.train):
                found = counts(
                    lambda: subject.loss(self.scene),
                    backward=lambda loss: loss.backward(),
                    weights=weights,
                    device=self.bench.device,
                    compiled=self.preset.compiled,
                )
            return found, 0
        with torch.inference_mode():
            if self.phase == "prefill":
                kept = []
                found = counts(
                    lambda: kept.append(subject.read(self.scene)),
                    weights=weights,
                    device=self.bench.device,
                    compiled=self.preset.compiled,
                )
                return found, kept[-1].kv_bytes()
            with eager():
                reading = self._readings[subject.name] = self._prompt(subject)
                kv = reading.kv_bytes()
                found = counts(lambda: subject.write(reading, 1), weights=weights, device=self.bench.device)
            return found, kv

    def _prompt(self, subject: Subject) -> Reading:
        """Read, to be written on."""
        if not isinstance(subject, Attached):
            return subject.read(self.scene)
        tokens = self.preset.decode_tokens * (2 + self.preset.repeats) + 8
        return subject.read(self.scene, tokens, fixed=self.phase == "decode_graph")

    def _timed(self, subject: Subject) -> Callable[[], object]:
        if self.phase == "train":

            def step() -> None:
                with training(subject, self.preset.train):
                    subject.loss(self.scene).backward()

            return step
        if self.phase == "prefill":
            return torch.inference_mode()(lambda: subject.read(self.scene))
        reading = self._readings[subject.name]
        return torch.inference_mode()(lambda: subject.write(reading, self.preset.decode_tokens))

    def _time(self, timed: dict[str, Callable[[], object]]) -> tuple[dict[str, Seconds], dict[str, str]]:
        """Of each step, or why it failed; others go on."""
        tokens = self.preset.decode_tokens if self.phase.startswith("decode") else 1
        subjects = {name: self.papers[name].flops * tokens for name in timed}
        found: dict[str, Seconds] = {}
        failed: dict[str, str] = {}

        def guarded(name: str, step: Callable[[], object]) -> None:
            if name not in failed:
                with self._guard() as guard:
                    step()
                if guard.why is not None:
                    failed[name] = guard.why

        steps = {name: partial(guarded, name, step) for name, step in timed.items()}
        with eager() if self.phase.startswith("decode") else nullcontext():
            # memory was given back after each was looked at; a round that does not count has it made again
            for rounds in (1, self.preset.repeats) if timed else ():
                found = round_seconds(
                    steps,
                    rounds,
                    self.bench.device,
                    each=tokens,
                    done=lambda name: self.bench.bar.update(subjects[name]),
                )
        return found, failed

    def _row(self, subject: Subject, found: Counts, kv: int, seconds: Seconds | None) -> Row:
        return Row(
            variant=subject.name,
            scope=self.scope,
            phase=self.phase,
            audio_tokens=self.scene.length,
            text_tokens=self.scene.text_tokens,
            batch=self.scene.batch,
            seconds=None if seconds is None else seconds.median,
            seconds_spread=None if seconds is None else seconds.spread,
            peak_bytes=found.peak_bytes,
            saved_bytes=found.saved_bytes,
            flops=found.flops,
            flops_closed_form=self.papers[subject.name].flops,
            kv_bytes=kv,
            parameters=sum(p.numel() for p in self._parameters(subject)),
        )

    def _parameters(self, subject: Subject) -> list[nn.Parameter]:
        hears = self.encoder is not None and subject.own is not None
        return [*subject.weights(), *(self.encoder.parameters() if self.encoder is not None and hears else ())]

    def _weights(self, subject: Subject) -> list[torch.Tensor]:
        buffers = [*self.bench.llm.buffers(), *self.bench.plain.buffers()]
        return [*self._parameters(subject), *buffers]

    def _obstacle(self, subject: Subject) -> str | None:
        """Why a variant is not even tried."""
        if self.phase == "train" and not subject.trained(self.preset.train):
            return f"nothing to train in stage '{self.preset.train}'"
        if self.bench.device.type == "cuda" or self.phase != "train":
            return None
        # a process that runs out of the machine's memory is killed with all it has measured
        needed = self.papers[subject.name].saved_bytes + sum(p.nbytes for p in subject.trained(self.preset.train))
        free = _free_bytes()
        if needed > free:
            return f"needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        return None

    @contextmanager
    def _guard(self) -> Iterator[_Guard]:
        """A variant that does not fit, or fails, leaves its row out and the run goes on."""
        guard = _Guard()
        try:
            yield guard
        except torch.OutOfMemoryError:
            guard.why = "out of memory"
        except Exception as error:
            guard.why = where_it_failed(error)
        if guard.why is not None:
            self.bench.tidy(always=True)

    def _advance(self, subject: Subject, passes: int) -> None:
        self.bench.bar.update(self.papers[subject.name].flops * passes)


@dataclass
class _Guard:
    why: str | None = None


@contextmanager
def training(subject: Subject, train: str) -> Iterator[None]:
    """What is trained requires gradients inside; afterwards nothing does, and none is kept."""
    trained = subject.trained(train)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None


def where_it_failed(error: BaseException) -> str:
    """An exception in one line: what it says and the last line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/pal/" in frame.filename] or list(frames)
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno}, {Path(frames[-1].filename).name}:{frames[-1].lineno})"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:300]}{place if frames else ''}"


@contextmanager
def many_graphs() -> Iterator[None]:
    """Room for the graphs of all variants; one that fills a cache has one for each layer."""
    with torch._dynamo.config.patch(recompile_limit=512, accumulated_recompile_limit=8192):
        yield


def eager() -> Any:
    """Nothing compiled inside, though it is."""
    return torch.compiler.set_stance("force_eager")


def _free_bytes() -> int:
    """Memory that a process can still have without pushing others out."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
