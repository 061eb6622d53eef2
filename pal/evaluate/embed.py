"""Text embeddings, for zero-shot classification from free answers."""

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
"""Width of the hashed n-gram counts."""


class TextEmbedder(ABC):
    """Text embedding model."""

    name: str
    """Name in score files."""
    digest: str | None
    """SHA-256 of its weights; None without weights."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Unit vectors [N, C] of the texts; their inner products are cosine similarities."""


class NgramEmbedder(TextEmbedder):
    """Bag of character n-grams within words: compares spelling, not meaning. Needs no weights."""

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
        """Hashed n-gram counts as unit vectors."""
        return np.asarray(self._counts.transform(texts).toarray(), dtype=np.float64)


class SentenceEmbedder(TextEmbedder):
    """sentence-transformers model."""

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
        """Embeddings in float32 on the CPU, for reproducible numbers."""
        vectors = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float64)


def open_embedder(source: str) -> TextEmbedder:
    """Load a text embedding model.

    Args:
        source: "ngrams", or a folder or Hub id of a sentence-transformers model.

    Raises:
        ConfigError: a package is missing, or the model cannot be loaded.
    """
    return NgramEmbedder() if source == NGRAMS else SentenceEmbedder(source, source)
