"""One sigmoid per category and none for the background: the layer of EQL, DropLoss, federated loss and others.

Shape shorthand: R proposals, C categories; logits [R, C], column c the category of label c + 1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bags.classifiers.base import BoxFeatures, ProposalClassifier, at_least_float32, need, new_linear


class Sigmoid(ProposalClassifier):
    """Binary cross entropy of each category; a background proposal is a negative of all of them.

    prior: in 0..1, every category's score before training (bias of the layer), so that the many negatives of
    the first steps do not swamp it; 0.001 as in the published long-tail models.
    """

    def __init__(self, in_features: int, num_categories: int, prior: float = 0.001):
        super().__init__()
        self.num_categories = num_categories
        self.linear = new_linear(in_features, num_categories)
        nn.init.constant_(self.linear.bias, prior_bias(prior))

    def forward(self, features: BoxFeatures) -> Tensor:
        """Features -> logits [R, C]."""
        return self.linear(features.fc)

    def element_weights(self, targets: Tensor, labels: Tensor) -> Tensor:
        """Weight of each element, broadcast to [R, C], from targets [R, C] (0 or 1) and labels [R]. Plain: 1."""
        return targets.new_ones(1, 1)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Weighted binary cross entropies, summed over the categories, averaged over the R proposals."""
        logits = at_least_float32(logits)
        targets = category_targets(labels, self.num_categories, logits.dtype)
        elements = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        total = (self.element_weights(targets, labels) * elements).sum()
        return {"loss_classifier": total / max(len(labels), 1)}

    def probs(self, logits: Tensor) -> Tensor:
        """[R, C+1]. Categories score independently; the background 1 minus the best of them.

        So a proposal is background where no category is more likely than not. Rows do not sum to 1.
        """
        scores = torch.sigmoid(at_least_float32(logits))
        return torch.cat([1 - scores.amax(1, keepdim=True), scores], dim=1)

    def weight_norms(self) -> Tensor:
        """[C+1]; NaN for the background, which has no vector."""
        norms = self.linear.weight.detach().norm(dim=1)
        return torch.cat([norms.new_full((1,), math.nan), norms])


def prior_bias(prior: float) -> float:
    """The logit of a probability in 0..1. Raises ValueError for another."""
    need(0 < prior < 1, "prior", "a probability between 0 and 1", prior)
    return math.log(prior / (1 - prior))


def category_targets(labels: Tensor, num_categories: int, dtype: torch.dtype) -> Tensor:
    """[R, C]: 1 at each proposal's category, nothing for background."""
    return F.one_hot(labels, num_categories + 1)[:, 1:].to(dtype)
