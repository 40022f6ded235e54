"""Seesaw loss (Wang et al., CVPR 2021).

Published (Mask R-CNN R50, LVIS v1, 24 epochs, multi-scale; box AP / mask AP, as in the authors' repository): 25.6 /
25.0 with uniform sampling, 27.6 / 26.4 with repeat factors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import (
    BoxFeatures,
    CosineLinear,
    ProposalClassifier,
    at_least_float32,
    need,
    need_not_negative,
    new_linear,
    sum_over_ranks,
)


class Seesaw(ProposalClassifier):
    """Softmax over the categories whose negatives are scaled, and a softmax of objectness beside it.

        L = -log(e^z_i / (sum_(j != i) S_ij e^z_j + e^z_i)),   S_ij = M_ij C_ij
        M_ij = min(1, N_j / N_i)^p     mitigation: category i, more frequent than j, pushes j down less
        C_ij = max(1, s_j / s_i)^q     compensation: but more where j has the higher probability s, a likely mistake

    N: training proposals of each category so far, this batch included. They are counted by `loss` in training mode,
    over all ranks, in the buffer `counts` (a checkpoint resumes exactly); 0 counts as 1.
    Foreground proposals alone train the categories, all proposals the objectness; both losses are divided by R.
    p, q: >= 0; at 0 without mitigation, without compensation.
    scale: >= 0, of the published normalised layer (scale times a cosine, their tau 20); 0 is a plain linear layer.
    eps: above 0, to 1: least s_i, in the released code.

    Shape shorthand: R proposals, C categories; logits [R, 2 + C], columns [background, foreground, categories].
    """

    counts: Tensor

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        p: float = 0.8,
        q: float = 2.0,
        scale: float = 20.0,
        eps: float = 0.01,
    ):
        super().__init__()
        need_not_negative(p=p, q=q, scale=scale)
        need(0 < eps <= 1, "eps", "a number above 0, to 1", eps)
        self.num_categories, self.p, self.q, self.eps = num_categories, p, q, eps
        outputs = num_categories + 2
        self.linear = CosineLinear(in_features, outputs, scale) if scale else new_linear(in_features, outputs)
        self.register_buffer("counts", torch.zeros(num_categories, dtype=torch.long))

    def forward(self, features: BoxFeatures) -> Tensor:
        """Features -> logits [R, 2 + C]."""
        return self.linear(features.fc)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of the categories and of the objectness, to be added up."""
        objectness, logits = at_least_float32(logits).split([2, self.num_categories], dim=1)
        if self.training:
            self._count(labels)
        proposals = max(len(labels), 1)
        shifted = logits + self.log_factors(logits.detach(), labels)
        # A background proposal has target -1, which is ignored.
        categories = F.cross_entropy(shifted, labels - 1, ignore_index=-1, reduction="sum")
        foreground = F.cross_entropy(objectness, (labels > 0).long(), reduction="sum")
        return {"loss_classifier": categories / proposals, "loss_objectness": foreground / proposals}

    def log_factors(self, logits: Tensor, labels: Tensor) -> Tensor:
        """log S of each proposal's own row, [R, C]: 0 at its category. Rows of background proposals mean nothing."""
        own = (labels - 1).clamp(min=0)[:, None]
        numbers = self.counts.clamp(min=1).to(logits.dtype).log()
        mitigation = self.p * (numbers - numbers[own]).clamp(max=0)
        probabilities = torch.log_softmax(logits, dim=1)
        least = torch.tensor(self.eps, dtype=logits.dtype, device=logits.device).log()
        compensation = self.q * (probabilities - probabilities.gather(1, own).maximum(least)).clamp(min=0)
        return (mitigation + compensation).scatter(1, own, 0)

    @torch.no_grad()
    def _count(self, labels: Tensor) -> None:
        found = F.one_hot(labels, self.num_categories + 1).sum(0)[1:]
        self.counts += sum_over_ranks(found)

    def probs(self, logits: Tensor) -> Tensor:
        """[R, C+1]: P(background), and each category's softmax times P(foreground). Rows sum to 1."""
        objectness, logits = at_least_float32(logits).split([2, self.num_categories], dim=1)
        background, foreground = torch.softmax(objectness, -1).split(1, dim=1)
        return torch.cat([background, torch.softmax(logits, -1) * foreground], dim=1)

    def weight_norms(self) -> Tensor:
        """[C+1], without the foreground's."""
        norms = self.linear.weight.detach().norm(dim=1)
        return torch.cat([norms[:1], norms[2:]])
