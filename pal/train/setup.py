"""Initial model of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pal.backbone.tokenizer import train_tokenizer
from pal.data.manifest import PLACEHOLDER
from pal.data.record_source import RecordSource
from pal.errors import ConfigError
from pal.files import atomic_folder, verify
from pal.model import PalModel
from pal.model_config import ModelConfig
from pal.train.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_tokenizer(recipe: Recipe, manifests: dict[str, RecordSource], out: Path) -> None:
    """Train the tokenizer of a fresh LLM on the manifests' text and save it in `out/tokenizer`, once.

    Of several processes the first must call it before the others.
    """
    folder, model = out / "tokenizer", recipe.model
    if model is None or model.llm.vocabulary is None or "llm" in recipe.start or folder.exists():
        return
    tokenizer = train_tokenizer(_texts(manifests.values()), model.llm.vocabulary)
    with atomic_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)


def build_model(recipe: Recipe, manifests: dict[str, RecordSource], out: Path) -> PalModel:
    """Build the recipe's model on the CPU, with the weights of `bundle` or `start` if set.

    Args:
        recipe: recipe of the run.
        manifests: training text for the tokenizer of a fresh LLM.
        out: folder of the run; the tokenizer is saved in `out/tokenizer`.

    Raises:
        ConfigError, BundleError: a bundle does not fit the recipe.
    """
    if recipe.bundle is not None:
        return PalModel.from_pretrained(recipe.bundle)
    from transformers import AutoTokenizer

    assert recipe.model is not None
    config = recipe.model
    tokenizer = None
    donors = {path: PalModel.from_pretrained(path) for path in dict.fromkeys(recipe.start.values())}
    if config.llm.vocabulary is not None:
        if "llm" in recipe.start:
            tokenizer = donors[recipe.start["llm"]].tokenizer
        else:
            make_tokenizer(recipe, manifests, out)
            verify(out / "tokenizer")
            # read back even if new, so that a resumed run has the same tokenizer
            tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer", local_files_only=True)
        config = _with_ids(config, tokenizer)
    model = PalModel.from_config(config, tokenizer)
    for part, path in recipe.start.items():
        tied, theirs_tied = (one.llm.lm.config.tie_word_embeddings for one in (model, donors[path]))
        if part == "llm" and tied and not theirs_tied:
            model.llm.untie_head()
        theirs, ours = donors[path].parts()[part].state_dict(), model.parts()[part].state_dict()
        fits = {name: t.shape for name, t in theirs.items()} == {name: t.shape for name, t in ours.items()}
        if not fits:
            raise ConfigError(f"start: the {part} of {path} does not fit the recipe's; give it the same options")
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(theirs[name])
        # bundles must include these weights, which differ from those of the part's pretrained source
        mine = {tensor.data_ptr() for tensor in ours.values()}
        model.trained |= {name for name, tensor in model.state_dict().items() if tensor.data_ptr() in mine}
    return model


def _with_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    """Configuration with the tokenizer's size and special tokens for a fresh LLM, unless the recipe sets them."""
    fields = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    llm = config.llm.model_copy(update={"fresh": fields | (config.llm.fresh or {})})
    return config.model_copy(update={"llm": llm})


def _texts(manifests: Iterable[RecordSource]) -> Iterator[str]:
    for manifest in manifests:
        for record in manifest:
            for turn in record.turns:
                yield turn.question.replace(PLACEHOLDER, "")
                # as the chat template writes it
                yield " " + turn.answer
