"""Balanced Softmax in its sigmoid form, which Ren et al. (NeurIPS 2020) use on LVIS.

Published (Mask R-CNN R50, LVIS v0.5, repeat factors, classifier retrained; mask AP / APr APc APf): 26.4 / 15.9 27.3
29.6 against 24.1 / 13.4 24.3 28.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bags.classifiers.base import TrainingCounts, at_least_float32, checked_counts
from bags.classifiers.sigmoid import Prior, Sigmoid, SigmoidLayerSettings


@dataclass(frozen=True)
class BalancedSigmoidSettings(SigmoidLayerSettings):
    """Balanced Softmax in its sigmoid form."""

    name: Literal["balanced_sigmoid"] = "balanced_sigmoid"
    prior: Prior = 0.001

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "BalancedSigmoid":
        """Make the untrained classifier."""
        return BalancedSigmoid(in_features, training.instance_counts, self.prior)


class BalancedSigmoid(Sigmoid):
    """Balanced Softmax as Ren et al. train it on LVIS: one sigmoid per category, adjusted for foreground proposals.

        z_j - log((n - n_j) / n_j)  for foreground,  z_j  for background;  scores sigmoid(z)

    counts: [C] training instances n_j, n their sum; 0 is taken as 1. (The released code has images in place of
    instances.)
    """

    shift: Tensor

    def __init__(self, in_features: int, counts: Sequence[int], prior: float = BalancedSigmoidSettings.prior):
        super().__init__(in_features, len(counts), prior)
        numbers = checked_counts("counts", counts).double().clamp(min=1)
        others = (numbers.sum() - numbers).clamp(min=1)  # a single category has no others
        self.register_buffer("shift", (others / numbers).log(), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sum the binary cross entropies over the categories and average them over the R proposals."""
        logits = at_least_float32(logits)
        foreground = (labels > 0)[:, None].to(logits.dtype)
        return super().loss(logits - foreground * self.shift.to(logits.dtype), labels)
