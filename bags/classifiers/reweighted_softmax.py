"""Softmax cross entropy weighted by training counts (models (6) and (7) of Table 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import (
    ClassifierSettings,
    TrainingCounts,
    at_least_float32,
    checked_counts,
    checked_weights,
)
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range

Weighting = Literal["inverse", "effective_number", "effective_number_clipped"]


@dataclass(frozen=True)
class ReweightedSoftmaxSettings(ClassifierSettings):
    """Softmax cross entropy weighted by training counts; `class_weights` explains the choices."""

    name: Literal["reweighted_softmax"] = "reweighted_softmax"
    is_softmax = True
    weighting: Weighting = "inverse"
    beta: Annotated[float, Range(ge=0, lt=1)] = 0.999  # of the effective number

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "ReweightedSoftmax":
        """Make the untrained classifier, with weights from the instance counts."""
        return ReweightedSoftmax(in_features, class_weights(training.instance_counts, self.weighting, self.beta))


class ReweightedSoftmax(Softmax):
    """Softmax whose cross entropy is weighted by the label's class.

    class_weights: [C+1] of 0 or more, entry 0 the background; see `class_weights`.
    Shape shorthand: R proposals, C categories; logits [R, C+1], column 0 the background.
    """

    class_weights: Tensor

    def __init__(self, in_features: int, class_weights: Tensor):
        super().__init__(in_features, len(class_weights) - 1)
        weights = checked_weights("class_weights", class_weights, self.num_categories + 1)
        self.register_buffer("class_weights", weights, persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sum the weighted cross entropies and divide by R, the number of proposals, not by the sum of weights."""
        logits = at_least_float32(logits)
        total = F.cross_entropy(logits, labels, self.class_weights.to(logits.dtype), reduction="sum")
        return {"loss_classifier": total / max(len(labels), 1)}


def class_weights(
    instance_counts: Sequence[int], weighting: Weighting, beta: float = ReweightedSoftmaxSettings.beta
) -> Tensor:
    """Compute a weight for each label, float64 [C+1], entry 0 the background. A count of 0 is taken as 1.

    inverse                   1/n over its mean over the categories, background 1, clipped to [0.1, 5]
    effective_number          (1 - beta) / (1 - beta^n) (Cui et al. 2019, Eq. 2) over its mean over all C+1
                              labels; the background counts as three times all instances
    effective_number_clipped  the same over its mean over the categories, background 1, clipped to
                              [0.1, 5]: the published "Re-weight-cls"
    These are the released `cls_weight`, `cls_weight_bf` and `cls_weight_bours`. Raises ValueError for another
    weighting, a beta outside [0, 1), and counts that are not whole numbers of 0 or more.
    """
    settings = ReweightedSoftmaxSettings(weighting=weighting, beta=beta)
    counts = checked_counts("instance_counts", instance_counts).double()
    if settings.weighting == "effective_number":
        counts = torch.cat([3 * counts.sum().reshape(1), counts])
    counts = counts.clamp(min=1)
    raw = 1 / counts if settings.weighting == "inverse" else (1 - settings.beta) / (1 - settings.beta**counts)
    weights = raw / raw.mean()
    if settings.weighting == "effective_number":
        return weights
    return torch.cat([torch.ones(1, dtype=torch.float64), weights.clamp(0.1, 5)])
