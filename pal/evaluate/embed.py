"""Embeddings of short texts, for classification from free answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pal.errors import ConfigError
from pal.files import sha256

NGRAMS = "ngrams"
_FEATURES = 4096
"""Numbers of a text's n-grams."""


class TextEmbedder(ABC):
    """Turns texts into directions."""

    name: str
    """What a score made with it says."""
    digest: str | None
    """SHA-256 of its weights, where it has some."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Unit vectors -> [N, C]; their inner products are cosines."""


class NgramEmbedder(TextEmbedder):
    """Counts of the letters' n-grams within words: spelling, not meaning. Needs no weights."""

    name = "character n-grams"
    digest = None

    def __init__(self) -> None:
        try:
            from sklearn.feature_extraction.text import HashingVectorizer
        except ImportError:
            raise ConfigError("similarity to labels needs scikit-learn: pip install 'pal-audio[scores]'") from None
        self._counts = HashingVectorizer(
            analyzer="char_wb", ngram_range=(2, 4), n_features=_FEATURES, alternate_sign=False, norm="l2"
        )

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Counts by hash, as unit vectors."""
        return np.asarray(self._counts.transform(texts).toarray(), dtype=np.float64)


class SentenceEmbedder(TextEmbedder):
    """A model of sentence-transformers."""

    def __init__(self, source: str, name: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ConfigError("similarity to labels needs an embedding: pip install 'pal-audio[embeddings]'") from None
        try:
            self._model = SentenceTransformer(source, device="cpu")
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load the embedding '{source}': {str(error).splitlines()[0]}") from None
        weights = Path(source) / "model.safetensors"
        self.digest = sha256(weights) if weights.is_file() else None
        self.name = name

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """In float32 on the CPU, which gives the same numbers each time."""
        vectors = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float64)


def open_embedder(source: str) -> TextEmbedder:
    """An embedding by its name.

    Args:
        source: "ngrams", or a folder or Hub id of a sentence-transformers model.

    Raises:
        ConfigError: a package is missing, or the model cannot be loaded.
    """
    return NgramEmbedder() if source == NGRAMS else SentenceEmbedder(source, source)
