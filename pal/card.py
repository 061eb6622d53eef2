"""Model cards, from a bundle's configuration, its `train.json` and its scores of `pal eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pal import bundle
from pal.errors import ConfigError
from pal.evaluate import MetricValue, Result, load_result
from pal.files import amend
from pal.pretrained import KNOWN

if TYPE_CHECKING:
    from pal.model import PalModel

NAME = "README.md"

_CARD = """---
{header}---
# {title}

An audio language model, made with `pal` (the package `pal-audio`): {llm} with {encoders}, attached by
`{integration}`. Audio and text go in, text comes out.

```python
import pal

model = pal.load("{title}")
model.ask("clip.wav", "What sound is this?")
```

`import pal`, and transformers' `AutoProcessor` and `AutoModelForMultimodalLM` read it, too.

## Parts

| part | what | parameters |
|---|---|---|
{parts}

This repository holds the trained weights{left_out}.

## Trained on

{data}

## Measured

{scores}

## Limits

{limits}
"""

_UNMEASURED = "Nothing yet. `pal eval` measures it, and `pal card --scores` puts it here."


@dataclass(frozen=True)
class ModelCard:
    """A model card as Markdown."""

    text: str
    out: str | None
    """File it was written to; None if it was not."""


def write_card(
    path: str | Path,
    scores: Sequence[str | Path] = (),
    data: Sequence[str] = (),
    license_name: str | None = None,
    into_bundle: bool = False,
) -> ModelCard:
    """Make the card of a bundle.

    Args:
        path: the bundle, or the run that made it; the run's `train.json` names the training data.
        scores: files that `pal eval --json` wrote, or run folders of `pal eval`, of this model.
        data: descriptions of further training data.
        license_name: licence of the weights, by the Hub's identifier.
        into_bundle: write the card into the bundle as `README.md`, and list it in the manifest.

    Raises:
        BundleError: no bundle, or a file that is no score.
        ConfigError: a score of another model.
    """
    folder = bundle.find(path)
    model = bundle.load(folder)
    read = [_read_score(Path(file), model.digest) for file in scores]
    run = folder.parent / "train.json"
    report = json.loads(run.read_text(encoding="utf-8")) if folder.name == "model" and run.is_file() else {}
    title = (folder.parent if folder.name == "model" else folder).resolve().name
    text = card(model, title, read, data, license_name, report, bundle.read_description(folder)["left_out"])
    if into_bundle:
        amend(folder, {NAME: text.encode()})
    return ModelCard(text, str(folder / NAME) if into_bundle else None)


def card(
    model: PalModel,
    title: str,
    scores: Sequence[Result] = (),
    data: Sequence[str] = (),
    license_name: str | None = None,
    report: Mapping[str, Any] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> str:
    """The card as Markdown, with the header that the Hub reads.

    Args:
        model: the model.
        title: its name.
        scores: results of `pal eval`.
        data: descriptions of further training data.
        license_name: licence of the weights.
        report: content of `train.json`.
        left_out: weights that the bundle loads from their source.
    """
    config = model.config
    trained = [*data, *_trained_on(report or {})]
    encoders = " and ".join(f"`{part.get('path', part['name'])}`" for part in config.encoders)
    return _CARD.format(
        header=yaml.safe_dump(_header(model, title, scores, license_name), sort_keys=False, allow_unicode=True),
        title=title,
        llm=_llm(model),
        encoders=encoders,
        integration=config.integration["name"],
        parts=_parts(model),
        left_out="; the others are loaded from their source and checked by SHA-256" if left_out else "",
        data="\n".join(f"- {line}" for line in trained) or "Not stated.",
        scores=_table(scores) if scores else _UNMEASURED,
        limits="\n".join(f"- {line}" for line in _limits(model, scores)),
    )


def _read_score(path: Path, digest: str) -> Result:
    result = load_result(path)
    if result.settings.get("model_digest") != digest:
        raise ConfigError(f"{path}: the score of another model; evaluate this one")
    return result


def _header(model: PalModel, title: str, scores: Sequence[Result], license_name: str | None) -> dict[str, Any]:
    named = [model.config.llm.path, *(part.get("path") for part in model.config.encoders)]
    named = [KNOWN[name].hub_id if name in KNOWN else name for name in named]
    # the Hub cannot link to a local folder
    bases = [name for name in named if name and not Path(name).exists() and not Path(name).is_absolute()]
    header: dict[str, Any] = {"license": license_name} if license_name else {}
    header |= {"pipeline_tag": "audio-text-to-text", "library_name": "pal-audio"}
    if bases:
        header["base_model"] = list(dict.fromkeys(bases))
    if scores:
        results = [
            {
                "task": {"type": "audio-text-to-text"},
                "dataset": {"name": score.benchmark, "type": score.benchmark},
                "metrics": [{"type": score.metric, "value": round(score.score, 4)}],
            }
            for score in scores
        ]
        header["model-index"] = [{"name": title, "results": results}]
    return header


def _llm(model: PalModel) -> str:
    config = model.config.llm
    if config.path is not None:
        return f"`{config.path}`"
    return f"a `{model.llm.lm.config.model_type}` of its own"


def _parts(model: PalModel) -> str:
    config = model.config
    connectors = config.connector if isinstance(config.connector, list) else [config.connector]
    what = {
        "encoder": ", ".join(part["name"] for part in config.encoders),
        "connector": ", ".join(part["name"] for part in connectors),
        "projectors": config.integration["name"],
        "llm": model.llm.lm.config.model_type,
    }
    return "\n".join(
        f"| {name} | {what[name]} | {sum(p.numel() for p in part.parameters()):,} |"
        for name, part in model.parts().items()
    )


def _trained_on(report: Mapping[str, Any]) -> list[str]:
    sources = report.get("recipe", {}).get("data", {})
    lines = []
    for name in report.get("data", {}):
        source = sources.get(name) or {}
        kinds = {
            kind: options for kind, options in source.items() if kind in ("synth", "prepare", "manifest") and options
        }
        lines.append(
            f"`{name}`: {'; '.join(_in_words(kind, options) for kind, options in kinds.items()) or 'as named'}"
        )
    return lines


def _in_words(kind: str, options: Any) -> str:
    if kind == "manifest":
        return f"the manifest {Path(options).name}"
    if kind == "prepare":
        return f"the data set `{options['name']}`" + _listed(options.get("options") or {})
    return "scenes of `pal data synth`" + _listed(options)


def _listed(options: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in options.items() if isinstance(value, str | int | float)}
    return f" ({', '.join(f'{key}: {value}' for key, value in plain.items())})" if plain else ""


def _table(scores: Sequence[Result]) -> str:
    lines = [
        "95 % bootstrap intervals over clips; beside them the same model without its audio.",
        "",
        "| data | task | n | measure | score | 95 % interval | without audio |",
        "|---|---|---|---|---|---|---|",
    ]
    for score in scores:
        for part, value in [("all", score.overall), *_categories(score)]:
            ends = "" if value.ci95 is None else f"{value.ci95[0]:.3f} to {value.ci95[1]:.3f}"
            no_audio = "" if value.no_audio_score is None else f"{value.no_audio_score:.3f}"
            measure = score.metric.replace("_", " ")
            lines.append(
                f"| {score.benchmark} | {part} | {value.n} | {measure} | {value.score:.3f} | {ends} | {no_audio} |"
            )
    return "\n".join(lines)


def _categories(score: Result) -> list[tuple[str, MetricValue]]:
    """Name and value of each category with an interval; none if there is only one."""
    # every manifest has the axis "task", so its values need no prefix
    parts = [
        (name if axis == "task" else f"{axis} {name}", value)
        for axis, of in score.categories.items()
        for name, value in of.items()
        if value.ci95 is not None
    ]
    return parts if len(parts) > 1 else []


def _limits(model: PalModel, scores: Sequence[Result]) -> list[str]:
    limits = [f"The model's notice: {model.config.notice}."] if model.config.notice else []
    limits += [
        "It answers any question about any sound, known or not, and gives no probability.",
        "Sounds, languages and kinds of questions outside of its training data were not evaluated"
        + (" beyond the table above." if scores else "."),
        f"Audio is mixed down to mono and resampled to {model.sampling_rate:,} Hz: frequencies above half of that "
        "and the direction of sounds are lost.",
    ]
    for score in scores:
        gain = score.overall.gain_ci95
        if gain is not None and gain[0] <= 0:
            limits.append(f"On {score.benchmark} its score is not measurably better than without the audio.")
    return limits
