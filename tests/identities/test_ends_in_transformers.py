"""Prompts that end in a clip, and answers right behind one, through transformers' interface and the model's own."""

from functools import cache

import pytest
import torch

from pal.hf.inputs import stack_prompts
from pal.hf.model import PalForConditionalGeneration
from pal.types import AUDIO, IGNORE, Batch, Tokens
from tests.identities.models import opened
from tests.models import noise, tiny_model, tone

N = 5
CLIPS = [tone(0.4, 300.0), noise(0.7, 3), tone(0.5, 900.0)]
ROWS = [Tokens([20, 30, AUDIO], [0]), Tokens([20, 30, 40, 50, AUDIO, AUDIO], [1, 2])]
KINDS = {
    "plits": "plits",
    "lal": "lal",
    "pal": "pal",
    "lal_audio_query": "lal_audio_query",
    "flamingo": {"name": "flamingo", "every": 2},
}

every_kind = pytest.mark.parametrize("kind", KINDS)
both_sides = pytest.mark.parametrize("side", ["left", "right"])


@cache
def model_of(kind):
    model = tiny_model(KINDS[kind])
    opened(model.integration)
    return model, PalForConditionalGeneration.wrap(model)


def tensors(rows, side):
    ids_BT, mask_BT = stack_prompts(rows, 0, side)
    clips = [CLIPS[clip] for row in rows for clip in row.clips]
    values_UN = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    lengths_U = torch.tensor([len(clip) for clip in clips])
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "input_values": values_UN, "audio_lengths": lengths_U}


def generated(wrapped, rows, **options):
    options = {"max_new_tokens": N, "do_sample": False, "eos_token_id": None, **options}
    return wrapped.generate(**tensors(rows, "left"), output_logits=True, return_dict_in_generate=True, **options)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def wholes(made):
    said = made.sequences[:, -N:].tolist()
    return [Tokens(row.ids + new, row.clips) for row, new in zip(ROWS, said, strict=True)]


def labelled(rows):
    """The answers of N ids are trained."""
    return [Tokens(row.ids, row.clips, [IGNORE] * (len(row.ids) - N) + row.ids[-N:]) for row in rows]


@both_sides
@every_kind
@torch.no_grad()
def test_forward_gives_what_generate_does_step_by_step(kind, side):
    _, wrapped = model_of(kind)
    made = generated(wrapped, ROWS)
    steps_BNV = torch.stack(made.logits, 1)
    given = tensors(ROWS, side)
    last = wrapped(**given).logits
    for b, row in enumerate(ROWS):
        column = -1 if side == "left" else len(row.ids) - 1
        close(last[b, column], steps_BNV[b, 0])
    whole = wholes(made)
    logits = wrapped(**tensors(whole, side)).logits
    for b, row in enumerate(whole):
        end = logits.shape[1] if side == "left" else len(row.ids)
        close(logits[b, end - N - 1 : end - 1], steps_BNV[b])
    if side == "left":
        close(wrapped(**given, logits_to_keep=1).logits[:, 0], steps_BNV[:, 0])
        close(wrapped(**given, logits_to_keep=torch.tensor([-1])).logits[:, 0], steps_BNV[:, 0])
        close(wrapped(**tensors(whole, side), logits_to_keep=N + 1).logits[:, :-1], steps_BNV)


@both_sides
@every_kind
@torch.no_grad()
def test_loss_is_that_of_generation_and_of_the_model_itself(kind, side):
    model, wrapped = model_of(kind)
    made = generated(wrapped, ROWS)
    whole = labelled(wholes(made))
    scores_B = torch.stack(made.logits, 1).log_softmax(-1).gather(2, made.sequences[:, -N:, None]).sum((1, 2))
    close(model.answer_scores(CLIPS, whole), scores_B)
    own = model(Batch(CLIPS, whole))
    assert own.items == 2 * N
    close(own.sum, -scores_B.sum())
    labels, mask_BT = stack_prompts([Tokens(row.labels, []) for row in whole], IGNORE, side)
    assert mask_BT.sum() == sum(len(row.ids) for row in whole)
    close(wrapped(**tensors(whole, side), labels=labels).loss, own.sum / own.items)
    # all ids trained, clips among them: what nothing predicts does not count
    everything = [Tokens(row.ids, row.clips, [i if i != AUDIO else IGNORE for i in row.ids]) for row in whole]
    given = tensors(whole, side)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, IGNORE)
    own = model(Batch(CLIPS, everything))
    close(wrapped(**given, labels=labels).loss, own.sum / own.items)


@every_kind
@torch.no_grad()
def test_lengths_count_and_streams_tell_it_whole(kind):
    model, wrapped = model_of(kind)
    row = ROWS[1:]
    made = generated(wrapped, row)
    width = len(row[0].ids)
    by_length = generated(wrapped, row, max_new_tokens=None, max_length=width + N)
    assert by_length.sequences.tolist() == made.sequences.tolist()
    assert made.sequences.shape == (1, width + N)
    clips, alone = CLIPS[1:], Tokens(row[0].ids, [0, 1])
    text = model.generate(clips, [alone], max_new_tokens=N)[0]
    assert "".join(model.stream(clips, alone, max_new_tokens=N)).strip() == text
    assert (
        text
        == model.tokenizer.decode(
            wrapped.generate(**tensors(row, "left"), max_new_tokens=N)[0, width:], skip_special_tokens=True
        ).strip()
    )


@every_kind
@torch.no_grad()
def test_beams_and_several_answers(kind):
    _, wrapped = model_of(kind)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 3, "eos_token_id": None}
    together = wrapped.generate(**tensors(ROWS, "left"), **options)[:, -3:]
    singly = [wrapped.generate(**tensors([row], "left"), **options)[:, -3:] for row in ROWS]
    assert together.tolist() == torch.cat(singly).tolist()
