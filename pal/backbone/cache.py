"""`JointCache`: keys and values for decoding, the audio's before the text's in one storage.

Every row that is generated comes after all audio of its conversation. So in decoding audio is what text is: keys that
were there before, and a step's attention is the plain LLM's, one call over all of them. Where a row has padding, a
shorter clip or a sliding window, one mask a step says so, for all layers of a kind.

A prompt is stored once, however many rows continue it (beams, several answers): their queries attend to it together,
and a mask says which generated row is whose. Reordering beams changes that mask and moves no keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from pal.backbone.context import AudioContext, Block
from pal.backbone.storage import Kind, Layer, Plan, kept, kinds_of
from pal.errors import PalError

ALIGNED = 8
"""Columns of a mask are stored in multiples of this, as CUDA's kernels take them without a copy."""


@dataclass(eq=False)
class _Seen:
    """What the generated rows see in the layers of one kind."""

    window: int | None
    seen_BK: Tensor
    """Which keys of the storage; all that may be generated included."""
    positions_BK: Tensor
    prompt: int
    """Keys before the generated ones."""
    order_K: Tensor
    """The step that each is made in, counted from 1; 0 for the prompt's."""
    whole: bool = False
    """Whether all of the prompts' keys are seen."""
    mask_B11K: Tensor | None = None
    """What is added to the scores, where that is the same in all steps."""


