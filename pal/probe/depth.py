"""`pal probe depth`: the same weights, but audio seen in some of the layers only; accuracy against what that costs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from pal.backbone.audio_mask import AudioMask
from pal.backbone.context import AudioContext
from pal.backbone.generate import reordered
from pal.backbone.llm import Backbone
from pal.bench.flops import flop_counter
from pal.evaluate.answerer import evaluation_mode
from pal.evaluate.clip_cache import EncodedClipCache
from pal.integrations.layers import LayerRange, chosen_layers
from pal.plots import COLOURS
from pal.probe.masked_eval import (
    NO_AUDIO,
    WHOLE,
    Condition,
    Example,
    MaskedAnswers,
    Seen,
    ask,
    errors,
    lines,
    pathways,
    remarks,
    settings_of,
)
from pal.probe.probe_result import Plot, ProbeResult, about

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pal.data.manifest import Record
    from pal.model import PalModel
    from pal.types import LLMInputs

SHARES = {"1/4": 1 / 4, "1/3": 1 / 3, "1/2": 1 / 2, "all": 1.0}
"""Depths, from the first layer on."""
WINDOW = 1 / 4
"""Width of the sliding window."""

Pathway = Literal["keys", "rows"] | None


@dataclass(frozen=True)
class Restriction:
    """Layers in which audio is still seen."""

    layers: tuple[int, ...]
    pathway: Pathway = None
    """Restricted pathway; the other one stays. None: both."""

    @property
    def name(self) -> str:
        """Name, such as "audio in layers 0 to 3"."""
        first, last = self.layers[0], self.layers[-1]
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        return f"{self.pathway or 'audio'} in {where}"

    def condition(self, total: int) -> Condition:
        """Condition that masks the audio in all other layers of an LLM of so many layers."""
        others = tuple(layer for layer in range(total) if layer not in self.layers)
        return Condition(self.name, (AudioMask(pathway=self.pathway, layers=others),) if others else ())


@dataclass(frozen=True)
class AnswerCost:
    """Cost of one question over its clips: operations of the prefill, and audio K/V that decoding keeps."""

    flops: int
    """Operations of connector, integration and LLM as they run here, where audio rows go through every layer."""
    flops_least: int
    """The same if rows were left out behind the last layer that sees them."""
    bytes: int
    """K/V of audio as they are kept here: keys in the layers that see them, rows in all."""
    bytes_least: int
    """The same without the rows' K/V in layers that do not see them, which decoding never reads."""


