"""`pal probe depth`: accuracy and cost of a trained model if audio is visible in some of its layers only."""

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
"""Depths: shares of the layers, from the first layer on."""
WINDOW = 1 / 4
"""Width of the sliding window, as a share of the layers."""

Pathway = Literal["keys", "rows"] | None


@dataclass(frozen=True)
class Restriction:
    """Layers in which audio is visible."""

    layers: tuple[int, ...]
    pathway: Pathway = None
    """Pathway that is restricted; the other one stays visible. None: both."""

    @property
    def name(self) -> str:
        """Name, such as "audio in layers 0 to 3"."""
        first, last = self.layers[0], self.layers[-1]
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        return f"{self.pathway or 'audio'} in {where}"

    def condition(self, total: int) -> Condition:
        """Condition that masks the audio in all other layers of an LLM with `total` layers."""
        others = tuple(layer for layer in range(total) if layer not in self.layers)
        return Condition(self.name, (AudioMask(pathway=self.pathway, layers=others),) if others else ())


@dataclass(frozen=True)
class AnswerCost:
    """Cost of one question: FLOPs of the prefill, and bytes of audio K/V in the cache."""

    flops: int
    """FLOPs of connector, integration and LLM as run here, where audio rows go through every layer."""
    flops_least: int
    """FLOPs if audio rows were dropped after the last layer in which they are visible."""
    bytes: int
    """Bytes of audio K/V as kept here: keys in layers where they are visible, rows in all layers."""
    bytes_least: int
    """Bytes without the K/V of rows in layers where they are masked, which decoding never reads."""


def depths(llm: Backbone, pathway: Pathway = None) -> dict[str, Restriction]:
    """Restrictions to the first layers, by each of `SHARES`, rounded as an integration's `layers`; equal ones once."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, share in SHARES.items():
        names.setdefault(chosen_layers(LayerRange(first=share), llm), []).append(name)
    return {", ".join(same): Restriction(layers, pathway) for layers, same in names.items()}


def windows(llm: Backbone, pathway: Pathway = None) -> list[Restriction]:
    """Restrictions to a sliding window of `WINDOW` of the layers."""
    width = len(chosen_layers(LayerRange(first=WINDOW), llm))
    starts = range(llm.n_layers - width + 1)
    return [Restriction(tuple(range(start, start + width)), pathway) for start in starts]


def cost(model: PalModel, example: Example, condition: Condition) -> AnswerCost:
    """Count the cost of the example question under a condition."""
    visible = example.seen(model, condition)
    with model.hiding(*condition.masks, with_spans=True), evaluation_mode(model), torch.no_grad():
        making = flop_counter()
        with making:
            inputs = model.inputs(list(example.clips), [example.row])
        as_is = _prefill(model.llm, inputs)
        seen_in = [layer for layer, pathway, _ in visible if pathway == "rows"]
        behind = range(max(seen_in, default=-1) + 1, model.llm.n_layers)
        assert isinstance(inputs.audio_context, AudioContext)
        rows = int(inputs.audio_context.audio_rows_BT.sum())
        rowless = _prefill(model.llm, _without_rows(inputs)) if rows and behind else as_is
    flops = making.get_total_flops() + sum(as_is)
    each = 2 * model.llm.kv_heads * model.llm.head_width * model.llm.dtype.itemsize
    keys_seen, rows_seen = (
        sum(len(tokens) for (_, pathway, _), tokens in visible.items() if pathway == name) for name in ("keys", "rows")
    )
    return AnswerCost(
        flops=flops,
        flops_least=flops - sum(as_is[layer] - rowless[layer] for layer in behind),
        bytes=each * (keys_seen + rows * model.llm.n_layers),
        bytes_least=each * (keys_seen + rows_seen),
    )


@dataclass(frozen=True)
class _Group:
    """Restrictions of one pathway, or of all audio."""

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
    """Evaluate a model with audio visible in some layers only.

    Args:
        model: the model.
        records: the questions.
        alone: also restrict each pathway alone, if there are two.
        seed: seed of the intervals' bootstrap.
        batch: rows of a forward pass.
        progress: show a progress bar.
        settings: origin of the questions, for `probe.json`.

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
            "flops": "connector, integration, LLM and its head on the last row, counted by torch; without the encoder; "
            "a multiply-add is 2; attention is counted in full, including masked pairs",
            "bytes": "K and V of the audio of one question in the cache, in the LLM's precision; without the text",
        },
        reading=_reading(asked, groups, costs, rows="rows" in pathways(whole)),
        tables=_tables(asked, groups, costs),
        details={"costs": {name: vars(one) for name, one in costs.items()}, **asked.details()},
        pictures=_pictures(asked, groups, costs),
        seconds=time.perf_counter() - started,
    )


