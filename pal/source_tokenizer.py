"""The tokenizer of a known pretrained LLM, which bundles name instead of holding a copy of it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal.backbone.sources import load_tokenizer
from pal.errors import BundleError, ConfigError, WeightsWarning
from pal.pretrained import KNOWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pal.model import PalModel


def named(model: PalModel) -> dict[str, str] | None:
    """Entry of a bundle's `config.json` for a tokenizer that it leaves out: name and digest of the source's.

    None where the bundle must hold the tokenizer: the LLM is not one of `pal.pretrained.KNOWN`, or the tokenizer is not
    its own, or the source cannot be read.
    """
    llm = model.config.llm
    if llm.path not in KNOWN or llm.tokenizer is not None or llm.revision is not None:
        return None
    own = digest(model.tokenizer)
    try:
        theirs = digest(load_tokenizer(llm.path))
    except ConfigError:  # the source is out of reach; a bundle must be written all the same
        return None
    return {"of": llm.path, "digest": own} if own == theirs else None


def load(
    entry: Mapping[str, str] | None, folder: str | Path, other: bool = False, **hub: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a bundle: that in its folder, or that of its LLM's source.

    Args:
        entry: what `named` made; None: the folder has the tokenizer.
        folder: the bundle, or its Hub id.
        other: take the source's tokenizer also where it has changed, with a `WeightsWarning`.
        hub: options of downloads from the Hub.

    Raises:
        BundleError: the source has another tokenizer now.
    """
    if entry is None:
        from transformers import AutoTokenizer

        own: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **hub)
        return own
    tokenizer = load_tokenizer(entry["of"])
    if digest(tokenizer) != entry["digest"]:
        different = f"{folder}: the tokenizer found in '{entry['of']}' is not that of then"
        if not other:
            raise BundleError(f"{different}; get that, or go on with other_weights=True (--other-weights)")
        warnings.warn(f"{different}; answers will differ", WeightsWarning, stacklevel=3)
    return tokenizer


def find(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a bundle's folder, also one that leaves it out, of a known LLM, in a folder or on the Hub.

    Raises:
        BundleError: as `load`, or the bundle's configuration cannot be read.
        ConfigError: there is no tokenizer that transformers can read.
    """
    config = Path(source) / "config.json"
    try:
        entry = json.loads(config.read_text()).get("tokenizer") if config.is_file() else None
    except (ValueError, AttributeError):
        raise BundleError(f"{config}: no JSON object; copy the folder again") from None
    return load(entry, source) if isinstance(entry, dict) else load_tokenizer(str(source))


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's vocabulary, merges, special tokens and chat template.

    Not of all that makes its ids: how its normaliser and the like are written differs between versions of libraries.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"] if tokenizer.is_fast else {}
    merges = [one if isinstance(one, str) else " ".join(one) for one in model.get("merges") or ()]
    about: list[Any] = [
        sorted(tokenizer.get_vocab().items()),
        merges,
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
