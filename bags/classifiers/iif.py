"""Inverse image frequency (IIF; Alexandridis et al., IEEE TIP 2023): logits multiplied by a factor for each category.

Published (Mask R-CNN R50, LVIS v1, 24 epochs, repeat factors, variant base10 of instances, a cosine classifier,
normalised masks and the augmented features of FASA; mask AP / APr APc APf, as in the authors' repository): 26.3 / 18.6
25.2 30.8.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from bags.classifiers.base import (
    ClassifierSettings,
    Counts,
    TrainingCounts,
    at_least_float32,
    checked_counts,
    checked_shares,
    counts_of,
    told_as_setting,
)
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range, need

Variant = Literal["raw", "smooth", "relative", "normit", "gombit", "base2", "base10"]


@dataclass(frozen=True)
class InverseFrequencySettings(ClassifierSettings):
    """Inverse image frequency (Alexandridis et al. 2023)."""

    name: Literal["iif"] = "iif"
    variant: Variant = "raw"
    counts: Counts = "instances"
    total: Annotated[int, Range(ge=0)] = 0  # what the counts are divided by; 0: their sum

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "InverseFrequency":
        """Make the untrained classifier. Raises UserError for what the counts do not allow."""
        counts = counts_of(self.counts, training)
        with told_as_setting():
            return InverseFrequency(in_features, counts, self.variant, self.total)


class InverseFrequency(Softmax):
    """Softmax of w * z in loss and scores, where w grows with the rarity of a category.

        raw       w_c = -ln p_c, p_c = n_c / N       base2, base10: logarithms to that base
        smooth    w_c = ln((N + 1) / (n_c + 1)) + 1
        relative  w_c = ln((1 - p_c) / p_c)          "prob" in the released code
        normit    w_c = -F(p_c)                      F: the inverse of the normal distribution function
        gombit    w_c = -ln(-ln(1 - p_c))

    n_c [C] are training instances (or images), 0 is taken as 1. total: N; 0 stands for the sum of n. The released code
    has factors of instances, with which the published model was trained, and of images with their number as N (100170
    for LVIS v1). The background has w = 1, and so has a single category. Raises ValueError for a total below one of the
    counts, and where w is not above 0: with relative and normit for a category with half of all objects or more, with
    gombit from 63 % on.
    """

    factors: Tensor

    def __init__(
        self,
        in_features: int,
        counts: Sequence[int],
        variant: Variant = InverseFrequencySettings.variant,
        total: int = 0,
    ):
        super().__init__(in_features, len(counts))
        settings = InverseFrequencySettings(variant=variant, total=total)
        numbers, shares = checked_counts("counts", counts).double().clamp(min=1), checked_shares(counts, total)
        factors = _factors(numbers, shares, settings.variant) if len(numbers) > 1 else torch.ones_like(numbers)
        words = f"one that suits a category with {100 * float(shares.max()):.0f} % of all objects"
        need(bool((factors > 0).all()), "variant", words, settings.variant)
        self.register_buffer("factors", torch.cat([factors.new_ones(1), factors]), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Average the cross entropy of the multiplied logits over the R proposals."""
        logits = at_least_float32(logits)
        return super().loss(logits * self.factors.to(logits.dtype), labels)

    def probs(self, logits: Tensor) -> Tensor:
        """Softmax [R, C+1] of the multiplied logits, column 0 the background. Rows sum to 1."""
        logits = at_least_float32(logits)
        return super().probs(logits * self.factors.to(logits.dtype))


def _factors(numbers: Tensor, shares: Tensor, variant: Variant) -> Tensor:
    """Compute w [C] of two or more categories with numbers [C] of objects, each above 0, and their shares [C]."""
    match variant:
        case "raw":
            return -shares.log()
        case "smooth":
            return ((numbers / shares + 1) / (numbers + 1)).log() + 1
        case "relative":
            return -torch.logit(shares)
        case "normit":
            return -torch.special.ndtri(shares)
        case "gombit":
            return -(-torch.log1p(-shares)).log()
        case "base2":
            return -shares.log2()
        case "base10":
            return -shares.log10()
