"""The objective `ctc`: connectors say what is heard, in the LLM's own embeddings."""

import itertools
import logging

import pytest
import torch

from pal.errors import ConfigError
from pal.plan import estimate
from pal.train.ctc import Alignment
from pal.train.objectives import MicroBatch, build_objective
from pal.train.recipe import Stage
from pal.types import AUDIO, IGNORE, AudioFeatures, Batch, Tokens
from tests.models import tiny_model
from tests.train.tiny import MODEL, recipe

ANSWERS = ["dog then cat", "cat", "dog dog"]


@pytest.fixture
def model():
    return tiny_model("plits")


def stage(**fields):
    given = {
        "objective": "ctc",
        "train": {"connector": True},
        "lr": {"connector": 1e-2, "head": 1e-2},
        "steps": 3,
        "batch": {"clips": 2, "rows_per_clip": 1},
    }
    return Stage(**given | fields)


def words(model, text):
    return model.tokenizer(" " + text, add_special_tokens=False)["input_ids"]


def conversation(model, text, clips=(0,)):
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = model.tokenizer.eos_token_id
    return Tokens([*[AUDIO] * len(clips), 5, 6, *ids, end], list(clips), [*[IGNORE] * (len(clips) + 2), *ids, end])


def collapsed(path, blank):
    return [label for label, _ in itertools.groupby(path) if label != blank]


def features(model, *lengths):
    generator = torch.Generator().manual_seed(1)
    x_BAE = torch.randn(len(lengths), max(lengths), model.ears.streams[0].width, generator=generator)
    return AudioFeatures(x_BAE, lengths, 0.08)


@pytest.fixture
def alignment(model):
    torch.manual_seed(3)
    made = Alignment(model, ["ab"])  # a small vocabulary, so that all paths can be listed
    torch.nn.init.normal_(made.blank_D)
    return made


def scores(model, alignment, clip):
    """Scores [A, V + 1] by the definition."""
    x_AD = alignment.linears[0](clip).detach()
    table = model.llm.lm.get_input_embeddings().weight[torch.tensor(sorted(set(words(model, "ab"))))]
    vectors = [*table, alignment.blank_D]
    cosines = [[float(x @ y) / float(x.norm() * y.norm()) for y in vectors] for x in x_AD]
    return 20 * torch.tensor(cosines)


def test_the_loss_is_that_of_all_paths_that_spell_the_answer(model, alignment):
    used = sorted(set(words(model, "ab")))
    heard = features(model, 5, 4)
    target = [used.index(token) for token in words(model, "ab")]
    embedded = model.llm.embed(alignment.vocabulary)
    targets = [(1, target), (0, target[:1]), (0, [target[0], target[0]])]  # a clip may have several answers
    loss, items, (hits, tries) = alignment([heard], embedded, targets)
    expected, right = 0.0, 0
    for clip, answer in targets:
        given = scores(model, alignment, heard.x_BAE[clip, : heard.lengths[clip]])
        logs = given.log_softmax(-1)
        paths = itertools.product(range(len(used) + 1), repeat=len(logs))
        total = sum(
            torch.stack([logs[t, label] for t, label in enumerate(path)]).sum().exp()
            for path in paths
            if collapsed(path, len(used)) == answer
        )
        expected = expected - total.log()
        right += collapsed(given.argmax(-1).tolist(), len(used)) == answer
    torch.testing.assert_close(loss, expected)
    assert (items, int(hits), tries) == (sum(len(answer) for _, answer in targets), right, 3)


