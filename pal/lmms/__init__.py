"""Models of this package in lmms-eval: `lmms-eval --model pal --model_args pretrained=runs/lal --tasks ...`.

lmms-eval pulls about a hundred packages; install it with `pal-audio[lmms-eval]` in an environment of its own. Its
scoring of MMAU, MMAR and MMSU is not the official scripts'; `pal eval` has those.
"""

from typing import Any


def manifest() -> Any:
    """What lmms-eval's entry points of the group `lmms_eval.models` give: the name and where the class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="pal", simple_class_path="pal.lmms.model.Pal")
