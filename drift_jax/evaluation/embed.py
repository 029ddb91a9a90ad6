"""Texts -> embeddings -> the two axes of a map. Nothing is downloaded, and the same texts give the same numbers.

UMAP's axes have no unit and no meaning of their own: what is close was close among the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from drift_jax.errors import DataError
from drift_jax.evaluation.coverage_settings import CoverageConfig
from drift_jax.evaluation.entry_points import load_function, missing_extra

_WORDS = 50_000  # the most frequent n-grams


def embed(texts: Sequence[str], settings: CoverageConfig) -> Float[np.ndarray, "N D"]:
    """One row a text, of length 1 (0 where an embedder finds nothing in it).

    Raises:
      ConfigError: the extra `analysis` or the embedder is not there.
      DataError: the embedder returned something else than a finite row a text.
    """
    function = _tfidf if settings.embedder == "tfidf" else _of_user(settings.embedder)
    found = np.asarray(function(list(texts), settings), np.float64)
    if found.ndim != 2 or len(found) != len(texts) or not found.shape[1] or not np.isfinite(found).all():
        raise DataError(
            f"embedder {settings.embedder} must return a finite row for each of {len(texts)} texts, found an array of "
            f"shape {found.shape}."
        )
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.where(lengths > 0, lengths, 1.0)


def _of_user(name: str) -> Callable[[list[str], CoverageConfig], Any]:
    function = load_function(name, "embedder")
    return lambda texts, _: function(texts)


def _tfidf(texts: list[str], settings: CoverageConfig) -> Any:
    """Of n-grams within words, which need no language's rules for what a word is."""
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise missing_extra("scikit-learn", "embedder tfidf") from None
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, max_features=_WORDS)
    counts = vectorizer.fit_transform(texts)
    dimensions = min(settings.dimensions, min(counts.shape) - 1)
    if dimensions < 1:
        return counts.toarray()
    return TruncatedSVD(dimensions, random_state=settings.seed).fit_transform(counts)


def project(embeddings: Float[np.ndarray, "N D"], settings: CoverageConfig) -> Float[np.ndarray, "N 2"]:
    """Raises `ConfigError` where UMAP is asked for and not installed."""
    return _PROJECTIONS[settings.projection](embeddings, settings)


def _umap(embeddings: Float[np.ndarray, "N D"], settings: CoverageConfig) -> Float[np.ndarray, "N 2"]:
    try:
        from umap import UMAP
    except ImportError:
        raise missing_extra("umap-learn", "projection umap") from None
    # With a seed UMAP runs on one thread, the order of whose sums is always the same.
    mapper = UMAP(
        n_components=2,
        n_neighbors=min(settings.neighbors, len(embeddings) - 1),
        min_dist=settings.min_dist,
        metric=settings.metric,
        init="pca",
        random_state=settings.seed,
        n_jobs=1,
    )
    return np.asarray(mapper.fit_transform(embeddings.astype(np.float32)), np.float64)


def _svd(embeddings: Float[np.ndarray, "N D"], settings: CoverageConfig) -> Float[np.ndarray, "N 2"]:
    centred = embeddings - embeddings.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(embeddings), 2))
    count = min(2, len(sizes))
    points[:, :count] = left[:, :count] * sizes[:count]
    # A component's sign is arbitrary: its largest entry is positive.
    signs = np.sign(points[np.argmax(np.abs(points), axis=0), [0, 1]])
    return points * np.where(signs < 0, -1.0, 1.0)


_PROJECTIONS: dict[str, Callable[..., Float[np.ndarray, "N 2"]]] = {"umap": _umap, "svd": _svd}
