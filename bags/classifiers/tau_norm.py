"""tau-normalisation of a trained softmax (models (12) and (13) of Table 1; Kang et al. 2020). Nothing is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import Affine, BoxFeatures, ClassifierSettings, TrainingCounts, affine_of
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range, need

Select = Literal["none", "foreground", "foreground_tail"]


@dataclass(frozen=True)
class TauNormSettings(ClassifierSettings):
    """tau-normalisation; takes a trained softmax, trains nothing."""

    trained, on_softmax = False, True

    name: Literal["tau_norm"] = "tau_norm"
    tau: Annotated[float, Range(ge=0)] = 1.0
    select: Select = "none"  # which proposals take the new scores
    background: bool = True  # normalise the background's vector too
    tail_below: Annotated[int, Range(ge=1)] = 100  # training instances, for foreground_tail

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "TauNorm":
        """Make the classifier, which scores with the layer of a trained softmax."""
        tail = [label for label, count in enumerate(training.instance_counts, start=1) if count < self.tail_below]
        return TauNorm(in_features, training.num_categories, self.tau, self.select, self.background, tail)


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
        tau: float = TauNormSettings.tau,
        select: Select = TauNormSettings.select,
        background: bool = TauNormSettings.background,
        tail: Sequence[int] = (),
    ):
        super().__init__(in_features, num_categories)
        settings = TauNormSettings(tau=tau, select=select, background=background)
        are_labels = all(1 <= label <= num_categories for label in tail)
        need(are_labels, "tail", f"labels 1 to {num_categories} (0 is the background)", list(tail))
        self.tau, self.select, self.background = settings.tau, settings.select, settings.background
        is_tail = torch.zeros(num_categories + 1, dtype=torch.bool)
        is_tail[list(tail)] = True
        self.register_buffer("is_tail", is_tail, persistent=False)

    def normalised_weight(self) -> Tensor:
        """Compute the normalised weight [C+1, in_features], row 0 the background."""
        weight = self.linear.weight
        norm = weight.norm(dim=1, keepdim=True)
        scale = torch.where(norm > 0, norm, 1) ** -self.tau
        if not self.background:
            scale = torch.cat([torch.ones_like(scale[:1]), scale[1:]])
        return weight * scale

    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute plain and normalised logits, [R, 2 * (C+1)]."""
        normalised = F.linear(features.fc, self.normalised_weight(), self.linear.bias)
        return torch.cat([self.linear(features.fc), normalised], dim=1)

    def affine(self) -> Affine | None:
        """Give the plain and the normalised layer as one matrix."""
        plain = affine_of(self.linear)
        if plain is None or plain.unit:
            return None
        return Affine(torch.cat([plain.weight, self.normalised_weight()]), plain.bias.repeat(2), False)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the loss of the plain classifier."""
        return super().loss(logits.chunk(2, dim=1)[0], labels)

    def probs(self, logits: Tensor) -> Tensor:
        """Scores [R, C+1], rows sum to 1; each row comes from one of the two classifiers."""
        plain, normalised = (super(TauNorm, self).probs(part) for part in logits.chunk(2, dim=1))
        if self.select == "none":
            return normalised
        taken = plain.argmax(1) != 0
        if self.select == "foreground_tail":
            taken &= self.is_tail[normalised.argmax(1)]
        return torch.where(taken[:, None], normalised, plain)

    def weight_norms(self) -> Tensor:
        """Norms [C+1] of the normalised weights."""
        return self.normalised_weight().detach().norm(dim=1)