def depths(llm: Backbone, pathway: Pathway = None) -> dict[str, Restriction]:
    """The first layers by each of `SHARES`, rounded as an integration's `layers` are; equal ones under one name."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, share in SHARES.items():
        names.setdefault(chosen_layers(LayerRange(first=share), llm), []).append(name)
    return {", ".join(same): Restriction(layers, pathway) for layers, same in names.items()}


def windows(llm: Backbone, pathway: Pathway = None) -> list[Restriction]:
    """`WINDOW` of the layers, from each layer on where it still fits."""
    width = len(chosen_layers(LayerRange(first=WINDOW), llm))
    starts = range(llm.n_layers - width + 1)
    return [Restriction(tuple(range(start, start + width)), pathway) for start in starts]


def cost(model: PalModel, example: Example, condition: Condition) -> AnswerCost:
    """Count the cost of the example under a condition."""
    view = example.seen(model, condition)
    with model.hiding(*condition.hides, with_spans=True), evaluation_mode(model), torch.no_grad():
        making = flop_counter()
        with making:
            inputs = model.inputs(list(example.clips), [example.row])
        as_is = _prefill(model.llm, inputs)
        seen_in = [layer for layer, pathway, _ in view if pathway == "rows"]
        behind = range(max(seen_in, default=-1) + 1, model.llm.n_layers)
        assert isinstance(inputs.audio_context, AudioContext)
        rows = int(inputs.audio_context.audio_rows_BT.sum())
        rowless = _prefill(model.llm, _without_rows(inputs)) if rows and behind else as_is
    flops = making.get_total_flops() + sum(as_is)
    each = 2 * model.llm.kv_heads * model.llm.head_width * model.llm.dtype.itemsize
    keys_seen, rows_seen = (
        sum(len(tokens) for (_, pathway, _), tokens in view.items() if pathway == name) for name in ("keys", "rows")
    )
    return AnswerCost(
        flops=flops,
        flops_least=flops - sum(as_is[layer] - rowless[layer] for layer in behind),
        bytes=each * (keys_seen + rows * model.llm.n_layers),
        bytes_least=each * (keys_seen + rows_seen),
    )


@dataclass(frozen=True)
class _Group:
    """All restrictions of one pathway, or of all audio."""

    pathway: Pathway
    depths: dict[str, Restriction]
    windows: list[Restriction]

    @property
    def suffix(self) -> str:
        """Suffix for titles."""
        return "" if self.pathway is None else f", {self.pathway} alone restricted"


def probe_depth(
    model: PalModel,
    records: Sequence[Record],
    alone: bool = False,
    *,
    seed: int = 0,
    batch: int = 32,
    progress: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> ProbeResult:
    """Ask the questions with the audio seen in some layers only.

    Args:
        model: the model.
        records: the questions.
        alone: where audio has several pathways, also restrict each by itself.
        seed: seed of the intervals' bootstrap.
        batch: rows of a forward pass.
        progress: show a bar.
        settings: where the questions came from, for `probe.json`.

    Raises:
        ConfigError: no question has a clip.
    """
    started = time.perf_counter()
    encode_clip = EncodedClipCache(model)
    example = Example.of(model, records, encode_clip)
    whole = example.seen(model, WHOLE)
    ways: list[Pathway] = [None]
    if alone and len(pathways(whole)) > 1:
        ways += ["keys", "rows"]
    groups = [_Group(way, depths(model.llm, way), windows(model.llm, way)) for way in ways]
    restrictions = [one for group in groups for one in (*group.depths.values(), *group.windows)]
    conditions = {one.name: one.condition(model.llm.n_layers) for one in restrictions}
    conditions[NO_AUDIO.name] = NO_AUDIO
    asked = ask(model, records, list(conditions.values()), example, encode_clip, batch, progress, seed)
    costs = {WHOLE.name: cost(model, example, WHOLE)}
    for name, condition in conditions.items():
        other = asked.same_as.get(name)
        costs[name] = cost(model, example, condition) if other is None else costs[other]
    return ProbeResult(
        probe="depth",
        model=about(model),
        settings={
            **(settings or {}),
            **settings_of(records, asked, batch),
            "cost_of": {
                "clip_seconds": sum(clip.seconds for clip in example.clips),
                "audio_tokens": _tokens(whole),
                "text_tokens": len(example.row.ids) - len(example.row.clips),
            },
            "flops": "connector, integration, LLM and its head on the last row, counted by torch; not the encoder; "
            "2 for a multiplication and an addition; attention's products in full, masked or not",
            "bytes": "K and V of one question's audio in the LLM's precision, which decoding keeps; not the text's",
        },
        reading=_reading(asked, groups, costs, rows="rows" in pathways(whole)),
        tables=_tables(asked, groups, costs),
        details={"costs": {name: vars(one) for name, one in costs.items()}, **asked.details()},
        pictures=_pictures(asked, groups, costs),
        seconds=time.perf_counter() - started,
    )


def _prefill(llm: Backbone, inputs: LLMInputs) -> list[int]:
    """Operations of each layer; one more entry at the end for everything else."""
    counter = flop_counter()
    marks: list[int] = []
    hooks = []

    def mark(*_: Any) -> None:
        marks.append(counter.get_total_flops())

    for layer in llm.layers:
        # in front of what an integration puts before the layer, which is the layer's cost here
        hooks += [layer.register_forward_pre_hook(mark, prepend=True), layer.register_forward_hook(mark)]
    try:
        with counter:
            last = inputs.attention_mask_BT.shape[1] - 1
            llm.logits_at(inputs, torch.full((1, 1), last, device=llm.device))
    finally:
        for hook in hooks:
            hook.remove()
    layers = [after - before for before, after in zip(marks[::2], marks[1::2], strict=True)]
    return [*layers, counter.get_total_flops() - sum(layers)]


def _without_rows(inputs: LLMInputs) -> LLMInputs:
    """Inputs of one conversation without its audio rows."""
    assert isinstance(inputs.audio_context, AudioContext)
    kept_T = (~inputs.audio_context.audio_rows_BT[0]).nonzero().flatten()
    return reordered(inputs, kept_T[None])


def _tokens(view: Seen) -> dict[str, int]:
    """Number of audio keys and of audio rows, without a restriction."""
    most: dict[tuple[str, int], int] = {}
    for (_, pathway, stream), tokens in view.items():
        most[pathway, stream] = max(most.get((pathway, stream), 0), len(tokens))
    return {name: sum(n for (pathway, _), n in most.items() if pathway == name) for name in pathways(view)}


def _tables(
    asked: MaskedAnswers, groups: Sequence[_Group], costs: Mapping[str, AnswerCost]
) -> dict[str, list[dict[str, Any]]]:
    def scored(name: str, items: Sequence[int] | None = None) -> dict[str, Any]:
        score, ends = asked.score(asked.right(name), items)
        drop = asked.drop(name, items)
        return {"score": score, "ci95": ends, "drop": drop.drop, "drop ci95": drop.ci95}

    def overall(shown: str, name: str) -> dict[str, Any]:
        of = costs[name]
        return {
            "depth": shown,
            "seen": "nowhere" if name == NO_AUDIO.name else name,
            **scored(name),
            "gflops": of.flops / 1e9,
            "gflops_least": of.flops_least / 1e9,
            "kv_kB": of.bytes / 1e3,
            "kv_kB_least": of.bytes_least / 1e3,
        }

    def by_domain(names: Iterable[str]) -> list[dict[str, Any]]:
        return [
            {"seen": name, "domain": domain, "n": len(items), **scored(name, items)}
            for name in names
            for domain in asked.values("domain")
            for items in [asked.among(domain=domain)]
        ]

    tables: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        none = [] if group.pathway else [overall("none", NO_AUDIO.name)]
        firsts = [overall(shown, one.name) for shown, one in group.depths.items()]
        tables[f"Audio seen in the first layers{group.suffix}"] = [*none, *firsts]
        tables[f"Audio seen in a window of layers{group.suffix}"] = [
            overall(f"window of {len(one.layers)}", one.name) for one in group.windows
        ]
        names = dict.fromkeys(one.name for one in (*group.depths.values(), *group.windows))
        tables[f"By domain{group.suffix}"] = by_domain(name for name in names if name not in asked.same_as)
    return tables


def _reading(asked: MaskedAnswers, groups: Sequence[_Group], costs: Mapping[str, AnswerCost], rows: bool) -> list[str]:
    whole, no_audio, floor = (
        100 * asked.score(right)[0] for right in (asked.right(WHOLE.name), asked.right(NO_AUDIO.name), asked.no_audio)
    )
    said = [
        f"{whole:.0f} % of {len(asked.items)} questions are right with the audio seen wherever the model has it, "
        f"{no_audio:.0f} % with it seen nowhere, {floor:.0f} % without audio in the prompt."
    ]
    for group in groups:
        full = costs[[*group.depths.values()][-1].name]
        for shown, one in group.depths.items():
            if asked.same_as.get(one.name) == WHOLE.name:
                continue
            of = costs[one.name]
            said.append(
                f"With {one.name} only ({shown} of them), {asked.drop(one.name).points()} are lost; "
                f"a prefill takes {_share(of.flops, full.flops)} of the operations and decoding keeps "
                f"{_share(of.bytes, full.bytes)} of the audio's K/V"
                + (f" (least: {_share(of.flops_least, full.flops)}, {_share(of.bytes_least, full.bytes)})" * rows)
                + "."
            )
        best = max(group.windows, key=lambda one: asked.score(asked.right(one.name))[0])
        said.append(f"Of {len(group.windows)} windows, {best.name} loses least: {asked.drop(best.name).points()}.")
    said += remarks(asked)
    if rows:
        said.append(
            "Audio rows run through every layer here, seen or not, and so do their K/V stay; 'least' says what there "
            "would be if they were left out behind the last layer that sees them, and only K/V that are read were kept."
        )
    said.append(
        "The weights were trained with audio in all of the model's own layers, so a restriction takes them where they "
        "never were: a low score is no verdict on the depth. For models trained at each depth, and what that saves in "
        "training: pal ablate RECIPE --axis depth."
    )
    return said


def _pictures(asked: MaskedAnswers, groups: Sequence[_Group], costs: Mapping[str, AnswerCost]) -> dict[str, Plot]:
    pictures: dict[str, Plot] = {}
    for group in groups:
        of = "" if group.pathway is None else f"-{group.pathway}"
        firsts = [(len(one.layers), one.name) for one in group.depths.values()]
        nowhere = [] if group.pathway else [(0, NO_AUDIO.name)]
        pictures[f"depth{of}"] = Plot(
            f"Audio seen in the first layers only{group.suffix}",
            "Accuracy with 95 % intervals, by the number of layers from the first on that still see the audio; the "
            "dashed line is the model without audio in the prompt.",
            partial(_profile, asked=asked, at=[*nowhere, *firsts], label="first layers that see audio"),
        )
        if len(group.windows) > 1:
            pictures[f"window{of}"] = Plot(
                f"Audio seen in {len(group.windows[0].layers)} of the layers{group.suffix}",
                "Accuracy with 95 % intervals, by the first layer of the window that still sees the audio; the dashed "
                "line is the model without audio in the prompt.",
                partial(
                    _profile,
                    asked=asked,
                    at=[(one.layers[0], one.name) for one in group.windows],
                    label="first layer of the window",
                ),
            )
    pictures["cost"] = Plot(
        "Accuracy against what it costs",
        "Each depth and window of one question's prefill and of the audio's K/V. Filled: as it runs here. Hollow: at "
        "least, without rows and their K/V where no layer sees them.",
        partial(_costs, asked=asked, group=groups[0], costs=costs),
        size=(10.0, 4.5),
    )
    return pictures


def _profile(figure: Figure, asked: MaskedAnswers, at: Sequence[tuple[int, str]], label: str) -> None:
    axes = figure.add_subplot()
    items = {"all": None, **{domain: asked.among(domain=domain) for domain in asked.values("domain")}}
    lines(
        axes,
        [x for x, _ in at],
        {shown: [asked.score(asked.right(name), some) for _, name in at] for shown, some in items.items()},
    )
    axes.axhline(sum(asked.no_audio) / len(asked.no_audio), color="grey", ls="--", lw=0.8)
    axes.set_xticks([x for x, _ in at])
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False)


def _costs(figure: Figure, asked: MaskedAnswers, group: _Group, costs: Mapping[str, AnswerCost]) -> None:
    named = {one.name: shown for shown, one in group.depths.items()}
    names = dict.fromkeys([NO_AUDIO.name, *named, *(one.name for one in group.windows)])
    for place, (label, run, least) in enumerate(
        (("GFLOPs of a prefill", "flops", "flops_least"), ("kB of audio K/V", "bytes", "bytes_least"))
    ):
        axes = figure.add_subplot(1, 2, place + 1)
        for name in names:
            score, ends = asked.score(asked.right(name))
            x, low = (getattr(costs[name], key) / (1e9 if key.startswith("flops") else 1e3) for key in (run, least))
            colour = COLOURS[0] if name in named else "grey" if name == NO_AUDIO.name else COLOURS[1]
            axes.plot([low, x], [score, score], color=colour, lw=0.8)
            axes.errorbar([x], [score], yerr=errors([score], [ends]), marker="o", color=colour, capsize=2)
            axes.plot([low], [score], marker="o", mfc="white", color=colour)
            shown = "nowhere" if name == NO_AUDIO.name else named.get(name, name.removeprefix("audio in "))
            axes.annotate(shown, (x, score), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlim(left=0)
        axes.margins(x=0.1)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"
