"""What every integration computes on a device, beside float32 on the CPU: loss, gradients, logits, written tokens.

The reference is the ordinary path: padded rows, one mask, nothing compiled. What is compared are rows padded on either
side and packed ones, of equal and of different lengths, as they are and compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from pal.backbone.generate import padded_left
from pal.backbone.llm import Backbone
from pal.backbone.prefill import prepared, read_prompts
from pal.bench.place import many_graphs
from pal.bench.result import where_it_failed
from pal.errors import PalError
from pal.integrations.base import Integration
from pal.integrations.routed import Stream, build_integration
from pal.types import AUDIO, IGNORE, AudioFeatures, LLMInputs, Tokens

Given = tuple[list[AudioFeatures], list[Tokens]]
"""Clips for each stream, and conversations about them."""
Rows = Literal["left", "right", "none"]
"""Where rows are filled up; `none` packs them."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 24, "query_pre_attn_scalar": 64},
}
INTEGRATIONS: dict[str, dict[str, Any]] = {
    "plits": {"name": "plits"},
    "lal": {"name": "lal"},
    "lal_third": {"name": "lal", "layers": "first_third"},
    "pal": {"name": "pal"},
    "flamingo": {"name": "flamingo", "every": 2},
    "lal_audio_query": {"name": "lal_audio_query"},
    "pal_routed": {"name": "pal_routed", "routes": {"one": "plits"}, "default": "lal"},
}
_PAPER = ("plits", "lal", "pal")
BATCHES = {"equal": ((40, 24), (40, 24), (40, 24)), "ragged": ((5, 40), (64, 16), (33, 25))}
"""Audio and text tokens of each row."""
LIMITS = {
    torch.bfloat16: {"loss": 1e-2, "gradients": 3e-2, "logits": 3e-2},
    torch.float32: {"loss": 1e-5, "gradients": 1e-4, "logits": 1e-4},
}
WRITTEN = ("flamingo", "lal_audio_query")
"""Integrations of whose training steps no CUDA graphs are made: they make keys outside of the layers."""


@dataclass(frozen=True)
class Size:
    """Size of the comparison: its models, and how much they generate."""

    head_width: int = 64
    layers: int = 4
    tokens: int = 12
    """Generated tokens, each of which must be the reference's in float32."""
    families: tuple[str, ...] = tuple(FAMILIES)
    integrations: tuple[str, ...] = tuple(INTEGRATIONS)
    compiler: str | None = None
    """torch.compile's backend; None for its own choice."""


TOY = Size(head_width=8, layers=2, tokens=4, families=("llama",), integrations=("lal",), compiler="eager")


@dataclass(frozen=True)
class Case:
    """One way to compute one batch."""

    integration: str
    family: str
    dtype: torch.dtype
    batch: str
    rows: Rows
    compiled: bool
    graph: bool = False
    """Whether the training step is replayed as CUDA graphs."""


@dataclass(frozen=True)
class Compared:
    """How far a case is off; shares of the reference's norm."""

    case: Case
    loss: float | None = None
    gradients: float | None = None
    """Of the worst parameter, each by its own norm and a hundredth of that of all."""
    worst: str | None = None
    """That parameter."""
    logits: float | None = None
    """After a prompt."""
    tokens: bool | None = None
    """Whether those that are written, step by step and by a CUDA graph, are the reference's."""
    failed: str | None = None
    """Why there is no number."""

    @property
    def ok(self) -> bool:
        """Within the limits."""
        limits = LIMITS[self.case.dtype]
        found = {"loss": self.loss, "gradients": self.gradients, "logits": self.logits}
        within = all(value is None or value <= limits[name] for name, value in found.items())
        return self.failed is None and within and self.tokens is not False

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = {**asdict(self.case), **asdict(self), "ok": self.ok, "dtype": str(self.case.dtype).split(".")[1]}
        found.pop("case")
        return found


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    """In the order of what they tell in little time: compiling takes most."""
    half, full = torch.bfloat16, torch.float32
    every = [(name, family) for family in size.families for name in size.integrations]
    sides: tuple[Rows, ...] = ("none", "right", "left")
    for dtype in (half, full):
        for name, family in every:
            for batch in BATCHES:
                yield from (Case(name, family, dtype, batch, rows, False) for rows in sides)
    # compiling takes seconds for each: all in one family, the paper's in the others, packed rows before padded ones
    few = [(name, family) for name, family in every if family == size.families[0] or name in _PAPER]
    for rows in ("none", "right") if device.type == "cuda" else ("none",):
        for name, family in few:
            yield Case(name, family, half, "ragged", rows, True)
        if rows == "none" and device.type == "cuda":
            for name, family in few:
                if name not in WRITTEN:
                    yield Case(name, family, half, "ragged", rows, True, graph=True)


