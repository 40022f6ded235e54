"""Logits shifted by the categories' training frequencies: logit adjustment (Menon et al., ICLR 2021) and Balanced
Softmax (Ren et al., NeurIPS 2020), which is the same loss with tau 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from bags.classifiers.base import ClassifierSettings, TrainingCounts, at_least_float32, checked_counts
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range

Adjusted = Literal["loss", "scores"]


@dataclass(frozen=True)
class LogitAdjustedSettings(ClassifierSettings):
    """Logit adjustment (Menon et al. 2021); with tau 1 and adjust loss, Balanced Softmax (Ren et al. 2020)."""

    name: Literal["logit_adjustment"] = "logit_adjustment"
    tau: Annotated[float, Range(ge=0)] = 1.0
    adjust: Adjusted = "loss"

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "LogitAdjusted":
        """Make the untrained classifier."""
        return LogitAdjusted(in_features, training.instance_counts, self.tau, self.adjust)


class LogitAdjusted(Softmax):
    """Softmax for categories that will be equally frequent in use, trained where they are not.

        adjust "loss":    L = CE(z + tau log(pi / q)),  scores softmax(z)
        adjust "scores":  L = CE(z),                    scores softmax(z - tau log(pi / q))

    pi_c = n_c / sum(n) is a category's share of the training objects, q_c = 1 / C the desired share. The
    background is as frequent in use as in training, pi_0 = q_0, so its logit stays. (Written with counts only, as
    for classification, it would have to be given one, and P(background) would shift with it.)
    counts: [C] training instances n, 0 is taken as 1. tau >= 0: 1 as derived, 0 changes nothing.
    """

    shift: Tensor

    def __init__(
        self,
        in_features: int,
        counts: Sequence[int],
        tau: float = LogitAdjustedSettings.tau,
        adjust: Adjusted = LogitAdjustedSettings.adjust,
    ):
        super().__init__(in_features, len(counts))
        settings = LogitAdjustedSettings(tau=tau, adjust=adjust)
        self.adjust = settings.adjust
        numbers = checked_counts("counts", counts).double().clamp(min=1)
        shift = settings.tau * (numbers / numbers.mean()).log()
        self.register_buffer("shift", torch.cat([shift.new_zeros(1), shift]), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Average the cross entropy over the R proposals; `adjust` "loss" adjusts its logits."""
        logits = at_least_float32(logits)
        return super().loss(logits + self.shift.to(logits.dtype) if self.adjust == "loss" else logits, labels)

    def probs(self, logits: Tensor) -> Tensor:
        """Softmax [R, C+1], column 0 the background; `adjust` "scores" adjusts its logits. Rows sum to 1."""
        logits = at_least_float32(logits)
        return super().probs(logits - self.shift.to(logits.dtype) if self.adjust == "scores" else logits)
