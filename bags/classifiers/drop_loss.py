"""DropLoss (Hsieh et al., AAAI 2021): equalization loss that also drops background proposals at random."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bags.classifiers.base import TrainingCounts
from bags.classifiers.equalization import EqualizationLoss, TailImages
from bags.classifiers.sigmoid import Prior, SigmoidLayerSettings


@dataclass(frozen=True)
class DropLossSettings(SigmoidLayerSettings):
    """DropLoss (Hsieh et al. 2021)."""

    name: Literal["drop_loss"] = "drop_loss"
    tail_images: TailImages = 100
    prior: Prior = 0.001

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "DropLoss":
        """Make the untrained classifier."""
        return DropLoss(in_features, training.image_counts, self.tail_images, self.prior)


class DropLoss(EqualizationLoss):
    """Rare categories are spared other categories' objects, and a share of the background.

        w_j = 1 - T(f_j) (1 - y_j)  for foreground,   w_j = 1 - T(f_j) d,  d ~ Bernoulli(1 - mu)  for background

    mu is the share of rare categories among the foreground proposals of the batch: the fewer they are, the less
    background they learn from. d is drawn for each proposal and category from torch's global generator. A batch
    without foreground drops nothing. tail_images: categories in at most so many training images are rare; the
    paper's are LVIS's rare and common ones, 100 images.
    """

    def element_weights(self, targets: Tensor, labels: Tensor) -> Tensor:
        """Return 0 for the elements that are dropped, else 1: [R, C]. targets [R, C] are 0 or 1; labels [R]."""
        foreground = (labels > 0).to(targets.dtype)
        number = foreground.sum()
        rare = (targets * self.is_tail.to(targets.dtype)).sum()
        share = torch.where(number > 0, rare / number.clamp(min=1), 1)
        dropped = (torch.rand_like(targets) > share).to(targets.dtype)
        dropped = torch.where(foreground[:, None] > 0, 1 - targets, dropped)
        return 1 - dropped * self.is_tail.to(targets.dtype)
