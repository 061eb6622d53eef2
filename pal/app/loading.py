"""Models and stored clips that commands take."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal.app.output import note
from pal.errors import ConfigError, WeightsWarning

if TYPE_CHECKING:
    from pal.model import PalModel


def load_model(model: str | None, other_weights: bool) -> PalModel:
    """Load a bundle; notes say which model is the default, and where it goes on with other weights."""
    import pal
    from pal import shipped

    if model is None:
        model = shipped.default()
        note(shipped.explain(model))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightsWarning)
        loaded = pal.load(model, other_weights=other_weights)
    for warning in caught:
        if issubclass(warning.category, WeightsWarning):
            note(str(warning.message))
    return loaded


def stored_clip(path: str) -> Any:
    """The indexed clip in a .safetensors file, or the path of any other file."""
    if not path.endswith(".safetensors"):
        return path
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; make it with: pal index AUDIO --out {path}")
    from pal.backbone.audio_kv import AudioKV

    return AudioKV.load(path)
