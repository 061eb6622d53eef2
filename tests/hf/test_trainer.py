"""The real transformers Trainer: it trains, saves, resumes and puts the best checkpoint back, exactly."""

import json
import logging

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, load_model, save_model
from transformers import (
    AutoModelForMultimodalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)
from transformers.trainer_utils import load_sharded_checkpoint

from pal.errors import BundleError, PalError, PromptError
from pal.hf import PalForConditionalGeneration, PalProcessor
from pal.types import IGNORE
from tests.hf.chats import chat, left_out, say, tensors, turns
from tests.hf.training import ITEMS, Collator, arguments, trainer
from tests.models import pal, tiny_model


def digest(folder):
    return pal.load(folder).digest


def test_trainer(tmp_path):
    """It takes the model as it is, and the loss falls."""
    wrapped = PalForConditionalGeneration.wrap(tiny_model())
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "logging_strategy": "steps", "logging_steps": 1}
    run = Trainer(wrapped, arguments(tmp_path, **options), train_dataset=ITEMS, data_collator=Collator(wrapped))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    run.save_model(tmp_path / "saved")
    assert digest(tmp_path / "saved") == wrapped.pal.digest


@pytest.fixture
def shards(monkeypatch):
    """Saving splits the weights, as for a model beyond max_shard_size."""
    whole = PalForConditionalGeneration.save_pretrained

    def save(self, folder, **options):
        whole(self, folder, **{**options, "max_shard_size": "80KB"})

    monkeypatch.setattr(PalForConditionalGeneration, "save_pretrained", save)


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_resumed_and_best_weights_are_the_checkpoints(tmp_path, kind, request, caplog):
    if kind == "sharded":
        request.getfixturevalue("shards")
    logging.getLogger("transformers").propagate = True
    model = PalForConditionalGeneration.wrap(tiny_model())
    start = model.pal.digest
    run = trainer(model, tmp_path, scores=[1.0, 0.5])
    run.train()
    first, last = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    assert len({start, digest(first), digest(last)}) == 3
    assert (first / "model.safetensors.index.json").exists() == (kind == "sharded")
    assert run.state.best_model_checkpoint == str(first)
    assert model.pal.digest == digest(first)

    # nothing is left to do after the last step: what comes out is what was restored
    again = PalForConditionalGeneration.wrap(tiny_model())
    trainer(again, tmp_path).train(resume_from_checkpoint=str(last))
    assert again.pal.digest == digest(last)
    assert not [record.message for record in caplog.records if "keys in the checkpoint" in record.message]


