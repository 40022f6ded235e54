"""Foreground classification balance loss (FCBL) of BACL (Qi et al., IEEE Transactions on Multimedia 2023).

Published (Faster R-CNN R50, LVIS v1, box AP, from the authors' repository): 26.1 against 19.3 of the baseline, which
was trained for 24 epochs. BACL has two stages of 12 epochs. The first trains a detector with sigmoids and pasted
objects. The second trains classifier, box regression and RPN with this loss and with hallucinated features. Here only
the classifier is trained, and features are not hallucinated.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bags.classifiers.base import ClassifierSettings, TrainingCounts, at_least_float32, sum_over_ranks
from bags.classifiers.sigmoid import Prior, prior_bias
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range

LEAST = 1e-3  # least mean score in a margin


@dataclass(frozen=True)
class BACLSettings(ClassifierSettings):
    """Foreground classification balance loss (Qi et al. 2023)."""

    name: Literal["bacl"] = "bacl"
    alpha: Annotated[float, Range(ge=0)] = 0.85  # of the margins
    threshold: Annotated[float, Range(gt=0, lt=1)] = 0.7  # score from which a wrong category is always pushed down
    prior: Prior = 0.001

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "BACL":
        """Make the untrained classifier."""
        return BACL(in_features, training.num_categories, self.alpha, self.threshold, self.prior)

    def columns(self, training: TrainingCounts) -> tuple:
        """Sigmoids, the first of them for the background."""
        return (self.name,)


class BACL(Softmax):
    """Sigmoids with a margin between each pair of categories, and without negatives that are no rival.

        L = sum_j w_j BCE(z_j + m_ij, y_j) / R,     m_ij = alpha log(S_ij / S_ji)
        w_j = 1 if p_j >= p_i or p_j >= threshold;  else 0

    i is the category of a foreground proposal. S_ij, at least 0.001, is the mean share of category j in a softmax over
    the categories, over all proposals of category i so far. Where proposals of i are often taken for j, but seldom the
    other way round, i pushes j down harder. p are the scores of `probs`. Background proposals, and the background's
    column 0, have margin 0 and weight 1.
    alpha >= 0: 0 is without margins. threshold: between 0 and 1. prior: between 0 and 1, every score before training.

    Shape shorthand: R proposals, C categories; logits [R, C+1], column 0 the background's sigmoid.
    `loss` adds to the buffers `shares` [C, C] and `counts` [C] in training mode, over all ranks and after it has used
    them, so that a checkpoint resumes exactly; in evaluation mode they do not change.
    """

    shares: Tensor
    counts: Tensor

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        alpha: float = BACLSettings.alpha,
        threshold: float = BACLSettings.threshold,
        prior: float = BACLSettings.prior,
    ):
        super().__init__(in_features, num_categories)
        settings = BACLSettings(alpha=alpha, threshold=threshold, prior=prior)
        self.alpha, self.threshold = settings.alpha, settings.threshold
        nn.init.constant_(self.linear.bias, prior_bias(settings.prior))
        # Double precision: late steps add little to large sums.
        self.register_buffer("shares", torch.zeros(num_categories, num_categories, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_categories, dtype=torch.float64))

    def margins(self) -> Tensor:
        """Compute m_ij, float64 [C, C], row i of the proposal's category: 0 at j = i, and m_ji = -m_ij."""
        means = (self.shares / self.counts.clamp(min=1)[:, None]).clamp(min=LEAST).log()
        return self.alpha * (means - means.T)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sum the weighted binary cross entropies over the C+1 columns and average them over the R proposals.

        logits [R, C+1]; labels [R] int64 in 0..C, 0 = background.
        """
        logits = at_least_float32(logits)
        targets = F.one_hot(labels, self.num_categories + 1).to(logits.dtype)
        margins = F.pad(self.margins(), (1, 0, 1, 0)).to(logits.dtype)[labels]
        elements = F.binary_cross_entropy_with_logits(logits + margins, targets, reduction="none")
        weights = self.element_weights(logits.detach(), labels)
        if self.training:
            self._accumulate(logits.detach(), targets)
        return {"loss_classifier": (weights * elements).sum() / max(len(labels), 1)}

    def element_weights(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return 0 or 1 for each element, [R, C+1]. logits [R, C+1]; labels [R], 0 = background."""
        scores = self.probs(logits)
        rivals = (scores >= scores.gather(1, labels[:, None])) | (scores >= self.threshold)
        rivals[:, 0] = True
        return (rivals | (labels == 0)[:, None]).to(logits.dtype)

    @torch.no_grad()
    def _accumulate(self, logits: Tensor, targets: Tensor) -> None:
        """Add this batch's foreground to the sums. logits, targets [R, C+1]."""
        targets, shares = targets[:, 1:].double(), torch.softmax(logits[:, 1:].double(), -1)
        sums = sum_over_ranks(torch.cat([targets.T @ shares, targets.sum(0)[:, None]], dim=1))
        self.shares += sums[:, :-1]
        self.counts += sums[:, -1]

    def probs(self, logits: Tensor) -> Tensor:
        """Sigmoids [R, C+1], those of the categories times 1 - P(background). Rows do not sum to 1."""
        scores = torch.sigmoid(at_least_float32(logits))
        return torch.cat([scores[:, :1], scores[:, 1:] * (1 - scores[:, :1])], dim=1)
