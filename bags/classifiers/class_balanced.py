"""Class-balanced sigmoid cross entropy (Cui et al., CVPR 2019; their section 4.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bags.classifiers.base import checked_counts, need
from bags.classifiers.sigmoid import Sigmoid


class ClassBalancedSigmoid(Sigmoid):
    """Binary cross entropies of a proposal, weighted by the effective number of its category's instances.

        CB(p, y) = (1 - beta) / (1 - beta^n_y) * sum_j BCE(p_j, y_j)

    The weights are scaled to a mean of 1 over the categories, as in the authors' code; a background proposal, which
    has no n, weighs 1. counts: [C] training instances, 0 is taken as 1. beta in 0..1 (excluded): 0 weighs all alike.
    (The paper reports no LVIS.)
    """

    label_weights: Tensor

    def __init__(self, in_features: int, counts: Sequence[int], beta: float = 0.999, prior: float = 0.001):
        super().__init__(in_features, len(counts), prior)
        need(0 <= beta < 1, "beta", "0 <= beta < 1", beta)
        raw = (1 - beta) / (1 - beta ** checked_counts("counts", counts).double().clamp(min=1))
        weights = torch.cat([raw.new_ones(1), raw / raw.mean()])
        self.register_buffer("label_weights", weights, persistent=False)

    def element_weights(self, targets: Tensor, labels: Tensor) -> Tensor:
        """[R, 1]: by the proposal's label."""
        return self.label_weights.to(targets.dtype)[labels][:, None]
