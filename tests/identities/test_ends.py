"""Conversations that end in a clip, and answers right behind one: the LLM has heard it before it says a word.

Generation, scoring and training go on behind the positions that the clip reserves, and agree with one another and with
the reference in plain matmuls.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.backbone.audio_mask import AudioMask
from pal.errors import PromptError
from pal.integrations.routed import Stream, build_integration
from pal.types import AUDIO, IGNORE, Tokens
from tests.identities.models import (
    FAMILIES,
    INTEGRATIONS,
    PLACEMENTS,
    E,
    conversation,
    expected_next,
    expected_score,
    features,
    make_backbone,
    make_integration,
    opened,
    shared,
    text_rows,
)

N = 7
"""Ids that are said, as many as the windows have."""
ENDS = {
    "one": [5, 6, 7, AUDIO],
    "two in a row": [5, 6, AUDIO, AUDIO],
    "one earlier": [5, AUDIO, 6, 7, AUDIO],
    "a short text": [9, AUDIO],
}
ROUTED = {
    "rows then keys": {"name": "pal_routed"},
    "keys then rows": {"name": "pal_routed", "routes": {"whisper": "lal"}, "default": "plits"},
    "summaries then blocks": {
        "name": "pal_routed",
        "routes": {"whisper": INTEGRATIONS["pal"]},
        "default": INTEGRATIONS["flamingo"],
    },
    "two of keys": "lal",
    "blocks then queries": {
        "name": "pal_routed",
        "routes": {"whisper": INTEGRATIONS["flamingo"]},
        "default": "lal_audio_query",
    },
}
ROWLESS = [name for name in INTEGRATIONS if name not in ("plits", "pal", "pal_slow")]
"""Those in which the last text row is repeated behind clips at the end; of PAL's, those with shared positions."""
KEYS_ONLY = [name for name in ROWLESS if not name.startswith("pal")]

every_family = pytest.mark.parametrize("family", FAMILIES)
some_families = pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
every_integration = pytest.mark.parametrize("name", INTEGRATIONS)
rowless = pytest.mark.parametrize("name", ROWLESS)
both_sides = pytest.mark.parametrize("side", ["left", "right"])


@cache
def ensemble(family, name):
    llm = make_backbone(family)
    torch.manual_seed(3)
    return llm, opened(build_integration(ROUTED[name], [Stream(E, ("whisper",)), Stream(E, ("clap",))], llm))


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def answered(row, said):
    """The conversation with its answer, which is trained."""
    return Tokens(row.ids + said, row.clips, [IGNORE] * len(row.ids) + said)


def generated(llm, inputs, **options):
    options = {"max_new_tokens": N, "do_sample": False, "eos_token_id": None, **options}
    return llm.generate(inputs, output_logits=True, return_dict_in_generate=True, **options)


def check(llm, integration, audio, rows, side):
    """What is generated of a batch has the reference's logits, and the likelihood that scoring and training give it."""
    made = generated(llm, integration(audio, rows, llm, side))
    logits_BNV = torch.stack(made.logits, 1)
    wholes = []
    for b, row in enumerate(rows):
        said = made.sequences[b].tolist()
        wholes.append(answered(row, said))
        expected = expected_next(llm, integration, Tokens(row.ids + said, row.clips), audio, len(row.ids))
        close(logits_BNV[b].double(), expected[:-1])
    scores_B = logits_BNV.log_softmax(-1).gather(2, made.sequences[..., None]).sum((1, 2))
    inputs = integration(audio, wholes, llm, side)
    close(llm.label_scores(inputs), scores_B, 1e-3)
    total, items = llm.loss(inputs)
    assert items == N * len(rows)
    close(total, -scores_B.sum(), 1e-3)
    close(llm.label_scores(integration(audio, wholes[:1], llm))[0], scores_B[0], 1e-3)


@pytest.mark.covering(1)
@every_integration
@every_family
@torch.no_grad()
def test_generation_scoring_and_training_agree(family, name):
    llm, integration = shared(family, name)
    places = ["two in a row", "one earlier"]
    rows = [conversation(ENDS[place], (1, 0)) for place in places] + [conversation(PLACEMENTS["middle"])]
    # each integration and family with either side of the other
    side = ["left", "right"][([*FAMILIES].index(family) + [*INTEGRATIONS].index(name)) % 2]
    check(llm, integration, features(7, 11), rows, side)


@pytest.mark.parametrize("name", ROUTED)
@some_families
@torch.no_grad()
def test_generation_scoring_and_training_agree_with_several_streams(family, name):
    llm, integration = ensemble(family, name)
    audio = [features(5, 3, seed=4), features(11, 7, seed=5)]
    check(llm, integration, audio, [conversation(ENDS["one earlier"]), conversation(ENDS["one"], (1,))], "left")


@pytest.mark.covering(1)
@pytest.mark.parametrize("place", ENDS)
@every_integration
@torch.no_grad()
def test_the_first_word_depends_on_the_last_clip(name, place):
    llm, integration = shared("llama", name)
    first = [
        generated(
            llm, integration(features(7, 7, seed=seed), [conversation(ENDS[place])], llm), max_new_tokens=1
        ).logits[0]
        for seed in (2, 3)
    ]
    assert (first[0] - first[1]).abs().max() > 1e-2


