"""The cache of text behind audio: what it holds, what a step sees of it, and what a step costs."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from pal.backbone.audio_mask import AudioMask
from pal.backbone.cache_storage import STEP
from pal.backbone.generate import padded_left
from pal.backbone.prefill import prepared, prompts_of, read_prompts
from pal.registry import build
from pal.types import AUDIO
from tests.identities.models import INTEGRATIONS, PLACEMENTS, E, conversation, features, shared

every_integration = pytest.mark.parametrize("name", INTEGRATIONS)
EQUAL = [conversation([5, 6, 7, AUDIO, 8, 9, 10], (i,)) for i in range(3)]
RAGGED = [EQUAL[0], conversation([5, AUDIO, 9], (1,)), conversation(PLACEMENTS["none"])]


class Operations(TorchDispatchMode):
    """Counts what is dispatched and is no view."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        view = any(x.alias_info and not x.alias_info.is_write for x in func._schema.arguments)
        if not view:
            self.counts[func.overloadpacket._qualified_op_name] += 1
            made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
            self.largest = max([self.largest, *(x.numel() for x in made)])
        return out

    @property
    def total(self):
        return self.counts.total()


def read(llm, integration, rows, lengths, side="left", **sizes):
    inputs = integration(features(*lengths), rows, llm, side)
    cache = prepared(llm, inputs, **sizes)
    read_prompts(llm, cache, inputs)
    last_B1 = prompts_of(inputs).positions_BT[:, -1:].repeat_interleave(sizes.get("beams", 1), dim=0)
    return cache, last_B1


def step(llm, cache, position_R1):
    with torch.no_grad():
        return llm.lm(
            input_ids=torch.full_like(position_R1, 4), position_ids=position_R1, past_key_values=cache, use_cache=True
        ).logits


def plain_step(llm, ragged):
    """Operations of transformers' own step with its own cache, among as much text."""
    ids_BT = torch.full((3, 7), 5)
    mask_BT = torch.ones(3, 8, dtype=torch.long)
    if ragged:
        mask_BT[1, :4] = 0
    cache = DynamicCache(config=llm.lm.config)
    with torch.no_grad():
        llm.lm(input_ids=ids_BT, attention_mask=mask_BT[:, :7], past_key_values=cache, use_cache=True)
        with Operations() as found:
            llm.lm(input_ids=ids_BT[:, :1], attention_mask=mask_BT, past_key_values=cache, use_cache=True)
    return found


@pytest.mark.covering(1)
@every_integration
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_a_step_takes_no_more_operations_than_the_plain_llms(family, name):
    """At most those of plain text, and none more for more layers; Flamingo's blocks have their own."""
    found = {}
    for layers in (3, 6) if family == "llama" else (3,):
        llm, integration = shared(family, name, layers)
        for kind, rows, lengths, sizes in (
            ("equal", EQUAL, (7, 7, 7), {}),
            ("ragged", RAGGED, (7, 5, 7), {}),
            ("fixed", RAGGED, (7, 5, 7), {"fixed": True}),
            ("beams", RAGGED, (7, 5, 7), {"beams": 3}),
        ):
            cache, last_B1 = read(llm, integration, rows, lengths, **sizes)
            step(llm, cache, last_B1 + 1)
            with Operations() as operations:
                step(llm, cache, last_B1 + 2)
            found[kind, layers] = operations.total
            assert not operations.counts["aten::_local_scalar_dense"]
        plain = {ragged: plain_step(llm, ragged).total for ragged in (False, True)}
        if name != "flamingo":
            # windows over positions that audio has moved on make a mask where text alone has none
            extra = 4 * len(set(llm.windows) - {None})
            assert found["equal", layers] <= plain[False] + extra
            assert found["ragged", layers] <= plain[True] + extra
            assert found["fixed", layers] <= plain[True] + extra
    if family == "llama" and name != "flamingo":
        per_layer = {kind: (found[kind, 6] - found[kind, 3]) / 3 for kind in ("equal", "ragged", "fixed", "beams")}
        plain_layer = (plain[True] - plain_step(shared(family, name, 3)[0], True).total) / 3
        assert max(per_layer["equal"], per_layer["ragged"], per_layer["fixed"]) <= plain_layer
        assert per_layer["beams"] <= plain_layer + 8


