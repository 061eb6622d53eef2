"""CIDEr-D, BLEU, METEOR, ROUGE-L, SPICE and SPIDEr, by pycocoevalcap."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pal.errors import ConfigError
from pal.evaluate.items import Item
from pal.evaluate.metrics import Metric, Ratio
from pal.evaluate.rules.base import NoOptions, Rule, Verdict
from pal.registry import register

_NO_JAVA = "needs Java on the PATH, 8 or later"
_NO_PARSER = (
    "Stanford CoreNLP 3.6.0 in pycocoevalcap's folder spice/lib, which "
    "'python get_stanford_models.py', run in its folder spice, downloads"
)
_PARSER = "spice/lib/stanford-corenlp-3.6.0-models.jar"
_PLAIN_WORD = re.compile(r"[\w']+")

Captions = dict[str, list[str]]


@register("rule", "captions")
class CaptionScores(Rule):
    """COCO's caption metrics, used for AudioCaps, Clotho and MusicCaps.

    The tokenizer, METEOR and SPICE are Java programs. Without Java the other metrics are computed on
    lower-case words without that tokenizer, under other names, since the values differ a little. SPICE needs Stanford's
    parser in the folder of pycocoevalcap; it is not downloaded automatically.
    """

    Config = NoOptions
    description = "COCO caption metrics (pycocoevalcap) after the Penn Treebank tokenizer, punctuation removed"
    quirks = ("document frequencies of CIDEr-D are those of this set's references, so its value depends on the set",)

    def __init__(self, config: NoOptions) -> None:
        del config
        package = importlib.util.find_spec("pycocoevalcap")
        if package is None or not package.submodule_search_locations:
            raise ConfigError("scores of captions need pycocoevalcap: pip install 'pal-audio[scores]'")
        self.java = shutil.which("java") is not None
        self.spice = self.java and (Path(package.submodule_search_locations[0]) / _PARSER).is_file()
        if not self.java:
            self.description = "COCO caption metrics (pycocoevalcap) on plain words in lower case; no Java here"

    def judge(self, items: Sequence[Item], texts: Sequence[str | None]) -> Verdict:
        """Caption metrics with CIDEr-D first; an item that raised is an empty caption."""
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        ids = [str(index) for index in range(len(items))]
        predictions = self._tokens({key: [text or ""] for key, text in zip(ids, texts, strict=True)})
        right = self._tokens({key: list(item.references) for key, item in zip(ids, items, strict=True)})
        note = "" if self.java else " (plain words)"
        _, each_cider = Cider().compute_score(right, predictions)
        _, each_rouge = Rouge().compute_score(right, predictions)
        bleu, _ = Bleu(4).compute_score(right, predictions, verbose=0)
        metrics: dict[str, Metric] = {
            f"CIDEr-D{note}": Ratio.mean(each_cider),
            f"ROUGE-L{note}": Ratio.mean(each_rouge),
        }
        single = {f"BLEU-{n}{note}": float(score) for n, score in enumerate(bleu, start=1)}
        missing: dict[str, str] = {}
        if self.java:
            score, _ = self._meteor.compute_score(right, predictions)
            single["METEOR"] = float(score)
        else:
            missing["METEOR"] = _NO_JAVA
        if self.spice:
            each_spice = _spice(right, predictions)
            metrics["SPICE"] = Ratio.mean(each_spice)
            metrics["SPIDEr"] = Ratio.mean([(c + s) / 2 for c, s in zip(each_cider, each_spice, strict=True)])
        else:
            missing["SPICE"] = missing["SPIDEr"] = (
                f"needs {_NO_PARSER}" if self.java else f"{_NO_JAVA}, and {_NO_PARSER}"
            )
        parsed = [None if text is None else predictions[key][0] for key, text in zip(ids, texts, strict=True)]
        values = [float(score) for score in each_cider]
        return Verdict(parsed, [None] * len(items), values, metrics, single, {"not_computed": missing})

    @cached_property
    def _meteor(self) -> Any:
        """One METEOR process for all sets: its start takes seconds and a gigabyte."""
        from pycocoevalcap.meteor.meteor import Meteor

        return Meteor()

    def _tokens(self, captions: Captions) -> Captions:
        if not self.java:
            return {key: [" ".join(_PLAIN_WORD.findall(c.lower())) for c in some] for key, some in captions.items()}
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        # the tokenizer takes one caption a line
        lines = {key: [{"caption": " ".join(c.split())} for c in some] for key, some in captions.items()}
        found: Captions = PTBTokenizer().tokenize(lines)
        return found


def _spice(right: Captions, predictions: Captions) -> list[float]:
    from pycocoevalcap.spice.spice import Spice

    _, each = Spice().compute_score(right, predictions)
    # SPICE sorts by key as text: restore the items' order
    of_key: dict[str, Any] = dict(zip(sorted(right), each, strict=True))
    return [float(of_key[key]["All"]["f"]) for key in right]
