"""`pal bench --preset stream`: a conversation that goes on, some seconds of audio and a question in each turn.

All variants use a `Session`, so each part is read once: PLITS' audio rows, too. What is measured is how the time to the
first token of an answer, and of each further token, grow with the turns.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from tqdm import tqdm

from pal.backbone.cost import StepSize, kv_bytes
from pal.backbone.llm import Backbone
from pal.backbone.session import KINDS
from pal.bench.machine import machine_facts
from pal.bench.models import AttachedModel, attached_to
from pal.bench.presets import LLAMA_1B, SMALL
from pal.config import StrictConfig, parse
from pal.files import write_text
from pal.integrations.cost import route_cost
from pal.lab.numbers import three_digits
from pal.lab.tables import markdown_table
from pal.memory import give_back_freed_memory, keep_freed_memory
from pal.types import AudioFeatures

StreamVariant = Literal["plits", "lal", "lal_third", "pal"]


class StreamPreset(StrictConfig):
    """One benchmark of a growing conversation."""

    name: str
    shape: str
    """Description of the LLM."""
    llm: dict[str, Any]
    width: int = Field(gt=0)
    """Width E of the features, and of the layer inside each projector."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    variants: tuple[StreamVariant, ...] = ("lal", "lal_third", "pal", "plits")
    turns: int = Field(default=512, ge=2)
    ends: int = Field(default=32, ge=1)
    """Turns at the beginning, and at the end, that are compared."""
    audio_tokens: int = Field(default=100, ge=1)
    """Of a turn: 4 s at 25 a second."""
    question: int = Field(default=16, ge=1)
    """Text tokens of a question."""
    answer: int = Field(default=8, ge=2)
    """Tokens of an answer."""
    window: int | None = Field(default=None, ge=1)
    """Turns whose audio is kept; None keeps all. All text stays."""


PRESETS = {
    preset.name: preset
    for preset in (
        StreamPreset(
            name="stream", shape="Llama-3.2-1B cut to 4 layers", llm={**LLAMA_1B, "num_hidden_layers": 4}, width=768
        ),
        StreamPreset(
            name="stream-window",
            shape="Llama-3.2-1B cut to 4 layers",
            llm={**LLAMA_1B, "num_hidden_layers": 4},
            width=768,
            window=15,
        ),
        StreamPreset(
            name="stream-small",
            shape="4 layers of 32",
            llm=SMALL,
            width=16,
            turns=6,
            ends=2,
            audio_tokens=12,
            question=4,
        ),
    )
}


def preset_of(name: str, **changes: Any) -> StreamPreset:
    """A preset by name, with some of its fields changed; what is None stays."""
    given = {key: value for key, value in changes.items() if value is not None}
    return parse(StreamPreset, {**PRESETS[name].model_dump(), **given}, where="bench")


@dataclass(frozen=True)
class StreamTurn:
    """Seconds of one turn."""

    append: float
    """Keys, values and rows of the turn's audio."""
    first: float
    """From the question to the first token of the answer."""
    token: float
    """Mean of the further tokens."""


@dataclass(frozen=True)
class StreamMeasurement:
    """Medians of the first and the last turns of one variant, in seconds, and what was stored at the end."""

    variant: str
    turns: int
    append: tuple[float, float]
    first: tuple[float, float]
    token: tuple[float, float]
    kv_bytes: int
    """Keys and values of text and audio, without room for later ones."""
    planned_bytes: int
    """The same by the closed form of `pal plan`."""


@dataclass
class StreamResult:
    """Result of a run."""

    preset: StreamPreset
    machine: dict[str, Any]
    rows: list[StreamMeasurement] = field(default_factory=list)
    interrupted: bool = False