@pytest.mark.parametrize("seed", range(6))
def test_a_hit_is_an_answer_that_is_the_best_path(model, alignment, seed):
    heard = features(model, 6, 3)
    torch.nn.init.normal_(alignment.linears[0].weight, generator=torch.Generator().manual_seed(seed))
    blank = len(alignment.vocabulary)
    best = [
        collapsed(scores(model, alignment, heard.x_BAE[i, :n]).argmax(-1).tolist(), blank)
        for i, n in enumerate(heard.lengths)
    ]
    embedded = model.llm.embed(alignment.vocabulary)
    said = [(i, answer) for i, answer in enumerate(best) if answer]
    assert said
    assert int(alignment([heard], embedded, said)[2][0]) == len(said)
    wrong = [(i, [*answer[:-1], (answer[-1] + 1) % blank]) for i, answer in said]
    assert int(alignment([heard], embedded, wrong)[2][0]) == 0
    longer = [(i, [*answer, (answer[-1] + 1) % blank]) for i, answer in said if len(answer) < heard.lengths[i]]
    assert int(alignment([heard], embedded, longer)[2][0]) == 0


def test_an_answer_too_long_for_its_clip_is_left_out_and_named(model, alignment, caplog):
    heard = features(model, 2)
    embedded = model.llm.embed(alignment.vocabulary)
    alone = alignment([heard], embedded, [(0, [0])])
    with caplog.at_level(logging.WARNING):
        both = alignment([heard], embedded, [(0, [1, 1]), (0, [0]), (0, [])])  # equal tokens need a blank between
        alignment([heard], embedded, [(0, [1, 1])])
    torch.testing.assert_close(both[0], alone[0])
    assert both[1] == alone[1] == 1
    too_few, empty = [record.message for record in caplog.records]  # once each
    assert "2 connector tokens are too few" in too_few and "an empty answer has no tokens" in empty


def test_answers_are_the_words_as_within_a_sentence(model):
    objective = build_objective(model, stage(), []).alignment
    objective = Alignment(model, ANSWERS)
    rows = [conversation(model, "cat", (1,)), conversation(model, "dog then cat")]
    (clip, cat), (other, dog) = objective.targets(rows)
    assert (clip, other) == (1, 0)
    assert objective.vocabulary[cat].tolist() == words(model, "cat")
    assert objective.vocabulary[dog].tolist() == words(model, "dog then cat")


def test_several_clips_or_answers_are_refused(model):
    objective = Alignment(model, ANSWERS)
    one = conversation(model, "cat")
    twice = Tokens([*one.ids, 5, *one.ids[2:]], [0], [*one.labels, IGNORE, *one.labels[2:]])
    for row in (conversation(model, "cat", (0, 1)), twice):
        with pytest.raises(ConfigError, match="one clip, one question and one answer"):
            objective.targets([row])


@pytest.mark.parametrize("trained", [{"projectors": True}, {"llm": "lora"}])
def test_it_trains_neither_projectors_nor_the_llm(model, trained):
    with pytest.raises(ConfigError, match="trains connectors and encoders"):
        build_objective(model, stage(train={"connector": True} | trained, lr=1e-2), [])


def test_the_connector_learns_and_the_llm_s_layers_do_not_run(model):
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randn(16_000, generator=generator), torch.randn(12_000, generator=generator)]
    rows = [conversation(model, "dog then cat"), conversation(model, "cat", (1,))]
    objective = build_objective(model, stage(), [])
    objective.alignment = Alignment(model, ANSWERS)

    def ran(*_):
        raise AssertionError("a layer of the LLM ran")

    for layer in model.llm.lm.get_decoder().layers:
        layer.register_forward_pre_hook(ran)
    model.requires_grad_(False)
    model.ears.connectors.requires_grad_(True)
    weights = [*model.ears.connectors.parameters(), *objective.head().values()]
    optimizer = torch.optim.Adam(weights, 2e-2)
    batch = objective.prepare(MicroBatch(Batch(clips, rows), ["a", "a"], seed=0))
    losses = []
    for _ in range(400):
        loss, items, _ = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / items)
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.grad is not None for p in weights)
    _, _, (hits, tries) = objective(batch)
    assert (int(hits), tries) == (2, 2)


def test_a_stage_of_a_run_needs_no_llm_in_its_plan(tmp_path):
    manifest = tmp_path / "m.jsonl"
    plan = estimate.make(recipe(manifest, [stage(name="align").model_dump()], model=MODEL))
    assert plan.stages[0].costs["llm"].forward == 0
    assert plan.stages[0].costs["connector"].forward > 0