def test_a_resumed_run_ends_as_one_that_was_not_broken_off(tmp_path):
    whole = PalForConditionalGeneration.wrap(tiny_model())
    trainer(whole, tmp_path).train()
    again = PalForConditionalGeneration.wrap(tiny_model())
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_what_is_frozen_is_left_out_and_what_was_trained_restored(foreign, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    model = AutoModelForMultimodalLM.from_pretrained(foreign)
    model.pal.llm.requires_grad_(False)
    trainer(model, tmp_path / "run", scores=[1.0, 0.5]).train()
    for step in (1, 2):
        assert left_out(tmp_path / "run" / f"checkpoint-{step}") == left_out(foreign)
    assert model.pal.digest == digest(tmp_path / "run" / "checkpoint-1")
    again = AutoModelForMultimodalLM.from_pretrained(foreign)
    again.pal.llm.requires_grad_(False)
    trainer(again, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.pal.digest == digest(tmp_path / "run" / "checkpoint-2")
    assert not [record.message for record in caplog.records if "keys in the checkpoint" in record.message]


def test_what_a_checkpoint_leaves_out_becomes_again_what_its_source_has(foreign, tmp_path):
    """Trap: with warm-up the first step may change nothing, so that its checkpoint leaves out what trains later."""
    model = AutoModelForMultimodalLM.from_pretrained(foreign)
    model.save_pretrained(tmp_path / "early")
    early = load_file(tmp_path / "early" / "model.safetensors")
    before = model.pal.digest
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    found = model.load_state_dict(early, strict=False)
    assert model.pal.digest == before
    assert not found.missing_keys and not found.unexpected_keys
    (foreign.parent / "llm" / "model.safetensors").rename(foreign.parent / "gone")
    model.load_state_dict(early)  # nothing to take from the source
    with torch.no_grad():
        model.pal.llm.lm.lm_head.weight.add_(0.1)
    with pytest.raises(ValueError, match="it has no weights"):
        model.load_state_dict(early)


def test_weights_of_another_model_are_refused(tmp_path):
    """Trap: transformers takes any names, with a line in the log."""
    model = PalForConditionalGeneration.wrap(tiny_model())
    model.save_pretrained(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    name = "integration.projectors.0.weight" if "integration.projectors.0.weight" in weights else sorted(weights)[-1]
    less = {other: tensor for other, tensor in weights.items() if other != name}
    digest = model.pal.digest
    for given, says in (
        ({**weights, "llm.nothing": torch.zeros(1)}, r"this one has no 'pal\.llm\.nothing'"),
        ({**weights, name: torch.zeros(7)}, r"has shape \(7,\), not"),
        (less, "is missing in the weights"),
    ):
        for strict in (True, False):
            with pytest.raises(BundleError, match=says) as caught:
                model.load_state_dict(given, strict=strict)
            assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({f"pal.{other}": tensor for other, tensor in less.items()})
    partly = model.load_state_dict({f"pal.{other}": tensor for other, tensor in less.items()}, strict=False)
    assert partly.missing_keys == [f"pal.{name}"], "said, since a shard has only some"
    assert model.pal.digest == digest


def test_other_tools_read_checkpoints(tmp_path):
    """safetensors', transformers' and accelerate's own ways to fill a model."""
    model = PalForConditionalGeneration.wrap(tiny_model())
    other = tiny_model(seed=1)
    PalForConditionalGeneration.wrap(other).save_pretrained(tmp_path / "m")
    PalForConditionalGeneration.wrap(other).save_pretrained(tmp_path / "shards", max_shard_size="80KB")
    load_model(model, tmp_path / "m" / "model.safetensors")
    assert model.pal.digest == other.digest
    model = PalForConditionalGeneration.wrap(tiny_model())
    load_sharded_checkpoint(model, tmp_path / "shards", strict=True)
    assert model.pal.digest == other.digest
    save_model(model, tmp_path / "all.safetensors")
    model = PalForConditionalGeneration.wrap(tiny_model())
    load_model(model, tmp_path / "all.safetensors")
    assert model.pal.digest == other.digest


def test_accelerate_saves_and_loads_the_state(tmp_path):
    def prepared():
        accelerator = Accelerator(cpu=True)
        model = PalForConditionalGeneration.wrap(tiny_model()).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return accelerator, *accelerator.prepare(model, optimizer)

    def step(accelerator, model, optimizer):
        accelerator.backward(model(**Collator(model)(ITEMS[:2])).loss)
        optimizer.step()
        optimizer.zero_grad()

    accelerator, model, optimizer = prepared()
    step(accelerator, model, optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    saved = model.pal.digest
    step(accelerator, model, optimizer)
    after = model.pal.digest
    assert after != saved
    accelerator.load_state(str(tmp_path / "state"))
    assert model.pal.digest == saved
    accelerator, model, optimizer = prepared()
    accelerator.load_state(str(tmp_path / "state"))
    assert model.pal.digest == saved


def test_the_loss_is_a_mean_over_all_items_of_a_step(tmp_path):
    """Trap: over several batches a mean of their means would weigh short answers more."""
    model = PalForConditionalGeneration.wrap(tiny_model())
    collate = Collator(model)
    batches = [collate(ITEMS[:1]), collate(ITEMS[2:3])]
    tokens = [int((batch["labels"] != IGNORE).sum()) for batch in batches]
    assert tokens[0] != tokens[1]
    losses = [model(**batch).loss for batch in batches]
    parts = [model(**batch, num_items_in_batch=torch.tensor(sum(tokens))).loss for batch in batches]
    both = sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
    torch.testing.assert_close(sum(parts), both)
    # and so Trainer logs it
    options = {"logging_strategy": "steps", "logging_steps": 1, "gradient_accumulation_steps": 2, "max_steps": 1}
    args = arguments(tmp_path, per_device_train_batch_size=1, learning_rate=0.0, **options)
    pair = [ITEMS[0], ITEMS[2]]
    run = Trainer(model.eval(), args, train_dataset=pair, data_collator=collate)
    model.pal.requires_grad_(False)
    next(iter(model.pal.integration.parameters())).requires_grad_(True)  # nothing with dropout or batch statistics
    run.train()
    (logged,) = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx(float(both), rel=1e-3)


def seq2seq(model, folder, **options):
    settings = arguments(
        folder, Seq2SeqTrainingArguments, predict_with_generate=True, per_device_eval_batch_size=2, **options
    )
    return Seq2SeqTrainer(
        model,
        settings,
        eval_dataset=ITEMS[:3],
        data_collator=Collator(model),
        processing_class=PalProcessor.of(model.pal).tokenizer,
    )


def test_predict_with_generate(tmp_path):
    """Each row is continued from where its answer begins: what is predicted is what is answered without it."""
    model = PalForConditionalGeneration.wrap(tiny_model())
    processor = PalProcessor.of(model.pal)
    run = seq2seq(model, tmp_path, generation_max_length=40)
    for _ in range(2):  # it leaves defaults of its own in the model's generation_config
        found = run.predict(ITEMS[:3])
        assert found.metrics["test_loss"] > 0
        for ids, item in zip(found.predictions, ITEMS, strict=False):
            prompt = tensors(processor, item[:1])
            expected = model.generate(**prompt, max_new_tokens=40)[0]
            width = prompt["input_ids"].shape[1]
            kept = [int(i) for i in ids if i not in (-100, 0)]
            answer = [int(i) for i in expected if i != 0]
            assert kept[:width] == answer[:width] and len(kept) > width
            assert kept[width:] == answer[width:][: len(kept) - width]


def test_generation_goes_on_before_the_last_answer():
    model = PalForConditionalGeneration.wrap(tiny_model())
    collate = Collator(model)
    before = [*chat(0.3), say("yes", role="assistant"), say("Which comes first?")]
    batch = collate([[*before, say("a loud siren", role="assistant")], turns(0.4, 1, "no")])
    made = model.generate(**batch, max_new_tokens=4)
    width = batch["input_ids"].shape[1]
    assert made[:, :width].ne(batch["input_ids"]).any()
    for row, prompt in zip(made, (before, chat(0.4, 1)), strict=True):
        alone = tensors(collate.processor, prompt)
        expected = model.generate(**alone, max_new_tokens=4)[0, alone["input_ids"].shape[1] :]
        assert row[width:][: len(expected)].equal(expected)
    with pytest.raises(PromptError, match="labels have shape"):
        model.generate(**{**batch, "labels": batch["labels"][:, 1:]})


def test_a_checkpoint_holds_no_pickle_of_ours(tmp_path):
    model = PalForConditionalGeneration.wrap(tiny_model())
    trainer(model, tmp_path, max_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    ours = json.loads((folder / "manifest.json").read_text())
    names = {path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert names and not any(name in str(ours) for name in names), "they are transformers' own"


def test_smoothed_labels_are_those_of_the_next_ids(tmp_path):
    """Trap: the Trainer shifts only for classes of its table; unshifted, column t would train on id t."""
    model = PalForConditionalGeneration.wrap(tiny_model())
    for wrapped in (model, get_peft_model(model, LoraConfig(r=2, target_modules=r".*llm\.lm.*q_proj"))):
        run = Trainer(
            wrapped.eval(),
            arguments(tmp_path, label_smoothing_factor=0.1),
            train_dataset=ITEMS,
            data_collator=Collator(model),
        )
        batch = Collator(model)(ITEMS)
        with torch.no_grad():
            logits = wrapped(**{name: x for name, x in batch.items() if name != "labels"}).logits[:, :-1]
            expected = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1
            )
            torch.testing.assert_close(run.compute_loss(wrapped, dict(batch)), expected)


def test_noise_on_embeddings_is_refused(tmp_path):
    model = PalForConditionalGeneration.wrap(tiny_model())
    run = Trainer(
        model, arguments(tmp_path, neftune_noise_alpha=5.0), train_dataset=ITEMS, data_collator=Collator(model)
    )
    with pytest.raises(PalError, match=r"neftune_noise_alpha is not supported: .*; leave it out"):
        run.train()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_a_wrapped_model_are_refused(prefix, strict):
    model = PalForConditionalGeneration.wrap(tiny_model())
    given = {prefix + name: x for name, x in model.state_dict().items()}
    with pytest.raises(BundleError, match=f"begin with '{prefix}'; remove that") as caught:
        model.load_state_dict(given, strict=strict)
    assert "\n" not in str(caught.value)


def test_a_source_that_has_changed_since_is_no_source(foreign, tmp_path):
    """Trap: what is put back for a checkpoint's left-out weights must be what they were."""
    model = AutoModelForMultimodalLM.from_pretrained(foreign)
    model.save_pretrained(tmp_path / "early")
    early = load_file(tmp_path / "early" / "model.safetensors")
    with torch.no_grad():
        model.pal.llm.lm.lm_head.weight.add_(0.1)
    model.pal.llm.lm.save_pretrained(foreign.parent / "llm")
    with torch.no_grad():
        model.pal.llm.lm.lm_head.weight.add_(0.1)
    with pytest.raises(BundleError, match="has changed in its source since the bundle; load"):
        model.load_state_dict(early)
