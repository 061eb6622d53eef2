"""Training in bfloat16 on a CPU: attention's backward pass is in float32, where torch's kernel is fast."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pal.types import AUDIO, IGNORE, Batch, Tokens
from tests.models import noise, tiny_model

BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Recorder(TorchDispatchMode):
    """Dtypes of the queries of attention's backward passes."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is BACKWARD:
            self.dtypes.append(args[1].dtype)
        return func(*args, **(kwargs or {}))


def batch():
    rows = [[5, AUDIO, 6, 7, 8, 9], [5, AUDIO, 6, 7]]
    return Batch(
        [noise(0.5, 1), noise(0.9, 2)],
        [Tokens(ids, [i], [*[IGNORE] * (len(ids) - 2), *ids[-2:]]) for i, ids in enumerate(rows)],
    )


def gradients(model, half):
    model.requires_grad_(True)
    model.zero_grad()
    recorder = Recorder()
    with recorder, torch.autocast("cpu", torch.bfloat16, enabled=half):
        total, items = model.loss(batch())[:2]
        total.backward()
    return (
        total.item() / items,
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        recorder,
    )


@pytest.mark.parametrize("integration", ["plits", "lal", "pal"])
@pytest.mark.parametrize("rows", ["both", "one"])
def test_backward_passes_are_in_float32(integration, rows, monkeypatch):
    model = tiny_model(integration)
    if rows == "one":  # without padding, so without a mask
        whole = batch()
        monkeypatch.setattr(
            "tests.backbone.test_half_precision.batch", lambda: Batch(whole.waveforms[:1], whole.conversations[:1])
        )
    loss, exact, _ = gradients(model, half=False)
    half_loss, found, recorder = gradients(model, half=True)
    assert recorder.dtypes and set(recorder.dtypes) == {torch.float32}
    assert half_loss == pytest.approx(loss, rel=0.05)
    assert found.keys() == exact.keys()
    a, b = (torch.cat([x.flatten().float() for x in each.values()]) for each in (exact, found))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


def test_models_in_bfloat16_give_bfloat16(monkeypatch):
    model = tiny_model("plits").to(torch.bfloat16)
    seen = []
    layer = model.llm.lm.get_decoder().layers[0].self_attn
    layer.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    _, found, recorder = gradients(model, half=False)
    assert set(seen) == {torch.bfloat16} and set(recorder.dtypes) == {torch.float32} and found
