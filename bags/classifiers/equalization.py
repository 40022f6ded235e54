"""Equalization loss (EQL; Tan et al., CVPR 2020).

Published (Mask R-CNN R50, mask AP / APr APc APf): LVIS v1, 12 epochs, 18.6 / 2.1 17.4 27.2 against 16.1 / 0.0 12.0 27.4
of softmax (table of the authors' later repository); LVIS v0.5 24.0 / 9.4 25.2 28.4 against 21.2 / 3.2 21.1 28.7.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from bags.classifiers.base import TrainingCounts, checked_counts
from bags.classifiers.sigmoid import Prior, Sigmoid, SigmoidLayerSettings
from bags.core.settings import Range

TailImages = Annotated[int, Range(ge=0)]  # categories in at most so many training images are rare


@dataclass(frozen=True)
class EqualizationLossSettings(SigmoidLayerSettings):
    """Equalization loss (Tan et al. 2020)."""

    name: Literal["eql"] = "eql"
    tail_images: TailImages = 100
    prior: Prior = 0.001

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "EqualizationLoss":
        """Make the untrained classifier."""
        return EqualizationLoss(in_features, training.image_counts, self.tail_images, self.prior)


class EqualizationLoss(Sigmoid):
    """Objects of other categories do not push rare categories down.

        L = -sum_j w_j log(p_j if y_j else 1 - p_j),    w_j = 1 - E(r) T(f_j) (1 - y_j)

    E(r) is 1 for foreground proposals, T(f_j) for rare categories, which so learn only from their own objects and from
    background. image_counts: [C] training images of each category; tail_images: those of at most so many are
    rare. (The paper's lambda is that share of all images: 1.76e-3 of them in LVIS v0.5, which are 100. The models of
    others for LVIS v1, the published one below and GOL's, have 1.1e-3, which are 109.)
    """

    is_tail: Tensor

    def __init__(
        self,
        in_features: int,
        image_counts: Sequence[int],
        tail_images: int = EqualizationLossSettings.tail_images,
        prior: float = EqualizationLossSettings.prior,
    ):
        super().__init__(in_features, len(image_counts), prior)
        tail_images = EqualizationLossSettings(tail_images=tail_images).tail_images
        is_tail = checked_counts("image_counts", image_counts) <= tail_images
        self.register_buffer("is_tail", is_tail, persistent=False)

    def element_weights(self, targets: Tensor, labels: Tensor) -> Tensor:
        """Return 0 for rare categories on proposals of other categories, else 1: [R, C]."""
        foreground = (labels > 0).to(targets.dtype)[:, None]
        return 1 - foreground * self.is_tail.to(targets.dtype) * (1 - targets)
