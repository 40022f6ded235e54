"""Normalised calibration of a trained softmax (NorCal; Pan et al. 2021). Nothing is trained."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bags.classifiers.base import checked_counts, need_not_negative
from bags.classifiers.softmax import Softmax


class NorCal(Softmax):
    """Scores with each category's exp(logit) divided by n^gamma and normalised again (their Eq. 3).

    counts [C]: training images (or instances) n of each category; 0 is taken as 1. The background stays as it
    is. gamma >= 0: 0 changes nothing.
    """

    log_factors: Tensor

    def __init__(self, in_features: int, counts: Sequence[int], gamma: float = 0.6):
        super().__init__(in_features, len(counts))
        need_not_negative(gamma=gamma)
        factors = gamma * checked_counts("counts", counts).double().clamp(min=1).log()
        self.register_buffer("log_factors", torch.cat([factors.new_zeros(1), factors]), persistent=False)

    def probs(self, logits: Tensor) -> Tensor:
        """[R, C+1], rows sum to 1."""
        return super().probs(logits - self.log_factors.to(logits.dtype))
