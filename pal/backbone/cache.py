"""`JointCache`: KV cache for decoding; audio and text K/V of a layer share one storage, the audio's first.

All generated rows come after all audio of their conversation. So in decoding, audio keys are ordinary entries of the
cache, and a step's attention is the plain LLM's: one call over all keys. If there is padding, a shorter clip or a
sliding window, one mask per step and kind of layer hides what is not seen.

Each prompt is stored once for all its beams or samples. Their queries attend to it in one call, and a mask separates
their generated keys. Reordering beams changes this mask and moves no keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from pal.backbone.cache_storage import CachedPrompts, CacheLayer, CachePlan, allocate_together, filled, kept
from pal.backbone.context import AudioContext
from pal.backbone.decode_mask import DecodeMask
from pal.backbone.interfaces import Block
from pal.backbone.packed import PackedContext
from pal.errors import PalError
from pal.transfer import to_device
from pal.types import LLMInputs


class JointCache(Cache):
    """KV cache of prompts with audio, in transformers' interface.

    `begin` takes the prompts, and one forward prefills them. Each later forward decodes one row per beam, with a
    `DecodingStep` as `attention_metadata`. Lengths count the text only, as transformers' loops expect.
    """

    def __init__(self, plan: CachePlan) -> None:
        self.stores = [CacheLayer(plan, kind) for kind in plan.layers]
        super().__init__(layers=list(self.stores))
        self.plan = plan
        self.context: AudioContext | None = None
        """Audio context of the prompts during prefill; its K/V are in the storage."""
        self.packed: LLMInputs | None = None
        """The prompts during prefill, if they are packed."""
        self.blocks: list[Mapping[int, Block]] = []
        """Cross-attention blocks by layer, for each of their key sets."""
        self._decode_mask: DecodeMask | None = None
        self._crossed: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in plan.crossed]
        self._order_BT: Tensor | None = None
        self._key_orders: dict[int, Tensor] = {}
        self._captured: CapturingLayer | None = None

    @property
    def decode_mask(self) -> DecodeMask:
        """Mask of generated rows."""
        assert self._decode_mask is not None, "begin first"
        return self._decode_mask

    @property
    def answers(self) -> int:
        """Number of rows of a decoding step."""
        return self.plan.rows * self.plan.beams

    @property
    def fixed_room(self) -> int | None:
        """Most rows that can be generated; None if the storage grows."""
        return self.plan.room if self.plan.fixed else None

    @property
    def begun(self) -> bool:
        """True once the prompts are stored."""
        return self.get_seq_length() > 0

    @property
    def no_mask(self) -> Tensor:
        """Placeholder mask for a step: given a 4-dimensional mask, transformers makes none."""
        return self.decode_mask.zero.view(1, 1, 1, 1)

    @torch.no_grad()
    def begin(self, inputs: LLMInputs, prompts: CachedPrompts, dtype: torch.dtype) -> None:
        """Start with prompts, padded on the left or packed; the audio K/V of padded ones are computed now.

        Args:
            inputs: the prompts.
            prompts: their layout.
            dtype: of queries and masks.
        """
        context, device = inputs.audio_context, inputs.position_ids_BT.device
        for layer in self.stores:
            layer.begin()
        decode_mask = DecodeMask(self.plan, prompts, dtype, device)
        if self.plan.fixed and self._decode_mask is not None:
            self._decode_mask.again(decode_mask)
        else:
            self._decode_mask = decode_mask
        keys = () if context is None else context.keys
        self.blocks = [one.blocks for one in keys if one.blocks is not None]
        self.context = self.packed = self._order_BT = None
        if isinstance(context, PackedContext):
            self.packed = inputs
            if context.segments:
                self._order_BT = to_device(filled(_numbers(context.lengths), left=True)[0], device)
                self._key_orders = {
                    i: to_device(filled(_numbers(context.key_counts(i)), left=False)[0], device)
                    for i in range(len(context.keys))
                }
        elif context is not None:
            self.context = self._stored(context)

    def _stored(self, context: AudioContext) -> AudioContext:
        """The context with its audio K/V computed and written to the storage."""
        parts = []
        for which, keys in enumerate(context.keys):
            rope = {} if keys.built is not None else context.llm.rope(keys.rope_positions_BA)
            built = {}
            for layer in keys.layers:
                made = keys.keys_values(layer, context.llm, rope) if keys.built is None else keys.built[layer]
                if keys.blocks is not None:
                    built[layer] = self._hold_crossed(context, which, layer, *made)
                else:
                    before = [context.keys[i] for i in context.joined(layer) if i < which]
                    built[layer] = self.stores[layer].hold(sum(one.mask_BA.shape[1] for one in before), *made)
            parts.append(replace(keys, built=built))
        return replace(context, keys=tuple(parts))

    def _hold_crossed(
        self, context: AudioContext | PackedContext, which: int, layer: int, k_BGAC: Tensor, v_BGAC: Tensor
    ) -> tuple[Tensor, Tensor]:
        number = sum(keys.blocks is not None for keys in context.keys[:which])
        made = (k_BGAC, v_BGAC)
        if not self.plan.fixed:
            self._crossed[number][layer] = made
            return made
        more = self.plan.crossed[number][0] - k_BGAC.shape[2]
        wide = [F.pad(x, (0, 0, 0, more)) for x in made]
        if layer not in self._crossed[number]:
            self._crossed[number][layer] = (kept(wide[0]), kept(wide[1]))
        else:
            for into, x in zip(self._crossed[number][layer], wide, strict=True):
                into.copy_(x)
        return made

    @torch.no_grad()
    def beginning(self, prompts: CachedPrompts, which: int, rest: int) -> tuple[JointCache, CachedPrompts]:
        """A cache of one of the prompts without its last rows, in memory of its own, and its layout.

        Args:
            prompts: that were read, by their layout.
            which: of them.
            rest: number of rows to leave out; they come after all audio.
        """
        windows = [self.plan.kinds[kind][0] for kind in self.plan.layers]
        layout = prompts.beginning(which, rest)
        cache = JointCache(CachePlan.of(windows, layout, room=1))
        cache._decode_mask = DecodeMask(cache.plan, layout, self.decode_mask.zero.dtype, self.decode_mask.device)
        cache.blocks = self.blocks
        kinds, of_layer = layout.kinds(windows)
        for store, made, kind in zip(self.stores, cache.stores, of_layer, strict=True):
            places, first = [], 0
            for joined in kinds[kind][2]:
                places.append(slice(first, first + layout.keys[joined].width))
                first += prompts.keys[joined].width
            places.append(slice(store.prompt - rest - layout.shape[1], store.prompt - rest))
            made.use(*(torch.cat([x[which, None, :, at] for at in places], dim=2) for x in (store.keys, store.values)))
            made.rows = layout.shape[1]
        crossed = [keys.width for keys in layout.keys if keys.crossed]
        cache._crossed = [
            {layer: _pair(torch.stack([x[which, None, :, :width] for x in pair])) for layer, pair in held.items()}
            for held, width in zip(self._crossed, crossed, strict=True)
        ]
        return cache, layout

    def capture_layer(self, layer: int) -> CapturingLayer:
        """A cache for one layer that captures the K/V of packed prompts."""
        self.flush()
        self._captured = CapturingLayer(layer)
        return self._captured

    def flush(self) -> None:
        """Write the K/V captured in the last layer to the storage."""
        captured, self._captured = self._captured, None
        if captured is None:
            return
        assert self.packed is not None and isinstance(self.packed.audio_context, PackedContext)
        context, store = self.packed.audio_context, self.stores[captured.layer]
        first = 0
        for which, made in zip(context.joined(captured.layer), captured.joined, strict=True):
            k_BGAC, v_BGAC = (self._laid(x, self._key_orders[which]) for x in made)
            store.hold(first, k_BGAC, v_BGAC)
            first += k_BGAC.shape[2]
        for which, made in captured.crossed.items():
            self._hold_crossed(context, which, captured.layer, *(self._laid(x, self._key_orders[which]) for x in made))
        if captured.text is None:  # transformers drops the cache there
            raise PalError("nothing is kept while an LLM trains with gradient checkpointing; call eval() to generate")
        k, v = captured.text
        if self._order_BT is not None:
            k, v = (self._laid(x[0].transpose(0, 1), self._order_BT) for x in (k, v))
        store.hold_prompt(k, v)

    @torch.no_grad()
    def hold_prompts(self, read: Iterable[tuple[LayerGroup, tuple[Tensor, Sequence[Tensor]]]]) -> None:
        """Store the K/V of packed prompts, of several layers at once.

        Args:
            read: groups of layers, and K/V of their text [X, G, N, C] and of each set of audio keys [X, I, G, C], in
                turns: K of the first layer, V of the first layer, K of the second, and so on.
        """
        assert self.packed is not None and isinstance(self.packed.audio_context, PackedContext)
        context = self.packed.audio_context
        for group, (text_XGNC, audio) in read:
            if self.plan.fixed:  # its storages, layer by layer, have their place already
                for number, layer in enumerate(group.layers):
                    pair = slice(2 * number, 2 * number + 2)
                    captured = self.capture_layer(layer)
                    captured.text = _pair(text_XGNC[pair, None])
                    captured.joined = [_pair(x_XIGC[pair]) for x_XIGC in audio]
                self.flush()
                continue
            stores = [self.stores[layer] for layer in group.layers]
            rows, first = max(context.lengths), 0
            storage_XBGKC = allocate_together(stores, text_XGNC[:, None].expand(-1, self.plan.rows, -1, -1, -1))
            for which, x_XIGC in zip(group.joined, audio, strict=True):
                counts = context.key_counts(which)
                _copy_each(storage_XBGKC, x_XIGC.transpose(1, 2), counts, [first] * len(counts))
                first += max(counts)
            places = [stores[0].prompt - length for length in context.lengths]
            _copy_each(storage_XBGKC, text_XGNC, context.lengths, places)
            for store in stores:
                store.rows = rows
        self.end_prompts()

    def _laid(self, x_IGC: Tensor, order_BX: Tensor) -> Tensor:
        """Packed entries [I, G, C] by index -> [B, G, X, C]."""
        return x_IGC.index_select(0, order_BX.flatten()).unflatten(0, order_BX.shape).transpose(1, 2)

    def end_prompts(self) -> None:
        """Free the prompts; the storage has all that decoding needs."""
        self.flush()
        self.context = self.packed = self._order_BT = None
        self._key_orders = {}

    def end(self) -> None:
        """Free everything but the storage, which another call reuses."""
        self.end_prompts()
        self.blocks = []

    def step(self, position_ids: Tensor) -> DecodingStep:
        """Attention metadata of the next row of each beam.

        Args:
            position_ids: [B times beams, 1].
        """
        plan, decode_mask = self.plan, self.decode_mask
        if position_ids.shape != (plan.rows * plan.beams, 1):
            raise PalError(
                f"a cache with audio takes one row more of each of {plan.rows * plan.beams}, got position_ids of shape "
                f"{tuple(position_ids.shape)}"
            )
        if decode_mask.done_1 is not None:
            first_X = torch.arange(plan.beams, device=position_ids.device) + decode_mask.done_1 * plan.beams
            places = {prompt: first_X + prompt for prompt in {layer.prompt for layer in self.stores}}
            for layer in self.stores:
                layer.slots_X = places[layer.prompt]
            decode_mask.done_1 += 1
        steps = self.stores[0].steps
        masks = decode_mask.masks(steps, position_ids[:: plan.beams])
        biased = (decode_mask.biased(masks[kind], layer, steps) for layer, kind in enumerate(plan.layers))
        return DecodingStep(self, tuple(biased))

    def crossing(self, layer: int) -> list[tuple[Block, Tensor | None, Tensor, Tensor]]:
        """Cross-attention blocks before the layer, each with its mask, bool [B, 1, 1, A], keys and values."""
        sets = zip(self.blocks, self.decode_mask.crossed, self._crossed, strict=True)
        return [(blocks[layer], seen, *crossed[layer]) for blocks, seen, crossed in sets if layer in crossed]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each beam continue another beam of the same prompt: indices [B times beams]."""
        self.decode_mask.reorder(beam_idx)