def test_a_fixed_storage_is_not_reused_with_another_gate():
    """A bias on scores adds columns to the keys that are stored."""
    plans = []
    for gate in ({}, {"gate": -1.0}, {"gate": -1.0, "gate_by": "head"}):
        llm, _ = shared("llama", "lal")
        integration = build("integration", {"name": "lal", "positions": "shared"} | gate, in_width=E, llm=llm)
        plans.append(read(llm, integration, EQUAL, (7, 7, 7), fixed=True)[0].plan)
    assert len(set(plans)) == 3
    assert [max(plan.biases) for plan in plans] == [0, 1, llm.lm.config.num_attention_heads]


@pytest.mark.parametrize("name", ["lal", "pal", "flamingo"])
def test_audio_is_not_copied_for_beams_or_steps(name):
    llm, integration = shared("llama", name)
    cache, last_B1 = read(llm, integration, EQUAL, (70, 70, 70), beams=4, room=4)
    for layer in cache.stores:
        assert layer.keys.shape[0] == 3  # prompts, not beams
    with Operations() as operations:
        for count in range(3):
            step(llm, cache, last_B1 + 1 + count)
    # nothing that is made in a step is as large as a prompt's keys
    assert operations.largest < 3 * 2 * 70 * 8


@torch.no_grad()
def test_storage_grows_seldom_and_keeps_what_it_holds():
    llm, integration = shared("llama", "lal")
    cache, last_B1 = read(llm, integration, EQUAL, (7, 7, 7), room=2)
    sizes = []
    for count in range(12):
        before = cache.stores[0].keys[:, :, : 7 + 6 + count].clone()
        step(llm, cache, last_B1 + 1 + count)
        assert torch.equal(cache.stores[0].keys[:, :, : 7 + 6 + count], before)
        sizes.append(cache.stores[0].keys.shape[2] - 13)
        assert cache.get_seq_length() == 6 + count + 1
    assert sizes == [2, 2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16]


