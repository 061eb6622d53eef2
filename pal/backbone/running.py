"""`RunningBatch`: independent sequences that are decoded together, and join and leave between two steps.

A sequence joins after its prompt was read. Later rows see a fixed set of the prompt's keys, audio and text alike, so
these keys are copied to the sequence's own row of the storage, without padding and without what is hidden from later
rows; a step is one attention call for each layer, with a mask by length. Keys that several sequences share (the samples
of one prompt, questions about one clip), or that are too many for others to be padded to, stay in the cache that read
them: each such cache is attended to in one more call, and the results are merged by the log-sum-exps of their scores.

Everything is taken from the `JointCache` that read the prompt, so this works for every integration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pal.backbone import kernels
from pal.backbone.attention import without_cudnn
from pal.backbone.cache import JointCache
from pal.backbone.cache_storage import CachedPrompts, CachePlan
from pal.backbone.generate import padded_left
from pal.backbone.interfaces import Block, LaterRows
from pal.backbone.merged import merge
from pal.backbone.prefill import prompts_of, query_dtype, read_prompts
from pal.backbone.running_storage import KeyPositions, SlotBias, SlotKeys, places_of
from pal.backbone.shared_prefix import Continuations, SharedPrefixCache, attend_together
from pal.types import LLMInputs

if TYPE_CHECKING:
    from pal.backbone.llm import Backbone


@dataclass(frozen=True, eq=False)
class PromptsRead:
    """Prompts that were read together, ready to be continued."""

    cache: JointCache
    logits_BV: Tensor
    """Of each prompt's first new token."""
    last: tuple[int, ...]
    """Position of each prompt's last row."""
    layout: CachedPrompts

    def __len__(self) -> int:
        return len(self.last)

    @property
    def keys(self) -> int:
        """Most keys of a layer, of the longest prompt."""
        return max(store.prompt for store in self.cache.stores)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        crossed = [
            x for layer in range(len(self.cache.stores)) for _, _, *pair in self.cache.crossing(layer) for x in pair
        ]
        stored = [x for store in self.cache.stores for x in (store.keys, store.values)]
        return sum(x.nbytes for x in (*stored, *crossed))

    def beginning(self, which: int, rest: int) -> PromptsRead:
        """One of the prompts without its last `rest` rows, which are text after all clips, as if read alone so far.

        It has memory of its own, and the logits of the whole prompt.
        """
        cache, layout = self.cache.beginning(self.layout, which, rest)
        return PromptsRead(cache, self.logits_BV[which, None].clone(), (self.last[which] - rest,), layout)


@dataclass(frozen=True, eq=False)
class ContinuationsRead:
    """Texts that were read after prompts, ready to be continued."""

    prompts: tuple[PromptsRead, ...]
    """Of each text, the prompt before it."""
    cache: SharedPrefixCache
    padding: tuple[int, ...]
    """Rows of padding before each text."""
    logits_RV: Tensor
    last: tuple[int, ...]
    """Position of each text's last row."""


@torch.no_grad()
def read(llm: Backbone, inputs: LLMInputs) -> PromptsRead:
    """Read prompts, padded or packed."""
    inputs = padded_left(inputs)
    layout = prompts_of(inputs)
    cache = JointCache(CachePlan.of(llm.windows, layout, room=1))
    cache.begin(inputs, layout, query_dtype(llm, llm.device))
    logits_BV = read_prompts(llm, cache, inputs)
    return PromptsRead(cache, logits_BV, tuple(layout.positions_BT[:, -1].tolist()), layout)


