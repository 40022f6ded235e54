"""Classification calibration with two heads (Calib in the paper's Table 3, rows (4) to (6); Wang et al., arXiv
1910.13081; SimCal, ECCV 2020).

Published (LVIS v0.5, mask AP / AP1 AP2 AP3 AP4): Mask R-CNN R50 21.10 / 8.60 22.00 19.60 26.60, HTC X101 29.85 / 16.05
30.60 29.80 33.50, HTC X101-MS-DCN 32.10 / 12.70 32.10 33.60 37.00.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from bags.classifiers.base import (
    Affine,
    BoxFeatures,
    ClassifierSettings,
    TrainingCounts,
    affine_of,
    checked_counts,
    new_linear,
)
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range


@dataclass(frozen=True)
class SimCalSettings(ClassifierSettings):
    """Dual-head calibration (Wang et al. 2020); takes a trained softmax, trains a second one."""

    on_softmax = True

    name: Literal["simcal"] = "simcal"
    below: Annotated[int, Range(ge=1)] = 300  # training instances of the categories that take the second one's scores

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "SimCal":
        """Make the classifier, whose first layer is still to be loaded."""
        return SimCal(in_features, training.instance_counts, self.below)


class SimCal(Softmax):
    """The trained softmax for frequent categories and background, a second one for rare categories.

        p[z] = p_calibrated[z] if n_z < below else p_original[z]

    Only the second layer is trained, on class-balanced proposals (sampler class_balanced). counts: [C] training
    instances n. below: 1 or more; the released code's is 300. (There the second head also has shared layers of its
    own; here it is a layer on the detector's features, so that it can be trained from stored ones.)

    Shape shorthand: R proposals, C categories; logits [R, 2 * (C+1)]: original, then calibrated. Scores are of
    two softmaxes: rows do not sum to 1.
    """

    is_rare: Tensor

    def __init__(self, in_features: int, counts: Sequence[int], below: int = SimCalSettings.below):
        super().__init__(in_features, len(counts))
        self.calibrated = new_linear(in_features, len(counts) + 1)
        rare = checked_counts("counts", counts) < SimCalSettings(below=below).below
        self.register_buffer("is_rare", torch.cat([rare.new_zeros(1), rare]), persistent=False)
        self.linear.requires_grad_(False)

    def requires_grad_(self, requires_grad: bool = True) -> "SimCal":
        """Switch gradients of the calibrated layer; the original one never has any."""
        super().requires_grad_(requires_grad)
        self.linear.requires_grad_(False)
        return self

    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute the logits of both layers, [R, 2 * (C+1)]."""
        return torch.cat([self.linear(features.fc), self.calibrated(features.fc)], dim=1)

    def affine(self) -> Affine | None:
        """Give both layers as one matrix."""
        original, calibrated = affine_of(self.linear), affine_of(self.calibrated)
        if original is None or calibrated is None or original.unit != calibrated.unit:
            return None
        weight = torch.cat([original.weight, calibrated.weight])
        return Affine(weight, torch.cat([original.bias, calibrated.bias]), original.unit)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Average the cross entropy of the calibrated layer over the R proposals."""
        return super().loss(logits.chunk(2, dim=1)[1], labels)

    def probs(self, logits: Tensor) -> Tensor:
        """Scores [R, C+1], column 0 the background, each of the layer that scores its label."""
        original, calibrated = (super(SimCal, self).probs(part) for part in logits.chunk(2, dim=1))
        return torch.where(self.is_rare, calibrated, original)

    def weight_norms(self) -> Tensor:
        """Norms [C+1], each of the layer that scores its label."""
        return torch.where(self.is_rare, self.calibrated.weight.detach().norm(dim=1), super().weight_norms())