@pytest.mark.covering(1)
@pytest.mark.parametrize("tokens", [1, 4, 6, 7])
@pytest.mark.parametrize("name", [*INTEGRATIONS])
@torch.no_grad()
def test_positions_go_on_behind_the_clip(name, tokens):
    llm, integration = shared("llama", name)
    without = ("flamingo", "lal_gated", "query_gated", "pal_gated", "pal_together")
    groups = -(-tokens // 3)
    spans = {
        "pal": groups * 4,
        "pal_slow": -(-groups * 4 // 3),
        "lal_some": -(-tokens // 3),
        **dict.fromkeys(without, 0),
    }
    span = spans.get(name, tokens)
    seen = []
    hook = llm.lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    generated(llm, integration(features(tokens), [conversation(ENDS["one"])], llm), max_new_tokens=3)
    hook.remove()
    # PLITS' last audio row, the last summary, or the row that asks
    assert seen[0][:3] == [0, 1, 2] and seen[0][-1] == 2 + span
    assert seen[1:] == [[3 + span], [4 + span]]


@pytest.mark.covering(1)
@rowless
@some_families
@torch.no_grad()
def test_a_row_that_asks_is_seen_by_no_other(family, name):
    llm, integration = shared(family, name)
    audio, ids = features(7, 11), PLACEMENTS["turns"]
    plain = conversation(ids)
    asking = Tokens(ids, [0, 1], [token if token > 0 else IGNORE for token in ids])
    for side in ("left", "right"):
        without, inputs = (integration(audio, [row, conversation(ids[:3])], llm, side) for row in (plain, asking))
        assert inputs.audio_context.repeats_BT[0].sum() == 2 and without.audio_context.repeats_BT is None
        rows = [text_rows(llm, integration, plain, x, llm(x).logits, 0) for x in (without, inputs)]
        close(rows[1], rows[0])
        assert inputs.position_ids_BT[0][~inputs.audio_context.audio_rows_BT[0]].unique().tolist() == sorted(
            without.position_ids_BT[0][~without.audio_context.audio_rows_BT[0]].unique().tolist()
        )


@every_family
@torch.no_grad()
def test_with_one_layer_an_answer_behind_a_clip_is_plits(family):
    llm = make_backbone(family, 1)
    plits, lal = make_integration("plits", llm), make_integration("lal", llm)
    lal.projectors["0"].load_state_dict(plits.projector.state_dict())
    row, audio = answered(conversation(ENDS["two in a row"]), [9, 10, 11]), features(4, 6)
    inputs = [integration(audio, [row], llm) for integration in (plits, lal)]
    # the answer's rows; what stands for its first word is a row of audio there and of text here
    close(llm(inputs[0]).logits[0, -3:], llm(inputs[1]).logits[0, -3:])


@every_family
@torch.no_grad()
def test_untrained_flamingo_goes_on_as_the_text_llm(family):
    llm = make_backbone(family)
    integration = make_integration("flamingo", llm)
    for parameter_name, parameter in integration.named_parameters():
        if "gate" in parameter_name:
            parameter.zero_()
    row = conversation(ENDS["one earlier"])
    text = Tokens([token for token in row.ids if token != AUDIO], [])
    ours = generated(llm, integration(features(7, 11), [row], llm))
    theirs = generated(llm, integration(None, [text], llm))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    close(torch.stack(ours.logits), torch.stack(theirs.logits))


@pytest.mark.covering(1)
@every_integration
@pytest.mark.parametrize(("family", "side"), [("llama", "left"), ("mistral", "right"), ("gemma3", "left")])
@torch.no_grad()
def test_beams_of_a_batch_equal_those_of_its_items_and_their_scores(family, name, side):
    llm, integration = shared(family, name)
    audio = features(7, 11)
    rows = [conversation(ENDS["one"]), conversation([5, AUDIO, 9], (1,)), conversation(ENDS["two in a row"])]
    options = {"num_beams": 3, "max_new_tokens": 4, "output_scores": True, "length_penalty": 0.0}
    made = generated(llm, integration(audio, rows, llm, side), **options)
    singly = [generated(llm, integration(audio, [row], llm, side), **options) for row in rows]
    assert made.sequences.tolist() == [one.sequences[0].tolist() for one in singly]
    wholes = [answered(row, said) for row, said in zip(rows, made.sequences.tolist(), strict=True)]
    close(llm.label_scores(integration(audio, wholes, llm)), made.sequences_scores, 1e-3)


@every_integration
@torch.no_grad()
def test_indexed_clips_at_the_end(name):
    llm, integration = shared("gemma3", name)
    audio = features(7, 11)
    rows = [conversation(ids) for ids in ENDS.values()]
    stored = integration.index(audio, llm, "d")
    ours, theirs = (generated(llm, integration(given, rows, llm)) for given in ([stored[0], stored[1]], audio))
    close(torch.stack(ours.logits), torch.stack(theirs.logits), 1e-5)


@pytest.mark.covering(1)
@rowless
@some_families
@torch.no_grad()
def test_apart_and_under_one_mask_it_is_the_same(family, name, monkeypatch):
    llm, integration = shared(family, name)
    rows = [answered(conversation(ids), [9, 8]) for ids in ENDS.values()]
    inputs = integration(features(7, 11), rows, llm)
    apart = llm.label_scores(inputs)
    monkeypatch.setattr(llm, "dropout", 0.5)
    close(llm.label_scores(inputs), apart)


@rowless
@torch.no_grad()
def test_with_all_hidden_the_clip_makes_no_difference(name):
    llm, integration = shared("mistral", name)
    logits = []
    for seed in (2, 3):
        inputs = integration(features(7, 11, seed=seed), [conversation(ENDS["two in a row"])], llm, with_spans=True)
        made = generated(llm, replace(inputs, audio_context=inputs.audio_context.without(AudioMask())))
        logits.append(torch.stack(made.logits))
    assert torch.equal(*logits)


@every_integration
@torch.no_grad()
def test_prompts_that_end_in_text_have_no_such_row(name):
    llm, integration = shared("llama", name)
    rows = [conversation(ids) for place, ids in PLACEMENTS.items() if place != "end"]
    rows.append(answered(conversation(PLACEMENTS["middle"]), [9, 10]))
    audio = integration(features(7, 11), rows, llm).audio_context
    assert audio is None or (audio.repeats_BT is None and audio.hidden_rows == ())


@torch.no_grad()
def test_a_prompt_that_is_only_a_clip():
    row = [Tokens([AUDIO, AUDIO], [0, 1])]
    for name in INTEGRATIONS:
        llm, integration = shared("llama", name)
        if name in KEYS_ONLY:
            with pytest.raises(PromptError, match="some text to ask about its clips"):
                integration(features(7, 11), row, llm)
        else:
            check(llm, integration, features(7, 11), row, "left")
    # its rows say something, and are asked again behind the keys
    llm, integration = ensemble("llama", "rows then keys")
    made = [
        generated(llm, integration([features(5, 3, seed=4), features(11, 7, seed=seed)], row, llm)) for seed in (5, 6)
    ]
    assert (made[0].logits[0] - made[1].logits[0]).abs().max() > 1e-2


@both_sides
@torch.no_grad()
def test_the_first_token_of_a_row_does_not_count(side):
    llm, integration = shared("llama", "lal")
    audio = features(7)
    rows = [[5, 6, 7, AUDIO, 8, 9], [5, 6, 7]]
    labelled = [Tokens(ids, [0] * ids.count(AUDIO), [max(token, IGNORE) for token in ids]) for ids in rows]
    later = [replace(row, labels=[IGNORE, *row.labels[1:]]) for row in labelled]
    # without the targets that integrations lay out, as other callers give labels
    ours, theirs = (replace(integration(audio, batch, llm, side), targets=None) for batch in (labelled, later))
    assert llm.loss(ours)[1] == llm.loss(theirs)[1] == 6
    close(llm.loss(ours)[0], llm.loss(theirs)[0], 1e-6)
    close(llm.label_scores(ours), llm.label_scores(theirs), 1e-6)


@rowless
@some_families
def test_what_is_heard_is_trained(family, name):
    """The first word's loss alone reaches every weight that makes keys."""
    llm = make_backbone(family)
    integration = make_integration(name, llm)
    gradients = []
    for on in (False, True):
        llm.train().checkpoint_gradients(on)
        integration.zero_grad()
        llm.loss(integration(features(7), [answered(conversation(ENDS["one"]), [9])], llm))[0].backward()
        gradients.append([parameter.grad.clone() for parameter in integration.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        close(recomputed, plain, 1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(["llama", "mistral", "gemma3"]),
    st.sampled_from([*INTEGRATIONS]),
    st.sampled_from(["left", "right"]),
    st.lists(st.lists(st.sampled_from([5, 6, 7, 8, 9, AUDIO]), min_size=1, max_size=8), min_size=1, max_size=3),
    st.integers(0, 2**24 - 1),
)
@torch.no_grad()
def test_any_labels_anywhere_count_what_the_reference_says(family, name, side, talks, bits):
    """Each labelled id by what the row before it says; it has heard every clip before that id."""
    llm, integration = shared(family, name)
    audio = features(4, 3)
    rows = []
    for b, ids in enumerate(talks):
        trained = [bool(bits >> (8 * b + i) & 1) and token != AUDIO for i, token in enumerate(ids)]
        labels = [token if train else IGNORE for token, train in zip(ids, trained, strict=True)]
        rows.append(Tokens(ids, [i % 2 for i in range(ids.count(AUDIO))], labels))
    if any(set(row.ids) == {AUDIO} for row in rows) and name in KEYS_ONLY:
        with pytest.raises(PromptError, match="some text"):
            integration(audio, rows, llm, side)
        return
    ours = llm.label_scores(integration(audio, rows, llm, side))
    close(ours.double(), torch.stack([expected_score(llm, integration, row, audio) for row in rows]))
