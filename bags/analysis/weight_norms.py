"""Is the classifier imbalanced? Weight norms against training counts (section 3.2, Figures 1 and 3)."""

import numpy as np
from numpy.typing import ArrayLike


def classifier_norms(detector) -> np.ndarray:
    """Norms of a detector's classifier, [C+1], entry 0 the background; of a cascade, the mean of its stages."""
    return np.mean([classifier.weight_norms().cpu().numpy() for classifier in detector.classifiers()], axis=0)


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's correlation; ties share their mean rank. NaN where one side is constant."""
    ranks = np.stack([_mean_ranks(np.asarray(values)) for values in (first, second)])
    if any(r.std() == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
