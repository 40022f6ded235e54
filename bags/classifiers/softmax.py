"""Softmax over background and all categories: plain (Eq. 1-2) and re-weighted by training counts.

Shape shorthand: R proposals, C categories; logits [R, C+1], column 0 the background.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import (
    BoxFeatures,
    ProposalClassifier,
    at_least_float32,
    checked_counts,
    checked_weights,
    need,
    new_linear,
)

WEIGHTINGS = ("inverse", "effective_number", "effective_number_clipped")


class Softmax(ProposalClassifier):
    """The baseline of every table. Other classifiers on the same layer derive from it."""

    def __init__(self, in_features: int, num_categories: int):
        super().__init__()
        self.num_categories = num_categories
        self.linear = new_linear(in_features, num_categories + 1)

    def forward(self, features: BoxFeatures) -> Tensor:
        """Features -> logits [R, C+1]."""
        return self.linear(features.fc)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean cross entropy over the R proposals (Eq. 1), at least in float32; 0 for R = 0."""
        total = F.cross_entropy(at_least_float32(logits), labels, reduction="sum")
        return {"loss_classifier": total / max(len(labels), 1)}

    def probs(self, logits: Tensor) -> Tensor:
        """Softmax (Eq. 2): [R, C+1], rows sum to 1."""
        return torch.softmax(at_least_float32(logits), -1)

    def weight_norms(self) -> Tensor:
        """[C+1]."""
        return self.linear.weight.detach().norm(dim=1)


class ReweightedSoftmax(Softmax):
    """Cross entropy weighted by the label's class (models (6) and (7) of Table 1).

    class_weights: [C+1] of 0 or more, entry 0 the background; see `class_weights`.
    """

    class_weights: Tensor

    def __init__(self, in_features: int, class_weights: Tensor):
        super().__init__(in_features, len(class_weights) - 1)
        weights = checked_weights("class_weights", class_weights, self.num_categories + 1)
        self.register_buffer("class_weights", weights, persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sum of weighted cross entropies over R: the number of proposals, not the sum of weights."""
        logits = at_least_float32(logits)
        total = F.cross_entropy(logits, labels, self.class_weights.to(logits.dtype), reduction="sum")
        return {"loss_classifier": total / max(len(labels), 1)}


def class_weights(instance_counts: Sequence[int], weighting: str, beta: float = 0.999) -> Tensor:
    """A weight for each label, float64 [C+1], entry 0 the background. A count of 0 is taken as 1.

    inverse                   1/n over its mean over the categories, background 1, clipped to [0.1, 5]
    effective_number          (1 - beta) / (1 - beta^n) (Cui et al. 2019, Eq. 2) over its mean over all C+1
                              labels; the background counts as three times all instances
    effective_number_clipped  the same over its mean over the categories, background 1, clipped to
                              [0.1, 5]: the published "Re-weight-cls"
    These are the released `cls_weight`, `cls_weight_bf` and `cls_weight_bours`. Raises ValueError for another
    weighting, a beta outside [0, 1), and counts that are not whole numbers of 0 or more.
    """
    counts = checked_counts("instance_counts", instance_counts).double()
    need(weighting in WEIGHTINGS, "weighting", f"one of {', '.join(WEIGHTINGS)}", weighting)
    need(0 <= beta < 1, "beta", "0 <= beta < 1", beta)
    if weighting == "effective_number":
        counts = torch.cat([3 * counts.sum().reshape(1), counts])
    counts = counts.clamp(min=1)
    raw = 1 / counts if weighting == "inverse" else (1 - beta) / (1 - beta**counts)
    weights = raw / raw.mean()
    if weighting == "effective_number":
        return weights
    return torch.cat([torch.ones(1, dtype=torch.float64), weights.clamp(0.1, 5)])
