"""`pal bench`: every variant on the same scenes, in one process, in turns."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from tqdm import tqdm

from pal.backbone.llm import Backbone
from pal.bench.closed_form import ClosedForm, closed_form
from pal.bench.machine import check_device, machine, product_rate
from pal.bench.measure import quick_collection
from pal.bench.models import AttachedModel, BenchModel, attached
from pal.bench.peers import Mllama, PlainLLM, Qwen2Audio, plain_lm
from pal.bench.place import PointRun, many_graphs
from pal.bench.presets import BenchPoint, Preset, Scope
from pal.bench.result import BASELINES, BenchResult
from pal.bench.scene import BenchScene, make_scene
from pal.encoders.base import Encoder
from pal.integrations.plits import PLITS
from pal.memory import give_back_freed_memory, keep_freed_memory
from pal.registry import build


def run(
    preset: Preset, progress: bool = False, keep: Callable[[BenchResult], object] = lambda result: None
) -> BenchResult:
    """Measure everything in a preset. Weights are random: time and memory do not depend on them.

    Ctrl-C ends it with the rows that are complete by then.

    Args:
        preset: what to measure.
        progress: whether to draw a bar.
        keep: called with the result so far after each place, so that a killed run keeps it.

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
    preset: Preset, progress: bool = False, keep: Callable[[BenchResult], object] = lambda result: None
) -> Iterator[Bench]:
    """Open a run: its models are made and ready to be measured. Takes the arguments of `run`."""
    result = BenchResult(preset, machine(preset))
    if preset.device == "cpu" and preset.repeats:
        result.machine["keeps_freed_memory"] = keep_freed_memory()
    torch.manual_seed(0)
    device, dtype = torch.device(preset.device), getattr(torch, preset.dtype)
    if preset.repeats:
        result.machine["product_flops_per_second"] = product_rate(device, dtype)
    with device:
        llm = Backbone.load(preset.llm, dtype=dtype).eval().requires_grad_(False)
    llm.capture_prompts(False)  # but where prefill is timed
    plain = plain_lm(llm)
    with (
        quick_collection(),
        many_graphs() if preset.compiled else nullcontext(),
        tqdm(
            desc="bench", unit="FLOP", unit_scale=True, delay=2, disable=None if progress else True, file=sys.stderr
        ) as bar,
    ):
        yield Bench(preset, llm, plain, result, bar, keep)


class Bench:
    """State of a run, which all its rows share: LLM, variants, scene, result."""

    def __init__(
        self,
        preset: Preset,
        llm: Backbone,
        plain: Any,
        result: BenchResult,
        bar: Any,
        keep: Callable[[BenchResult], object],
    ) -> None:
        self.preset = preset
        self.llm = llm
        self.plain = plain
        self.result = result
        self.bar = bar
        self.keep = keep
        self.seconds, self.started = preset.seconds, time.monotonic()
        self._scene: tuple[Any, BenchScene] | None = None
        self._subjects: dict[Encoder | None, list[BenchModel]] = {}
        self.device = torch.device(preset.device)

    def measure(self, scope: Scope) -> None:
        """Measure all rows of a scope."""
        preset = self.preset
        encoder = self._encoder() if scope == "end_to_end" else None
        subjects = self.subjects(encoder)
        # features alone are ragged
        places = [place for place in preset.places() if encoder is None or place.length != "ragged"]
        papers = {place: self._papers(place, subjects, encoder) for place in places}
        ahead = sum(paper.flops * preset.passes(place.phase) for place in places for paper in papers[place].values())
        self.bar.total = (self.bar.total or 0) + ahead
        for place in places:
            scene = self.scene(place, encoder)
            here = PointRun(self, scope, scene, place.phase, encoder, papers[place])
            if self.seconds is not None and time.monotonic() - self.started > self.seconds:
                here.leave_out(subjects, f"not begun within {self.seconds:.0f} s")
            else:
                here.measure(subjects)
            self.keep(self.result)

    def scene(self, place: BenchPoint, encoder: Encoder | None) -> BenchScene:
        """Scene of a place; the last one is kept for other phases."""
        about = (place.batch, place.length, encoder)
        if self._scene is None or self._scene[0] != about:
            self._scene = (about, make_scene(self.preset, place.batch, place.length, self.llm.vocab, encoder))
        return self._scene[1]

    def _papers(
        self, place: BenchPoint, subjects: Sequence[BenchModel], encoder: Encoder | None
    ) -> dict[str, ClosedForm]:
        scene = make_scene(self.preset, place.batch, place.length, self.llm.vocab, encoder, shapes=True)
        return {subject.name: closed_form(subject, scene, self.preset, place.phase) for subject in subjects}

    def _encoder(self) -> Encoder:
        with self.device:
            encoder = build("encoder", {"name": "af_whisper", "architecture": self.preset.encoder})
        assert isinstance(encoder, Encoder)
        return encoder.to(getattr(torch, self.preset.dtype)).eval()

    def subjects(self, encoder: Encoder | None) -> list[BenchModel]:
        """Models of all variants, and next to `plits` and `text` the plain LLM on the same rows; made once."""
        if encoder not in self._subjects:
            self._subjects[encoder] = self._made(encoder)
        return self._subjects[encoder]

    def give(self, seconds: float) -> None:
        """Set the time limit to so many seconds from now on, in place of the preset's."""
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

    def _made(self, encoder: Encoder | None) -> list[BenchModel]:
        preset, llm = self.preset, self.llm
        found: list[BenchModel] = []
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
                    assert isinstance(subject, AttachedModel)
                    route = subject.integration if name == "plain" else None
                    assert route is None or isinstance(route, PLITS)
                    found.insert(found.index(subject) + 1, PlainLLM(name, llm, self.plain, route))
        for subject in found:
            for parameter in subject.weights():
                parameter.requires_grad_(False)
        if encoder is not None:  # whose weights Qwen2Audio took over as trainable ones
            encoder.requires_grad_(False)
        if preset.compiled:
            for subject in found:
                subject.compile(**({} if preset.compiler is None else {"backend": preset.compiler}))
        return found
