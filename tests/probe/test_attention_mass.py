"""Attention summed up while a pass runs, against the weights themselves; and what is said of it."""

import json
from dataclasses import replace

import pytest
import soundfile
import torch

from pal.data.manifest import Record, Turn
from pal.data.prompts import encode, user_turn
from pal.errors import ConfigError, PalError
from pal.probe.attention_mass import probe_attention, words
from pal.probe.attention_stats import PATHWAYS, record_attention
from pal.probe.probe_result import read
from pal.types import IGNORE, TagSpan
from tests.models import noise, tiny_model, tone

INTEGRATIONS = ["plits", "lal", "pal", {"name": "flamingo", "every": 1}, "lal_audio_query"]
RATE = 16_000


class Everything:
    """Keeps the weights that a watch is shown, rows and keys of a context after one another."""

    def __init__(self, rows_BN):
        self.rows_BN, self.own, self.cross = rows_BN, {}, {}

    def attended(self, layer, weights):
        self.own[layer] = weights

    def crossed(self, layer, which, weights_BHNA):
        self.cross[layer] = weights_BHNA


def model_of(integration):
    model = tiny_model(integration)
    with torch.no_grad():
        for name, parameter in model.integration.named_parameters():
            if "gate" in name:
                parameter.fill_(0.8)
    return model


def labelled(model, question, answer, clips):
    talk = [user_turn(question, len(clips)), {"role": "assistant", "content": answer}]
    return encode(model.tokenizer, talk, clips, train=True)


@pytest.mark.parametrize("integration", INTEGRATIONS, ids=str)
def test_sums_are_those_of_the_weights(integration):
    model = model_of(integration)
    clips = [noise(0.9, 1), tone(0.5, 500.0)]
    rows = [
        labelled(model, "What sound is this?", "a loud siren", [0]),
        labelled(model, "Which comes first, the dog or the bell?", "yes", [1]),
    ]
    found = record_attention(model, clips, rows, bins=8)
    inputs = model.inputs(clips, rows, padding_side="left", with_spans=True)
    B, T = inputs.position_ids_BT.shape
    observer = Everything(torch.arange(T).expand(B, T))
    with torch.inference_mode():
        model.llm.hidden(replace(inputs, audio_context=replace(inputs.audio_context, observer=observer)))
    for b, (row, attention) in enumerate(zip(rows, found, strict=True)):
        N = len(attention.tokens)
        assert attention.tokens == row.ids[-N:] and row.ids[-N - 1] == -1
        assert [attention.tokens[n + 1] for n in attention.answer] == [i for i in row.labels if i != IGNORE]
        is_audio = inputs.audio_context.audio_rows_BT[b]
        for layer in range(3):
            own = observer.own[layer].rows_BHNK[b][:, -N:]
            keys = [w[b][:, -N:] for w in observer.own[layer].keys_BHNA.values()]
            expected = {
                "rows": own[..., is_audio].sum(-1),
                "text": own[..., ~is_audio].sum(-1),
                "keys": sum((w.sum(-1) for w in keys), torch.zeros(own.shape[:2])),
                "cross": observer.cross[layer][b][:, -N:].sum(-1) if observer.cross else torch.zeros(own.shape[:2]),
            }
            for p, pathway in enumerate(PATHWAYS):
                torch.testing.assert_close(attention.mass_LHNP[layer, ..., p], expected[pathway], atol=1e-6, rtol=0)
            heard = expected["cross"] if observer.cross else expected["rows"] + expected["keys"]
            # time and tokens share out the same mass
            torch.testing.assert_close(attention.time_LNX[layer].sum(-1), heard.mean(0), atol=1e-5, rtol=0)
            answered = heard.mean(0)[attention.answer].mean()
            torch.testing.assert_close(attention.token_LA[layer].sum(), answered, atol=1e-5, rtol=0)
        tokens = inputs.audio_context.audio_rows_BT[b].sum() + sum(
            k.mask_BA[b].sum() for k in inputs.audio_context.keys
        )
        assert len(attention.tokens_audio) == tokens == attention.token_LA.shape[1]


def test_time_is_that_of_the_tokens():
    model = tiny_model("lal")
    (attention,) = record_attention(model, [tone(1.0, 300.0)], [labelled(model, "What is this?", "yes", [0])], bins=5)
    by_hand = torch.zeros(3, 5)
    end = max(end for *_, end in attention.tokens_audio)
    for (_, _, start, stop), shares_L in zip(attention.tokens_audio, attention.token_LA.T, strict=True):
        for piece in range(5):
            low, high = max(start, piece * end / 5), min(stop, (piece + 1) * end / 5)
            by_hand[:, piece] += shares_L * max(0.0, high - low) / (stop - start)
    torch.testing.assert_close(attention.time_LNX[:, attention.answer].mean(1), by_hand, atol=1e-6, rtol=1e-4)


