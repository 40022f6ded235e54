"""Gumbel optimised loss (GOL; Alexandridis et al., ECCV 2022): DropLoss with a Gumbel link in place of the sigmoid.

Published (Mask R-CNN R50, LVIS v1, repeat factors, 24 epochs, normalised masks; mask AP / APr APc APf): 27.7 / 21.4
27.7 30.4.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bags.classifiers.base import ClassifierSettings, TrainingCounts, at_least_float32
from bags.classifiers.drop_loss import DropLoss
from bags.classifiers.equalization import TailImages
from bags.classifiers.sigmoid import Prior, category_targets

LEAST, MOST = -4.0, 10.0  # of a logit in the loss; beyond them it has no gradient, as in the released code


@dataclass(frozen=True)
class GumbelSettings(ClassifierSettings):
    """Gumbel optimised loss (Alexandridis et al. 2022)."""

    name: Literal["gumbel"] = "gumbel"
    drop: bool = True  # with DropLoss, as published; false: the Gumbel link alone
    tail_images: TailImages = 100
    prior: Prior = 0.001

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "Gumbel":
        """Make the untrained classifier."""
        return Gumbel(in_features, training.image_counts, self.drop, self.tail_images, self.prior)

    def columns(self, training: TrainingCounts) -> tuple:
        """Logits of a Gumbel distribution, which no other method has."""
        return (self.name,)


class Gumbel(DropLoss):
    """Binary cross entropy of each category with the score exp(-exp(-z)).

    This link is not symmetric: scores fall to 0 much faster than they rise to 1, as objects of one category are much
    rarer than everything else. DropLoss spares rare categories some of their negatives.
    image_counts [C]: training images of each category. drop: whether DropLoss is on. tail_images: categories in at most
    so many images are rare. prior: between 0 and 1, every score before training.
    Shape shorthand: R proposals, C categories; logits [R, C], column c the category of label c + 1.
    """

    def __init__(
        self,
        in_features: int,
        image_counts: Sequence[int],
        drop: bool = GumbelSettings.drop,
        tail_images: int = GumbelSettings.tail_images,
        prior: float = GumbelSettings.prior,
    ):
        super().__init__(in_features, image_counts, tail_images, prior)
        self.drop = drop
        nn.init.constant_(self.linear.bias, -math.log(-math.log(prior)))

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sum the binary cross entropies that are not dropped over the categories, average them over R proposals."""
        logits = at_least_float32(logits)
        targets = category_targets(labels, self.num_categories, logits.dtype)
        decay = torch.exp(-logits.clamp(LEAST, MOST))  # -log of the score
        elements = torch.where(targets > 0, decay, -torch.log(-torch.expm1(-decay)))
        if self.drop:
            elements = elements * self.element_weights(targets, labels)
        return {"loss_classifier": elements.sum() / max(len(labels), 1)}

    def probs(self, logits: Tensor) -> Tensor:
        """Scores exp(-exp(-z)) [R, C+1]; the background scores 1 minus the best. Rows do not sum to 1."""
        scores = torch.exp(-torch.exp(-at_least_float32(logits)))
        return torch.cat([1 - scores.amax(1, keepdim=True), scores], dim=1)
