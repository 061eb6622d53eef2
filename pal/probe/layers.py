"""`pal probe layers`: linear probes for sound labels on the hidden states of text rows, after each layer.

All clips get the same question, so text rows differ between clips only by the audio. A linear probe predicts the labels
of a clip from the hidden state of a row after each layer. Where it scores above a probe with shuffled labels, audio has
entered the LLM's representation. Probed rows:

- `last`: the last row of the prompt, which predicts the answer;
- `after`: the mean of all text rows after the audio;
- `before`: the last text row before the audio, which cannot attend to it;
- `no audio`: the last row of the prompt without the audio.

The last two are controls: they are equal for all clips, so a probe is exactly at chance there. References are the means
over time of the features of the encoders and of the connectors.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pal import audio
from pal.backbone.observers import residual_stream
from pal.clips import ClipFeatures
from pal.data.manifest import Record
from pal.data.prompts import encode, user_turn
from pal.data.synth.questions import PARAPHRASES
from pal.errors import ManifestError
from pal.evaluate.answerer import evaluation_mode
from pal.evaluate.bootstrap import INTERVALS
from pal.lab.records import SCENES_SEED, records_to_ask, spread
from pal.plots import style_of
from pal.probe.linear import FOLDS, INNER_FOLDS, ROUND_OFF, STRENGTHS, ProbeLabels, ProbeScore, check, score_probe
from pal.probe.probe_result import Plot, ProbeResult, about
from pal.types import AUDIO, AudioFeatures, Tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pal.model import PalModel

QUESTION = PARAPHRASES["caption"][0]
"""Question asked about every clip. It names no sound, and occurs in the training of models on scenes."""
CLIPS = 200
"""Default maximum number of clips of a data set."""
MOST_LABELS = 16
"""Maximum number of probed labels of a data set."""
FEWEST = 2 * FOLDS
"""Minimum number of clips with a probed label, and of clips without it."""
SHUFFLE_SEED = 1

ROWS = ("last", "after", "before", "no audio")
_CONTROL_ROWS = ("before", "no audio")


@dataclass
class LayerStates:
    """Hidden states of N clips."""

    by_layer: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)
    """One of `ROWS` -> its states [N, D]: the embedding, then the output of each layer."""
    reference: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """"encoder" or "connector" -> means of its features over time [N, E]; those of several are concatenated."""


def probe_layers(
    model: PalModel,
    manifests: Sequence[Path] = (),
    clips: int = CLIPS,
    seed: int = SCENES_SEED,
    question: str = QUESTION,
    batch: int = 16,
    progress: bool = False,
) -> ProbeResult:
    """Train linear probes for the labels of clips on every layer.

    The labels of a clip are its tags, or its answer if it has no tags. Each data set is probed separately, on its most
    frequent labels. The metric is balanced accuracy if every clip has exactly one label, else macro average precision.

    Args:
        model: the model.
        manifests: manifests of the clips; none: synthetic scenes.
        clips: maximum number of clips of a data set, spread evenly over it.
        seed: seed of the scenes.
        question: question asked about every clip.
        batch: clips of a forward pass.
        progress: show progress bars.

    Raises:
        ConfigError: scikit-learn is missing.
        ManifestError: no clip has labels, or no label is frequent enough.
        AudioError: a clip is unusable.
    """
    check()
    started = time.perf_counter()
    with records_to_ask(manifests, 4 * clips, seed) as records:
        chosen = _chosen(records, clips)
        sets = {title: labels_of(title, part) for title, part in chosen.items()}
        found: dict[str, LayerScores] = {}
        for title, labels in sets.items():
            paths = [record.clips[0] for record in chosen[title]]
            rows = collect(model, paths, question, batch, progress)
            found[title] = score_states(rows, labels, paths, progress)
    n_layers = model.llm.n_layers
    return ProbeResult(
        probe="layers",
        model=about(model),
        settings={
            "question": question,
            "clips": {title: len(part) for title, part in chosen.items()},
            "labels": {title: labels.names for title, labels in sets.items()},
            "metric": {title: labels.metric for title, labels in sets.items()},
            "probe": f"logistic regression, L2, C of {STRENGTHS} by {INNER_FOLDS} folds within the training clips",
            "held_out": f"whole clips, {FOLDS} folds",
            "constant_below": ROUND_OFF,
            "seed": seed,
            "intervals": INTERVALS,
        },
        reading=[sentence for one in found.values() for sentence in reading(one, n_layers)],
        tables={f"{title}: {one.labels.metric}": list(_table(one)) for title, one in found.items()},
        details={title: _details(one) for title, one in found.items()},
        pictures=_pictures(found),
        seconds=time.perf_counter() - started,
    )


def _chosen(records: Sequence[Record], most: int) -> dict[str, list[Record]]:
    """Data set -> one record for each labelled clip."""
    by_set: dict[str, dict[str, Record]] = {}
    for record in records:
        if len(record.clips) == 1 and _names(record):
            by_set.setdefault(record.dataset, {}).setdefault(record.clips[0], record)
    if not by_set:
        raise ManifestError("no clip has labels; give a manifest with 'tags', or with 'choices'")
    return {title: spread(list(part.values()), most) for title, part in by_set.items()}


def _names(record: Record) -> set[str]:
    if record.tags:
        return {tag.label for tag in record.tags}
    return {record.turns[-1].answer} if record.choices else set()


def labels_of(title: str, records: Sequence[Record]) -> ProbeLabels:
    """Labels of a data set's clips, the most frequent first.

    Raises:
        ManifestError: no label has enough clips with it and without it.
    """
    has = [_names(record) for record in records]
    counts = Counter(name for names in has for name in names)
    usable = [name for name, n in counts.items() if FEWEST <= n <= len(records) - FEWEST]
    names = sorted(usable, key=lambda name: (-counts[name], name))[:MOST_LABELS]
    if not names:
        raise ManifestError(
            f"{title}: none of {len(counts)} labels has at least {FEWEST} clips with it and {FEWEST} without it, of "
            f"{len(records)} clips; give more clips"
        )
    truth_NK = np.array([[name in one for name in names] for one in has])
    return ProbeLabels(title, tuple(names), truth_NK, exclusive=len(names) > 1 and bool((truth_NK.sum(1) == 1).all()))


@torch.inference_mode()
def collect(model: PalModel, paths: Sequence[str], question: str, batch: int, progress: bool = False) -> LayerStates:
    """Hidden states of some clips, in the order of `paths`."""
    from tqdm import tqdm

    lengths = [audio.seconds(path) for path in paths]
    order = sorted(range(len(paths)), key=lambda i: -lengths[i])
    kept: dict[str, list[list[Tensor]]] = {}
    references: dict[str, list[Tensor]] = {}
    with evaluation_mode(model), tqdm(total=len(paths), unit="clip", disable=not progress, leave=False) as bar:
        for start in range(0, len(paths), batch):
            part = order[start : start + batch]
            features = model.ears.encode([audio.load(paths[i], model.sampling_rate).samples_N for i in part])
            streams = model.ears.connect(features)
            references.setdefault("encoder", []).append(_means(features))
            references.setdefault("connector", []).append(_means(streams))
            tokens = [_prompt(model, question, [i]) for i in range(len(part))]
            for name, layers in _text_rows(model, streams, tokens).items():
                kept.setdefault(name, []).append(layers)
            bar.update(len(part))
        no_audio = _text_rows(model, None, [_prompt(model, question, [])])
    back = np.argsort(order)
    rows = LayerStates()
    for name, parts in kept.items():
        rows.by_layer[name] = [torch.cat(layer).numpy()[back] for layer in zip(*parts, strict=True)]
    rows.by_layer["no audio"] = [layer.numpy().repeat(len(paths), 0) for layer in no_audio["last"]]
    for name, means in references.items():
        rows.reference[name] = torch.cat(means).numpy()[back]
    return rows


def _prompt(model: PalModel, question: str, clips: list[int]) -> Tokens:
    system = [{"role": "system", "content": model.config.system}] if model.config.system else []
    return encode(model.tokenizer, [*system, user_turn(question, len(clips), model.config.after_clip)], clips)


def _text_rows(model: PalModel, streams: list[AudioFeatures] | None, tokens: list[Tokens]) -> dict[str, list[Tensor]]:
    """Row (`last`, with audio also `after` and `before`) -> states by layer, float32 [B, D]. All texts are equal."""
    ids = tokens[0].ids
    inputs = model.inputs(ClipFeatures(streams or ()), tokens, "left")
    mask_BT = inputs.attention_mask_BT
    # with padding on the left, text after the audio is at the end of every sequence, and text before it at the start of
    # its real rows, whatever rows an integration puts between them
    first_B = mask_BT.shape[1] - mask_BT.long().sum(1)
    at = ids.index(AUDIO) if AUDIO in ids else len(ids)

    def keep(hidden_BTD: Tensor) -> dict[str, Tensor]:
        kept = {"last": hidden_BTD[:, -1]}
        if at < len(ids) - 1:
            kept["after"] = hidden_BTD[:, at + 1 - len(ids) :].mean(1)
        if 0 < at < len(ids):
            kept["before"] = hidden_BTD[torch.arange(len(tokens)), first_B + at - 1]
        return {name: rows_BD.float().cpu() for name, rows_BD in kept.items()}

    layers = residual_stream(model.llm, inputs, keep)
    return {name: [layer[name] for layer in layers] for name in layers[0]}


def _means(streams: list[AudioFeatures]) -> Tensor:
    """Means over the real tokens [B, E], streams concatenated."""
    means = [
        (stream.x_BAE * stream.mask_BA[..., None]).sum(1) / stream.mask_BA.sum(1, keepdim=True) for stream in streams
    ]
    return torch.cat(means, dim=1).float().cpu()


@dataclass(frozen=True)
class LayerScores:
    """Probe scores on one data set."""

    labels: ProbeLabels
    by_layer: Mapping[str, list[ProbeScore]]
    control: Mapping[str, list[ProbeScore]]
    """Scores with shuffled labels."""
    reference: Mapping[str, ProbeScore]
    differing: float
    """Largest difference of `before` rows between two clips, relative to their RMS."""


def score_states(rows: LayerStates, labels: ProbeLabels, groups: Sequence[str], progress: bool = False) -> LayerScores:
    """Probe every layer's states for the labels, and for shuffled ones; clips of a group are held out together."""
    from tqdm import tqdm

    shuffled = labels.shuffled(SHUFFLE_SEED)
    total = sum(2 * len(layers) for layers in rows.by_layer.values()) + len(rows.reference)
    with tqdm(total=total, desc=labels.title, unit="probe", disable=not progress, leave=False) as bar:

        def of(x_ND: NDArray[np.float32], truth: ProbeLabels) -> ProbeScore:
            bar.update()
            return score_probe(x_ND, truth, groups)

        return LayerScores(
            labels,
            {name: [of(x_ND, labels) for x_ND in layers] for name, layers in rows.by_layer.items()},
            {name: [of(x_ND, shuffled) for x_ND in layers] for name, layers in rows.by_layer.items()},
            {name: of(x_ND, labels) for name, x_ND in rows.reference.items()},
            max((_difference(x_ND) for x_ND in rows.by_layer.get("before", [])), default=0.0),
        )


