"""Most attended seconds: those of the attention weights that the layers compute."""

import json

import pytest
import torch
from typer.testing import CliRunner

from pal.app.cli import app
from pal.data.prompts import encode, user_turn
from pal.errors import PalError
from pal.probe.attention_stats import record_attention
from pal.probe.when import attention_by_word, most_attended
from tests.models import noise, tiny_model

QUESTION = "What sound is this?"


@pytest.mark.parametrize("integration", ["plits", "lal", "pal"])
def test_shares_are_those_of_the_recorded_attention(integration):
    model = tiny_model(integration)
    clip = (noise(3.4).numpy(), 16_000)
    answer = model.ask(clip, QUESTION, max_new_tokens=6)
    spans = most_attended(model, clip, QUESTION, answer, count=9)
    assert len(spans) == 4 and sum(one.share for one in spans) == pytest.approx(1.0)
    assert [one.share for one in spans] == sorted((one.share for one in spans), reverse=True)
    assert sorted(one.start for one in spans) == pytest.approx([0.0, 0.85, 1.7, 2.55], abs=0.01)
    assert max(one.end for one in spans) == pytest.approx(3.4)
    row = encode(model.tokenizer, [user_turn(QUESTION, 1), {"role": "assistant", "content": answer}], [0], train=True)
    (found,) = record_attention(model, [noise(3.4)], [row], 4)
    expected = found.time_LNX[:, found.answer].double().mean((0, 1))
    expected = expected / expected.sum()
    by_time = torch.tensor([one.share for one in sorted(spans, key=lambda one: one.start)])
    torch.testing.assert_close(by_time.double(), expected, atol=1e-5, rtol=1e-5)
    assert most_attended(model, clip, QUESTION, answer, count=2) == spans[:2]
    assert most_attended(model, model.index(clip), QUESTION, answer, count=1)[0].share == pytest.approx(spans[0].share)


def test_what_has_no_seconds():
    model = tiny_model("lal", connector={"name": "qformer", "queries": 4})
    with pytest.raises(PalError, match="no time of their own"):
        most_attended(model, (noise(1.0).numpy(), 16_000), QUESTION, "a bell")
    with pytest.raises(PalError, match="empty answer"):
        most_attended(model, (noise(1.0).numpy(), 16_000), QUESTION, "")


def test_the_command(tmp_path):
    import soundfile

    model = tiny_model("pal")
    model.save_pretrained(tmp_path / "model", full=True)
    soundfile.write(tmp_path / "a.wav", noise(2.6).numpy(), 16_000)
    given = ["ask", str(tmp_path / "a.wav"), QUESTION, "--model", str(tmp_path / "model"), "--when"]
    done = CliRunner().invoke(app, given)
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and lines[-1].startswith("attention, which is no proof: ") and lines[-1].count("%") == 3
    done = CliRunner().invoke(app, [*given, "--json"])
    spans = json.loads(done.stdout)["most_attended"]
    assert len(spans) == 3 and set(spans[0]) == {"start", "end", "share"}
    made = tiny_model("lal", connector={"name": "qformer", "queries": 4})
    made.save_pretrained(tmp_path / "late", full=True)
    done = CliRunner().invoke(app, [*given[:4], str(tmp_path / "late"), "--when"])
    assert done.exit_code == 1 and done.stdout.strip() and "attention" not in done.stdout  # the answer is there
    assert "no time of their own" in done.stderr
    done = CliRunner().invoke(app, [given[0], given[1], *given[1:]])
    assert done.exit_code == 1 and "--when shows seconds of one clip" in done.stderr


@pytest.mark.parametrize("integration", ["plits", "lal", "pal"])
def test_attention_of_words_is_that_of_their_tokens(integration):
    model = tiny_model(integration)
    clip = model.index((noise(2.0).numpy(), 16_000))
    answer = "yes a loud siren"
    found = attention_by_word(model, clip, QUESTION, answer, bins=5)
    assert found.words == answer.split() and found.mass_WX.shape == (4, 5)
    assert found.seconds == pytest.approx(2.0, abs=0.1)
    row = encode(model.tokenizer, [user_turn(QUESTION, 1), {"role": "assistant", "content": answer}], [0], train=True)
    (recorded,) = record_attention(model, [noise(2.0)], [row], 5)
    said = iter(recorded.answer)
    for word, mass_X in zip(found.words, found.mass_WX, strict=True):
        text, rows = "", []
        while text.strip() != word:
            rows.append(next(said))
            text += model.tokenizer.decode([recorded.tokens[rows[-1] + 1]])
        expected = recorded.time_LNX.mean(0)[rows].double().mean(0)
        torch.testing.assert_close(mass_X, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(PalError, match="empty answer"):
        attention_by_word(model, clip, QUESTION, "")
