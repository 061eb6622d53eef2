"""Closed forms of what an integration saves for the backward pass, against what autograd saves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_plan import INTEGRATIONS, STAGES, planned, prepared, recipe

EXACT = ("plits", "lal", "lal, last half", "lal, shared", "pal")


def saved(integration: str, stage: dict[str, Any]) -> tuple[int, float]:
    """Bytes that the LLM and an integration save in a step, and those that a plan says.

    Plans leave out what does not grow with the widths: integers, rotary embeddings and the statistics of norms.
    """
    one = recipe(INTEGRATIONS[integration], stage)
    model, batch = prepared(one)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    tensors: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        rotary = x.ndim == 4 and x.shape[1] == 1
        if x.is_floating_point() and x.ndim > 1 and x.shape[-1] > 1 and not rotary:
            tensors.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    features = model.ears.connect(model.ears.encode(batch.waveforms))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, _ = model.llm.loss(model.integration(features, batch.conversations, model.llm))
    found = sum(x.untyped_storage().nbytes() for at, x in tensors.items() if at not in weights)
    assert loss.requires_grad
    return found, planned(one).costs["llm"].saved


@pytest.mark.parametrize(
    ("integration", "stage", "recompute"),
    [
        *((name, stage, False) for name in EXACT for stage in ("connector", "attention", "all")),
        *((name, stage, True) for name in ("lal", "pal") for stage in ("connector", "all")),
        *(("lal", stage, False) for stage in ("projectors", "no_ffn")),
    ],
)
@pytest.mark.covering(1)
def test_saved_bytes(integration: str, stage: str, recompute: bool) -> None:
    found, made = saved(integration, {**STAGES[stage], "recompute_audio": recompute})
    assert made == found


@pytest.mark.parametrize(
    ("integration", "stage", "most"),
    [
        # adapters without dropout share their input, which is counted for each
        *((name, "lora", 0.08) for name in EXACT),
        # the input of the norm of audio keys is counted, but not saved where only the norm's weight trains
        *((name, "llm", 0.08) for name in ("lal", "pal")),
        # a block's or an update's tensors that two operations share are counted for each
        *(("flamingo", stage, 0.04) for stage in ("connector", "all")),
        *(("lal_audio_query", stage, 0.06) for stage in ("connector", "all")),
    ],
)
def test_saved_bytes_are_not_said_to_be_less(integration: str, stage: str, most: float) -> None:
    found, made = saved(integration, {**STAGES[stage], "recompute_audio": False})
    assert found < made < (1 + most) * found