def _difference(x_ND: NDArray[np.float32]) -> float:
    size = float(np.sqrt(np.mean(x_ND.astype(np.float64) ** 2)))
    return float(np.abs(x_ND - x_ND[0]).max()) / size if size else 0.0


def _table(one: LayerScores) -> Iterator[dict[str, Any]]:
    for name, layers in one.by_layer.items():
        for layer, (real, control) in enumerate(zip(layers, one.control[name], strict=True)):
            yield {
                "rows": name,
                "layer": str(layer) if layer else "embeddings",
                "score": real.score,
                "ci95": real.ci95,
                "shuffled": control.score,
                "selectivity": real.score - control.score,
            }
    for name, real in one.reference.items():
        yield {
            "rows": name,
            "layer": None,
            "score": real.score,
            "ci95": real.ci95,
            "shuffled": None,
            "selectivity": None,
        }


def _details(one: LayerScores) -> dict[str, Any]:
    return {
        "chance": one.labels.chance,
        "clips_with_label": dict(zip(one.labels.names, one.labels.truth_NK.sum(0).tolist(), strict=True)),
        "by_label": {
            name: [dict(zip(one.labels.names, layer.by_label, strict=True)) for layer in layers]
            for name, layers in one.by_layer.items()
        },
        "shuffled_ci95": {name: [layer.ci95 for layer in layers] for name, layers in one.control.items()},
        "first_layer": {name: first_above(one.by_layer[name], one.control[name]) for name in one.by_layer},
        "rows_before_audio_differ_by": one.differing,
    }


