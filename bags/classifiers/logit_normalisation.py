"""Logit normalisation of a trained softmax (LogN; Zhao, Teng and Wang, IJCV 2024). Nothing is trained.

No published LVIS v1 numbers: the authors' repository has none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bags.classifiers.base import BoxFeatures, ClassifierSettings, TrainingCounts, at_least_float32
from bags.classifiers.softmax import Softmax

LEAST_VARIANCE = 1e-11  # as in the released code


@dataclass(frozen=True)
class LogitNormalisationSettings(ClassifierSettings):
    """Logit normalisation; takes a trained softmax, trains nothing."""

    trained, on_softmax, fitted = False, True, True

    name: Literal["logit_normalisation"] = "logit_normalisation"

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "LogitNormalisation":
        """Make the classifier, whose statistics are still to be fitted."""
        return LogitNormalisation(in_features, training.num_categories, training.instance_counts)


class LogitNormalisation(Softmax):
    """Softmax of logits that are normalised per category, as batch normalisation would.

        z'_c = (z_c - mean_c + beta) / sigma_c  for categories,   z'_0 = z_0  for the background

    mean and sigma are those of the baseline's logits over training proposals, as the sampler of training draws them;
    beta is the least mean of all categories with training objects, which restores the balance with the background. The
    released code tracks them as running statistics in training; here `fit` computes them in one pass. Before it, logits
    stay unchanged.

    The logits of categories without training objects stay unchanged, and their means do not count for beta, other than
    in the released code: the baseline has only pushed them down, to nearly one value, so that dividing by their
    deviation would lift them above all others.
    """

    means: Tensor
    deviations: Tensor

    def __init__(self, in_features: int, num_categories: int, instance_counts: Sequence[int] | None = None):
        """instance_counts: [C] training objects; None stands for some of each category."""
        super().__init__(in_features, num_categories)
        counts = [1] * num_categories if instance_counts is None else list(instance_counts)
        self.has_objects = torch.tensor([0, *counts]) > 0  # [C+1], without the background
        self.register_buffer("means", torch.zeros(num_categories + 1))
        self.register_buffer("deviations", torch.ones(num_categories + 1))

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[BoxFeatures, Tensor]]) -> None:
        """Compute mean and deviation of each category's logit. Raises ValueError if there are no proposals."""
        sums = torch.zeros_like(self.means, dtype=torch.float64)
        squares, number = torch.zeros_like(sums), 0
        for features, _ in batches:
            logits = self(features).double()
            sums += logits.sum(0)
            squares += logits.square().sum(0)
            number += len(logits)
        if not number:
            raise ValueError("no proposal in the training images: there are no logits to normalise")
        means = sums / number
        deviations = (squares / number - means.square()).clamp(min=LEAST_VARIANCE).sqrt()
        chosen = self.has_objects.to(means.device)
        if chosen.any():
            self.means[chosen] = (means[chosen] - means[chosen].min()).to(self.means)
            self.deviations[chosen] = deviations[chosen].to(self.deviations)

    def probs(self, logits: Tensor) -> Tensor:
        """Softmax [R, C+1] of the normalised logits, column 0 the background. Rows sum to 1."""
        logits = at_least_float32(logits)
        return super().probs((logits - self.means.to(logits.dtype)) / self.deviations.to(logits.dtype))