class CapturingLayer:
    """Capture of a layer's K/V of packed prompts, which are stored after the layer, since it may be compiled.

    Attributes:
        layer: its number.
        text: keys and values of the rows, [1, G, N, C] each.
        joined: of each set of audio keys that joins the layer's own, [I, G, C] each.
        crossed: of key sets of cross-attention blocks before the layer, by their number.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.text: tuple[Tensor, Tensor] | None = None
        self.joined: list[tuple[Tensor, Tensor]] = []
        self.crossed: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Capture the text's K/V; the signature is that of transformers' caches."""
        self.text = (key_states, value_states)
        return key_states, value_states


class CapturingCache(Cache):
    """Cache that captures the K/V of packed prompts in all layers, and stores none.

    Attributes:
        captured: K/V of each layer.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.captured: dict[int, CapturingLayer] = {}

    def capture_layer(self, layer: int) -> CapturingLayer:
        """A cache for one layer that captures its K/V."""
        self.captured[layer] = CapturingLayer(layer)
        return self.captured[layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: nothing was read before."""
        return 0


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose storages have one size, and which attend to the same audio keys."""

    layers: tuple[int, ...]
    joined: tuple[int, ...]
    """Numbers of the sets of audio keys."""


@dataclass(frozen=True, eq=False)
class DecodingStep:
    """Attention metadata of one decoding step, for each beam."""

    cache: JointCache
    masks: tuple[Tensor | None, ...]
    """Additive mask of each layer, [B or 1, H or 1, 1 or beams, K]; None where everything is seen."""

    @property
    def beams(self) -> int:
        """Beams (or samples) per prompt."""
        return self.cache.plan.beams

    def crosses(self, layer: int) -> bool:
        """True if cross-attention blocks come before the layer."""
        return bool(self.cache.crossing(layer))

    def cross(self, layer: int, x_RQD: Tensor) -> Tensor:
        """The layer's input rows after the cross-attention blocks before it."""
        for block, seen_B11A, k_BGAC, v_BGAC in self.cache.crossing(layer):
            x_BXD = x_RQD.reshape(-1, self.beams, x_RQD.shape[2])
            seen = None if seen_B11A is None else seen_B11A.expand(-1, -1, self.beams, -1)
            x_RQD = block(x_BXD, k_BGAC, v_BGAC, seen).reshape(x_RQD.shape)
        return x_RQD


def _numbers(lengths: list[int] | tuple[int, ...]) -> list[range]:
    """Consecutive ranges of the given lengths."""
    firsts = [sum(lengths[:b]) for b in range(len(lengths))]
    return [range(first, first + length) for first, length in zip(firsts, lengths, strict=True)]


def _pair(x_2X: Tensor) -> tuple[Tensor, Tensor]:
    return x_2X[0], x_2X[1]


def _copy_each(into_XBGKC: Tensor, x_XGIC: Tensor, lengths: Sequence[int], places: Sequence[int]) -> None:
    """Copy consecutive entries of each prompt to a place of its own: long copies, where an index takes each number."""
    first = 0
    for b, (length, place) in enumerate(zip(lengths, places, strict=True)):
        into_XBGKC[:, b, :, place : place + length] = x_XGIC[:, :, first : first + length]
        first += length
