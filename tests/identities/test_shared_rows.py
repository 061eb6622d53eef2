"""Training on questions that share a clip's rows and keys: losses and gradients of whole conversations."""

from dataclasses import replace

import pytest
import torch

from pal.backbone.packed import PackedContext
from pal.backbone.segments import numbers_of, sizes_of
from pal.types import AUDIO, IGNORE, Tokens
from tests.identities.models import CROSSED, INTEGRATIONS, features, make_backbone, make_integration, shared
from tests.identities.test_packed import GATE, SAME, loss_and_gradients

WIDE = {"mistral": {"sliding_window": 64}, "gemma3": {"sliding_window": 64}}


def asked(prefix, clips, *texts):
    """Conversations with a common prefix; the last two ids of each are the answer."""
    rows = []
    for text in texts:
        ids = [*prefix, *text]
        labels = [token if at >= len(ids) - 2 else IGNORE for at, token in enumerate(ids)]
        rows.append(Tokens(ids, list(clips), labels))
    return rows


def batch():
    """Groups of three, of one and of two questions, and one without a clip."""
    return features(7, 11, 5), [
        *asked([5, AUDIO, 6, AUDIO], (0, 1), [7, 8, 9], [9, 9, 12, 13, 14], [3, 10, 11, 12]),
        *asked([5, AUDIO], (2,), [6, 7, 8]),
        *asked([5, 6, 7], (), [8, 9, 10]),
        *asked([AUDIO, 30], (1,), [31, 32], [33, 34, 35]),
    ]


def unshared(llm, integration, audio, rows):
    llm.shares_prefixes = False
    try:
        return loss_and_gradients(llm, integration, audio, rows, "right")
    finally:
        llm.shares_prefixes = True


