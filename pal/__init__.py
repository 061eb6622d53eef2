"""Audio for language models: audio enters a Hugging Face LLM as attention keys and values, or as tokens.

`pal.load()` gives a trained model, `pal.attach(...)` an untrained one; both answer to `model.ask`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal import shipped
from pal.hf import lazy

if TYPE_CHECKING:
    from pal.model import PalModel


def _version() -> str:
    """Version of the installed package, or that in pyproject.toml for a source tree that is not installed."""
    try:
        return version("pal-audio")
    except PackageNotFoundError:
        import tomllib

        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        try:
            return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
        except (OSError, tomllib.TOMLDecodeError, KeyError):
            return "unknown"


__version__ = _version()

lazy.register_on_import()

SHIPPED = shipped.TINY
"""Folder of the complete small model that ships with the package, a toy."""
TEXT_LLM = shipped.TINY_LM
"""Its text-only LLM before training on audio, with the tokenizer: a folder that transformers loads."""


def load(path: str | Path | None = None, other_weights: bool = False) -> PalModel:
    """Load a bundle.

    Args:
        path: a folder that `save_pretrained` wrote, a Hub id, or a shipped model: "smol", "tiny" or "tiny-causal" (for
            streams). None takes "smol" where `pal models get smol` has been run, else "tiny"; the model's `source`
            says which.
        other_weights: go on, with a `WeightsWarning`, where weights at the source of the LLM or encoder are not those
            that the bundle was made with.

    Raises:
        BundleError: the bundle is missing, damaged or from another version, or made with other weights.
    """
    from pal import bundle

    name = shipped.default() if path is None else str(path)
    return bundle.load(shipped.FOLDERS.get(name, name), other_weights=other_weights)


def attach(
    llm: str | Mapping[str, object],
    encoders: Sequence[str | Mapping[str, object]],
    connector: str | Mapping[str, object] | Sequence[str | Mapping[str, object]] = "mlp",
    integration: str | Mapping[str, object] = "pal",
    **options: str | None,
) -> PalModel:
    """Attach audio encoders to an LLM; connectors and projectors are untrained.

    Args:
        llm: Hub id, folder or GGUF file of a causal LM, `"smollm2-135m-instruct"`, or the fields of
            `pal.model_config.LLMConfig`.
        encoders: names (`"tiny"`), Hub ids (`"openai/whisper-small"`), `"whisper-tiny.en"`, or
            `{"name": ..., option: value}`.
        connector: name or `{"name": ..., option: value}`; a list makes several streams.
        integration: name or `{"name": ..., option: value}`.
        options: the other fields of `pal.model_config.ModelConfig`: `system` and `notice`.

    Raises:
        ConfigError: an unknown part or option; the message names the known ones.
    """
    from pal.config import parse
    from pal.model import PalModel
    from pal.model_config import ModelConfig

    fields = {
        "llm": _plain(llm),
        "encoders": [_plain(encoder) for encoder in encoders],
        "connector": _plain(connector),
        "integration": _plain(integration),
        **options,
    }
    return PalModel.from_config(parse(ModelConfig, fields, where="attach"))


def _plain(part: object) -> Any:
    """Convert mappings and sequences to dicts and lists, as a recipe has them."""
    if isinstance(part, Mapping):
        return dict(part)
    return part if isinstance(part, str) or not isinstance(part, Sequence) else [_plain(one) for one in part]
