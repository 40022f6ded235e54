"""Adaptive class suppression loss (ACSL; Wang et al., CVPR 2021).

Published (Faster R-CNN R50, LVIS v0.5, classifier trained on from softmax, box AP): 26.36 against 21.18 of softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import ClassifierSettings, TrainingCounts, at_least_float32, checked_counts
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range

SHARES = (0.01, 0.1)  # of the background proposals, for rare and common categories


@dataclass(frozen=True)
class ACSLSettings(ClassifierSettings):
    """Adaptive class suppression loss, trained on from softmax's weights as its authors do."""

    name: Literal["acsl"] = "acsl"
    threshold: Annotated[float, Range(gt=0, lt=1)] = 0.7  # score from which a wrong category is pushed down

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "ACSL":
        """Make the untrained classifier."""
        return ACSL(in_features, training.image_counts, self.threshold)


class ACSL(Softmax):
    """Sigmoids; a negative counts only where the classifier is wrongly confident of it.

        w_ij = 1 if j is the label, or p_ij >= threshold;  else 0

    On background proposals, as in the released code, the weight is 1 for the background and for all frequent
    categories. Common and rare categories count on a tenth and on a hundredth of these proposals, drawn from torch's
    global generator.
    image_counts: [C] training images; at most 10 make a category rare, at most 100 common (LVIS).
    threshold: between 0 and 1, the score from which a wrong category is pushed down.
    Shape shorthand: R proposals, C categories; logits [R, C+1], column 0 a sigmoid for the background.
    """

    bands: Tensor

    def __init__(self, in_features: int, image_counts: Sequence[int], threshold: float = ACSLSettings.threshold):
        super().__init__(in_features, len(image_counts))
        self.threshold = ACSLSettings(threshold=threshold).threshold
        images = checked_counts("image_counts", image_counts)
        bands = torch.bucketize(images, torch.tensor([10, 100]))  # 0 rare, 1 common, 2 frequent
        self.register_buffer("bands", torch.cat([torch.full((1,), 2), bands]), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sum the weighted binary cross entropies over the C+1 columns and average them over the R proposals."""
        logits = at_least_float32(logits)
        targets = F.one_hot(labels, self.num_categories + 1).to(logits.dtype)
        elements = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        weights = self.element_weights(logits.detach(), targets, labels)
        return {"loss_classifier": (weights * elements).sum() / max(len(labels), 1)}

    def element_weights(self, logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        """Return 0 or 1 for each element, [R, C+1]. logits, targets [R, C+1]; labels [R], 0 = background."""
        background = labels == 0
        confident = (torch.sigmoid(logits) >= self.threshold) | (targets > 0)
        # Random ranks among the background proposals, one draw for each band.
        keys = torch.rand(len(SHARES), len(labels), device=labels.device).masked_fill(~background, 2.0)
        quotas = [(background.sum().double() * share).floor() for share in SHARES]
        chosen = keys.argsort(1).argsort(1) < torch.stack(quotas)[:, None]
        by_band = torch.cat([chosen, torch.ones_like(chosen[:1])])  # [3, R]
        return torch.where(background[:, None], by_band[self.bands].T, confident).to(logits.dtype)

    def probs(self, logits: Tensor) -> Tensor:
        """Sigmoids [R, C+1], column 0 the background. Rows do not sum to 1."""
        return torch.sigmoid(at_least_float32(logits))