def compare(
    device: torch.device,
    size: Size = Size(),
    in_time: Callable[[], bool] = lambda: True,
    done: Callable[[Compared], object] = lambda found: None,
) -> tuple[list[Compared], int]:
    """All cases, and how many of them there was no time for.

    Args:
        device: what is compared with the CPU.
        size: of the models.
        in_time: asked before each case.
        done: called with each result.
    """
    found: list[Compared] = []
    todo = list(cases(size, device))
    with many_graphs():
        for case in todo:
            if not in_time():
                break
            try:
                one = _compare(case, size, device)
            except Exception as error:
                one = Compared(case, failed=where_it_failed(error))
            if one is None:
                continue
            found.append(one)
            done(one)
    left = len(todo) - len(found) - sum(_pointless(case, device) for case in todo)
    for made in (_models, _reference):
        made.cache_clear()
    torch.compiler.reset()
    return found, max(0, left)


def _pointless(case: Case, device: torch.device) -> bool:
    # the kernel of packed rows takes two bytes a number
    return case.rows == "none" and device.type == "cuda" and case.dtype == torch.float32


def _compare(case: Case, size: Size, device: torch.device) -> Compared | None:
    if _pointless(case, device):
        return None
    llm, integration = _models(case.family, case.integration, size, str(device), case.dtype, case.compiled)
    if case.rows == "none" and device.type == "cuda" and not llm.packs:
        return Compared(case, failed="the backbone does not pack rows here")
    exact = _reference(case.family, case.integration, size, case.batch)
    training = _given(case, size, device, trains=True)
    if case.graph:
        loss, gradients = _replayed(llm, integration, training)
    else:
        loss, gradients = _step(llm, integration, training, case.rows)
    errors = gradient_errors(gradients, exact.gradients)
    worst = max(errors, key=lambda name: errors[name])
    logits = tokens = None
    if case.rows != "right":  # of which nothing can be asked
        prompt = _given(case, size, device, trains=False)
        read = _replayed_logits if case.graph else _logits
        logits = _off(read(llm, integration, prompt, case.rows), exact.logits)
        if case.dtype == torch.float32:
            made = [
                _written(llm, integration, prompt, case.rows, cache, size.tokens) for cache in ("dynamic", "static")
            ]
            tokens = all(torch.equal(one.cpu(), exact.tokens) for one in made)
    return Compared(
        case=case,
        loss=abs(loss - exact.loss) / abs(exact.loss),
        gradients=errors[worst],
        worst=worst,
        logits=logits,
        tokens=tokens,
    )


@dataclass(frozen=True)
class _Exact:
    loss: float
    gradients: dict[str, Tensor]
    logits: Tensor
    tokens: Tensor


@cache
def _reference(family: str, name: str, size: Size, batch: str) -> _Exact:
    llm, integration = _models(family, name, size, "cpu", torch.float32, False)
    case = Case(name, family, torch.float32, batch, "right", False)
    cpu = torch.device("cpu")
    loss, gradients = _step(llm, integration, _given(case, size, cpu, trains=True), "right")
    prompt = _given(case, size, cpu, trains=False)
    tokens = _written(llm, integration, prompt, "left", "dynamic", size.tokens)
    return _Exact(loss, gradients, _logits(llm, integration, prompt, "left"), tokens)


@cache
def _models(
    family: str, name: str, size: Size, device: str, dtype: torch.dtype, compiled: bool
) -> tuple[Backbone, Integration]:
    """The same weights whatever the dtype: numbers that bfloat16 has."""
    torch.manual_seed(0)
    heads = 4
    width = heads * size.head_width
    llm = Backbone.load(_fields(family, size))
    llm.capture_prompts(False)
    streams = [Stream(width, ("one",)), Stream(width, ("other",))][: 1 + (name == "pal_routed")]
    integration = build_integration(INTEGRATIONS[name], streams, llm)
    with torch.no_grad():
        for parameter_name, parameter in (*llm.named_parameters(), *integration.named_parameters()):
            if parameter.ndim == 1:  # norms and biases, at whose neutral start mistakes would not show
                parameter.add_(0.1 * torch.randn_like(parameter))
            if "gate" in parameter_name and parameter.numel() == 1:
                parameter.fill_(0.8)
            parameter.copy_(parameter.bfloat16().float())
    llm = llm.to(device, dtype).eval()
    if compiled:
        llm.compile(**({} if size.compiler is None else {"backend": size.compiler}))
    return llm, integration.to(device, dtype)


