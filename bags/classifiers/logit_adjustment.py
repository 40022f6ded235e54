"""Logits shifted by the categories' training frequencies: logit adjustment (Menon et al., ICLR 2021) and Balanced
Softmax (Ren et al., NeurIPS 2020), which is the same loss with tau 1.

Published (Ren et al., Mask R-CNN R50, LVIS v0.5, repeat factors, classifier retrained; mask AP / APr APc APf): Balanced
Softmax in its sigmoid form 26.4 / 15.9 27.3 29.6 against 24.1 / 13.4 24.3 28.1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bags.classifiers.base import at_least_float32, checked_counts, need, need_not_negative
from bags.classifiers.sigmoid import Sigmoid
from bags.classifiers.softmax import Softmax

ADJUSTED = ("loss", "scores")


class LogitAdjusted(Softmax):
    """Softmax for categories that will be equally frequent, learnt where they are not.

        adjust "loss":    L = CE(z + tau log(pi / q)),  scores softmax(z)
        adjust "scores":  L = CE(z),                    scores softmax(z - tau log(pi / q))

    pi_c = n_c / sum(n) is a category's share of the training objects, q_c = 1 / C the share that is wanted. The
    background is as frequent in use as in training, pi_0 = q_0, so its logit stays. (Written with counts alone, as
    for classification, it would have to be given one, and P(background) would shift with it.)
    counts: [C] training instances n, 0 is taken as 1. tau >= 0: 1 as derived, 0 changes nothing.
    """

    shift: Tensor

    def __init__(self, in_features: int, counts: Sequence[int], tau: float = 1.0, adjust: str = "loss"):
        super().__init__(in_features, len(counts))
        need(adjust in ADJUSTED, "adjust", f"one of {', '.join(ADJUSTED)}", adjust)
        need_not_negative(tau=tau)
        self.adjust = adjust
        numbers = checked_counts("counts", counts).double().clamp(min=1)
        shift = tau * (numbers / numbers.mean()).log()
        self.register_buffer("shift", torch.cat([shift.new_zeros(1), shift]), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean cross entropy, of adjusted logits where the loss is what is adjusted."""
        logits = at_least_float32(logits)
        return super().loss(logits + self.shift.to(logits.dtype) if self.adjust == "loss" else logits, labels)

    def probs(self, logits: Tensor) -> Tensor:
        """[R, C+1], rows sum to 1."""
        logits = at_least_float32(logits)
        return super().probs(logits - self.shift.to(logits.dtype) if self.adjust == "scores" else logits)


class BalancedSigmoid(Sigmoid):
    """Balanced Softmax as Ren et al. train it on LVIS: one sigmoid per category, adjusted for foreground proposals.

        z_j - log((n - n_j) / n_j)  for foreground,  z_j  for background;  scores sigmoid(z)

    counts: [C] training instances n_j, n their sum; 0 is taken as 1. (The released code has images in place of
    instances.)
    """

    shift: Tensor

    def __init__(self, in_features: int, counts: Sequence[int], prior: float = 0.001):
        super().__init__(in_features, len(counts), prior)
        numbers = checked_counts("counts", counts).double().clamp(min=1)
        others = (numbers.sum() - numbers).clamp(min=1)  # a single category has no others
        self.register_buffer("shift", (others / numbers).log(), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Binary cross entropies summed over the categories, averaged over the R proposals."""
        logits = at_least_float32(logits)
        foreground = (labels > 0)[:, None].to(logits.dtype)
        return super().loss(logits - foreground * self.shift.to(logits.dtype), labels)
