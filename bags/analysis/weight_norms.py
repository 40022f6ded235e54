"""Is the classifier imbalanced? Weight norms against training counts (section 3.2, Figures 1 and 3)."""

from collections.abc import Sequence

import numpy as np


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation; ties share their mean rank. NaN where one side is constant."""
    ranks = [_mean_ranks(np.asarray(values)) for values in (first, second)]
    if any(r.std() == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def weight_norms(label_weights: np.ndarray) -> np.ndarray:
    """Norm of each label's weight vector, [C+1]; entry 0 is the background. label_weights: [C+1, D]."""
    return np.linalg.norm(np.asarray(label_weights, np.float64), axis=1)