def first_above(real: Sequence[ProbeScore], control: Sequence[ProbeScore]) -> int | None:
    """First layer (0: the embeddings) whose interval lies above that with shuffled labels."""
    pairs = enumerate(zip(real, control, strict=True))
    return next((layer for layer, (one, other) in pairs if one.ci95[0] > other.ci95[1]), None)


def reading(one: LayerScores, n_layers: int) -> Iterator[str]:
    """Sentences that say where the labels appear in an LLM of `n_layers` layers, and whether the controls hold."""
    title, metric, chance = one.labels.title, one.labels.metric, one.labels.chance
    for name, layers in one.by_layer.items():
        if name in _CONTROL_ROWS:
            continue
        first = first_above(layers, one.control[name])
        what = "the row that predicts the answer" if name == "last" else "the mean text row after the audio"
        if first is None:
            yield f"{title}: in {what}, no layer is above the probe with shuffled labels."
            continue
        peak = max(range(len(layers)), key=lambda layer: layers[layer].score)
        place = f"after layer {first}" if first else "already in the embeddings"
        yield (
            f"{title}: in {what}, labels first appear {place} of {n_layers} ({metric} {layers[first].score:.2f}, "
            f"chance {chance:.2f}), and are clearest after layer {peak} ({layers[peak].score:.2f}, "
            f"{layers[peak].ci95[0]:.2f} to {layers[peak].ci95[1]:.2f})."
        )
    references = ", ".join(f"the {name}'s {real.score:.2f}" for name, real in one.reference.items())
    yield f"{title}: for reference, {metric} on mean features: {references}."
    for name in _CONTROL_ROWS:
        layers = one.by_layer.get(name, [])
        leaking = [layer for layer, real in enumerate(layers) if not _at(chance, real)]
        if leaking:
            yield f"{title}: fault: rows '{name}' must be at chance, but are not in layers {leaking}."
    if "before" in one.by_layer and all(_at(chance, real) for real in one.by_layer["before"]):
        yield (
            f"{title}: the row before the audio is at chance in every layer ({chance:.2f}), as it must be; its "
            f"relative difference between clips is {one.differing:.0e}."
        )


