"""`pal probe mask`: accuracy lost when a part of the audio is masked, by domain and by task.

The paper masks one pathway of the hybrid at inference (tables 5 and 6); here also an encoder, layers, or a time span.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, Literal, cast

from pal.backbone.audio_mask import AudioMask
from pal.errors import ConfigError
from pal.evaluate.clip_cache import EncodedClipCache
from pal.probe.masked_eval import (
    NO_AUDIO,
    WHOLE,
    Condition,
    Drop,
    Example,
    MaskedAnswers,
    ask,
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

EACH = 8
"""Maximum number of layers to mask one by one; with more layers, quarters of them are masked."""

_QUARTERS = ("1st", "2nd", "3rd", "4th")
_WORDS = {"keys": "the keys", "rows": "the audio rows"}


def default_conditions(model: PalModel, example: Example) -> dict[str, list[Condition]]:
    """Default conditions, by kind.

    They mask each pathway, each stream (if there are several), each layer (or quarter of more than `EACH` layers),
    each quarter of the clips' time (if tokens have times), and everything.
    """
    context = example.context(model, WHOLE)
    found = example.seen(model, WHOLE)
    kinds: dict[str, list[Condition]] = {
        "pathway": [Condition(_WORDS[name], (AudioMask(pathway=_pathway(name)),)) for name in pathways(found)],
        "encoder": [],
        "layers": [
            Condition(_layers_name(layers), (AudioMask(layers=layers),)) for layers in layer_groups(model.llm.n_layers)
        ],
        "time": [],
        "all": [NO_AUDIO],
    }
    streams = model.ears.streams
    if len(streams) > 1:
        kinds["encoder"] = [
            Condition(f"encoder {number} ({' and '.join(stream.encoders)})", (AudioMask(stream=number),))
            for number, stream in enumerate(streams)
        ]
    every = [keys.token_spans for keys in context.keys] + [context.token_spans]
    if not any(bool(places.start_BX[places.stream_BX >= 0].isnan().any()) for places in every if places is not None):
        kinds["time"] = [
            Condition(f"the {name} quarter", (AudioMask(share=(i / 4, (i + 1) / 4)),))
            for i, name in enumerate(_QUARTERS)
        ]
    return kinds


def layer_groups(total: int) -> list[range]:
    """Single layers, or quarters of more than `EACH` layers, in order."""
    if total <= EACH:
        return [range(layer, layer + 1) for layer in range(total)]
    ends = [round(i * total / 4) for i in range(5)]
    return [range(a, b) for a, b in pairwise(ends)]


def chosen_condition(
    pathways: Collection[str] = (),
    encoders: Collection[int] = (),
    layers: Collection[str] = (),
    seconds: Collection[str] = (),
) -> Condition | None:
    """Condition that masks the intersection of all options; None without options.

    Args:
        pathways: "keys" or "rows".
        encoders: indices of streams.
        layers: "FROM-TO", both included, or a single index.
        seconds: "FROM-TO", in seconds.

    Raises:
        ConfigError: an option is malformed.
    """
    if not (pathways or encoders or layers or seconds):
        return None
    spans = [span(text, "--seconds") for text in seconds]
    numbers = sorted({layer for text in layers for layer in _layers(text)})
    ways: list[Literal["keys", "rows"] | None] = [_pathway(name) for name in dict.fromkeys(pathways)]
    streams: list[int | None] = [*dict.fromkeys(encoders)]
    times: list[tuple[float, float] | None] = [*spans]
    masks = tuple(
        AudioMask(pathway=way, stream=stream, layers=numbers or None, seconds=when)
        for way, stream, when in product(ways or [None], streams or [None], times or [None])
    )
    parts = [" and ".join(_WORDS[name] for name in dict.fromkeys(pathways)) or "the audio"]
    parts += [f"of encoder {' and '.join(map(str, dict.fromkeys(encoders)))}"] if encoders else []
    parts += [f"in layers {' and '.join(layers)}"] if layers else []
    parts += [f"at {' and '.join(f'{a:g} to {b:g}' for a, b in spans)} s"] if spans else []
    return Condition(" ".join(parts), masks)


def span(text: str, option: str) -> tuple[float, float]:
    """Parse a time span "FROM-TO" in seconds. Raises ConfigError if it is malformed."""
    start, _, end = text.partition("-")
    try:
        found = float(start), float(end)
    except ValueError:
        found = (1.0, 0.0)
    if not 0 <= found[0] < found[1]:
        raise ConfigError(f"{option} {text}: give FROM-TO, such as 0.5-2, with FROM less than TO")
    return found


def probe_mask(
    model: PalModel,
    records: Sequence[Record],
    chosen: Condition | None = None,
    *,
    seed: int = 0,
    batch: int = 32,
    progress: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> ProbeResult:
    """Evaluate a model with parts of the audio masked.

    Args:
        model: the model.
        records: the questions; answers are scored by exact match.
        chosen: condition to evaluate; default: `default_conditions`.
        seed: seed of the bootstrap.
        batch: rows of a forward pass.
        progress: show a progress bar.
        settings: origin of the questions, for `probe.json`.

    Raises:
        ConfigError: the model has no such layer or encoder, its tokens have no times, or no question has a clip.
    """
    started = time.perf_counter()
    encode_clip = EncodedClipCache(model)
    example = Example.of(model, records, encode_clip)
    kinds = default_conditions(model, example) if chosen is None else {"chosen": [chosen], "all": [NO_AUDIO]}
    conditions = [condition for same in kinds.values() for condition in same]
    asked = ask(model, records, conditions, example, encode_clip, batch, progress, seed)
    drops = _drops(asked, [condition.name for condition in conditions])
    whole = asked.score(asked.right(WHOLE.name))
    floor = asked.score(asked.no_audio)
    return ProbeResult(
        probe="mask",
        model=about(model),
        settings={
            **(settings or {}),
            **settings_of(records, asked, batch),
            "conditions": {
                condition.name: [_as_settings(mask) for mask in condition.masks] for condition in conditions
            },
        },
        reading=_reading(asked, kinds, drops, whole, floor),
        tables=_tables(asked, kinds, drops, whole, floor),
        details={
            "kinds": {kind: [condition.name for condition in same] for kind, same in kinds.items()},
            "drops": [
                {"condition": name, "of": of, "which": which, "relative": drop.relative, **vars(drop)}
                for (name, of, which), drop in drops.items()
            ],
            **asked.details(),
        },
        pictures=_pictures(asked, kinds, drops),
        seconds=time.perf_counter() - started,
    )


Drops = Mapping[tuple[str, str, str], Drop]
"""(condition, "all", "domain" or "task", name of the domain or task) -> drop in accuracy."""


def _drops(asked: MaskedAnswers, names: Sequence[str]) -> Drops:
    found = {}
    for name in names:
        found[name, "all", "all"] = asked.drop(name)
        for key in ("domain", "task"):
            for value in asked.values(key):
                found[name, key, value] = asked.drop(name, asked.among(**{key: value}))
    return found


def _tables(
    asked: MaskedAnswers,
    kinds: Mapping[str, Sequence[Condition]],
    drops: Drops,
    whole: tuple[float, tuple[float, float]],
    floor: tuple[float, tuple[float, float]],
) -> dict[str, list[dict[str, Any]]]:
    conditions = [condition for same in kinds.values() for condition in same]
    nothing = {"condition": WHOLE.name, "share_masked": 0.0, "score": whole[0], "ci95": whole[1]}
    unasked = {"condition": "no audio in the prompt", "share_masked": None, "score": floor[0], "ci95": floor[1]}
    of_drop: dict[str, Any] = {"drop": None, "drop ci95": None, "relative": None, "lost": None, "gained": None}
    overall = [{**nothing, **of_drop}]
    for condition in conditions:
        drop = drops[condition.name, "all", "all"]
        score, ends = asked.score(asked.right(condition.name))
        overall.append(
            {
                "condition": condition.name,
                "share_masked": asked.hidden[condition.name],
                "score": score,
                "ci95": ends,
                "drop": drop.drop,
                "drop ci95": drop.ci95,
                "relative": drop.relative,
                "lost": drop.lost,
                "gained": drop.gained,
            }
        )
    overall.append({**unasked, **of_drop})
    # tasks get a table for few conditions only; `details` has all layers and times
    brief = {c.name for kind in ("pathway", "encoder", "chosen", "all") for c in kinds.get(kind, ())}
    return {
        "Accuracy lost by masking": overall,
        **{
            f"Accuracy lost by masking, by {key}": [
                {
                    "condition": condition.name,
                    key: value,
                    "n": drop.n,
                    "score": drop.score,
                    "drop": drop.drop,
                    "ci95": drop.ci95,
                    "relative": drop.relative,
                }
                for condition in conditions
                if condition.name not in asked.same_as and (key == "domain" or condition.name in brief)
                for value in asked.values(key)
                for drop in [drops[condition.name, key, value]]
            ]
            for key in ("domain", "task")
        },
    }


def _reading(
    asked: MaskedAnswers,
    kinds: Mapping[str, Sequence[Condition]],
    drops: Drops,
    whole: tuple[float, tuple[float, float]],
    floor: tuple[float, tuple[float, float]],
) -> list[str]:
    no_audio = drops[NO_AUDIO.name, "all", "all"]
    sentences = [
        f"{100 * whole[0]:.0f} % of {len(asked.items)} questions are right with the whole audio, "
        f"{100 * no_audio.score:.0f} % with all audio masked, {100 * floor[0]:.0f} % without audio in the prompt."
    ]
    domains = asked.values("domain")
    for kind in ("pathway", "encoder", "chosen"):
        for condition in kinds.get(kind, ()):
            if asked.same_as.get(condition.name) == WHOLE.name:
                continue
            parts = [f"{domain} {drops[condition.name, 'domain', domain].points()}" for domain in domains]
            costs = [*parts[:-2], " and ".join(parts[-2:])]
            sentences.append(f"Masking {condition.name} costs {', '.join(costs)}.")
    for kind, what in (("layers", "layers"), ("time", "quarters of the time")):
        asked_for = [c.name for c in kinds.get(kind, ()) if asked.same_as.get(c.name) != WHOLE.name]
        if not asked_for:
            continue
        significant = [name for name in asked_for if drops[name, "all", "all"].significant]
        most = max(asked_for, key=lambda name: drops[name, "all", "all"].drop)
        if len(asked_for) == 1:
            sentences.append(f"Masking {most} costs {drops[most, 'all', 'all'].points()} over all questions.")
        elif significant:
            sentences.append(
                f"Of the {what}, masking {most} costs most: {drops[most, 'all', 'all'].points()} over all questions; "
                f"{len(significant)} of {len(asked_for)} have a significant effect."
            )
        else:
            sentences.append(f"Of the {what}, none has a significant effect when masked alone.")
    sentences += remarks(asked)
    sentences.append(
        "A drop shows what these weights use: a model trained without the part might not need it. "
        "Keys are masked for every query, including those of summary rows."
    )
    return sentences


def _pictures(asked: MaskedAnswers, kinds: Mapping[str, Sequence[Condition]], drops: Drops) -> dict[str, Plot]:
    asked_for = {
        kind: [c.name for c in same if asked.same_as.get(c.name) != WHOLE.name] for kind, same in kinds.items()
    }
    names = [name for same in asked_for.values() for name in same]
    domains = asked.values("domain")
    columns = [("all", "all"), *(("domain", domain) for domain in domains)]
    pictures = {
        "drops": Plot(
            "Accuracy lost by masking",
            "Points of accuracy lost, with 95 % intervals; bold if the interval excludes 0. "
            "The last row masks all audio.",
            partial(_heat_map, names=names, columns=columns, drops=drops),
            size=(2.6 + 1.5 * len(columns), 1.2 + 0.5 * len(names)),
        )
    }
    for kind, title, caption in (
        ("layers", "Accuracy lost by masking, by layer", "Points lost with audio masked in these layers only."),
        ("time", "Accuracy lost by masking, by time", "Points lost with a quarter of each clip masked."),
    ):
        same = [condition.name for condition in kinds.get(kind, ())]
        if len(same) > 1:
            pictures[kind] = Plot(
                title,
                f"{caption} Bars are 95 % intervals, paired over clips.",
                partial(_profile, names=same, columns=columns, drops=drops),
            )
    return pictures


def _heat_map(figure: Figure, names: Sequence[str], columns: Sequence[tuple[str, str]], drops: Drops) -> None:
    axes = figure.add_subplot()
    values = [[100 * drops[name, *column].drop for column in columns] for name in names]
    top = max(10.0, *(abs(value) for row in values for value in row))
    image = axes.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
    for y, name in enumerate(names):
        for x, column in enumerate(columns):
            drop = drops[name, *column]
            low, high = (100 * end for end in drop.ci95)
            axes.text(
                x,
                y,
                f"{round(100 * drop.drop)}\n({round(low)} to {round(high)})",
                ha="center",
                va="center",
                fontsize=8,
                weight="bold" if drop.significant else "normal",
                color="white" if abs(100 * drop.drop) > 0.6 * top else "black",
            )
    axes.set_xticks(range(len(columns)), [value for _, value in columns])
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.tick_top()
    figure.colorbar(image, label="points lost")


def _profile(figure: Figure, names: Sequence[str], columns: Sequence[tuple[str, str]], drops: Drops) -> None:
    axes = figure.add_subplot()
    series = {
        column[1]: [
            (100 * drop.drop, (100 * drop.ci95[0], 100 * drop.ci95[1]))
            for drop in (drops[name, *column] for name in names)
        ]
        for column in columns
    }
    lines(axes, range(len(names)), series)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set_xticks(range(len(names)), [name.removeprefix("the ") for name in names])
    axes.set_ylabel("points lost")
    axes.legend(frameon=False)


def _pathway(name: str) -> Literal["keys", "rows"]:
    if name not in _WORDS:
        raise ConfigError(f"--pathway {name}: give keys or rows")
    return cast(Literal["keys", "rows"], name)


def _layers(text: str) -> range:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
        raise ConfigError(f"--layers {text}: give FROM-TO, such as 0-3, both included, or one number")
    return range(int(first), int(last or first) + 1)


def _layers_name(layers: range) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def _as_settings(mask: AudioMask) -> dict[str, Any]:
    layers = None if mask.layers is None else list(mask.layers)
    found = vars(replace(mask, layers=layers))
    return {key: value for key, value in found.items() if value is not None}
