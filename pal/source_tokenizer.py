"""The tokenizer of a known pretrained LLM, which bundles name instead of holding a copy of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal.backbone.sources import load_tokenizer
from pal.errors import BundleError
from pal.pretrained import KNOWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pal.model import PalModel


def named(model: PalModel) -> dict[str, str] | None:
    """Entry of a bundle's `config.json` for a tokenizer that it leaves out: name and digest of the source's.

    None where the bundle must hold the tokenizer: the LLM is not one of `pal.pretrained.KNOWN`, or the tokenizer is not
    its own.
    """
    llm = model.config.llm
    if llm.path not in KNOWN or llm.tokenizer is not None or llm.revision is not None:
        return None
    own = digest(model.tokenizer)
    if own != digest(load_tokenizer(llm.path)):
        return None
    return {"of": llm.path, "digest": own}


def load(
    entry: Mapping[str, str] | None, folder: str | Path, other: bool = False, **hub: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a bundle: that in its folder, or that of its LLM's source.

    Args:
        entry: what `named` made; None: the folder has the tokenizer.
        folder: the bundle, or its Hub id.
        other: take the source's tokenizer also where it has changed.
        hub: options of downloads from the Hub.

    Raises:
        BundleError: the source has another tokenizer now.
    """
    if entry is None:
        from transformers import AutoTokenizer

        own: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **hub)
        return own
    tokenizer = load_tokenizer(entry["of"])
    if not other and digest(tokenizer) != entry["digest"]:
        raise BundleError(
            f"{folder}: the tokenizer found in '{entry['of']}' is not that of then; get that, or go on with "
            "other_weights=True (--other-weights)"
        )
    return tokenizer


def find(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a bundle, also one that leaves it out, of a known LLM, of a folder or on the Hub.

    Raises:
        BundleError: as `load`.
        ConfigError: there is no tokenizer that transformers can read.
    """
    config = Path(source) / "config.json"
    entry = json.loads(config.read_text()).get("tokenizer") if config.is_file() else None
    return load(entry, source) if isinstance(entry, dict) else load_tokenizer(str(source))


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what makes a tokenizer's ids: its vocabulary, special tokens and chat template."""
    about: list[Any] = [
        sorted(tokenizer.get_vocab().items()),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
