"""One sigmoid per category and none for the background: the layer of EQL, DropLoss, federated loss and others.

Shape shorthand: R proposals, C categories; logits [R, C], column c the category of label c + 1.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from bags.core.settings import Range

Prior = Annotated[float, Range(gt=0, lt=1)]  # every category's score before training


@dataclass(frozen=True)
class SigmoidLayerSettings(ClassifierSettings):
    """Base of the settings of all methods on this layer, which can take each other's weights."""

    def columns(self, training: TrainingCounts) -> tuple:
        """The same for all of them."""
        return ("sigmoid",)


@dataclass(frozen=True)
class SigmoidSettings(SigmoidLayerSettings):
    """A sigmoid for each category, none for the background."""

    name: Literal["sigmoid"] = "sigmoid"
    prior: Prior = 0.001

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "Sigmoid":
        """Make the untrained classifier."""
        return Sigmoid(in_features, training.num_categories, self.prior)


class Sigmoid(ProposalClassifier):
    """Binary cross entropy of each category; a background proposal is a negative of all of them.

    prior: between 0 and 1, every category's score before training (bias of the layer), so that the many negatives of
    the first steps do not swamp it; 0.001 as in the published long-tail models.
    """

    def __init__(self, in_features: int, num_categories: int, prior: float = SigmoidSettings.prior):
        super().__init__()
        settings = SigmoidSettings(prior=prior)
        self.num_categories = num_categories
        self.linear = new_linear(in_features, num_categories)
        nn.init.constant_(self.linear.bias, prior_bias(settings.prior))

    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute logits [R, C]."""
        return self.linear(features.fc)

    def affine(self) -> Affine | None:
        """Give the layer as one matrix."""
        return affine_of(self.linear)

    def element_weights(self, targets: Tensor, labels: Tensor) -> Tensor:
        """Weigh each element: factors broadcast to [R, C]; here 1. targets [R, C] are 0 or 1; labels [R]."""
        return targets.new_ones(1, 1)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sum the weighted binary cross entropies over the categories and average them over the R proposals."""
        logits = at_least_float32(logits)
        targets = category_targets(labels, self.num_categories, logits.dtype)
        elements = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        total = (self.element_weights(targets, labels) * elements).sum()
        return {"loss_classifier": total / max(len(labels), 1)}

    def probs(self, logits: Tensor) -> Tensor:
        """Scores [R, C+1]. Categories score independently; the background scores 1 minus the best of them.

        So a proposal is background where no category is more likely than not. Rows do not sum to 1.
        """
        scores = torch.sigmoid(at_least_float32(logits))
        return torch.cat([1 - scores.amax(1, keepdim=True), scores], dim=1)

    def weight_norms(self) -> Tensor:
        """Norms [C+1] of the layer's rows; NaN for the background, which has no row."""
        norms = self.linear.weight.detach().norm(dim=1)
        return torch.cat([norms.new_full((1,), math.nan), norms])


def prior_bias(prior: float) -> float:
    """Return the logit of a probability between 0 and 1."""
    return math.log(prior / (1 - prior))


def category_targets(labels: Tensor, num_categories: int, dtype: torch.dtype) -> Tensor:
    """Return [R, C]: 1 at each proposal's category, zeros for background."""
    return F.one_hot(labels, num_categories + 1)[:, 1:].to(dtype)
