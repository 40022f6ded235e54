"""Normalised calibration of a trained softmax (NorCal; Pan et al. 2021). Nothing is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from bags.classifiers.base import ClassifierSettings, Counts, TrainingCounts, checked_counts, counts_of
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range


@dataclass(frozen=True)
class NorCalSettings(ClassifierSettings):
    """Normalised calibration; takes a trained softmax, trains nothing."""

    trained, on_softmax = False, True

    name: Literal["norcal"] = "norcal"
    gamma: Annotated[float, Range(ge=0)] = 0.6
    counts: Counts = "images"  # a category's exp(logit) is divided by these, to the gamma

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "NorCal":
        """Make the classifier, which scores with the layer of a trained softmax."""
        counts = counts_of(self.counts, training)
        return NorCal(in_features, counts, self.gamma)


class NorCal(Softmax):
    """Scores with each category's exp(logit) divided by n^gamma and normalised again (their Eq. 3).

    counts [C]: training images (or instances) n of each category; 0 is taken as 1. The background stays as it
    is. gamma >= 0: 0 changes nothing.
    """

    log_factors: Tensor

    def __init__(self, in_features: int, counts: Sequence[int], gamma: float = NorCalSettings.gamma):
        super().__init__(in_features, len(counts))
        factors = NorCalSettings(gamma=gamma).gamma * checked_counts("counts", counts).double().clamp(min=1).log()
        self.register_buffer("log_factors", torch.cat([factors.new_zeros(1), factors]), persistent=False)

    def probs(self, logits: Tensor) -> Tensor:
        """Calibrated softmax [R, C+1], column 0 the background. Rows sum to 1."""
        return super().probs(logits - self.log_factors.to(logits.dtype))
