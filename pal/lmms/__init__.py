"""Plug-in for lmms-eval: `lmms-eval --model pal --model_args pretrained=runs/lal --tasks ...`.

lmms-eval installs about a hundred packages; install it with `pal-audio[lmms-eval]` in a separate environment. It
scores MMAU, MMAR and MMSU by rules of its own; `pal eval` has the official ones.
"""

from typing import Any


def manifest() -> Any:
    """`ModelManifest` with name and import path of the model class, for the entry point group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="pal", simple_class_path="pal.lmms.model.Pal")
