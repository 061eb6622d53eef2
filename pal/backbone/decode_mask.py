"""Attention masks of decoding steps: one for each kind of layer, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pal.backbone.cache_storage import AudioKeyLayout, CachedPrompts, CachePlan, Kind, kept
from pal.backbone.merged import UNSEEN
from pal.backbone.score_bias import Bias
from pal.transfer import to_device

ALIGNED = 8
"""Mask columns are padded to a multiple of this: CUDA kernels then take the mask without a copy."""


@dataclass(eq=False)
class _SeenKeys:
    """Keys that generated rows see in the layers of one kind."""

    window: int | None
    seen_BK: Tensor
    """Which keys of the storage, room for generated ones included."""
    positions_BK: Tensor
    order_K: Tensor
    """Decoding step that writes each key, counted from 1; 0 for the prompt's."""
    prompt: int
    """Keys before the generated ones."""
    whole: bool
    """All of the prompts' keys are seen."""
    last: int
    """One past the last of the prompts' keys that is seen in any prompt; a repeated row at their end is not."""
    solid: bool
    """All of the prompts' keys before `last` are seen."""
    mask_B11K: Tensor | None = None
    """Additive mask, where it is the same in all steps."""


class DecodeMask:
    """Additive attention mask of each decoding step.

    Args:
        plan: of the storage.
        prompts: layout of the prompts.
        dtype: of queries.
        device: of the LLM. Prompts described on the host need no synchronisation with it.
    """

    def __init__(self, plan: CachePlan, prompts: CachedPrompts, dtype: torch.dtype, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        kinds, _ = prompts.kinds([plan.kinds[kind][0] for kind in plan.layers])
        crossed = [keys.mask_BA for keys in prompts.keys if keys.crossed]
        seen = [self._seen_by(kind, width, prompts) for kind, (_, width) in zip(kinds, plan.kinds, strict=True)]
        self.far = 0
        """Largest distance of a prompt's rows; 0 where the storage is fixed, which does not need it."""
        whole = [False] * (len(seen) + len(crossed))
        shown = [(width + plan.text, False) for _, width in plan.kinds]
        if not plan.fixed:
            facts = [seen_BK[:, : -plan.slots].all() for seen_BK, _ in seen] + [mask_BA.all() for mask_BA in crossed]
            far = prompts.positions_BT.max() - prompts.positions_BT.min().clamp(max=0)
            lasts = [fact for seen_BK, _ in seen for fact in _shown(seen_BK[:, : -plan.slots])]
            *found, self.far = torch.stack([*(fact.long() for fact in (*facts, *lasts)), far]).tolist()
            whole = [bool(fact) for fact in found[: len(facts)]]
            shown = [
                (last, bool(solid))
                for last, solid in zip(found[len(facts) :: 2], found[len(facts) + 1 :: 2], strict=True)
            ]
        order_X = torch.arange(plan.slots, device=device) // plan.beams + 1
        with torch.inference_mode(False):  # a fixed storage is reused by other calls
            self.done_1 = torch.zeros(1, dtype=torch.long, device=device) if plan.fixed else None
            """Steps done with a fixed storage."""
            self.zero = torch.zeros((), dtype=dtype, device=device)
            self._never = torch.full((), -torch.inf, dtype=dtype, device=device)
            tree_XX = torch.eye(plan.beams, dtype=torch.bool, device=device).repeat(1, plan.room)
            self._tree_BXX = (tree_XX if plan.fixed else torch.zeros_like(tree_XX)).repeat(plan.rows, 1, 1)
        self._seen = [
            _SeenKeys(
                kind[0],
                kept(to_device(seen_BK, device)),
                kept(to_device(positions_BK, device)),
                kept(F.pad(order_X, (width + plan.text, 0))),
                width + plan.text,
                all_seen,
                *ends,
            )
            for kind, (_, width), (seen_BK, positions_BK), all_seen, ends in zip(
                kinds, plan.kinds, seen, whole, shown, strict=False
            )
        ]
        self.crossed: list[Tensor | None] = [
            None if all_seen else kept(to_device(F.pad(mask_BA, (0, width - mask_BA.shape[1])), device)[:, None, None])
            for mask_BA, (width, _), all_seen in zip(crossed, plan.crossed, whole[len(seen) :], strict=True)
        ]
        """For each key set of cross-attention blocks, which keys are seen: bool [B, 1, 1, A]; None where all are."""
        self._biases: dict[int, Tensor] = {}
        """For layers with a bias on the scores of audio, the bias on each key: [B or 1, H or 1, 1, K], 0 for text."""
        biased = [(bias, to_device(rows_BT, device)) for bias, rows_BT in prompts.row_biases]
        for layer, heads in enumerate(plan.biases):
            if heads:
                kind = plan.layers[layer]
                sets = [prompts.keys[i] for i in kinds[kind][2]]
                bias_1H1K = self._bias_of(layer, heads, sets, self._seen[kind].seen_BK.shape[1])
                self._biases[layer] = kept(self._with_rows(bias_1H1K, layer, self._seen[kind].prompt, biased))

    def _with_rows(self, bias_1H1K: Tensor, layer: int, prompt: int, biased: Sequence[tuple[Bias, Tensor]]) -> Tensor:
        """The same with the biases on the prompts' audio rows, which end before key `prompt`."""
        for bias, rows_BT in biased:
            if layer in bias:
                places = (prompt - rows_BT.shape[1], bias_1H1K.shape[-1] - prompt)
                rows_B11K = F.pad(rows_BT, places)[:, None, None]
                bias_1H1K = bias_1H1K + rows_B11K * bias[layer].detach().to(bias_1H1K)[:, None, None]
        return bias_1H1K

    def _bias_of(self, layer: int, heads: int, sets: Sequence[AudioKeyLayout], length: int) -> Tensor:
        """Bias on each of at least `length` keys, of which the audio's are the first: [1, heads, 1, K]."""
        row_HK = torch.zeros(heads, -(-length // ALIGNED) * ALIGNED, dtype=self.zero.dtype, device=self.device)
        first = 0
        for one in sets:
            if one.bias is not None:
                row_HK[:, first : first + one.width] = one.bias[layer].detach().to(row_HK)[:, None]
            first += one.width
        return row_HK[None, :, None]

    def _seen_by(self, kind: Kind, width: int, prompts: CachedPrompts) -> tuple[Tensor, Tensor]:
        """Which keys the layers of a kind see, and the positions of all keys: [B, K] each."""
        _, hiding, joined = kind
        plan = self.plan
        rows_BT, positions_BT = prompts.valid_BT, prompts.positions_BT
        for i in hiding:
            rows_BT = rows_BT & ~prompts.hidden[i][1]
        sets = [prompts.keys[i] for i in joined]
        left = width - sum(keys.width for keys in sets) + plan.text - rows_BT.shape[1]
        steps_X = torch.arange(plan.slots, device=positions_BT.device) // plan.beams + 1
        seen_BK = torch.cat([*(keys.mask_BA for keys in sets), F.pad(rows_BT, (left, plan.slots))], dim=1)
        seen_BK[:, -plan.slots :] = True
        positions = [*(keys.positions_BA for keys in sets), F.pad(positions_BT, (left, 0))]
        return seen_BK, torch.cat([*positions, positions_BT[:, -1:] + steps_X], dim=1)

    def again(self, other: DecodeMask) -> None:
        """Take the masks of other prompts of the same plan, in the same tensors."""
        assert self.done_1 is not None
        self.done_1.zero_()
        for mine, new in zip(self._seen, other._seen, strict=True):
            mine.seen_BK.copy_(new.seen_BK)
            mine.positions_BK.copy_(new.positions_BK)
        for old, mask in zip(self.crossed, other.crossed, strict=True):
            assert old is not None and mask is not None
            old.copy_(mask)
        for layer, bias in self._biases.items():
            bias.copy_(other._biases[layer])

    def of_prompts(self, layer: int) -> tuple[int, Tensor | None]:
        """Number of the prompts' keys that any later row sees, and their additive mask, with biases.

        The mask is [B or 1, H or 1, 1, K]; None where all are seen and there is no bias.
        """
        one = self._seen[self.plan.layers[layer]]
        mask = None
        if not one.solid:  # finite, since later rows may see no key of a prompt
            mask = torch.where(one.seen_BK[:, None, None, : one.last], self.zero, UNSEEN)
        bias = self._biases.get(layer)
        if bias is None:
            return one.last, mask
        return one.last, bias[..., : one.last] if mask is None else mask + bias[..., : one.last]

    def keys_of_prompts(self, layer: int) -> tuple[Tensor, Tensor]:
        """Which of the prompts' keys later rows see in a layer, windows aside, and their positions: [B, K] each."""
        one = self._seen[self.plan.layers[layer]]
        return one.seen_BK[:, : one.prompt], one.positions_BK[:, : one.prompt]

    def bias_of_prompts(self, layer: int) -> Tensor | None:
        """Biases on the scores of the prompts' keys in a layer: [B or 1, H or 1, 1, K]; None without."""
        bias = self._biases.get(layer)
        return None if bias is None else bias[..., : self._seen[self.plan.layers[layer]].prompt]

    def biased(self, mask: Tensor | None, layer: int, steps: int) -> Tensor | None:
        """A layer's mask of the next step plus its bias on the scores of audio: [B or 1, H or 1, 1 or beams, K].

        Args:
            mask: of the layer's kind, from `masks`.
            layer: its number.
            steps: done so far, unless the storage is fixed.
        """
        if layer not in self._biases:
            return mask
        one = self._seen[self.plan.layers[layer]]
        length = one.prompt + (steps + 1) * self.plan.beams if mask is None else mask.shape[-1]
        if length > self._biases[layer].shape[-1]:
            self._biases[layer] = F.pad(self._biases[layer], (0, max(length, one.seen_BK.shape[1])))
        bias = self._biases[layer][..., :length]
        return bias if mask is None else mask + bias

    def masks(self, steps: int, query_B1: Tensor) -> list[Tensor | None]:
        """Additive mask of the next step for each kind of layer: [B, 1, 1 or beams, K], or None.

        Args:
            steps: done so far, unless the storage is fixed.
            query_B1: position of the step's rows.
        """
        if self.done_1 is not None:
            return [self._fixed(one, query_B1, self.done_1) for one in self._seen]
        if self.plan.beams > 1:
            self._branch(steps)
        return [self._mask(one, steps, query_B1) for one in self._seen]

    def _branch(self, steps: int) -> None:
        """Add one key for each beam, which only that beam sees."""
        beams = self.plan.beams
        if (steps + 1) * beams > self._tree_BXX.shape[2]:
            self._tree_BXX = F.pad(self._tree_BXX, (0, self._tree_BXX.shape[2]))
        own_XX = torch.eye(beams, dtype=torch.bool, device=self.device)
        self._tree_BXX[:, :, steps * beams : (steps + 1) * beams] = own_XX

    def _mask(self, one: _SeenKeys, steps: int, query_B1: Tensor) -> Tensor | None:
        beams, window = self.plan.beams, one.window
        near = window is None or window > self.far + 1 + steps
        if near and one.whole and beams == 1:
            return None
        length = one.prompt + (steps + 1) * beams
        wide = -(-length // ALIGNED) * ALIGNED
        if wide > one.seen_BK.shape[1]:
            self._longer(one, wide)
        if near and beams == 1:
            if one.mask_B11K is None:
                one.mask_B11K = self._added(one.seen_BK[:, None, None])
            return one.mask_B11K[..., :length]
        seen_BXK = one.seen_BK[:, None, :wide]
        if window is not None and not near:
            seen_BXK = seen_BXK & (one.positions_BK[:, None, :wide] > query_B1[..., None] - window)
        if beams > 1:
            tree_BXX = self._tree_BXX[:, :, : wide - one.prompt]
            tree_BXX = F.pad(tree_BXX, (0, wide - one.prompt - tree_BXX.shape[2]))
            seen_BXK = self._among_beams(seen_BXK, one.prompt, tree_BXX)
        return self._added(seen_BXK[:, None])[..., :length]

    def _longer(self, one: _SeenKeys, least: int) -> None:
        """Double the room for generated rows, to at least `least` keys."""
        more = max(one.seen_BK.shape[1] - one.prompt, least - one.seen_BK.shape[1])
        one.seen_BK = F.pad(one.seen_BK, (0, more), value=True)
        steps_X = torch.arange(one.seen_BK.shape[1] - one.prompt, device=self.device) // self.plan.beams
        first_B1 = one.positions_BK[:, one.prompt : one.prompt + 1]
        one.positions_BK = torch.cat((one.positions_BK[:, : one.prompt], first_B1 + steps_X), dim=1)
        one.mask_B11K = None

    def _fixed(self, one: _SeenKeys, query_B1: Tensor, done_1: Tensor) -> Tensor:
        """Mask over the whole fixed storage; this step is counted already."""
        seen_BXK = (one.seen_BK & (one.order_K <= done_1))[:, None]
        if one.window is not None:
            seen_BXK = seen_BXK & (one.positions_BK[:, None] > query_B1[..., None] - one.window)
        if self.plan.beams > 1:
            seen_BXK = self._among_beams(seen_BXK, one.prompt, self._tree_BXX)
        return self._added(seen_BXK[:, None])

    def _among_beams(self, seen_B1K: Tensor, prompt: int, tree_BXX: Tensor) -> Tensor:
        """Mask [B, 1, beams, K]: every beam sees the prompt, and of the generated keys its own."""
        shared_BXK = seen_B1K[..., :prompt].expand(-1, self.plan.beams, -1)
        return torch.cat((shared_BXK, seen_B1K[..., prompt:] & tree_BXX), dim=2)

    def _added(self, seen: Tensor) -> Tensor:
        return torch.where(seen, self.zero, self._never)

    def reorder(self, from_R: Tensor) -> None:
        """Let each beam continue another one: reorder the mask by beam."""
        beams = self.plan.beams
        from_BX = from_R.to(self.device).unflatten(0, (-1, beams)).long() % beams
        self._tree_BXX = self._tree_BXX.gather(1, from_BX[..., None].expand(self._tree_BXX.shape))


def _shown(seen_BK: Tensor) -> tuple[Tensor, Tensor]:
    """One past the last key that any row of a batch sees, and whether all rows see all keys before it."""
    at_K = torch.arange(seen_BK.shape[1], device=seen_BK.device)
    last = (seen_BK.any(0) * (at_K + 1)).max() if seen_BK.shape[1] else at_K.sum()
    return last, (seen_BK | (at_K >= last)).all()
