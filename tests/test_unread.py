"""From frames to the LLM's inputs no value of a tensor is read, for which the host would wait for the device.

Twice: on the device "meta", whose tensors have shapes alone while those of the host have numbers, as with a GPU; and
with fake tensors, of which the host's have no numbers either, and which transformers takes for a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pal.connectors.base import Connector
from pal.encoders.base import Encoder
from pal.registry import build, names, toy
from pal.types import AUDIO, AudioFeatures, EncodedClip, Frames, PreparedClips, Tokens
from tests.models import noise, tiny_model

CONNECTORS: list[dict[str, Any]] = [
    {"name": "mlp"},
    {"name": "strided_conv"},
    {"name": "conv_transformer"},
    {"name": "qformer", "queries": 3},
    {"name": "qformer", "queries": 2, "window_seconds": 0.4},
    {"name": "lfst", "width": 16},
]
INTEGRATIONS: list[str | dict[str, Any]] = ["plits", "lal", "pal", "lal_audio_query", {"name": "flamingo", "every": 2}]

CLIPS: dict[str, Callable[[], list[Any]]] = {
    "ragged": lambda: [noise(0.3), noise(1.2)],
    "heard": lambda: [EncodedClip((torch.randn(n, 12),), 1.0) for n in (9, 4)],
}

Move = Callable[[Any], Any]


@pytest.fixture(params=["meta", "fake"])
def device(request: pytest.FixtureRequest) -> Iterator[Move]:
    """Moves networks and tensors to where nothing can be read."""
    if request.param == "meta":
        yield lambda x: x.to("meta")
        return
    with FakeTensorMode() as mode:
        yield lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else faked(x, mode)


def faked(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(real(weight.detach)), weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    return network


def real(make: Callable[[], Any]) -> Any:
    """What is made before anything moves to the device."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        return make()


def moved(x: Any, device: Move) -> Any:
    """What was prepared, as it is; fake where all tensors must be. Moving it is for the encoders."""
    if device(torch.zeros(1)).is_meta:
        return x
    if isinstance(x, PreparedClips):
        return replace(x, parts=tuple(moved(part, device) for part in x.parts))
    if isinstance(x, AudioFeatures):
        return replace(x, x_BAE=device(x.x_BAE))
    return replace(x, blocks_WFM=tuple(map(device, x.blocks_WFM)))


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", names("encoder"))
def test_encoders(device: Move, name: str) -> None:
    encoder: Encoder = real(lambda: build("encoder", toy("encoder", name)).train())
    window = encoder.window_seconds or 1.0
    batches = [(0.3, 2.4 * window, window), (2 * window, 2 * window)]
    given: list[Frames] = real(
        lambda: [encoder.prepare([noise(s, 0, encoder.sampling_rate) for s in seconds]) for seconds in batches]
    )
    encoder = device(encoder)
    for frames, padded in zip(given, (True, False), strict=True):
        features = encoder.encode(moved(frames, device))
        assert features.padded is padded and features.mask_BA.shape == features.x_BAE.shape[:2]
        features.x_BAE.sum().backward()


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", CONNECTORS, ids=str)
def test_connectors(device: Move, options: dict[str, Any]) -> None:
    takes = 2 if options["name"] == "lfst" else 1
    widths: dict[str, Any] = {"in_width": 8} if takes == 1 else {"in_widths": (8, 8)}
    connector: Connector = device(real(lambda: build("connector", options, **widths).train()))
    for lengths in ((11, 1, 30), (30, 30), (30,)):
        given = [device(real(partial(torch.randn, len(lengths), 30, 8))).requires_grad_() for _ in range(takes)]
        features = connector(*(AudioFeatures(x_BAE, lengths, 0.1) for x_BAE in given))
        features.x_BAE.sum().backward()
        assert all(x_BAE.grad is not None for x_BAE in given)


@pytest.mark.covering(2)
@pytest.mark.parametrize("side", ["right", "none"])
@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("integration", INTEGRATIONS, ids=str)
def test_from_frames_to_the_llms_inputs(device: Move, integration: Any, kind: str, side: Any) -> None:
    model = real(lambda: tiny_model(integration, warm=False))
    prepared: PreparedClips = real(lambda: model.ears.prepare(CLIPS[kind]()))
    rows = [Tokens([5, AUDIO, 6, 7], [0], [-100, -100, 6, 7]), Tokens([AUDIO, 6], [1], [-100, 6])]
    model.llm.packs = side == "none"  # by itself it would ask what "meta" has kernels for
    inputs = device(model).inputs(moved(prepared, device), rows, side)
    assert inputs.inputs_embeds_BTD.shape[-1] == model.llm.width


@pytest.mark.parametrize("look", [lambda x: int(x.max()), lambda x: bool(x.any()), lambda x: x[x > 0], Tensor.tolist])
def test_a_look_would_be_noticed(device: Move, look: Callable[[Tensor], Any]) -> None:
    x = device(real(lambda: torch.randn(3)))
    with pytest.raises((RuntimeError, NotImplementedError)):
        look(x).sum().backward()