def _at(chance: float, real: ProbeScore) -> bool:
    return abs(real.score - chance) < 1e-9  # equal except for the order of summation


def _pictures(found: Mapping[str, LayerScores]) -> dict[str, Plot]:
    pictures = {}
    for number, (title, one) in enumerate(found.items(), start=1):
        tail = f"-{number}" if len(found) > 1 else ""
        pictures[f"layers{tail}"] = Plot(
            f"{title}: sound labels in text rows, by layer",
            "Score of linear probes on held-out clips, with intervals over clips. Grey: with shuffled labels. Dashed: "
            "on features of the encoder and of the connector.",
            lambda figure, one=one: _draw(figure, one),  # type: ignore[misc]
        )
        pictures[f"labels{tail}"] = Plot(
            f"{title}: each label in the text rows after the audio, by layer",
            "Labels are sorted by their score in the last layer; numbers of clips are in brackets.",
            lambda figure, one=one: _draw_labels(figure, one),  # type: ignore[misc]
            size=(8.0, 2.2 + 0.26 * len(one.labels.names)),
        )
    return pictures


def _draw(figure: Figure, one: LayerScores) -> None:
    axes: Axes = figure.add_subplot()
    names = {"last": "last row of the prompt", "after": "text after the audio", "before": "text before the audio"}
    for place, (name, words) in enumerate(names.items()):
        if name not in one.by_layer:
            continue
        layers, x, style = one.by_layer[name], np.arange(len(one.by_layer[name])), style_of(place)
        y = np.array([real.score for real in layers])
        ends = np.abs(np.array([[y[i] - p.ci95[0], p.ci95[1] - y[i]] for i, p in enumerate(layers)])).T
        axes.errorbar(x, y, yerr=ends, label=words, capsize=2, lw=1.8, ms=5, **style)
        if name not in _CONTROL_ROWS:
            low, high = np.array([control.ci95 for control in one.control[name]]).T
            axes.fill_between(
                x, low, high, color="0.85", lw=0, label="shuffled labels" if not place else None, zorder=0
            )
    for (name, real), dashes in zip(one.reference.items(), ("--", "-."), strict=False):
        axes.axhline(real.score, color="0.25", lw=1.2, ls=dashes, label=f"{name}, mean over time")
    axes.set_xticks(x, ["embed-\ndings", *(str(layer) for layer in x[1:])])
    axes.set_xlabel("after layer")
    axes.set_ylabel(one.labels.metric)
    axes.set_ylim(0, 1.03)
    axes.set_title(f"{one.labels.title}: labels in text rows")
    axes.legend(fontsize=8, framealpha=0.95)


def _draw_labels(figure: Figure, one: LayerScores) -> None:
    axes: Axes = figure.add_subplot()
    score_LK = np.array([real.by_label for real in one.by_layer["after"]])
    order_K = np.argsort(-score_LK[-1], kind="stable")
    image = axes.imshow(score_LK.T[order_K], aspect="auto", cmap="viridis", vmin=0, vmax=1)
    counts_K = one.labels.truth_NK.sum(0)
    axes.set_yticks(range(len(order_K)), [f"{one.labels.names[k]} ({counts_K[k]})" for k in order_K])
    axes.set_xticks(range(len(score_LK)), ["embeddings", *(str(layer) for layer in range(1, len(score_LK)))])
    axes.set_xlabel("after layer")
    axes.set_title(f"{one.labels.title}: each label after the audio")
    figure.colorbar(image, ax=axes, label="recall" if one.labels.exclusive else "average precision")
