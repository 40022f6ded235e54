"""Nearest class mean (models (10) and (11) of Table 1; Guerriero et al. 2018). Nothing is trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import BoxFeatures, ClassifierSettings, TrainingCounts, at_least_float32
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range

Features = Literal["fc", "conv"]


@dataclass(frozen=True)
class NearestClassMeanSettings(ClassifierSettings):
    """Nearest class mean; takes a trained softmax, trains nothing."""

    trained, on_softmax, fitted, fits_pooled = False, True, True, True

    name: Literal["ncm"] = "ncm"
    features: Features = "fc"
    scale: Annotated[float, Range(gt=0)] = 1.0  # of the cosine similarities

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "NearestClassMean":
        """Make the classifier, whose means are still to be fitted."""
        width = in_features if self.features == "fc" else pooled_features
        return NearestClassMean(in_features, training.num_categories, width, self.features, self.scale)


class NearestClassMean(Softmax):
    """Foreground by cosine similarity to class means, background from the plain classifier.

    features  "fc": after the box head, so after its ReLU (NCM-fc; the released variant takes the values
              before the ReLU); "conv": the RoIAlign output (NCM-conv)
    width     numbers per proposal of that feature
    scale     above 0: similarities are multiplied by it before the softmax; the paper's code: 1

    Logits are [R, (C+1) + C]: plain, then similarities in -1..1. A category without training proposals
    scores 0.
    """

    means: Tensor
    counts: Tensor

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        width: int,
        features: Features = NearestClassMeanSettings.features,
        scale: float = NearestClassMeanSettings.scale,
    ):
        super().__init__(in_features, num_categories)
        settings = NearestClassMeanSettings(features=features, scale=scale)
        self.features, self.scale = settings.features, settings.scale
        self.register_buffer("means", torch.zeros(num_categories, width))
        self.register_buffer("counts", torch.zeros(num_categories, dtype=torch.long))

    def _chosen(self, features: BoxFeatures) -> Tensor:
        return features.fc if self.features == "fc" else features.pooled.flatten(1)

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[BoxFeatures, Tensor]]) -> None:
        """Average the features of each category's foreground proposals (sampled ones and ground truth boxes).

        Raises ValueError if no category has any.
        """
        sums, counts = torch.zeros_like(self.means, dtype=torch.float64), torch.zeros_like(self.counts)
        for features, labels in batches:
            foreground = labels > 0
            index = labels[foreground] - 1
            sums.index_add_(0, index, self._chosen(features)[foreground].double())
            counts += torch.bincount(index, minlength=self.num_categories)
        if not counts.any():
            raise ValueError("no foreground proposal in the training images: there are no class means")
        self.means.copy_(sums / counts.clamp(min=1)[:, None])
        self.counts.copy_(counts)

    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute plain logits and cosine similarities, [R, 2C + 1]."""
        similarity = F.normalize(self._chosen(features), dim=1) @ F.normalize(self.means, dim=1).T
        return torch.cat([self.linear(features.fc), similarity], dim=1)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the loss of the plain classifier."""
        return super().loss(logits[:, : self.num_categories + 1], labels)

    def probs(self, logits: Tensor) -> Tensor:
        """Scores [R, C+1], rows sum to 1: P(background) of the plain softmax, the rest shared by similarity."""
        plain, similarity = at_least_float32(logits).split([self.num_categories + 1, self.num_categories], dim=1)
        background = torch.softmax(plain, -1)[:, :1]
        similarity = (self.scale * similarity).masked_fill(self.counts == 0, -torch.inf)
        return torch.cat([background, (1 - background) * torch.softmax(similarity, -1)], dim=1)

    def weight_norms(self) -> Tensor:
        """Norms [C+1] of the plain background vector and of the class means."""
        return torch.cat([super().weight_norms()[:1], self.means.norm(dim=1)])