@pytest.mark.covering(1)
@pytest.mark.parametrize(("family", "name"), CROSSED)
@pytest.mark.parametrize("side", ["any", "none"])
def test_losses_and_gradients(family, name, side):
    llm = make_backbone(family, **WIDE.get(family, {}))
    integration = make_integration(name, llm)
    audio, rows = batch()
    _, expected, wanted = unshared(llm, integration, audio, rows)
    inputs, total, found = loss_and_gradients(llm, integration, audio, rows, side)
    context = inputs.audio_context
    assert isinstance(context, PackedContext) and (context.tiles is not None) == (side == "any")
    # each group's prefix and keys once: 3 + 5 + 4 own rows after the first two clips, and so on
    own = sizes_of(context.conversations, range(len(context.conversations[0].keys)))
    assert inputs.inputs_embeds_BTD.shape[:2] == (1, own[0])
    assert context.conversations[1].shared == context.conversations[2].shared > 0
    assert own[0] == sum(len(one.positions_T) for one in context.conversations) - sum(
        one.shared for one in context.conversations
    )
    assert [one.base for one in context.conversations] == [-1, 0, 0, -1, -1, -1, 5]
    torch.testing.assert_close(total, expected, **SAME)
    assert found.keys() == wanted.keys()
    for key, grad in found.items():
        same = GATE if "gate" in key else SAME
        torch.testing.assert_close(grad, wanted[key], **same, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_recomputed_layers_share_too(name):
    llm = make_backbone("llama")
    integration = make_integration(name, llm)
    audio, rows = batch()
    _, expected, wanted = unshared(llm, integration, audio, rows)
    llm.train()
    llm.checkpoint_gradients(True)
    _, total, found = loss_and_gradients(llm, integration, audio, rows, "any")
    torch.testing.assert_close(total, expected, **SAME)
    for key, grad in found.items():
        torch.testing.assert_close(grad, wanted[key], **(GATE if "gate" in key else SAME))


def test_compiled_layers_run_tiles_eagerly():
    """Each batch has tiles of its own."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    llm = make_backbone("llama")
    integration = make_integration("lal", llm)
    audio, rows = batch()
    _, expected, _ = loss_and_gradients(llm, integration, audio, rows, "any")
    llm.compile(backend="eager")
    _, total, _ = loss_and_gradients(llm, integration, audio, rows, "any")
    torch.testing.assert_close(total, expected, **SAME)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["plits", "lal", "pal", "flamingo"])
@pytest.mark.parametrize("side", ["any", "none"])
@torch.no_grad()
def test_scores_of_each_conversation(name, side):
    llm, integration = shared("qwen3", name)
    audio, rows = batch()
    alone = torch.cat([llm.label_scores(integration(audio, [row], llm, "right")) for row in rows])
    torch.testing.assert_close(llm.label_scores(integration(audio, rows, llm, side)), alone, **SAME)


def test_an_answer_right_after_the_clip_is_predicted_by_the_clips_last_row():
    """PLITS' last audio row; integrations that repeat the last text row there share nothing."""
    audio = features(7)
    rows = [Tokens([5, AUDIO, answer], [0], [IGNORE, IGNORE, answer]) for answer in (7, 8)]
    llm, plits = shared("llama", "plits")
    inputs = plits(audio, rows, llm, "any")
    assert inputs.audio_context.lengths == (9, 1)
    expected = torch.cat([llm.label_scores(plits(audio, [row], llm)) for row in rows])
    torch.testing.assert_close(llm.label_scores(inputs), expected, **SAME)
    _, lal = shared("llama", "lal")
    inputs = lal(audio, rows, llm, "any")
    assert not isinstance(inputs.audio_context, PackedContext)
    expected = torch.cat([llm.label_scores(lal(audio, [row], llm)) for row in rows])
    torch.testing.assert_close(llm.label_scores(inputs), expected, **SAME)
    packed = lal(audio, rows, llm, "none")
    assert not any(one.shared for one in packed.audio_context.conversations)
    torch.testing.assert_close(llm.label_scores(packed), expected, **SAME)


@pytest.mark.parametrize("side", ["any", "none"])
@torch.no_grad()
def test_the_same_words_about_another_clip_are_not_shared(side):
    llm, lal = shared("llama", "lal")
    rows = [*asked([5, AUDIO], (0,), [6, 7, 8], [4, 9, 9]), *asked([5, AUDIO], (1,), [6, 7, 8], [4, 9, 9])]
    audio = features(7, 11)
    inputs = lal(audio, rows, llm, side)
    assert [one.base for one in inputs.audio_context.conversations] == [-1, 0, -1, 2]
    alone = torch.cat([llm.label_scores(lal(audio, [row], llm, "right")) for row in rows])
    torch.testing.assert_close(llm.label_scores(inputs), alone, **SAME)


def test_what_does_not_share():
    llm, lal = shared("llama", "lal")
    audio, rows = batch()
    one = [rows[0], rows[3], rows[5]]
    assert not isinstance(lal(audio, one, llm, "any").audio_context, PackedContext)  # no two begin alike
    apart = [rows[0], rows[3], rows[1]]
    assert not isinstance(lal(audio, apart, llm, "any").audio_context, PackedContext)  # not neighbours
    prompts = [replace(row, labels=None) for row in rows]
    assert not isinstance(lal(audio, prompts, llm, "any").audio_context, PackedContext)  # nothing to train
    assert not any(one.shared for one in lal(audio, prompts, llm, "none").audio_context.conversations)
    assert not isinstance(lal(audio, rows, llm, "any", with_spans=True).audio_context, PackedContext)
    llm, lal = shared("mistral", "lal")  # a short window
    assert not isinstance(lal(audio, rows, llm, "any").audio_context, PackedContext)
    llm = make_backbone("llama", attention_dropout=0.1).train()
    assert not isinstance(make_integration("lal", llm)(audio, rows, llm, "any").audio_context, PackedContext)


def test_numbers_of_shared_rows_and_keys_are_those_of_the_first():
    llm, lal = shared("llama", "lal")
    audio, rows = batch()
    conversations = lal(audio, rows[:4], llm, "none").audio_context.conversations
    assert sizes_of(conversations, [0]) == (5 + 5 + 4 + 4, [18 + 5])
    (first, (keys,)), (second, same), _, (last, (others,)) = numbers_of(conversations, [0])
    assert first.tolist() == [0, 1, 2, 3, 4] and second.tolist() == [0, 1, 5, 6, 7, 8, 9]
    assert keys.tolist() == list(range(18)) == same[0].tolist() and others.tolist() == list(range(18, 23))
    assert last.tolist() == [14, 15, 16, 17]
