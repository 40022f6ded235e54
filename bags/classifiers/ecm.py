"""Effective class-margin loss (ECM; Cho and Krähenbühl, ECCV 2022).

Published (Mask R-CNN R50, LVIS v1, repeat factors; box AP / mask AP, as in the authors' repository): 26.9 / 26.4 after
12 epochs, 27.9 / 27.5 after 24.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bags.classifiers.base import (
    ClassifierSettings,
    CosineLinear,
    Counts,
    TrainingCounts,
    at_least_float32,
    checked_counts,
    counts_of,
)
from bags.classifiers.sigmoid import Prior, prior_bias
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range


@dataclass(frozen=True)
class EffectiveClassMarginSettings(ClassifierSettings):
    """Effective class-margin loss (Cho and Krähenbühl 2022)."""

    name: Literal["ecm"] = "ecm"
    counts: Counts = "instances"  # the released code counts images
    background: Annotated[float, Range(gt=0, le=1e6)] = 6.3313  # background proposals for each object, as published
    scale: Annotated[float, Range(ge=0)] = 20.0  # of the cosine layer; 0: a linear layer
    prior: Prior = 0.001

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "EffectiveClassMargin":
        """Make the untrained classifier."""
        counts = counts_of(self.counts, training)
        return EffectiveClassMargin(in_features, counts, self.background, self.scale, self.prior)

    def columns(self, training: TrainingCounts) -> tuple:
        """Sigmoids, the first of them for the background, of a linear or of a cosine layer."""
        return self.name, self.scale > 0


class EffectiveClassMargin(Softmax):
    """Sigmoids with a margin for each category, which comes from a bound on its detection error.

        s_c(x) = w+ e^f / (w+ e^f + w- e^-f),   w+ = 1 / g+,  w- = 1 / g-
        g+ = N-^(1/4) / (N+^(1/4) + N-^(1/4)),  g- = N+^(1/4) / (N+^(1/4) + N-^(1/4))
        L = sum_c m_c BCE(s_c, y_c),            m_c = a log((1 + a) / a),  a = N- / N+

    N+ are the samples of a category and N- all others. So s_c = sigmoid(2 f - log(N- / N+) / 4): a rare category must
    score higher to count as found. m_c is near 1 for rare categories and less for frequent ones. The background is a
    category of its own, with `background` samples for each object. Scores are sigmoid(f), without the margin, times
    1 - P(background).
    counts: [C] training instances, 0 is taken as 1. background: above 0, up to 1e6. scale: >= 0, of the published
    normalised layer (scale times a cosine); 0 is a plain linear layer. prior: between 0 and 1, every score before
    training.
    Shape shorthand: R proposals, C categories; logits [R, C+1].
    """

    margins: Tensor
    weights: Tensor

    def __init__(
        self,
        in_features: int,
        counts: Sequence[int],
        background: float = EffectiveClassMarginSettings.background,
        scale: float = EffectiveClassMarginSettings.scale,
        prior: float = EffectiveClassMarginSettings.prior,
    ):
        super().__init__(in_features, len(counts))
        settings = EffectiveClassMarginSettings(background=background, scale=scale, prior=prior)
        if settings.scale > 0:
            self.linear = CosineLinear(in_features, len(counts) + 1, settings.scale)
        nn.init.constant_(self.linear.bias, prior_bias(settings.prior))
        objects = checked_counts("counts", counts).double().clamp(min=1)
        positive = torch.cat([settings.background * objects.sum()[None], objects])
        ratio = (positive.sum() - positive) / positive
        self.register_buffer("margins", ratio.log() / 4, persistent=False)
        self.register_buffer("weights", ratio * torch.log1p(1 / ratio), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sum the weighted binary cross entropies over the C+1 columns and average them over the R proposals."""
        logits = at_least_float32(logits)
        targets = F.one_hot(labels, self.num_categories + 1).to(logits.dtype)
        shifted = 2 * logits - self.margins.to(logits.dtype)
        elements = F.binary_cross_entropy_with_logits(shifted, targets, reduction="none")
        return {"loss_classifier": (self.weights.to(logits.dtype) * elements).sum() / max(len(labels), 1)}

    def probs(self, logits: Tensor) -> Tensor:
        """Sigmoids [R, C+1], those of the categories times 1 - P(background). Rows do not sum to 1."""
        scores = torch.sigmoid(at_least_float32(logits))
        return torch.cat([scores[:, :1], scores[:, 1:] * (1 - scores[:, :1])], dim=1)