class JointCache(Cache):
    """transformers' cache of a prompt with audio; see this file's head.

    `begin` says what the prompt is, then it goes through the LLM once; each later forward is one row more, with a
    `Step` as its `audio`. Lengths are those of the text, as transformers' loops count them.
    """

    def __init__(self, plan: Plan) -> None:
        self.stores = [Layer(plan, kind) for kind in plan.layers]
        super().__init__(layers=list(self.stores))
        self.plan = plan
        self.context: AudioContext | None = None
        """The prompts' audio, its keys and values in the storage."""
        self.far = 0
        """The largest position of a prompt's row."""
        self.done_1: Tensor | None = None
        """Steps that were made with a fixed storage, on the device."""
        self._seen: list[_Seen] = []
        self._tree_BXX: Tensor | None = None
        self._values: tuple[Tensor, Tensor] | None = None
        self.blocks: list[Mapping[int, Block]] = []
        """What stands before layers and looks at keys of its own."""
        self._crossed: list[dict[int, tuple[Tensor, Tensor]]] = []
        self._crossed_seen: list[Tensor | None] = []

    @property
    def begun(self) -> bool:
        """Whether the prompt is stored."""
        return self.get_seq_length() > 0

    @property
    def no_mask(self) -> Tensor:
        """What keeps transformers from making a mask in a step: any that has 4 dimensions already."""
        assert self._values is not None
        return self._values[0].view(1, 1, 1, 1)

    @torch.no_grad()
    def begin(self, audio: AudioContext | None, valid_BT: Tensor, positions_BT: Tensor, dtype: torch.dtype) -> None:
        """Make and store the audio keys and values of prompts, and what their generated rows will see.

        Args:
            audio: of the prompts.
            valid_BT: which of their rows are real; padding is on the left.
            positions_BT: of their rows.
            dtype: of queries, in which masks are made.
        """
        plan, device = self.plan, positions_BT.device
        for layer in self.stores:
            layer.begin()
        if self._values is None:
            with torch.inference_mode(False):
                self._values = (
                    torch.zeros((), dtype=dtype, device=device),
                    torch.full((), -torch.inf, dtype=dtype, device=device),
                )
                if plan.fixed:
                    self.done_1 = torch.zeros(1, dtype=torch.long, device=device)
        if self.done_1 is not None:
            self.done_1.zero_()
        kinds, _ = kinds_of([plan.kinds[kind][0] for kind in plan.layers], audio)
        seen = [
            self._seen_by(kind, width, audio, valid_BT, positions_BT)
            for kind, (_, width) in zip(kinds, plan.kinds, strict=True)
        ]
        if plan.fixed and self._seen:
            for old, new in zip(self._seen, seen, strict=True):
                old.seen_BK.copy_(new.seen_BK)
                old.positions_BK.copy_(new.positions_BK)
        else:
            self._seen = seen
        self.context = None if audio is None else self._stored(audio)
        crossed = [keys.mask_BA for keys in (() if audio is None else audio.keys) if keys.blocks is not None]
        if not plan.fixed:
            # the one time that the host waits
            facts = [one.seen_BK[:, : one.prompt].all() for one in self._seen]
            facts += [mask_BA.all() for mask_BA in crossed]
            *whole, self.far = torch.stack([*(fact.long() for fact in facts), positions_BT.max()]).tolist()
            for one, all_seen in zip(self._seen, whole, strict=False):
                one.whole = bool(all_seen)
            self._crossed_seen = [
                None if all_seen else mask_BA[:, None, None]
                for mask_BA, all_seen in zip(crossed, whole[len(self._seen) :], strict=True)
            ]
            self._tree_BXX = None
            if plan.beams > 1:
                self._tree_BXX = valid_BT.new_zeros(
                    (plan.rows, plan.beams, plan.room * plan.beams), dtype=torch.bool, device=device
                )
            return
        masks = [
            F.pad(mask, (0, width - mask.shape[1])) for mask, (width, _) in zip(crossed, plan.crossed, strict=True)
        ]
        if self._crossed_seen:
            for old_seen, mask_BA in zip(self._crossed_seen, masks, strict=True):
                assert old_seen is not None
                old_seen.copy_(mask_BA[:, None, None])
        else:
            self._crossed_seen = [kept(mask_BA[:, None, None]) for mask_BA in masks]
        if self._tree_BXX is None:
            with torch.inference_mode(False):
                self._tree_BXX = torch.eye(plan.beams, dtype=torch.bool, device=device).repeat(plan.rows, 1, plan.room)

    def _seen_by(
        self, kind: Kind, width: int, audio: AudioContext | None, valid_BT: Tensor, positions_BT: Tensor
    ) -> _Seen:
        window, hiding, joined = kind
        plan = self.plan
        rows_BT = valid_BT.bool()
        seen = []
        positions = []
        if audio is not None:
            for i in joined:
                seen.append(audio.keys[i].mask_BA)
                positions.append(audio.keys[i].positions_BA)
            for i in hiding:
                rows_BT = rows_BT & ~audio.hidden_rows[i][1]
        more = width - sum(mask.shape[1] for mask in seen)
        left = plan.text - rows_BT.shape[1]
        slots = plan.room * plan.beams
        seen_BK = torch.cat([*seen, F.pad(rows_BT, (more + left, slots))], dim=1)
        seen_BK[:, width + plan.text :] = True
        steps_X = torch.arange(slots, device=positions_BT.device) // plan.beams + 1
        positions_BK = torch.cat(
            [*positions, F.pad(positions_BT, (more + left, 0)), positions_BT[:, -1:] + steps_X], dim=1
        )
        order_K = F.pad(steps_X, (width + plan.text, 0))
        if plan.fixed:
            seen_BK, positions_BK, order_K = kept(seen_BK), kept(positions_BK), kept(order_K)
        return _Seen(window, seen_BK, positions_BK, width + plan.text, order_K)

    def _stored(self, audio: AudioContext) -> AudioContext:
        """The same audio, with its keys and values made and put where they stay."""
        parts = []
        crossed = []
        self.blocks = [keys.blocks for keys in audio.keys if keys.blocks is not None]
        firsts = [0] * len(self.stores)
        for keys in audio.keys:
            rope = {} if keys.built is not None else audio.llm.rope(keys.turns_BA)
            built = {}
            for number in keys.layers:
                made = keys.keys_values(number, audio.llm, rope) if keys.built is None else keys.built[number]
                if keys.blocks is None:
                    made = self.stores[number].hold(firsts[number], *made)
                    firsts[number] += made[0].shape[2]
                built[number] = made
            if keys.blocks is not None:
                crossed.append(built)
            parts.append(replace(keys, built=built))
        if self.plan.fixed:
            crossed = [
                {
                    number: tuple(F.pad(x, (0, 0, 0, width - x.shape[2])) for x in made)  # type: ignore[misc]
                    for number, made in built.items()
                }
                for built, (width, _) in zip(crossed, self.plan.crossed, strict=True)
            ]
            if self._crossed:
                for old, new in zip(self._crossed, crossed, strict=True):
                    for number, made in new.items():
                        for into, x in zip(old[number], made, strict=True):
                            into.copy_(x)
            else:
                self._crossed = [{number: tuple(map(kept, made)) for number, made in one.items()} for one in crossed]  # type: ignore[misc]
        else:
            self._crossed = crossed
        return replace(audio, keys=tuple(parts))

    def packed(self, order_BT: Tensor) -> None:
        """Say that the prompts come one after the other, [1, N, D]: which of the rows goes where.

        Args:
            order_BT: numbers of rows, padding on the left; its own may be any.
        """
        for layer in self.stores:
            layer.order_BT = order_BT

    def end_prompt(self) -> None:
        """Let go of the audio, of which all that decoding needs is in the storage."""
        self.context = None

    def end(self) -> None:
        """Let go of all that is not the storage, which is kept for another call."""
        self.context, self.blocks = None, []

    def step(self, position_ids: Tensor) -> Step:
        """What the next row of each beam sees.

        Args:
            position_ids: [B times beams, 1].
        """
        plan = self.plan
        if position_ids.shape != (plan.rows * plan.beams, 1):
            raise PalError(
                f"a cache with audio takes one row more of each of {plan.rows * plan.beams}, got position_ids of shape "
                f"{tuple(position_ids.shape)}"
            )
        query_B1 = position_ids[:: plan.beams]
        if self.done_1 is not None:
            first_X = torch.arange(plan.beams, device=position_ids.device) + self.done_1 * plan.beams
            places = {prompt: first_X + prompt for prompt in {layer.prompt for layer in self.stores}}
            for layer in self.stores:
                layer.slots_X = places[layer.prompt]
            self.done_1 += 1
            masks: list[Tensor | None] = [self._fixed_mask(one, query_B1) for one in self._seen]
        else:
            steps = self.stores[0].steps
            if plan.beams > 1:
                self._branch(steps)
            masks = [self._mask(one, steps, query_B1) for one in self._seen]
        return Step(self, tuple(masks[kind] for kind in plan.layers))

    def _branch(self, steps: int) -> None:
        """One more row for each beam, which it alone sees."""
        assert self._tree_BXX is not None
        beams = self.plan.beams
        if (steps + 1) * beams > self._tree_BXX.shape[2]:
            self._tree_BXX = F.pad(self._tree_BXX, (0, self._tree_BXX.shape[2]))
        self._tree_BXX[:, :, steps * beams : (steps + 1) * beams] = torch.eye(
            beams, dtype=torch.bool, device=self._tree_BXX.device
        )

    def _mask(self, one: _Seen, steps: int, query_B1: Tensor) -> Tensor | None:
        """What is added to the scores of a step, [B, 1, 1 or beams, K]; None where everything is seen."""
        beams = self.plan.beams
        window = one.window
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
            assert self._tree_BXX is not None
            tree_BXX = self._tree_BXX[:, :, : wide - one.prompt]
            tree_BXX = F.pad(tree_BXX, (0, wide - one.prompt - tree_BXX.shape[2]))
            seen_BXK = torch.cat(
                (seen_BXK[..., : one.prompt].expand(-1, beams, -1), seen_BXK[..., one.prompt :] & tree_BXX), dim=2
            )
        return self._added(seen_BXK[:, None])[..., :length]

    def _longer(self, one: _Seen, least: int) -> None:
        """Room for as many more generated rows as there are, and `least` keys at least."""
        beams = self.plan.beams
        more = max(one.seen_BK.shape[1] - one.prompt, least - one.seen_BK.shape[1])
        one.seen_BK = F.pad(one.seen_BK, (0, more), value=True)
        steps_X = torch.arange(one.seen_BK.shape[1] - one.prompt, device=one.seen_BK.device) // beams
        one.positions_BK = torch.cat(
            (one.positions_BK[:, : one.prompt], one.positions_BK[:, one.prompt : one.prompt + 1] + steps_X), dim=1
        )
        one.mask_B11K = None

    def _fixed_mask(self, one: _Seen, query_B1: Tensor) -> Tensor:
        """The same over the whole of a fixed storage."""
        assert self._tree_BXX is not None and self.done_1 is not None
        beams = self.plan.beams
        seen_BXK = (one.seen_BK & (one.order_K <= self.done_1))[:, None]
        if one.window is not None:
            seen_BXK = seen_BXK & (one.positions_BK[:, None] > query_B1[..., None] - one.window)
        if beams > 1:
            seen_BXK = torch.cat(
                (seen_BXK[..., : one.prompt].expand(-1, beams, -1), seen_BXK[..., one.prompt :] & self._tree_BXX), dim=2
            )
        return self._added(seen_BXK[:, None])

    def _added(self, seen: Tensor) -> Tensor:
        assert self._values is not None
        return torch.where(seen, *self._values)

    def crossing(self, layer: int) -> list[tuple[Block, Tensor | None, Tensor, Tensor]]:
        """The blocks before the layer, each with what its rows see, bool [B, 1, 1, A], and the keys and values."""
        sets = zip(self.blocks, self._crossed_seen, self._crossed, strict=True)
        return [(blocks[layer], seen, *crossed[layer]) for blocks, seen, crossed in sets if layer in crossed]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on from what another one made: [B times beams] numbers of rows of the same prompts."""
        if self._tree_BXX is not None:
            from_BX = beam_idx.to(self._tree_BXX.device).unflatten(0, (-1, self.plan.beams)) % self.plan.beams
            self._tree_BXX = self._tree_BXX.gather(1, from_BX.long()[..., None].expand(self._tree_BXX.shape))


@dataclass(frozen=True, eq=False)
class Step:
    """What one generated row of each beam sees; takes an `AudioView`'s place in the layers."""

    cache: JointCache
    masks: tuple[Tensor | None, ...]
    """Per layer, what is added to the scores: [B, 1, 1 or beams, K]; None where everything is seen."""

    @property
    def beams(self) -> int:
        """Rows that continue each prompt."""
        return self.cache.plan.beams

    def crosses(self, layer: int) -> bool:
        """Whether blocks stand before a layer."""
        return bool(self.cache.crossing(layer))

    def cross(self, layer: int, x_RQD: Tensor) -> Tensor:
        """The rows that go into a layer, after the blocks that stand before it."""
        for block, seen_B11A, k_BGAC, v_BGAC in self.cache.crossing(layer):
            x_BXD = x_RQD.reshape(-1, self.beams, x_RQD.shape[2])
            seen = None if seen_B11A is None else seen_B11A.expand(-1, -1, self.beams, -1)
            x_RQD = block(x_BXD, k_BGAC, v_BGAC, seen).reshape(x_RQD.shape)
        return x_RQD
