"""Class-balanced sigmoid cross entropy (Cui et al., CVPR 2019; their section 4.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from bags.classifiers.base import TrainingCounts, checked_counts
from bags.classifiers.sigmoid import Prior, Sigmoid, SigmoidLayerSettings
from bags.core.settings import Range


@dataclass(frozen=True)
class ClassBalancedSigmoidSettings(SigmoidLayerSettings):
    """Class-balanced sigmoid cross entropy (Cui et al. 2019)."""

    name: Literal["class_balanced_sigmoid"] = "class_balanced_sigmoid"
    beta: Annotated[float, Range(ge=0, lt=1)] = 0.999
    prior: Prior = 0.001

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "ClassBalancedSigmoid":
        """Make the untrained classifier."""
        return ClassBalancedSigmoid(in_features, training.instance_counts, self.beta, self.prior)


class ClassBalancedSigmoid(Sigmoid):
    """Binary cross entropies of a proposal, weighted by the effective number of its category's instances.

        CB(p, y) = (1 - beta) / (1 - beta^n_y) * sum_j BCE(p_j, y_j)

    The weights are scaled to a mean of 1 over the categories, as in the authors' code; a background proposal, which
    has no n, weighs 1. counts: [C] training instances, 0 is taken as 1. beta in 0..1 (excluded): 0 weighs all alike.
    (The paper reports no LVIS.)
    """

    label_weights: Tensor

    def __init__(
        self,
        in_features: int,
        counts: Sequence[int],
        beta: float = ClassBalancedSigmoidSettings.beta,
        prior: float = ClassBalancedSigmoidSettings.prior,
    ):
        super().__init__(in_features, len(counts), prior)
        beta = ClassBalancedSigmoidSettings(beta=beta).beta
        raw = (1 - beta) / (1 - beta ** checked_counts("counts", counts).double().clamp(min=1))
        weights = torch.cat([raw.new_ones(1), raw / raw.mean()])
        self.register_buffer("label_weights", weights, persistent=False)

    def element_weights(self, targets: Tensor, labels: Tensor) -> Tensor:
        """Weigh each proposal by its label: [R, 1]."""
        return self.label_weights.to(targets.dtype)[labels][:, None]
