"""Seesaw loss (Wang et al., CVPR 2021).

Published (Mask R-CNN R50, LVIS v1, 24 epochs, multi-scale; box AP / mask AP, as in the authors' repository): 25.6 /
25.0 with uniform sampling, 27.6 / 26.4 with repeat factors.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import (
    Affine,
    BoxFeatures,
    ClassifierSettings,
    CosineLinear,
    ProposalClassifier,
    TrainingCounts,
    affine_of,
    at_least_float32,
    new_linear,
    sum_over_ranks,
)
from bags.core.settings import Range, need


@dataclass(frozen=True)
class SeesawSettings(ClassifierSettings):
    """Seesaw loss (Wang et al. 2021)."""

    name: Literal["seesaw"] = "seesaw"
    p: Annotated[float, Range(ge=0)] = 0.8  # mitigation
    q: Annotated[float, Range(ge=0)] = 2.0  # compensation
    scale: Annotated[float, Range(ge=0)] = 20.0  # of the cosine layer; 0: a linear layer

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "Seesaw":
        """Make the untrained classifier."""
        return Seesaw(in_features, training.num_categories, self.p, self.q, self.scale)

    def columns(self, training: TrainingCounts) -> tuple:
        """Background, foreground and the categories, of a linear or of a cosine layer."""
        return self.name, self.scale > 0


class Seesaw(ProposalClassifier):
    """Softmax over the categories whose negatives are scaled, and a softmax of objectness beside it.

        L = -log(e^z_i / (sum_(j != i) S_ij e^z_j + e^z_i)),   S_ij = M_ij C_ij
        M_ij = min(1, N_j / N_i)^p     mitigation: category i, more frequent than j, pushes j down less
        C_ij = max(1, s_j / s_i)^q     compensation: but more where j has the higher probability s, a likely mistake

    N: training proposals of each category so far, this batch included. They are counted by `loss` in training mode,
    over all ranks, in the buffer `counts` (a checkpoint resumes exactly); 0 counts as 1.
    Only foreground proposals train the categories, all proposals the objectness; both losses are divided by R.
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
        p: float = SeesawSettings.p,
        q: float = SeesawSettings.q,
        scale: float = SeesawSettings.scale,
        eps: float = 0.01,
    ):
        super().__init__()
        settings = SeesawSettings(p=p, q=q, scale=scale)
        need(0 < eps <= 1, "eps", "above 0, to 1", eps)
        self.num_categories, self.p, self.q, self.eps = num_categories, settings.p, settings.q, eps
        outputs = num_categories + 2
        cosine = settings.scale > 0
        self.linear = CosineLinear(in_features, outputs, scale) if cosine else new_linear(in_features, outputs)
        self.register_buffer("counts", torch.zeros(num_categories, dtype=torch.long))

    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute logits [R, 2 + C]."""
        return self.linear(features.fc)

    def affine(self) -> Affine | None:
        """Give the layer as one matrix."""
        return affine_of(self.linear)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the losses of the categories and of the objectness, to be added up."""
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
        """Compute log S_ij for each proposal's category i, [R, C]: 0 at j = i. Rows of background have no meaning."""
        category = (labels - 1).clamp(min=0)[:, None]
        numbers = self.counts.clamp(min=1).to(logits.dtype).log()
        mitigation = self.p * (numbers - numbers[category]).clamp(max=0)
        probabilities = torch.log_softmax(logits, dim=1)
        least = torch.full((), self.eps, dtype=logits.dtype, device=logits.device).log()  # no copy to a GPU
        compensation = self.q * (probabilities - probabilities.gather(1, category).maximum(least)).clamp(min=0)
        return (mitigation + compensation).scatter(1, category, 0)

    @torch.no_grad()
    def _count(self, labels: Tensor) -> None:
        proposals = F.one_hot(labels, self.num_categories + 1).sum(0)[1:]
        self.counts += sum_over_ranks(proposals)

    def probs(self, logits: Tensor) -> Tensor:
        """Scores [R, C+1]: P(background), and each category's softmax times P(foreground). Rows sum to 1."""
        objectness, logits = at_least_float32(logits).split([2, self.num_categories], dim=1)
        background, foreground = torch.softmax(objectness, -1).split(1, dim=1)
        return torch.cat([background, torch.softmax(logits, -1) * foreground], dim=1)

    def weight_norms(self) -> Tensor:
        """Norms [C+1] of the rows of background and categories, without the foreground's."""
        norms = self.linear.weight.detach().norm(dim=1)
        return torch.cat([norms[:1], norms[2:]])
