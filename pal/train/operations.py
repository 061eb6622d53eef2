"""Model FLOPs utilisation (MFU): FLOPs of each step by the cost model, and the device's measured peak."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement

import numpy as np
import torch

from pal.backbone.cost import Cost, StepSize, decoder, total
from pal.connectors.base import Connector
from pal.errors import PalError
from pal.integrations.cost import route_cost
from pal.model import PalModel
from pal.plan.counted import connected, encoded
from pal.plan.skeleton import skeleton
from pal.train.objectives import MicroBatch
from pal.train.recipe import Recipe, Stage
from pal.train.stages import freeze
from pal.types import AUDIO, IGNORE, Batch

logger = logging.getLogger(__name__)

_SECONDS = 12.0
"""Length of the clip on which encoders and connectors are counted, in seconds."""
_BASE = (64, 16, 16, _SECONDS)
"""Base point of the fit: a row's text tokens, trained tokens, text tokens before the clip, and seconds of audio."""


class Operations:
    """FLOPs of a step, forward and backward, without recomputation.

    Counted by the closed forms of `pal.backbone.cost`, with attention as a full square, from lengths known on the host.
    The closed forms are second-degree polynomials in the lengths, so they are interpolated from a few values. The rows
    of the objective `transcript` and the scores of `ctc` are not counted.

    Args:
        recipe: recipe of the run.
        stage: stage of the recipe.
        model: model in the state in which the stage trains it.

    Raises:
        PalError: the architecture of a part is unknown without downloads, or the integration has no cost model.
    """

    def __init__(self, recipe: Recipe, stage: Stage, model: PalModel) -> None:
        self._rate = model.sampling_rate
        bare = skeleton(recipe)
        freeze(bare, stage.train)
        ears = bare.ears
        features, encoding = zip(*(encoded(ears.encoder(i), _SECONDS) for i in range(len(ears.encoders))), strict=True)
        streams, connecting = zip(
            *(
                connected(one, [features[i] for i in indices])
                for one, indices in zip(ears.connectors, ears.encoder_indices, strict=True)
                if isinstance(one, Connector)
            ),
            strict=True,
        )
        self._encoding = _both(encoding) / _SECONDS if stage.runs_connectors or stage.by_clip else 0.0
        self._connecting = _both(connecting) / _SECONDS if stage.runs_connectors else 0.0
        tokens = [stream.lengths[0] / _SECONDS for stream in streams]
        grad = any(stream.x_BAE.requires_grad for stream in streams)

        def counted(clips: int, rows: int, *lengths: float, shares: bool = False) -> float:
            text, targets, before, seconds = lengths
            step = StepSize(
                clips=clips,
                rows=rows,
                text=round(text),
                targets=round(targets),
                before=round(before),
                llm=stage.train.llm,
                integration=stage.train.projectors,
                features=grad,
                recompute=False,
                autocast=stage.precision == "bf16",
                shares=shares,
            )
            routes = zip(model.integration.routes(), tokens, strict=True) if stage.runs_connectors else ()
            added = [route_cost(route, step, round(per_second * seconds), model.llm) for route, per_second in routes]
            return _both([decoder(model.llm, step, added)])

        def continued(*lengths: float) -> float:
            """A conversation whose rows up to the end of its clip ran with another one's."""
            return counted(1, 2, *lengths, shares=True) - counted(1, 1, *lengths)

        self._shares = model.llm.shares_prefixes
        if not stage.runs_llm:
            self._of_rows = self._of_continuations = self._of_clips = _Polynomial(lambda *_: 0.0, (1.0,))
        else:
            self._of_rows = _Polynomial(lambda *lengths: counted(0, 1, *lengths), _BASE)
            self._of_continuations = _Polynomial(continued, _BASE)
            self._of_clips = _Polynomial(lambda seconds: counted(1, 0, 1, 1, 0, seconds), (_SECONDS,))
        self._llm = stage.runs_llm

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> float:
        """FLOPs of this process's part of a step."""
        return sum(self._of(micro_batch.batch) for micro_batch in micro_batches)

    def _of(self, batch: Batch) -> float:
        seconds = batch.durations(self._rate)
        done = sum(seconds) * (self._connecting + self._encoding * (not batch.encoded))
        if not self._llm:
            return done
        rows, continuations = [], []
        begins: tuple[list[int], list[int]] | None = None
        for row in batch.conversations:
            text = len(row.ids) - len(row.clips)
            trained = sum(label != IGNORE for label in row.labels or ())
            heard = sum(seconds[clip] for clip in row.clips)
            end = len(row.ids) - row.ids[::-1].index(AUDIO) if row.clips else 0
            begun = (row.ids[:end], list(row.clips)) if 0 < end < len(row.ids) else None
            if self._shares and begun is not None and begun == begins:
                continuations.append((text, trained, end - len(row.clips), heard))
            else:
                rows.append((text, trained, row.ids.index(AUDIO) if row.clips else text, heard))
            begins = begun
        of_clips = self._of_clips([(one,) for one in seconds])
        return done + self._of_rows(rows) + self._of_continuations(continuations) + of_clips


class _Polynomial:
    """Second-degree polynomial that interpolates a function, at `base` plus up to two steps of its coordinates."""

    def __init__(self, function: Callable[..., float], base: Sequence[float]) -> None:
        size = len(base)
        self._base = np.array(base, dtype=np.float64)
        steps = np.vstack((np.zeros(size), np.eye(size)))
        points = np.array([steps[i] + steps[j] for i, j in combinations_with_replacement(range(size + 1), 2)]) + 1
        values = np.array([function(*(point * self._base)) for point in points])
        self._weights = np.linalg.solve(_monomials(points), values)

    def __call__(self, rows: Sequence[Sequence[float]]) -> float:
        """Sum of the values at all points."""
        return float((_monomials(np.array(rows).reshape(-1, len(self._base)) / self._base) @ self._weights).sum())


def _monomials(points: np.ndarray) -> np.ndarray:
    ones = np.hstack((np.ones((len(points), 1)), points))
    pairs = combinations_with_replacement(range(ones.shape[1]), 2)
    return np.stack([ones[:, i] * ones[:, j] for i, j in pairs], axis=1)


def _both(costs: Sequence[Cost]) -> float:
    cost = total(costs)
    return cost.forward + cost.backward


def product_rate(device: torch.device, width: int = 4096, times: int = 20) -> float | None:
    """Measured FLOP/s of square bfloat16 matrix products of this width; None without CUDA."""
    if device.type != "cuda":
        return None
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(width, width, device=device, generator=generator).to(torch.bfloat16)
    out = torch.empty_like(x)
    for _ in range(times):
        torch.mm(x, x, out=out)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(times):
        torch.mm(x, x, out=out)
    ended.record()
    ended.synchronize()
    return times * 2 * width**3 / (began.elapsed_time(ended) / 1000)


def operations_of(recipe: Recipe, stage: Stage, model: PalModel) -> Operations | None:
    """`Operations` of a stage; None with a line in the log where a part has no cost model."""
    try:
        return Operations(recipe, stage, model)
    except PalError as error:
        logger.info("stage '%s': no 'mfu' in the log: %s", stage.name, error)
        return None
