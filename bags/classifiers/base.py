"""The one seam of the project: how a proposal's features become a loss and probabilities.

Shape shorthand: R proposals of the batch, C categories, D logits (private to each classifier).
Labels are 0..C and 0 is the background.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class BoxFeatures(NamedTuple):
    """What the detector knows of each proposal."""

    pooled: Tensor  # [R, channels, 7, 7]  RoIAlign output
    fc: Tensor  # [R, in_features]  after the box head


class ProposalClassifier(nn.Module, ABC):
    """A layer, its loss and its scores. Subclasses set `num_categories` (C)."""

    num_categories: int

    @abstractmethod
    def forward(self, features: BoxFeatures) -> Tensor:
        """Features of R proposals -> logits [R, D]."""

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Named scalar losses, to be added up. logits [R, D]; labels [R] int64 in 0..C, 0 = background."""

    @abstractmethod
    def probs(self, logits: Tensor) -> Tensor:
        """Scores [R, C+1] in 0..1 for ranking detections; column 0 is the background."""

    @abstractmethod
    def label_weights(self) -> Tensor:
        """The weight vector that scores each label, [C+1, in_features]; row 0 is the background.

        For analysis (Figures 1 and 3 of the paper plot the norms of these rows).
        """


def new_linear(in_features: int, outputs: int) -> nn.Linear:
    """A classification layer as in the paper's code: weights N(0, 0.01), biases 0."""
    layer = nn.Linear(in_features, outputs)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer
