"""Distribution alignment of a trained softmax (DisAlign; Zhang et al., CVPR 2021).

Published (Mask R-CNN R50, LVIS v1, several scales; 180,000 iterations for the baseline, then 9,000 for the calibration;
box AP / mask AP, from the authors' repository): 21.9 / 21.3 against 18.8 / 18.3 of the baseline; with a cosine layer in
the baseline 24.8 / 24.2 against 21.3 / 21.1. Boxes of r, c, f: 3.3 21.1 31.1 against 0.9 15.1 30.6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bags.classifiers.base import (
    Affine,
    BoxFeatures,
    ClassifierSettings,
    TrainingCounts,
    at_least_float32,
    checked_counts,
    new_linear,
)
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range


@dataclass(frozen=True)
class DisAlignSettings(ClassifierSettings):
    """Distribution alignment (Zhang et al. 2021); takes a trained softmax, trains its calibration."""

    on_softmax = True

    name: Literal["disalign"] = "disalign"
    rho: Annotated[float, Range(ge=0)] = 0.8  # power of the class weights; 0: all are 1
    divide_by: Literal["proposals", "weights"] = "proposals"  # the loss; the released code: the sum of the weights

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "DisAlign":
        """Make the classifier, whose frozen layer is still to be loaded."""
        return DisAlign(in_features, training.instance_counts, self.rho, self.divide_by)


class DisAlign(Softmax):
    """A frozen softmax whose category logits are scaled and shifted where a learned confidence asks for it.

        z'_j = s(x) (a_j z_j + b_j) + (1 - s(x)) z_j,   s(x) = sigmoid(v x + d)      (adaptive calibration)
        L = -w_y log softmax(z')_y,   w_c = C (1/r_c)^rho / sum_k (1/r_k)^rho        (generalised re-weighting)

    r_c is a category's share of the training objects. The background keeps its logit and has weight 1.
    counts: [C] training instances, 0 is taken as 1. rho >= 0: the authors' models have 0.8. divide_by: what the sum of
    the losses is divided by, the number of "proposals", as in the paper, or the sum of their "weights", as in the
    released code.
    Trained are scale a [C], offset b [C] and the confidence (v, d); at first a = 1 and b = 0, which changes nothing.
    The authors' mask heads and the cosine layer of the baseline are not part of it.

    Shape shorthand: R proposals, C categories; logits [R, C+1], column 0 the background.
    """

    class_weights: Tensor

    def __init__(
        self,
        in_features: int,
        counts: Sequence[int],
        rho: float = DisAlignSettings.rho,
        divide_by: Literal["proposals", "weights"] = "proposals",
    ):
        super().__init__(in_features, len(counts))
        settings = DisAlignSettings(rho=rho, divide_by=divide_by)
        self.by_weights = settings.divide_by == "weights"
        self.scale = nn.Parameter(torch.ones(len(counts)))
        self.offset = nn.Parameter(torch.zeros(len(counts)))
        self.confidence = new_linear(in_features, 1)
        numbers = checked_counts("counts", counts).double().clamp(min=1)
        weights = len(numbers) * torch.softmax(-settings.rho * numbers.log(), 0)  # n^-rho over its mean
        weights = torch.cat([weights.new_ones(1), weights])
        self.register_buffer("class_weights", weights, persistent=False)
        self.linear.requires_grad_(False)

    def requires_grad_(self, requires_grad: bool = True) -> "DisAlign":
        """Switch gradients of the calibration; the softmax's layer never has any."""
        super().requires_grad_(requires_grad)
        self.linear.requires_grad_(False)
        return self

    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute the aligned logits [R, C+1]."""
        logits = at_least_float32(self.linear(features.fc))
        confidence = torch.sigmoid(at_least_float32(self.confidence(features.fc)))
        background, categories = logits.split([1, self.num_categories], dim=1)
        aligned = self.scale * categories + self.offset
        return torch.cat([background, confidence * aligned + (1 - confidence) * categories], dim=1)

    def affine(self) -> Affine | None:
        """Return None: the confidence makes the logits no affine map of the features."""
        return None

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Average the weighted cross entropies; 0 for R = 0. logits [R, C+1]; labels [R] in 0..C, 0 = background."""
        logits = at_least_float32(logits)
        weights = self.class_weights.to(logits.dtype)
        total = F.cross_entropy(logits, labels, weights, reduction="sum")
        if self.by_weights and len(labels):
            return {"loss_classifier": total / weights[labels].sum()}
        return {"loss_classifier": total / max(len(labels), 1)}