def test_what_does_not_depend_on_the_batch():
    model = tiny_model("pal")
    clips = [noise(0.9, 1), tone(0.4, 500.0)]
    rows = [labelled(model, "What sound is this?", "a loud siren", [0]), labelled(model, "first?", "no", [1])]
    together = record_attention(model, clips, rows)
    for one, clip, row in zip(together, clips, rows, strict=True):
        (alone,) = record_attention(model, [clip], [replace(row, clips=[0])])
        torch.testing.assert_close(one.mass_LHNP, alone.mass_LHNP, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(one.time_LNX, alone.time_LNX, atol=1e-4, rtol=1e-3)
        assert torch.equal(one.visible_LNP, alone.visible_LNP)


def test_even_attention_counts_what_is_seen():
    model = tiny_model("lal")
    (attention,) = record_attention(model, [tone(1.0, 300.0)], [labelled(model, "What is this?", "yes", [0])])
    keys, text = PATHWAYS.index("keys"), PATHWAYS.index("text")
    tokens = len(attention.tokens_audio)
    assert (attention.visible_LNP[..., keys] == tokens).all()
    seen = attention.visible_LNP[0, :, text]
    assert (seen.diff() == 1).all()  # each row sees one more than the one before it


def test_words_join_the_tokens_of_a_word():
    model = tiny_model("lal")
    (attention,) = record_attention(model, [tone(0.5, 300.0)], [labelled(model, "What is this?", "a loud siren", [0])])
    said = words(model, attention)
    assert [word for word, _ in said] == ["a", "loud", "siren"]
    rows = [row for _, of_word in said for row in of_word]
    assert rows == attention.answer[: len(rows)] and len(rows) < len(attention.answer)


@pytest.fixture
def records(tmp_path):
    found = []
    for i in range(4):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, noise(0.6 + 0.1 * i, i).numpy(), RATE)
        tags = (TagSpan("bell", 0.1, 0.4),)
        found.append(
            Record(f"r{i}", (str(path),), (Turn("What sound is this?", "bell"),), "what", "synth", ("bell",), tags)
        )
    return found


@pytest.mark.parametrize("integration", INTEGRATIONS, ids=str)
def test_a_result_of_every_integration(integration, records, tmp_path):
    examples = 2 if integration == "pal" else 1  # each is a picture with a panel for each word
    few = {"examples": examples, "batch": 3, "max_new_tokens": 4}
    result = probe_attention(model_of(integration), records, **few)
    result.save(tmp_path / "out")
    found = read(tmp_path / "out")
    layers = found["tables"]["attention of the answer's rows by layer"]
    shares = [pathway for pathway in found["details"]["pathways"] if pathway != "cross"]
    for row in layers:
        assert sum(row[pathway] for pathway in shares) == pytest.approx(1.0, abs=1e-4)
        assert all(row[f"{p} ci95"][0] <= row[p] + 1e-9 <= row[f"{p} ci95"][1] + 2e-9 for p in shares)
    assert len(found["details"]["examples"]) == examples
    assert set(found["clips"]) == {f"example-{number + 1}.wav" for number in range(examples)}
    for picture in found["pictures"]:
        assert (tmp_path / "out" / picture["file"]).read_bytes()[:4] == b"\x89PNG"
    assert found["tables"]["attention to the sound that the answer names"][0]["questions"] == 4
    if integration == "pal":  # which has both ways in
        again = probe_attention(model_of(integration), records, **few).to_dict()
        assert {**json.loads(json.dumps(again)), "seconds": 0} == {**found, "seconds": 0}


def test_pointing_compares_with_even_attention(records):
    model = tiny_model("lal")
    with torch.no_grad():  # without queries attention is even, so nothing points anywhere
        for block in model.llm.lm.model.layers:
            block.self_attn.q_proj.weight.zero_()
    result = probe_attention(model, records, examples=0, max_new_tokens=4)
    for row in result.tables["attention to the sound that the answer names"]:
        assert row["relative to uniform"] == pytest.approx(1.0, abs=0.02)
    for row in result.tables["attention of the answer's rows by layer"]:
        assert row["keys"] == pytest.approx(row["keys if uniform"], abs=1e-5)


def test_questions_without_clips_and_other_results_are_errors(records, tmp_path):
    model = tiny_model("lal")
    with pytest.raises(PalError, match="no question has a clip"):
        probe_attention(model, [replace(records[0], clips=())])
    result = probe_attention(model, records[:1], examples=1, max_new_tokens=2)
    result.save(tmp_path)
    result.save(tmp_path)
    with pytest.raises(ConfigError, match="'pal probe attention'"):
        replace(result, probe="mask").save(tmp_path)