def run(
    preset: StreamPreset, progress: bool = False, keep: Callable[[StreamResult], object] = lambda result: None
) -> StreamResult:
    """Measure all variants, one after the other, with random weights. Ctrl-C ends it with the rows so far.

    Args:
        preset: what to measure.
        progress: whether to draw a bar.
        keep: called with the result so far after each variant.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, preset.dtype)
    keep_freed_memory()
    llm = Backbone.load(preset.llm, dtype=dtype).eval().requires_grad_(False)
    result = StreamResult(preset, machine_facts("cpu"))
    try:
        for name in preset.variants:
            model = attached_to(name, llm, preset.width, torch.device("cpu"), dtype)
            result.rows.append(measure(preset, model, progress))
            keep(result)
            give_back_freed_memory()
    except KeyboardInterrupt:
        result.interrupted = True
    return result


@torch.inference_mode()
def measure(preset: StreamPreset, model: AttachedModel, progress: bool = False) -> StreamMeasurement:
    """A whole conversation with one variant."""
    llm, (route,) = model.llm, model.integration.routes()
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, preset.dtype)
    x_1AE = torch.randn(1, preset.audio_tokens, preset.width, generator=generator).to(dtype)
    features = AudioFeatures(x_1AE, (preset.audio_tokens,), 0.04)
    question = torch.randint(3, llm.vocab, (preset.question,), generator=generator).tolist()
    session = route.session(llm, route.stream_kv(features, llm).layout)
    session.read(question)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": preset.answer}
    turns: list[StreamTurn] = []
    for turn in tqdm(range(preset.turns), desc=model.name, unit="turn", disable=None if progress else True):
        moments = [time.perf_counter()]
        session.hear(route.stream_kv(features, llm))
        if preset.window is not None and turn >= preset.window:
            session.forget(preset.audio_tokens)
        moments.append(time.perf_counter())
        logits_1V = session.read(question)
        moments.append(time.perf_counter())
        session.generate(logits_1V, **options)
        moments.append(time.perf_counter())
        append, first, rest = (b - a for a, b in itertools.pairwise(moments))
        turns.append(StreamTurn(append, first, rest / (preset.answer - 1)))
    parts = (turns[: preset.ends], turns[-preset.ends :])

    def medians(name: str) -> tuple[float, float]:
        first, last = (statistics.median(getattr(turn, name) for turn in part) for part in parts)
        return first, last

    stored = [x for kind in KINDS for store in session.stores[kind] if len(store) for x in store.view()]
    size = sum(x.numel() * x.element_size() for x in stored)
    # the last token of an answer is not read
    text = preset.question + preset.turns * (preset.question + preset.answer - 1)
    kept = preset.turns if preset.window is None else preset.window
    step = StepSize(clips=1, rows=1, text=1, targets=1)
    heard = route_cost(route, step, preset.audio_tokens, llm)
    planned = kv_bytes(llm, [heard] * kept, dtype.itemsize, text)
    times = (medians("append"), medians("first"), medians("token"))
    return StreamMeasurement(model.name, preset.turns, *times, size, planned)


def to_dict(result: StreamResult) -> dict[str, Any]:
    """Plain data: sizes, machine and rows, each with the ratios of the last turns to the first."""
    rows = [
        {**asdict(row), "growth": {name: getattr(row, name)[1] / getattr(row, name)[0] for name in _TIMES}}
        for row in result.rows
    ]
    sizes = result.preset.model_dump(mode="json", exclude={"llm"})
    return {"machine": {**result.machine, "preset": result.preset.name}, "sizes": sizes, "rows": rows}


def to_json(result: StreamResult) -> str:
    """`to_dict` as text."""
    return json.dumps(to_dict(result), indent=1) + "\n"


_TIMES = ("append", "first", "token")
_MOST = 1.1
"""Goal: the last turns take at most so many times as long as the first."""


def to_markdown(result: StreamResult) -> str:
    """One table."""
    preset, facts = result.preset, result.machine
    kept = "" if preset.window is None else f" The audio of the last {preset.window} turns is kept."
    lines = [
        f"# pal bench --preset {preset.name}",
        "",
        f"{preset.shape}; {preset.dtype}. {preset.turns} turns of {preset.audio_tokens} audio tokens, a question of "
        f"{preset.question} and an answer of {preset.answer} tokens.{kept} Medians of the first and the last "
        f"{preset.ends} turns.",
        f"{facts['device']}, {facts['threads']} threads; torch {facts['torch']}, transformers {facts['transformers']},"
        f" pal {facts['pal']}; {facts['date']}.",
        "",
    ]
    cells = []
    for row in result.rows:
        pairs = [getattr(row, name) for name in _TIMES]
        times = [cell for first, last in pairs for cell in (three_digits(first, 1e3), three_digits(last, 1e3))]
        growth = [last / first for first, last in pairs[1:]]
        mark = "ok" if max(growth) <= _MOST else "missed"
        sizes = (three_digits(size, 1e-6) for size in (row.kv_bytes, row.planned_bytes))
        cells.append((row.variant, *times, *(f"{one:.2f}" for one in growth), mark, *sizes))
    head = (
        *("variant", "append, ms", "last", "first token, ms", "last", "a token, ms", "last"),
        *("first token, last over first", "a token", f"<= {_MOST}", "KV MB", "planned"),
    )
    return "\n".join([*lines, *markdown_table(head, cells, left=1)]) + "\n"


def write(result: StreamResult, folder: Path) -> list[Path]:
    """`stream.json` and `stream.md`; each is whole at any moment."""
    files = {folder / "stream.json": to_json(result), folder / "stream.md": to_markdown(result)}
    for path, text in files.items():
        write_text(path, text)
    return list(files)