def _fields(family: str, size: Size) -> dict[str, Any]:
    width = 4 * size.head_width
    fields = {
        "model_type": family,
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": size.head_width,
        "max_position_embeddings": 512,
        "initializer_range": 0.6 * width**-0.5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **FAMILIES[family],
    }
    if family == "gemma3_text":
        fields["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(size.layers)]
    return fields


def _given(case: Case, size: Size, device: torch.device, trains: bool) -> Given:
    """An eighth of the text stands before the clip, and the last quarter is trained."""
    generator = torch.Generator().manual_seed(1)
    width = 4 * size.head_width
    rows_of = BATCHES[case.batch]
    longest = max(clip for clip, _ in rows_of)
    lengths = tuple(clip for clip, _ in rows_of)
    audio = []
    for _ in range(1 + (case.integration == "pal_routed")):
        x_BAE = torch.randn(len(rows_of), longest, width, generator=generator).bfloat16()
        audio.append(AudioFeatures(x_BAE.to(device, case.dtype), lengths, 0.04))
    rows = []
    for clip, (_, n) in enumerate(rows_of):
        text = torch.randint(2, 256, (n,), generator=generator).tolist()
        before, answer = n // 8, n // 4
        labels = [IGNORE] * (n - answer + 1) + text[-answer:]
        rows.append(Tokens([*text[:before], AUDIO, *text[before:]], [clip], labels if trains else None))
    return audio, rows


def _step(llm: Backbone, integration: Integration, given: Given, rows: Rows) -> tuple[float, dict[str, Tensor]]:
    """Loss, and the gradient of every weight on the CPU."""
    audio, conversations = given
    side: Any = rows
    total, tokens = llm.loss(integration(audio, conversations, llm, side))
    loss = total / tokens
    loss.backward()
    gradients = {}
    for part, module in (("llm", llm), ("integration", integration)):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                gradients[f"{part}.{name}"] = parameter.grad.detach().float().cpu()
                parameter.grad = None
    return loss.item(), gradients


def _replayed(llm: Backbone, integration: Integration, given: Given) -> tuple[float, dict[str, Tensor]]:
    """The same of a step that is replayed; the second of its size is recorded."""
    llm.capture()
    try:
        for _ in range(3):
            found = _step(llm, integration, given, "none")
        graphs = llm.loss_graphs
        if graphs is None or not len(graphs):
            raise PalError(f"no CUDA graph was made: {(graphs and graphs.failed) or 'the step was run as written'}")
    finally:
        llm.capture(False)
    return found


def _prompts(integration: Integration, given: Given, llm: Backbone, rows: Rows) -> LLMInputs:
    audio, conversations = given
    side: Any = rows
    with torch.no_grad():
        return integration(audio, conversations, llm, side)


@torch.no_grad()
def _logits(llm: Backbone, integration: Integration, given: Given, rows: Rows) -> Tensor:
    """Of what follows each prompt: [B, V]."""
    # some integrations cannot be packed in some LLMs, and are padded on the right
    inputs = padded_left(_prompts(integration, given, llm, rows))
    return read_prompts(llm, prepared(llm, inputs), inputs).float().cpu()


def _replayed_logits(llm: Backbone, integration: Integration, given: Given, rows: Rows) -> Tensor:
    """The same of a prefill that is replayed; the second of its size is recorded."""
    llm.capture_prompts()
    try:
        for _ in range(3):
            found = _logits(llm, integration, given, rows)
        graphs = llm.prompt_graphs
        if graphs is None or not len(graphs):
            raise PalError(f"no CUDA graph of a prefill: {(graphs and graphs.failed) or 'it was run as written'}")
    finally:
        llm.capture_prompts(False)
    return found


def _written(llm: Backbone, integration: Integration, given: Given, rows: Rows, cache: str, tokens: int) -> Tensor:
    """Ids of greedily generated tokens: [B, tokens]."""
    inputs = _prompts(integration, given, llm, rows)
    return llm.generate(inputs, max_new_tokens=tokens, do_sample=False, cache_implementation=cache)


def gradient_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each weight's gradient; infinite where one has none that should, or the other way round."""
    whole = torch.stack([x.norm() for x in exact.values()]).norm()
    names = found.keys() | exact.keys()
    return {
        name: _off(found[name], exact[name], 1e-2 * float(whole)) if name in found and name in exact else float("inf")
        for name in names
    }


def _off(found: Tensor, exact: Tensor, more: float = 0.0) -> float:
    """The norm of the difference by that of what is exact."""
    error = float((found - exact).norm()) / (float(exact.norm()) + more)
    return error if error == error else float("inf")
