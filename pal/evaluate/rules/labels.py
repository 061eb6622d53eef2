"""Zero-shot classification of free text by embedding similarity, as in LTU, GAMA and PAL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pal.config import StrictConfig
from pal.errors import ConfigError
from pal.evaluate.embed import NGRAMS, TextEmbedder, open_embedder
from pal.evaluate.items import Item
from pal.evaluate.label_metrics import MacroF1, MeanAveragePrecision
from pal.evaluate.metrics import Metric, Ratio
from pal.evaluate.rules.base import Rule, Verdict, share
from pal.registry import register


@register("rule", "labels")
class NearestLabel(Rule):
    """Classification by the label whose embedding is nearest to the answer's.

    F1 and mAP are scikit-learn's, over the labels that occur. An item that raised has no predicted label, and the
    lowest score for all labels.
    """

    class Config(StrictConfig):
        """Options of the rule: texts to embed, embedding and metric."""

        metric: Literal["accuracy", "f1", "map"] = "accuracy"
        """Accuracy and F1 take the most similar label; mAP ranks by the similarity to each."""
        answer: str = "sound of {}"
        """Template of an answer's embedded text, in lower case (LTU's)."""
        label: str = "sound of {}"
        """Template of a label's embedded text, in lower case (LTU's)."""
        embedding: str = NGRAMS
        """Folder or Hub id of a sentence-transformers model (pal-audio[embeddings]), or "ngrams", which needs no
        download and compares spelling, not meaning: "puppy" is not similar to "dog"."""

    def __init__(self, config: Config, embedder: TextEmbedder | None = None) -> None:
        self.config = config
        self.embedder = embedder if embedder is not None else open_embedder(config.embedding)
        self.description = (
            f"cosine similarity of '{config.answer}' and '{config.label}' in lower case, by {self.embedder.name}"
        )

    def describe(self) -> dict[str, Any]:
        """Description with the embedding used in place of the original."""
        return {
            **super().describe(),
            "embedding": {"name": self.embedder.name, "digest": self.embedder.digest},
            "deviations": [
                f"LTU, GAMA and PAL embed with text-embedding-ada-002; scores by {self.embedder.name} differ"
            ],
        }

    def judge(self, items: Sequence[Item], texts: Sequence[str | None]) -> Verdict:
        """Accuracy, micro and macro F1, or mAP."""
        labels = items[0].choices
        if not labels or any(item.choices != labels for item in items):
            raise ConfigError("similarity to labels needs the same labels for all items; use another rule")
        scores_NL = self._similarities(labels, texts)
        nearest = scores_NL.argmax(1)
        truth_NL = np.asarray([[label in item.references for label in labels] for item in items])
        parsed = [None if text is None else labels[best] for text, best in zip(texts, nearest, strict=True)]
        answered = np.asarray([text is not None for text in texts])
        correct = [bool(truth_NL[row, best]) and bool(answered[row]) for row, best in enumerate(nearest)]
        values = [float(right) for right in correct]
        if self.config.metric == "map":
            scores_NL = np.where(answered[:, None], scores_NL, -1.0)  # the lowest possible cosine
            metrics: dict[str, Metric] = {"mAP": MeanAveragePrecision(truth_NL, scores_NL)}
            empty = int((~truth_NL.any(0)).sum())
            return Verdict(parsed, list(correct), values, metrics, facts={"labels_without_items": empty})
        if self.config.metric == "accuracy":
            return Verdict(parsed, list(correct), values, {"accuracy": Ratio.right(correct)})
        predicted_NL = (np.arange(len(labels)) == nearest[:, None]) & answered[:, None]
        hits = 2.0 * (predicted_NL & truth_NL).sum(1)
        metrics = {
            # pooled over labels: 2 TP / (predicted + true)
            "micro_f1": share(hits.tolist(), (predicted_NL.sum(1) + truth_NL.sum(1)).tolist()),
            "macro_f1": MacroF1(truth_NL, predicted_NL),
        }
        return Verdict(parsed, list(correct), values, metrics)

    def _similarities(self, labels: Sequence[str], texts: Sequence[str | None]) -> NDArray[np.float64]:
        of_label = self.embedder.embed([self.config.label.format(label.lower()) for label in labels])
        # each distinct answer is embedded once
        sentences = [self.config.answer.format(_caption(text or "").lower()) for text in texts]
        different = list(dict.fromkeys(sentences))
        places = {text: place for place, text in enumerate(different)}
        of_text = self.embedder.embed(different)
        similarities: NDArray[np.float64] = (of_text @ of_label.T)[[places[text] for text in sentences]]
        return similarities


def _caption(answer: str) -> str:
    """The answer without the heading "Audio caption:" of models trained on LTU's data."""
    return answer.rpartition("Audio caption:")[2].strip()
