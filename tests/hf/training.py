"""transformers' Trainer on a few chats about noise, for tests of `pal.hf`."""

from transformers import (
    Trainer,
    TrainingArguments,
)

from pal.hf import PalProcessor
from pal.types import IGNORE
from tests.hf.chats import turns

WORDS = ["yes", "no", "a loud siren", "yes"]
ITEMS = [turns(0.3, i, word) for i, word in enumerate(WORDS)]


class Collator:
    """Chats as tensors with labels on the answers."""

    def __init__(self, model):
        self.processor = PalProcessor.of(model.pal)

    def __call__(self, chats):
        made = self.processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = made.pop("assistant_masks")
        return {**made, "labels": made["input_ids"].masked_fill(mask == 0, IGNORE)}


def arguments(folder, kind=TrainingArguments, **options):
    usual = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "logging_strategy": "no",
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "max_steps": 2,
        "save_strategy": "no",
    }
    return kind(**{**usual, **options})


def trainer(model, folder, scores=None, **options):
    """A Trainer that saves at every step; with scores, one that takes the checkpoint with the highest for the best."""
    usual = {"save_strategy": "steps", "save_steps": 1}
    if scores is not None:
        usual |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
        usual |= {"metric_for_best_model": "eval_x", "greater_is_better": True}
    left = iter(scores or ())
    return Trainer(
        model=model,
        args=arguments(folder, **{**usual, **options}),
        train_dataset=ITEMS,
        eval_dataset=ITEMS[:2],
        data_collator=Collator(model),
        compute_metrics=(lambda _: {"x": next(left)}) if scores is not None else None,
    )
