"""Label-distribution-aware margins (LDAM; Cao et al., NeurIPS 2019), a method of image classification."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import ClassifierSettings, CosineLinear, TrainingCounts, at_least_float32, checked_counts
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range


@dataclass(frozen=True)
class LDAMSettings(ClassifierSettings):
    """Label-distribution-aware margins (Cao et al. 2019)."""

    name: Literal["ldam"] = "ldam"
    margin: Annotated[float, Range(ge=0, le=2)] = 0.5  # of the rarest category, in cosines
    scale: Annotated[float, Range(gt=0)] = 30.0  # of the cosines

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "LDAM":
        """Make the untrained classifier."""
        return LDAM(in_features, training.instance_counts, self.margin, self.scale)

    def columns(self, training: TrainingCounts) -> tuple:
        """The background and the categories, of a cosine layer."""
        return (self.name,)


class LDAM(Softmax):
    """Softmax over cosines, in which an object must win by the margin of its category.

        L = CE(scale (cos_j - m_y [j = y])),   m_c = margin n_c^(-1/4) / max_k n_k^(-1/4);   scores softmax(scale cos)

    counts: [C] training instances n, 0 is taken as 1. The background has no margin. The cosine layer has a bias, as all
    cosine layers here. scale: above 0. margin: 0 to 2; at 0 it is a softmax with a cosine layer.
    """

    margins: Tensor

    def __init__(
        self,
        in_features: int,
        counts: Sequence[int],
        margin: float = LDAMSettings.margin,
        scale: float = LDAMSettings.scale,
    ):
        super().__init__(in_features, len(counts))
        settings = LDAMSettings(margin=margin, scale=scale)
        self.linear = CosineLinear(in_features, len(counts) + 1, settings.scale)
        roots = checked_counts("counts", counts).double().clamp(min=1) ** -0.25
        margins = settings.scale * settings.margin * roots / roots.max()
        self.register_buffer("margins", torch.cat([margins.new_zeros(1), margins]), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Average the cross entropy with margins over the R proposals."""
        logits = at_least_float32(logits)
        targets = F.one_hot(labels, self.num_categories + 1).to(logits.dtype)
        return super().loss(logits - targets * self.margins.to(logits.dtype), labels)