@every_integration
@torch.no_grad()
def test_packed_prompts_are_stored_as_padded_ones(name):
    llm, integration = shared("qwen3", name)
    rows = [*RAGGED, conversation(PLACEMENTS["turns"], (2, 0)), conversation(PLACEMENTS["end"], (1,))]
    for fixed in (False, True):
        (one, _), (other, last) = (
            read(llm, integration, rows, (7, 5, 9), side, room=4, fixed=fixed) for side in ("left", "none")
        )
        assert one.plan == other.plan
        # what nobody sees may be anything
        for layer, (a, b) in enumerate(zip(one.stores, other.stores, strict=True)):
            seen_BK = one.decode_mask._seen[one.plan.layers[layer]].seen_BK[:, : a.prompt]
            assert torch.equal(seen_BK, other.decode_mask._seen[one.plan.layers[layer]].seen_BK[:, : a.prompt])
            for x, y in ((a.keys, b.keys), (a.values, b.values)):
                for i in range(len(rows)):
                    got, wanted = (z[i, :, : a.prompt][:, seen_BK[i]] for z in (x, y))
                    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step(llm, one, last + 1), step(llm, other, last + 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("name", ["lal", "pal", "lal_first"])
@torch.no_grad()
def test_masks_are_what_positions_say(family, name):
    """Each generated row sees real keys within the window, its own beam's rows, and no row that asks again."""
    llm, integration = shared(family, name)
    rows = [conversation(PLACEMENTS["turns"]), conversation(PLACEMENTS["end"], (1,)), conversation([5, AUDIO, 9], (1,))]
    inputs = integration(features(7, 5), rows, llm, "left")
    for sizes in ({}, {"beams": 2}, {"fixed": True}, {"fixed": True, "beams": 2}):
        cache, last_B1 = read(llm, integration, rows, (7, 5), room=8, **sizes)
        for count in range(1, 6):
            masks = cache.step(last_B1 + count).masks
            for layer in range(llm.n_layers):
                for r, position in enumerate((last_B1 + count)[:, 0].tolist()):
                    b, beam = divmod(r, cache.plan.beams)
                    expected = seen_by_hand(llm, inputs, cache, layer, b, beam, position, count)
                    mask = masks[layer]
                    if mask is not None:
                        found = (mask[b, 0, beam if mask.shape[2] > 1 else 0] == 0).tolist()
                    else:
                        found = [True] * (cache.stores[layer].prompt + count * cache.plan.beams)
                    assert found == expected[: len(found)] and not any(expected[len(found) :])
            for store in cache.stores:
                store.steps += 1


def seen_by_hand(llm, inputs, cache, layer, b, beam, position, count):
    """Which of a storage's keys the row of a beam sees that is generated as number `count`, at a position."""
    context, store, beams = inputs.audio_context, cache.stores[layer], cache.plan.beams
    window = llm.windows[layer] or 10**6
    expected = [False] * (store.prompt + cache.plan.slots)
    first = 0
    for keys in (context.keys[i] for i in context.joined(layer)):
        for a, at in enumerate(keys.positions_BA[b].tolist()):
            expected[first + a] = bool(keys.mask_BA[b, a]) and position - at < window
        first += keys.mask_BA.shape[1]
    first = store.prompt - inputs.position_ids_BT.shape[1]
    for t, at in enumerate(inputs.position_ids_BT[b].tolist()):
        repeats = context.repeats_BT is not None and bool(context.repeats_BT[b, t])
        expected[first + t] = bool(inputs.attention_mask_BT[b, t]) and not repeats and position - at < window
    for n in range(1, count + 1):
        expected[store.prompt + (n - 1) * beams + beam] = count - n < window
    return expected


@torch.no_grad()
def test_no_mask_where_everything_is_seen_and_one_where_a_part_is_hidden():
    llm, integration = shared("llama", "pal")
    cache, last_B1 = read(llm, integration, EQUAL, (7, 7, 7))
    assert cache.step(last_B1 + 1).masks == (None, None, None)
    inputs = integration(features(7, 7, 7), EQUAL, llm, "left")
    hidden = prepared(
        llm, type(inputs)(**{**vars(inputs), "audio_context": inputs.audio_context.without(AudioMask(pathway="rows"))})
    )
    read_prompts(llm, hidden, inputs)
    assert all(mask is not None for mask in hidden.step(last_B1 + 1).masks)


def test_windows_make_a_mask_only_once_they_are_passed():
    llm, integration = shared("mistral", "lal")  # a window of 7
    rows = [conversation([5, AUDIO, 6])]
    cache, last_B1 = read(llm, integration, rows, (2,))
    assert int(last_B1) == 3
    masks = []
    for count in range(1, 6):
        masks.append(cache.step(last_B1 + count).masks[0])
        for layer in cache.stores:
            layer.steps += 1
    assert [mask is None for mask in masks] == [True, True, True, False, False]


def test_fixed_storage_has_the_same_size_for_prompts_of_like_length():
    llm, integration = shared("llama", "pal")
    plans = [
        read(llm, integration, rows, lengths, fixed=True)[0].plan
        for rows, lengths in ((EQUAL, (7, 7, 7)), (RAGGED, (30, 2, 9)))
    ]
    assert plans[0] == plans[1]
    assert {width % STEP for _, width in plans[0].kinds} == {0}
    assert read(llm, integration, EQUAL, (70, 7, 7), fixed=True)[0].plan != plans[0]


def test_padding_on_the_right_gets_no_such_cache():
    """A forward that asks for a cache gets transformers' own, which takes rows as they come."""
    llm, integration = shared("llama", "lal")
    rows = [conversation(PLACEMENTS["middle"]), conversation([5, AUDIO, 9], (1,))]
    with torch.no_grad():
        right = integration(features(7, 5), rows, llm, "right")
        assert type(llm(right, use_cache=True).past_key_values) is DynamicCache
        left = padded_left(right)
        assert type(llm(left, use_cache=True).past_key_values).__name__ == "JointCache"