def _prefill(llm: Backbone, inputs: LLMInputs) -> list[int]:
    """FLOPs of each layer; the last entry is everything else."""
    counter = flop_counter()
    marks: list[int] = []
    hooks = []

    def mark(*_: Any) -> None:
        marks.append(counter.get_total_flops())

    for layer in llm.layers:
        # before hooks of the integration, so that its blocks before a layer count as the layer's cost
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
    """Number of audio keys and audio rows without a restriction."""
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
            "visible_in": "nowhere" if name == NO_AUDIO.name else name,
            **scored(name),
            "gflops": of.flops / 1e9,
            "gflops_least": of.flops_least / 1e9,
            "kv_kB": of.bytes / 1e3,
            "kv_kB_least": of.bytes_least / 1e3,
        }

    def by_domain(names: Iterable[str]) -> list[dict[str, Any]]:
        return [
            {"visible_in": name, "domain": domain, "n": len(items), **scored(name, items)}
            for name in names
            for domain in asked.values("domain")
            for items in [asked.among(domain=domain)]
        ]

    tables: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        none = [] if group.pathway else [overall("none", NO_AUDIO.name)]
        firsts = [overall(shown, one.name) for shown, one in group.depths.items()]
        tables[f"Audio in the first layers{group.suffix}"] = [*none, *firsts]
        tables[f"Audio in a window of layers{group.suffix}"] = [
            overall(f"window of {len(one.layers)}", one.name) for one in group.windows
        ]
        names = dict.fromkeys(one.name for one in (*group.depths.values(), *group.windows))
        tables[f"By domain{group.suffix}"] = by_domain(name for name in names if name not in asked.same_as)
    return tables


def _reading(asked: MaskedAnswers, groups: Sequence[_Group], costs: Mapping[str, AnswerCost], rows: bool) -> list[str]:
    whole, no_audio, floor = (
        100 * asked.score(right)[0] for right in (asked.right(WHOLE.name), asked.right(NO_AUDIO.name), asked.no_audio)
    )
    sentences = [
        f"{whole:.0f} % of {len(asked.items)} questions are right with audio in all of the model's layers, "
        f"{no_audio:.0f} % with audio masked in all layers, {floor:.0f} % without audio in the prompt."
    ]
    for group in groups:
        full = costs[[*group.depths.values()][-1].name]
        for shown, one in group.depths.items():
            if asked.same_as.get(one.name) == WHOLE.name:
                continue
            of = costs[one.name]
            sentences.append(
                f"With {one.name} only ({shown} of all layers), {asked.drop(one.name).points()} are lost; "
                f"a prefill takes {_share(of.flops, full.flops)} of the FLOPs, and the cache holds "
                f"{_share(of.bytes, full.bytes)} of the audio K/V"
                + (f" (least: {_share(of.flops_least, full.flops)}, {_share(of.bytes_least, full.bytes)})" * rows)
                + "."
            )
        best = max(group.windows, key=lambda one: asked.score(asked.right(one.name))[0])
        sentences.append(
            f"Of {len(group.windows)} windows, {best.name} loses the least: {asked.drop(best.name).points()}."
        )
    sentences += remarks(asked)
    if rows:
        sentences.append(
            "Audio rows run through every layer here and stay in the cache, visible or not. 'Least' is the cost if "
            "they were dropped after the last layer in which they are visible, and only K/V that are read were kept."
        )
    sentences.append(
        "The weights were trained with audio in all of the model's layers, so a low score under a restriction does not "
        "mean that a model trained at this depth is bad. To train at each depth: pal ablate RECIPE --axis depth."
    )
    return sentences


def _pictures(asked: MaskedAnswers, groups: Sequence[_Group], costs: Mapping[str, AnswerCost]) -> dict[str, Plot]:
    pictures: dict[str, Plot] = {}
    for group in groups:
        of = "" if group.pathway is None else f"-{group.pathway}"
        firsts = [(len(one.layers), one.name) for one in group.depths.values()]
        nowhere = [] if group.pathway else [(0, NO_AUDIO.name)]
        pictures[f"depth{of}"] = Plot(
            f"Audio in the first layers only{group.suffix}",
            "Accuracy with 95 % intervals, by the number of first layers in which audio is visible. Dashed: the model "
            "without audio in the prompt.",
            partial(_profile, asked=asked, at=[*nowhere, *firsts], label="number of first layers with audio"),
        )
        if len(group.windows) > 1:
            pictures[f"window{of}"] = Plot(
                f"Audio in {len(group.windows[0].layers)} of the layers{group.suffix}",
                "Accuracy with 95 % intervals, by the first layer of the window in which audio is visible. Dashed: the "
                "model without audio in the prompt.",
                partial(
                    _profile,
                    asked=asked,
                    at=[(one.layers[0], one.name) for one in group.windows],
                    label="first layer of the window",
                ),
            )
    pictures["cost"] = Plot(
        "Accuracy against cost",
        "Each depth and window, against the cost of a prefill and of the audio K/V. Filled: as run here. Hollow: "
        "without rows and their K/V in layers that do not need them.",
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
