"""Weight norms of classifiers, which rise with training counts (section 3.2, Figures 1 and 3 of the paper)."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def classifier_norms(detector: Any) -> np.ndarray:
    """Weight norms [C+1] of a detector's classifier, the mean over stages; entry 0 is the background."""
    return np.mean([classifier.weight_norms().cpu().numpy() for classifier in detector.classifiers()], axis=0)


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's correlation of two series [N], in -1..1. Ties share their mean rank; NaN if a series is constant."""
    ranks = np.stack([_mean_ranks(np.asarray(series)) for series in (first, second)])
    if any(r.std() == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def _mean_ranks(series: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(series, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
