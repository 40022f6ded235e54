"""The one seam of the project: how a proposal's features become a loss and probabilities.

Shape shorthand: R proposals of the batch, C categories, D logits (private to each classifier).
Labels are 0..C and 0 is the background.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
    def weight_norms(self) -> Tensor:
        """Norm of the weight vector that scores each label, [C+1]; entry 0 is the background (Figures 1, 3)."""

    def fit(self, batches: Iterable[tuple[BoxFeatures, Tensor]]) -> None:
        """For methods without gradients: one pass over (features, labels [R]) of training proposals.

        Methods that need none of it do not override this, and are spared the pass.
        """


def need(holds: bool, argument: str, expected: str, given: object) -> None:
    """Raises ValueError, naming the argument, where it does not hold."""
    if not holds:
        raise ValueError(f"{argument}: expected {expected}, got {given!r}")


def need_not_negative(**arguments: float) -> None:
    """Raises ValueError for the first that is not a number of 0 or more."""
    for name, value in arguments.items():
        need(0 <= value < math.inf, name, "a number of 0 or more", value)


def checked_counts(name: str, counts: Sequence[int] | Tensor, number: int | None = None) -> Tensor:
    """Counts of labels 1..C as int64 [C]; `number` is the C that is wanted. Raises ValueError for anything else."""
    values = torch.as_tensor(counts)
    shape = tuple(values.shape)
    need(values.ndim == 1 and len(values) > 0, name, "one count per category", shape)
    need(number in (None, len(values)), name, f"{number}, one for each label 1 to {number}", shape)
    whole = torch.equal(values, values.long().to(values.dtype))
    need(whole and bool((values >= 0).all()), name, "whole numbers of 0 or more", values.tolist())
    return values.long()


def checked_weights(name: str, weights: Sequence[float] | Tensor, number: int) -> Tensor:
    """Factors [number]. Raises ValueError unless they are that many numbers of 0 or more."""
    values = torch.as_tensor(weights)
    usable = values.shape == (number,) and bool(((values >= 0) & (values < math.inf)).all())
    need(usable, name, f"{number} numbers of 0 or more", values.tolist() if number < 10 else tuple(values.shape))
    return values


def new_linear(in_features: int, outputs: int) -> nn.Linear:
    """A classification layer as in the paper's code: weights N(0, 0.01), biases 0."""
    layer = nn.Linear(in_features, outputs)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class CosineLinear(nn.Linear):
    """`scale` times the cosine of feature and weight vector, plus bias; a zero vector gives 0."""

    def __init__(self, in_features: int, outputs: int, scale: float):
        super().__init__(in_features, outputs)
        self.scale = scale
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[R, in_features] -> [R, outputs]."""
        return F.linear(self.scale * F.normalize(features, dim=1), F.normalize(self.weight, dim=1), self.bias)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Added up over all processes, in place: what a classifier counts is the same on each of them."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def at_least_float32(logits: Tensor) -> Tensor:
    """Half-precision logits of autocast as float32; others as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
