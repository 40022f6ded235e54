"""Inverse image frequency (IIF; Alexandridis et al., IEEE TIP 2023): logits multiplied by a factor for each category.

Published (Mask R-CNN R50, LVIS v1, repeat factors, 24 epochs; mask AP, as in the authors' repository): 26.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bags.classifiers.base import ClassifierSettings, TrainingCounts, at_least_float32, checked_counts
from bags.classifiers.softmax import Softmax

Variant = Literal["raw", "smooth", "base2", "base10"]


@dataclass(frozen=True)
class InverseFrequencySettings(ClassifierSettings):
    """Inverse image frequency (Alexandridis et al. 2023)."""

    name: Literal["iif"] = "iif"
    variant: Variant = "raw"
    counts: Literal["instances", "images"] = "instances"

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "InverseFrequency":
        """Make the untrained classifier."""
        counts = training.image_counts if self.counts == "images" else training.instance_counts
        return InverseFrequency(in_features, counts, self.variant)


class InverseFrequency(Softmax):
    """Softmax of w * z in loss and scores, where w grows with the rarity of a category.

        raw     w_c = ln(N / n_c)                    base2, base10: logarithms to that base
        smooth  w_c = ln((N + 1) / (n_c + 1)) + 1

    n_c [C] are training instances, 0 is taken as 1, and N is their sum (the released code takes images, of which N is
    the number in the dataset). The background has w = 1. A category with all objects would have w = 0, except with
    smooth, so a single category always has w = 1.
    """

    factors: Tensor

    def __init__(self, in_features: int, counts: Sequence[int], variant: Variant = InverseFrequencySettings.variant):
        super().__init__(in_features, len(counts))
        settings = InverseFrequencySettings(variant=variant)
        numbers = checked_counts("counts", counts).double().clamp(min=1)
        total = numbers.sum()
        if settings.variant == "smooth":
            factors = ((total + 1) / (numbers + 1)).log() + 1
        else:
            logarithm = {"raw": torch.log, "base2": torch.log2, "base10": torch.log10}[settings.variant]
            factors = logarithm(total / numbers)
        factors = factors if len(factors) > 1 else torch.ones_like(factors)
        self.register_buffer("factors", torch.cat([factors.new_ones(1), factors]), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Average the cross entropy of the multiplied logits over the R proposals."""
        logits = at_least_float32(logits)
        return super().loss(logits * self.factors.to(logits.dtype), labels)

    def probs(self, logits: Tensor) -> Tensor:
        """Softmax [R, C+1] of the multiplied logits, column 0 the background. Rows sum to 1."""
        logits = at_least_float32(logits)
        return super().probs(logits * self.factors.to(logits.dtype))
