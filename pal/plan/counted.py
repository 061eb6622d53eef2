"""FLOPs and activation bytes of networks without a closed form, counted in one run on the meta device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from pal.backbone.cost import Cost, total
from pal.connectors.base import Connector
from pal.encoders.base import Encoder
from pal.types import AudioFeatures


def encoded(encoder: Encoder, seconds: float) -> tuple[AudioFeatures, Cost]:
    """Features of a clip of so many seconds by an encoder on the meta device, and their cost."""
    samples = max(1, round(seconds * encoder.sampling_rate))
    window = samples if encoder.window_seconds is None else round(encoder.window_seconds * encoder.sampling_rate)
    windows = Counter([window] * (samples // window) + [samples % window] * (samples % window > 0))
    tokens, parts = 0, []
    for length, times in windows.items():
        with FlopCounterMode(display=False) as frontend:
            frames_1FM = encoder.frontend(torch.zeros(length))[None]
        features, cost = _counted(encoder, frames_1FM.to("meta"), [frames_1FM.shape[1]])
        tokens += times * features.lengths[0]
        parts.append((cost + Cost(forward=frontend.get_total_flops())).times(times))
    x_BAE = torch.empty(1, tokens, encoder.width, device="meta")
    x_BAE.requires_grad_(any(parameter.requires_grad for parameter in encoder.parameters()))
    return AudioFeatures(x_BAE, (tokens,), encoder.seconds_per_token), total(parts)


def connected(connector: Connector, features: list[AudioFeatures]) -> tuple[AudioFeatures, Cost]:
    """Audio tokens from the features of one clip by a connector on the meta device, and their cost."""
    out, cost = _counted(connector, *features)
    x_BAE = torch.empty(out.x_BAE.shape, device="meta").requires_grad_(out.x_BAE.requires_grad)
    return AudioFeatures(x_BAE, out.lengths, out.seconds_per_token), cost


def _counted(network: nn.Module, *inputs: Any) -> tuple[AudioFeatures, Cost]:
    # by storage, since views share it; weights are counted elsewhere
    own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor.detach())
        return tensor

    counter = FlopCounterMode(display=False)
    with counter:
        with saved_tensors_hooks(keep, _unchanged):
            out: AudioFeatures = network(*inputs)
        forward = counter.get_total_flops()
        if out.x_BAE.requires_grad:
            out.x_BAE.backward(torch.ones_like(out.x_BAE))
    for parameter in network.parameters():
        parameter.grad = None
    saved = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    return out, Cost(forward, counter.get_total_flops() - forward, saved)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
