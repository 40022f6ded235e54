"""Federated loss (Zhou et al. 2021, "Probabilistic two-stage detection", CenterNet2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from bags.classifiers.base import TrainingCounts, checked_counts
from bags.classifiers.sigmoid import Prior, Sigmoid, SigmoidLayerSettings
from bags.core.settings import Range


@dataclass(frozen=True)
class FederatedSettings(SigmoidLayerSettings):
    """Federated loss (Zhou et al. 2021)."""

    name: Literal["federated"] = "federated"
    number: Annotated[int, Range(ge=1)] = 50  # categories in the loss of a batch
    power: Annotated[float, Range(ge=0)] = 0.5  # of the training images, for drawing them
    prior: Prior = 0.01

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "Federated":
        """Make the untrained classifier."""
        return Federated(in_features, training.image_counts, self.number, self.power, self.prior)


class Federated(Sigmoid):
    """Binary cross entropy over a few categories of each batch: those that appear, and others drawn by frequency.

    LVIS's annotations are federated: most images say nothing about most categories, so a proposal that is labelled
    background may well be an object of one of them.
    image_counts  [C] training images of each category; a category is drawn with probability ~ count^power,
                  without replacement, from torch's global generator; 0 is taken as 1
    number        >= 1: categories in the loss; the background, where the batch has some, takes one of these places (as
                  in the released code). More where more appear.
    power         >= 0; 0 draws all categories alike
    prior         between 0 and 1, every score before training
    """

    log_weights: Tensor

    def __init__(
        self,
        in_features: int,
        image_counts: Sequence[int],
        number: int = FederatedSettings.number,
        power: float = FederatedSettings.power,
        prior: float = FederatedSettings.prior,
    ):
        super().__init__(in_features, len(image_counts), prior)
        settings = FederatedSettings(number=number, power=power)
        self.number = settings.number
        log_weights = settings.power * checked_counts("image_counts", image_counts).double().clamp(min=1).log()
        self.register_buffer("log_weights", log_weights, persistent=False)

    def element_weights(self, targets: Tensor, labels: Tensor) -> Tensor:
        """Return 1 for the categories of this batch, else 0: [1, C].

        Gumbel's trick: the best k of log-weights plus Gumbel noise are a draw without replacement.
        """
        appears = targets.amax(0) > 0 if len(targets) else torch.zeros_like(targets.sum(0), dtype=torch.bool)
        uniform = torch.rand(self.num_categories, device=targets.device, dtype=torch.float64)
        keys = self.log_weights - (-uniform.log()).log()
        ranks = keys.masked_fill(appears, torch.inf).argsort(descending=True).argsort()
        places = self.number - (labels == 0).any().long()
        return (appears | (ranks < places)).to(targets.dtype)[None]