@torch.no_grad()
def read_after(
    llm: Backbone, prompts: Sequence[PromptsRead], texts: Sequence[Sequence[list[int]]]
) -> ContinuationsRead:
    """Read texts that follow prompts, each of which was read alone; for LLMs without sliding windows.

    Args:
        llm: the LLM.
        prompts: what was read before.
        texts: token ids of the texts after each prompt.
    """
    assert all(len(prompt) == 1 for prompt in prompts) and not any(llm.windows)
    continuations = Continuations(tuple(map(len, texts)), tuple(text for each in texts for text in each))
    ids_RT, positions_RT = continuations.rows(torch.tensor([prompt.last[0] for prompt in prompts], device=llm.device))
    cache = SharedPrefixCache([prompt.cache for prompt in prompts], continuations, room=0)
    out = llm.lm(input_ids=ids_RT, position_ids=positions_RT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    of_text = tuple(prompts[which] for which in continuations.prompts)
    last = tuple(prompt.last[0] + len(text) for prompt, text in zip(of_text, continuations.ids, strict=True))
    return ContinuationsRead(of_text, cache, tuple(continuations.padding), out.logits[:, -1], last)


class RunningBatch:
    """Sequences that are decoded together.

    Rows are numbered from 0 in the order of joining; when one leaves, the last one takes its number.

    Args:
        llm: in evaluation mode.
    """

    def __init__(self, llm: Backbone) -> None:
        self.llm = llm
        self.positions: list[int] = []
        """Position of each row's next token."""
        self.prompts: list[PromptsRead | None] = []
        """The prompt that a row attends to where it was read; None where its keys are the row's own."""
        self._clear()

    def _clear(self) -> None:
        """Free the storage."""
        layers = range(self.llm.n_layers)
        self._keys = [SlotKeys() for _ in layers]
        self._biases = [SlotBias() for _ in layers]
        self._crossed: list[dict[Block, tuple[SlotKeys, list[int]]]] = [{} for _ in layers]
        windows = list(dict.fromkeys(self.llm.windows))
        self._layouts = [KeyPositions(window, self.llm.device) for window in windows]
        self._layout_of = [windows.index(window) for window in self.llm.windows]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' own keys and values, room included."""
        crossed = [keys for sets in self._crossed for keys, _ in sets.values()]
        return sum(keys.nbytes for keys in (*self._keys, *crossed))

    @torch.no_grad()
    def join(self, prompts: PromptsRead, which: int, in_place: bool = False) -> int:
        """Add a sequence that continues a prompt; returns its row.

        Args:
            prompts: as read.
            which: of them.
            in_place: attend to the prompt where it is, which must have been read alone; sequences that do so share it.
                For LLMs without sliding windows.
        """
        row = len(self)
        if in_place:
            assert len(prompts) == 1 and not any(self.llm.windows)
            self._join_own(row, [0] * self.llm.n_layers, [torch.zeros(0, dtype=torch.long)])
            self._reserve(row, prompts.cache)
            self._end_join(prompts, prompts.last[which] + 1)
            return row
        cache, mask = prompts.cache, prompts.cache.decode_mask
        kinds = cache.plan.layers
        seen = []
        for kind in range(len(cache.plan.kinds)):
            seen_BK, positions_BK = mask.keys_of_prompts(kinds.index(kind))
            at_K = seen_BK[which].nonzero()[:, 0]
            seen.append((at_K, positions_BK[which, at_K]))
        self._join_own(row, kinds, [positions_K for _, positions_K in seen])
        for layer, (store, kind) in enumerate(zip(cache.stores, kinds, strict=True)):
            at_K = seen[kind][0]
            self._keys[layer].put(row, store.keys[which, :, at_K], store.values[which, :, at_K])
            bias = mask.bias_of_prompts(layer)
            if bias is not None:
                bias = bias.expand(len(prompts), -1, -1, -1)[which, :, 0, at_K]
            self._biases[layer].put(row, bias, self.llm.device)
            for block, seen_B11A, k_BGAC, v_BGAC in cache.crossing(layer):
                count = k_BGAC.shape[2] if seen_B11A is None else int(seen_B11A[which].sum())  # padded on the right
                keys, lengths = self._crossed[layer].setdefault(block, (SlotKeys(), [0] * row))
                keys.put(row, k_BGAC[which, :, :count], v_BGAC[which, :, :count])
                lengths.append(count)
        self._end_join(None, prompts.last[which] + 1)
        return row

    @torch.no_grad()
    def join_after(self, texts: ContinuationsRead, which: int) -> int:
        """Add a sequence that continues a text after a prompt, to which it attends where it is; returns its row."""
        prompt, padding = texts.prompts[which], texts.padding[which]
        own = [(store, slice(padding, store.rows)) for store in texts.cache.stores]
        return self._join_following(prompt, own, which, texts.last[which])

    @torch.no_grad()
    def join_whole(self, prompts: PromptsRead, which: int, beginning: PromptsRead) -> int:
        """Add a sequence that continues a prompt, of whose beginning it attends to a copy; returns its row.

        Args:
            prompts: as read.
            which: of them.
            beginning: of this prompt, from `PromptsRead.beginning`.
        """
        last = prompts.last[which]
        own = [(store, slice(store.prompt - last + beginning.last[0], store.prompt)) for store in prompts.cache.stores]
        return self._join_following(beginning, own, which, last)

    def _join_following(self, prompt: PromptsRead, own: Sequence[tuple[Any, slice]], which: int, last: int) -> int:
        """Add a sequence that attends to a prompt where it is; its own keys stand in a row of caches' layers."""
        row, first = len(self), prompt.last[0] + 1
        self._join_own(row, [0] * self.llm.n_layers, [torch.arange(first, last + 1, device=self.llm.device)])
        for layer, (store, at) in enumerate(own):
            self._keys[layer].put(row, store.keys[which, :, at], store.values[which, :, at])
            self._biases[layer].put(row, None, self.llm.device)
        self._end_join(prompt, last + 1)
        return row

    def _join_own(self, row: int, kinds: Sequence[int], positions: Sequence[Tensor]) -> None:
        """Note where a new row's own keys stand: kind of each layer, and positions of each kind."""
        if not row:
            self._clear()
        layouts: dict[tuple[int, int], int] = {}
        made: list[KeyPositions] = []
        used: set[int] = set()
        for pair in dict.fromkeys(zip(self._layout_of, kinds, strict=True)):
            old = self._layouts[pair[0]]
            layouts[pair] = len(made)
            made.append(old.split() if pair[0] in used else old)
            used.add(pair[0])
        self._layout_of = [layouts[pair] for pair in zip(self._layout_of, kinds, strict=True)]
        self._layouts = made
        for (_, kind), at in layouts.items():
            made[at].put(row, positions[kind])

    def _reserve(self, row: int, cache: JointCache) -> None:
        """Room for a row without keys of its own yet."""
        for layer, store in enumerate(cache.stores):
            self._keys[layer].reserve(row + 1, 1, store.keys[0], store.values[0])
            self._biases[layer].put(row, None, self.llm.device)

    def _end_join(self, prompt: PromptsRead | None, position: int) -> None:
        self.positions.append(position)
        self.prompts.append(prompt)
        for sets in self._crossed:
            for keys, lengths in sets.values():
                lengths += [0] * (len(self) - len(lengths))
                keys.add_rows(len(self))

    def leave(self, row: int) -> None:
        """Forget a sequence; the last one takes its number."""
        last = len(self) - 1
        for layout in self._layouts:
            layout.leave(row)
        for layer in range(self.llm.n_layers if row != last else 0):
            self._keys[layer].move(last, row)
            self._biases[layer].move(last, row)
            for keys, _ in self._crossed[layer].values():
                keys.move(last, row)
        lengths = [each for sets in self._crossed for _, each in sets.values()]
        for numbers in (self.positions, *lengths):
            numbers[row] = numbers[last]
            numbers.pop()
        self.prompts[row] = self.prompts[last]
        self.prompts.pop()
        if not last:
            self._clear()

    @torch.no_grad()
    def step(self, ids: Sequence[int]) -> Tensor:
        """Read one more token of each sequence; logits [R, V] of the tokens after them."""
        device = self.llm.device
        rows_R = torch.arange(len(self), device=device)
        query_R, ids_R = (torch.tensor(list(x), device=device) for x in (self.positions, ids))
        dtype = query_dtype(self.llm, device)
        places = [places_of(layout.lengths, device) for layout in self._layouts]
        masks = [
            layout.next(rows_R, places_R, query_R, dtype)
            for layout, places_R in zip(self._layouts, places, strict=True)
        ]
        with without_cudnn():
            out = self.llm.lm(
                input_ids=ids_R[:, None],
                position_ids=query_R[:, None],
                attention_mask=torch.zeros(1, 1, 1, 1, dtype=dtype, device=device),  # then transformers makes none
                use_cache=False,
                logits_to_keep=1,
                attention_metadata=RunningRows(self, rows_R, places, masks),
            )
        for layout in self._layouts:
            layout.lengths = [length + 1 for length in layout.lengths]
        self.positions = [position + 1 for position in self.positions]
        logits_RV: Tensor = out.logits[:, -1]
        return logits_RV

    def shared(self) -> list[tuple[PromptsRead, list[int]]]:
        """The prompts that are attended to where they are, each with its rows."""
        found: dict[int, tuple[PromptsRead, list[int]]] = {}
        for row, prompt in enumerate(self.prompts):
            if prompt is not None:
                found.setdefault(id(prompt), (prompt, []))[1].append(row)
        return list(found.values())

    def layout_of(self, layer: int) -> int:
        """Number of the layer's layout of keys."""
        return self._layout_of[layer]

    def keys_of(self, layer: int) -> SlotKeys:
        """The rows' own keys in a layer."""
        return self._keys[layer]

    def bias_of(self, layer: int, places: int) -> Tensor | None:
        """Bias on the scores of the rows' own keys, [R, H or 1, 1, K]; None without."""
        return self._biases[layer].view(len(self), places)

    def crossed(self, layer: int) -> dict[Block, tuple[SlotKeys, list[int]]]:
        """Cross-attention blocks before a layer, each with the rows' own keys and their numbers."""
        return self._crossed[layer]


class RunningRows(LaterRows):
    """Attention metadata of one step of a `RunningBatch`."""

    def __init__(self, batch: RunningBatch, rows_R: Tensor, places: list[Tensor], masks: list[Tensor]) -> None:
        self.batch = batch
        self.rows_R = rows_R
        self.places, self.masks = places, masks
        self.shared = [
            (prompt, torch.tensor(rows, device=rows_R.device), len(rows) == len(batch))
            for prompt, rows in batch.shared()
        ]

    def crosses(self, layer: int) -> bool:
        """Whether cross-attention blocks come before the layer."""
        return bool(self.batch.crossed(layer)) or any(prompt.cache.crossing(layer) for prompt, *_ in self.shared)

    def cross(self, layer: int, x_R1D: Tensor) -> Tensor:
        """The layer's input rows after the blocks before it; each row passes those that it has audio for."""
        for block, (keys, lengths) in self.batch.crossed(layer).items():
            longest = max(lengths)
            if longest:
                lengths_R = torch.tensor(lengths, device=x_R1D.device)
                seen_RA = torch.arange(longest, device=x_R1D.device) < lengths_R[:, None]
                x_R1D = block(x_R1D, *keys.view(len(lengths), longest), seen_RA[:, None, None])
        for prompt, rows_X, _ in self.shared:
            for block, seen_111A, k_1GAC, v_1GAC in prompt.cache.crossing(layer):
                x_1XD = x_R1D[rows_X, 0][None]
                seen = None if seen_111A is None else seen_111A.expand(-1, -1, len(rows_X), -1)
                x_R1D = x_R1D.index_copy(0, rows_X, block(x_1XD, k_1GAC, v_1GAC, seen)[0][:, None])
        return x_R1D

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Queries [R, H, 1, C], keys and values of the new rows [R, G, 1, C], which are stored -> [R, 1, H, C]."""
        batch, at = self.batch, self.batch.layout_of(layer)
        mask, keys = self.masks[at], batch.keys_of(layer)
        rows, places = len(query), mask.shape[-1]
        keys.reserve(rows, places, key[0], value[0])
        keys.write(self.rows_R, self.places[at], key, value)
        k_RGKC, v_RGKC = keys.view(rows, places)
        bias = batch.bias_of(layer, places)
        if bias is not None:
            mask = mask + bias
        out_RH1C, lse_RH1 = kernels.attend(query, k_RGKC, v_RGKC, False, mask, scale)
        for prompt, rows_X, whole in self.shared:
            store = prompt.cache.stores[layer]
            width, seen = prompt.cache.decode_mask.of_prompts(layer)
            if not width:  # without audio keys in this layer, and without text before the clip
                continue
            k_1GKC, v_1GKC = store.keys[:, :, :width], store.values[:, :, :width]
            q_XH1C = query if whole else query[rows_X]
            found = attend_together(q_XH1C, k_1GKC, v_1GKC, seen, scale)
            into = (out_RH1C, lse_RH1) if whole else (out_RH1C[rows_X], lse_RH1[rows_X])
            merge(*into, *found)
            if not whole:
                out_RH1C[rows_X], lse_RH1[rows_X] = into
        return out_RH1C.transpose(1, 2)
