"""Equalization loss v2 (EQL v2; Tan et al., CVPR 2021).

Published (Mask R-CNN R50, LVIS v1, 12 epochs, mask AP / APr APc APf): 23.7 / 14.9 22.8 28.6 against 16.1 / 0.0 12.0
27.4 of softmax and 23.1 / 13.1 22.5 28.2 of BAGS in the same code.
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

BALANCED = 100.0  # the ratio before the first gradient: f is 1, and so are all weights
EPS = 1e-10


@dataclass(frozen=True)
class EqualizationLossV2Settings(ClassifierSettings):
    """Equalization loss v2 (Tan et al. 2021)."""

    name: Literal["eql_v2"] = "eql_v2"
    gamma: Annotated[float, Range(ge=0)] = 12.0
    mu: Annotated[float, Range(ge=0)] = 0.8
    alpha: Annotated[float, Range(ge=0)] = 4.0
    prior: Prior = 0.001

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "EqualizationLossV2":
        """Make the untrained classifier."""
        return EqualizationLossV2(in_features, training.num_categories, self.gamma, self.mu, self.alpha, self.prior)

    def columns(self, training: TrainingCounts) -> tuple:
        """Sigmoids, the first of them for objectness."""
        return (self.name,)


class EqualizationLossV2(Softmax):
    """Sigmoids whose positive and negative gradients are brought into balance, category by category.

        g_j = sum over training of |positive gradients| / |negative gradients|
        f(x) = 1 / (1 + exp(-gamma (x - mu)))
        negatives of j weigh f(g_j), positives 1 + alpha (1 - f(g_j))

    Gradients are those of the weighted loss, by the logit. Column 0 is an objectness sigmoid, trained on all
    proposals with weight 1, whose target is background; it gives the scores their factor P(foreground).
    gamma >= 0: steepness of f. mu >= 0: the ratio at which f is 1/2. alpha >= 0: the most that positives gain. prior:
    between 0 and 1, every score before training.
    Shape shorthand: R proposals, C categories; logits [R, C+1].

    `loss` adds its gradients to the buffers `positive` and `negative` in training mode, over all ranks, so that a
    checkpoint resumes exactly; in evaluation mode they do not change.
    """

    positive: Tensor
    negative: Tensor

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        gamma: float = EqualizationLossV2Settings.gamma,
        mu: float = EqualizationLossV2Settings.mu,
        alpha: float = EqualizationLossV2Settings.alpha,
        prior: float = EqualizationLossV2Settings.prior,
    ):
        super().__init__(in_features, num_categories)
        settings = EqualizationLossV2Settings(gamma=gamma, mu=mu, alpha=alpha, prior=prior)
        self.gamma, self.mu, self.alpha = settings.gamma, settings.mu, settings.alpha
        nn.init.constant_(self.linear.bias, prior_bias(settings.prior))
        # Double precision: late steps add little to large sums.
        for name in ("positive", "negative"):
            self.register_buffer(name, torch.zeros(num_categories, dtype=torch.float64))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Compute the weights of positives and of negatives, [C+1] each; those of column 0 are 1."""
        started = (self.positive.sum() + self.negative.sum()) > 0
        ratio = torch.where(started, self.positive / (self.negative + EPS), BALANCED)
        negative = torch.sigmoid(self.gamma * (ratio - self.mu))
        negative = torch.cat([negative.new_ones(1), negative])
        return 1 + self.alpha * (1 - negative), negative

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sum the weighted binary cross entropies over the C+1 columns and average them over the R proposals."""
        logits = at_least_float32(logits)
        targets = F.one_hot(labels, self.num_categories + 1).bool()
        positive, negative = (of.to(logits.dtype) for of in self.weights())
        weights = torch.where(targets, positive, negative)
        elements = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        if self.training:
            self._accumulate(logits.detach(), targets, weights)
        return {"loss_classifier": (weights * elements).sum() / max(len(labels), 1)}

    @torch.no_grad()
    def _accumulate(self, logits: Tensor, targets: Tensor, weights: Tensor) -> None:
        gradients = weights * (torch.sigmoid(logits) - targets.to(logits.dtype)).abs()
        sums = torch.stack([(gradients * chosen).double().sum(0)[1:] for chosen in (targets, ~targets)])
        positive, negative = sum_over_ranks(sums)
        self.positive += positive
        self.negative += negative

    def probs(self, logits: Tensor) -> Tensor:
        """Sigmoids [R, C+1], those of the categories times 1 - P(background). Rows do not sum to 1."""
        scores = torch.sigmoid(at_least_float32(logits))
        return torch.cat([scores[:, :1], scores[:, 1:] * (1 - scores[:, :1])], dim=1)
