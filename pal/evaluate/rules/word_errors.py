"""Word error rate (WER) after Whisper's normalisation of English."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pal.errors import ConfigError
from pal.evaluate.items import Item
from pal.evaluate.metrics import Ratio
from pal.evaluate.rules.base import NoOptions, Rule, Verdict
from pal.registry import register


@register("rule", "word_errors")
class WordErrors(Rule):
    """Word error rate by jiwer: insertions, deletions and substitutions / words of the references, over all items."""

    Config = NoOptions
    description = "word error rate (jiwer) after Whisper's English normaliser (whisper-normalizer) on both sides"
    lower_is_better = True

    def __init__(self, config: NoOptions) -> None:
        del config
        try:
            import jiwer
            from whisper_normalizer.english import EnglishTextNormalizer
        except ImportError:
            raise ConfigError(
                "word error rates need jiwer and whisper-normalizer: pip install 'pal-audio[scores]'"
            ) from None
        self.count = jiwer.process_words
        self.normalise = EnglishTextNormalizer()

    def judge(self, items: Sequence[Item], texts: Sequence[str | None]) -> Verdict:
        """WER; an item that raised is an empty transcript. References empty after normalisation are left out."""
        predictions = [self.normalise(text or "") for text in texts]
        references = [self.normalise(item.references[0]) for item in items]
        errors, lengths = [], []
        for predicted, right in zip(predictions, references, strict=True):
            if not right:
                errors.append(0)
                lengths.append(0)
                continue
            found = self.count(right, predicted)
            errors.append(found.substitutions + found.deletions + found.insertions)
            lengths.append(len(right.split()))
        rates = [wrong / max(1, length) for wrong, length in zip(errors, lengths, strict=True)]
        parsed = [None if text is None else one for one, text in zip(predictions, texts, strict=True)]
        correct: list[bool | None] = [
            wrong == 0 and text is not None for wrong, text in zip(errors, texts, strict=True)
        ]
        facts = {"words": sum(lengths), "word_errors": sum(errors), "empty_references": lengths.count(0)}
        wer = Ratio(np.asarray(errors, dtype=float), np.asarray(lengths, dtype=float))
        return Verdict(parsed, correct, rates, {"wer": wer}, facts=facts)
