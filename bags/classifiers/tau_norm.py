"""tau-normalisation of a trained softmax (models (12) and (13) of Table 1; Kang et al. 2020). Nothing is trained."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import BoxFeatures, need, need_not_negative
from bags.classifiers.softmax import Softmax


class TauNorm(Softmax):
    """Scores with each weight vector w divided by ||w||^tau; biases stay.

    tau         >= 0; 0 changes nothing
    background  whether the background's vector is normalised too (released plain variant: yes; "select": no)
    select      "none": all proposals take the normalised scores; "foreground": those that the plain
                classifier calls foreground (the paper's rule); "foreground_tail": of these, those whose
                normalised class is a tail class (the released rule)
    tail        labels (1..C) of tail classes, for "foreground_tail"; released: fewer than 100 instances

    Logits are [R, 2 * (C+1)]: plain, then normalised.
    """

    is_tail: Tensor

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        tau: float = 1.0,
        select: str = "none",
        background: bool = True,
        tail: Sequence[int] = (),
    ):
        super().__init__(in_features, num_categories)
        selections = ("none", "foreground", "foreground_tail")
        need(select in selections, "select", "none, foreground or foreground_tail", select)
        need_not_negative(tau=tau)
        labels = all(1 <= label <= num_categories for label in tail)
        need(labels, "tail", f"labels 1 to {num_categories} (0 is the background)", list(tail))
        self.tau, self.select, self.background = tau, select, background
        is_tail = torch.zeros(num_categories + 1, dtype=torch.bool)
        is_tail[list(tail)] = True
        self.register_buffer("is_tail", is_tail, persistent=False)

    def normalised_weight(self) -> Tensor:
        """[C+1, in_features]."""
        weight = self.linear.weight
        norm = weight.norm(dim=1, keepdim=True)
        scale = torch.where(norm > 0, norm, 1) ** -self.tau
        if not self.background:
            scale = torch.cat([torch.ones_like(scale[:1]), scale[1:]])
        return weight * scale

    def forward(self, features: BoxFeatures) -> Tensor:
        """Features -> plain and normalised logits, [R, 2 * (C+1)]."""
        normalised = F.linear(features.fc, self.normalised_weight(), self.linear.bias)
        return torch.cat([self.linear(features.fc), normalised], dim=1)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The plain classifier's."""
        return super().loss(logits.chunk(2, dim=1)[0], labels)

    def probs(self, logits: Tensor) -> Tensor:
        """[R, C+1], rows sum to 1; whole rows come from one of the two classifiers."""
        plain, normalised = (super(TauNorm, self).probs(part) for part in logits.chunk(2, dim=1))
        if self.select == "none":
            return normalised
        taken = plain.argmax(1) != 0
        if self.select == "foreground_tail":
            taken &= self.is_tail[normalised.argmax(1)]
        return torch.where(taken[:, None], normalised, plain)

    def weight_norms(self) -> Tensor:
        """[C+1], of the normalised weights."""
        return self.normalised_weight().detach().norm(dim=1)
