"""One phase on one scene: each variant is counted once, then all are timed in turns."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pal.backbone.llm import Backbone
from pal.bench.closed_form import ClosedForm
from pal.bench.measure import Counts, RoundSeconds, counts, round_seconds
from pal.bench.models import AttachedModel, BenchModel, PrefilledPrompt
from pal.bench.presets import Phase, Scope
from pal.bench.result import BASELINES, Measurement, where_it_failed
from pal.bench.scene import BenchScene
from pal.encoders.base import Encoder

if TYPE_CHECKING:
    from pal.bench.run import Bench


class PointRun:
    """Measurement of one phase on one scene: each variant is counted once, then all are timed in turns."""

    def __init__(
        self,
        bench: Bench,
        scope: Scope,
        scene: BenchScene,
        phase: Phase,
        encoder: Encoder | None,
        papers: Mapping[str, ClosedForm],
    ) -> None:
        self.bench = bench
        self.preset = bench.preset
        self.scope: Scope = scope
        self.scene = scene
        self.phase: Phase = phase
        self.encoder = encoder
        self.papers = papers
        self._readings: dict[str, PrefilledPrompt] = {}
        """Prefilled prompts to decode from."""

    def measure(self, subjects: Sequence[BenchModel]) -> None:
        """Add a row for each variant that can be measured here."""
        counted: dict[str, tuple[BenchModel, Counts, int]] = {}
        timed: dict[str, Callable[[], object]] = {}
        for subject in self._asked(subjects):
            why = self._obstacle(subject)
            if why is None:
                with self._guard() as guard:
                    counted[subject.name] = (subject, *self._count(subject))
                    if self.preset.repeats:
                        timed[subject.name] = self._timed(subject)
                why = guard.why
                self.bench.tidy()
            self._advance(subject, 1 if why is None else self.preset.passes(self.phase))
            if why is not None:
                counted.pop(subject.name, None)
                self.leave_out([subject], why)
        seconds, failed = self._time(timed)
        for name, (subject, found, kv) in counted.items():
            if name in failed:
                self.leave_out([subject], failed[name])
                continue
            row = self._row(subject, found, kv, seconds.get(name))
            (self.bench.result.baselines if name in BASELINES else self.bench.result.rows).append(row)
            self.bench.result.paper[name, row.place] = self.papers[name]
        timed.clear()
        self._readings.clear()
        self.bench.tidy()

    def leave_out(self, subjects: Sequence[BenchModel], why: str) -> None:
        """Record that these variants are not measured here."""
        for subject in self._asked(subjects):
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

    def _asked(self, subjects: Sequence[BenchModel]) -> list[BenchModel]:
        return [subject for subject in subjects if subject.graphs or self.phase != "decode_graph"]

    def _count(self, subject: BenchModel) -> tuple[Counts, int]:
        """Operations and bytes of the phase, and bytes of the keys and values it keeps."""
        weights = self._weights(subject)
        if self.phase == "train":
            with training(subject, self.preset.train):
                found = counts(
                    lambda: subject.loss(self.scene),
                    backward=lambda loss: loss.backward(),
                    weights=weights,
                    device=self.bench.device,
                    compiled=self._compiles(subject),
                )
            return found, 0
        with torch.inference_mode(), nullcontext() if self._compiles(subject) else eager():
            if self.phase == "prefill":
                kept = []
                found = counts(
                    lambda: kept.append(subject.read(self.scene)),
                    weights=weights,
                    device=self.bench.device,
                    compiled=self._compiles(subject),
                )
                return found, kept[-1].kv_bytes()
            reading = self._readings[subject.name] = self._prompt(subject)
            kv = reading.kv_bytes()
            found = counts(lambda: subject.write(reading, 1), weights=weights, device=self.bench.device)
            return found, kv

    def _compiles(self, subject: BenchModel) -> bool:
        return self.preset.compiled and self.phase in subject.compiled_phases

    def _prompt(self, subject: BenchModel) -> PrefilledPrompt:
        """Prefilled prompt with room for all tokens that are decoded."""
        if not isinstance(subject, AttachedModel):
            return subject.read(self.scene)
        tokens = self.preset.decode_tokens * (2 + self.preset.repeats) + 8
        return subject.read(self.scene, tokens, fixed=self.phase == "decode_graph")

    def _timed(self, subject: BenchModel) -> Callable[[], object]:
        if self.phase == "train":

            def steps() -> None:
                with training(subject, self.preset.train) as trained:
                    for _ in range(self.preset.train_steps):
                        subject.loss(self.scene).backward()
                        for parameter in trained:
                            parameter.grad = None

            return steps
        if self.phase == "prefill":

            def read() -> None:
                with torch.inference_mode(), nullcontext() if self._compiles(subject) else eager():
                    subject.read(self.scene)

            return read
        reading = self._readings[subject.name]
        return torch.inference_mode()(lambda: subject.write(reading, self.preset.decode_tokens))

    def _time(self, timed: dict[str, Callable[[], object]]) -> tuple[dict[str, RoundSeconds], dict[str, str]]:
        """Seconds of each step, and why others failed."""
        each = self.preset.each(self.phase)
        flops = {name: self.papers[name].flops * each for name in timed}
        found: dict[str, RoundSeconds] = {}
        failed: dict[str, str] = {}

        def guarded(name: str, step: Callable[[], object]) -> None:
            if name not in failed:
                with self._guard() as guard:
                    step()
                if guard.why is not None:
                    failed[name] = guard.why

        steps = {name: partial(guarded, name, step) for name, step in timed.items()}
        captures = self.phase in ("train", "prefill") and self.bench.device.type == "cuda"
        with eager() if self.phase.startswith("decode") else capturing(self.bench.llm, self.preset.compiled):
            # memory was given back after each variant was counted: an uncounted round allocates it again, and a second
            # one records CUDA graphs
            for rounds in (2 if captures else 1, self.preset.repeats) if timed else ():
                found = round_seconds(
                    steps,
                    rounds,
                    self.bench.device,
                    each=each,
                    done=lambda name: self.bench.bar.update(flops[name]),
                )
        return found, failed

    def _row(self, subject: BenchModel, found: Counts, kv: int, seconds: RoundSeconds | None) -> Measurement:
        return Measurement(
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

    def _parameters(self, subject: BenchModel) -> list[nn.Parameter]:
        with_encoder = self.encoder is not None and subject.own is not None
        return [*subject.weights(), *(self.encoder.parameters() if self.encoder is not None and with_encoder else ())]

    def _weights(self, subject: BenchModel) -> list[torch.Tensor]:
        buffers = [*self.bench.llm.buffers(), *self.bench.plain.buffers()]
        return [*self._parameters(subject), *buffers]

    def _obstacle(self, subject: BenchModel) -> str | None:
        """Reason not to try a variant; None where there is none."""
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
        """Catch what goes wrong with a variant: its row is left out and the run goes on."""
        guard = _Guard()
        try:
            yield guard
        except torch.OutOfMemoryError:
            guard.why = "out of memory"
        except Exception as error:
            guard.why = where_it_failed(error)
        if guard.why is not None:
            self.bench.tidy(always=True)

    def _advance(self, subject: BenchModel, passes: int) -> None:
        self.bench.bar.update(self.papers[subject.name].flops * passes)


@dataclass
class _Guard:
    why: str | None = None


@contextmanager
def training(subject: BenchModel, train: str) -> Iterator[list[nn.Parameter]]:
    """Make the trained weights require gradients inside the block; afterwards none does, and gradients are dropped."""
    trained = subject.trained(train)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield trained
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def many_graphs() -> Iterator[None]:
    """Raise torch.compile's limits of recompilation, so that the graphs of all variants fit."""
    with torch._dynamo.config.patch(recompile_limit=512, accumulated_recompile_limit=8192):
        yield


@contextmanager
def capturing(llm: Backbone, steps: bool = True) -> Iterator[None]:
    """Inside the block, replay prefill and, with `steps`, training steps as CUDA graphs where possible."""
    llm.capture(steps)
    llm.capture_prompts()
    try:
        yield
    finally:
        for graphs in (llm.loss_graphs, llm.prompt_graphs):
            if graphs is not None and graphs.failed is not None:
                warnings.warn(f"timed without CUDA graphs: {graphs.failed}", stacklevel=2)
        llm.capture(False)
        llm.capture_prompts(False)


def eager() -> Any:
    """Run compiled layers eagerly inside the block."""
    return torch.compiler.set_stance("force_eager")


def _free_bytes() -> int:
    """Free memory in bytes, without swapping."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
