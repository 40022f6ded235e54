"""Softmax over background and all categories (Eq. 1-2): the baseline.

Shape shorthand: R proposals, C categories; logits [R, C+1], column 0 the background.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import (
    Affine,
    BoxFeatures,
    ClassifierSettings,
    ProposalClassifier,
    TrainingCounts,
    affine_of,
    at_least_float32,
    new_linear,
)


@dataclass(frozen=True)
class SoftmaxSettings(ClassifierSettings):
    """Plain softmax cross entropy (Eq. 1-2)."""

    name: Literal["softmax"] = "softmax"
    is_softmax = True

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "Softmax":
        """Make the untrained classifier."""
        return Softmax(in_features, training.num_categories)


class Softmax(ProposalClassifier):
    """The baseline of every table. Other classifiers on the same layer derive from it."""

    def __init__(self, in_features: int, num_categories: int):
        super().__init__()
        self.num_categories = num_categories
        self.linear = new_linear(in_features, num_categories + 1)

    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute logits [R, C+1]."""
        return self.linear(features.fc)

    def affine(self) -> Affine | None:
        """Give the layer as one matrix."""
        return affine_of(self.linear)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Average the cross entropy over the R proposals (Eq. 1), at least in float32; 0 for R = 0."""
        total = F.cross_entropy(at_least_float32(logits), labels, reduction="sum")
        return {"loss_classifier": total / max(len(labels), 1)}

    def probs(self, logits: Tensor) -> Tensor:
        """Softmax (Eq. 2): [R, C+1], rows sum to 1."""
        return torch.softmax(at_least_float32(logits), -1)

    def weight_norms(self) -> Tensor:
        """Norms [C+1] of the layer's rows; entry 0 is the background."""
        return self.linear.weight.detach().norm(dim=1)
