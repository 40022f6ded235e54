"""Fractal calibration of trained scores (FRACAL; Alexandridis et al., CVPR 2025). Nothing is trained.

Published (Mask R-CNN R50 with repeat factors, a cosine classifier, normalised masks and CARAFE, LVIS v1, 24 epochs,
counts of images and their number as total; mask AP / APr APc APf, as in the authors' repository): 28.5 / 23.0 28.1
31.5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from bags.classifiers.base import (
    ClassifierSettings,
    Counts,
    TrainingCounts,
    at_least_float32,
    checked_shares,
    counts_of,
    told_as_setting,
)
from bags.classifiers.sigmoid import Sigmoid, SigmoidLayerSettings
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range

LEAST_BOXES = 4  # of a category, for its dimension to be measured
FINEST = 64  # grids have up to 64 x 64 cells
Power = Annotated[float, Range(ge=0)]
Total = Annotated[int, Range(ge=0)]


@dataclass(frozen=True)
class FractalSettings(ClassifierSettings):
    """Fractal calibration; takes a trained softmax, trains nothing."""

    trained, on_softmax, located = False, True, True

    name: Literal["fracal"] = "fracal"
    power: Power = 2.0  # of the dimension that divides a score
    counts: Counts = "instances"
    total: Total = 0  # what the counts are divided by; 0: their sum

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "Fractal":
        """Make the classifier, which scores with the layer of a trained softmax. Raises UserError for `total`."""
        with told_as_setting():
            return Fractal(in_features, counts_of(self.counts, training), self.power, self.total)


@dataclass(frozen=True)
class FractalSigmoidSettings(SigmoidLayerSettings):
    """Fractal calibration in its sigmoid form; takes trained sigmoids, trains nothing."""

    trained, located = False, True

    name: Literal["fracal_sigmoid"] = "fracal_sigmoid"
    power: Power = 2.0
    counts: Counts = "instances"
    total: Total = 0

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "FractalSigmoid":
        """Make the classifier, which scores with the layer of trained sigmoids. Raises UserError for `total`."""
        with told_as_setting():
            return FractalSigmoid(in_features, counts_of(self.counts, training), self.power, self.total)


class Fractal(Softmax):
    """Softmax of shifted logits, divided by a power of the fractal dimension of each category's box centres.

        p_c = softmax(z_c - log10(n_c / N) + log10(1 / C)),   scores p_c / D_c^power, normalised to sum 1

    The shift takes the training frequencies out and puts equal ones in their place. A category that occurs everywhere
    in the images has a dimension D near 2, one on a line 1; the background has 1 and no shift. counts: [C] training
    instances n (or images), 0 is taken as 1. total: N; 0 stands for the sum of n, otherwise no count may exceed it. The
    authors' models count images and have the number of images as N (100170 for LVIS v1), which shifts all categories
    alike against the background. power: 0 or more; 0 leaves the dimensions out.
    `locate` computes the dimensions; before it they are 1. A checkpoint holds them.
    """

    shift: Tensor
    dimensions: Tensor

    def __init__(self, in_features: int, counts: Sequence[int], power: float = FractalSettings.power, total: int = 0):
        super().__init__(in_features, len(counts))
        self.power = FractalSettings(power=power, total=total).power
        shift = frequency_shift(counts, total)
        self.register_buffer("shift", torch.cat([shift.new_zeros(1), shift]), persistent=False)
        self.register_buffer("dimensions", torch.ones(len(counts) + 1))

    @torch.no_grad()
    def locate(self, centres: Tensor, labels: Tensor) -> None:
        """Compute the dimensions from the training boxes: see `box_dimensions`."""
        self.dimensions[1:] = box_dimensions(centres, labels, self.num_categories).to(self.dimensions)

    def probs(self, logits: Tensor) -> Tensor:
        """Calibrated scores [R, C+1], column 0 the background. Rows sum to 1."""
        logits = at_least_float32(logits)
        shift = self.shift - self.power * self.dimensions.to(self.shift).log()  # divides e^z by D^power
        return super().probs(logits + shift.to(logits.dtype))


class FractalSigmoid(Sigmoid):
    """The form for sigmoids: sigmoid(z) sigmoid(z + shift_c - log10(D_c^power / sum(D^power)) + log10(1 / C)).

    The shift is that of `Fractal`. counts, power, total: as there.
    """

    shift: Tensor
    dimensions: Tensor

    def __init__(
        self, in_features: int, counts: Sequence[int], power: float = FractalSigmoidSettings.power, total: int = 0
    ):
        super().__init__(in_features, len(counts))
        self.power = FractalSigmoidSettings(power=power, total=total).power
        self.register_buffer("shift", frequency_shift(counts, total), persistent=False)
        self.register_buffer("dimensions", torch.ones(len(counts)))

    @torch.no_grad()
    def locate(self, centres: Tensor, labels: Tensor) -> None:
        """Compute the dimensions from the training boxes: see `box_dimensions`."""
        self.dimensions.copy_(box_dimensions(centres, labels, self.num_categories))

    def probs(self, logits: Tensor) -> Tensor:
        """Calibrated scores [R, C+1]; the background scores 1 minus the best. Rows do not sum to 1."""
        logits = at_least_float32(logits)
        sizes = self.power * self.dimensions.to(self.shift).log()
        spread = (sizes.logsumexp(0) - sizes) / math.log(10) - math.log10(self.num_categories)
        scores = torch.sigmoid(logits) * torch.sigmoid(logits + (self.shift + spread).to(logits.dtype))
        return torch.cat([1 - scores.amax(1, keepdim=True), scores], dim=1)


def frequency_shift(counts: Sequence[int], total: int = 0) -> Tensor:
    """Return -log10(n_c / N) + log10(1 / C) as float64 [C]; with N = sum(n) it is 0 for a category of mean frequency.

    counts: [C], 0 is taken as 1. total: N, or 0 for the sum. Raises ValueError for a total below one of the counts.
    """
    shares = checked_shares(counts, total)
    return -(shares * len(shares)).log10()


def box_dimensions(centres: Tensor, labels: Tensor, num_categories: int) -> Tensor:
    """Compute the box-counting dimension of each category's box centres, float64 [C] in 1..2.

    An image is divided into g x g cells, g = 1, 2, ..., up to 64 and to the root of the category's number of boxes (a
    finer grid could not be filled). N(g) are the cells with a centre of the category in any image. The dimension is the
    slope of log N against log g by least squares, at least 1. A category with fewer than 4 boxes gets 1.
    centres: [K, 2] x, y in 0..1, as parts of width and height; labels: [K] int64 in 1..C.
    """
    centres, labels = centres.cpu(), labels.cpu().long() - 1
    counts = torch.bincount(labels, minlength=num_categories)
    most = min(FINEST, math.isqrt(int(counts.max()))) if len(labels) else 0
    sums = torch.zeros(4, num_categories, dtype=torch.float64)  # of 1, x, y, x y, and x x below
    squares = torch.zeros(num_categories, dtype=torch.float64)
    for grid in range(1, most + 1):
        cells = (centres.double() * grid).floor().clamp(0, grid - 1).long()
        filled = torch.zeros(num_categories, grid**2, dtype=torch.bool)
        filled[labels, cells[:, 1] * grid + cells[:, 0]] = True
        occupied = filled.sum(1)
        used = (counts >= max(LEAST_BOXES, grid**2)).double()
        x = math.log(grid)
        y = occupied.clamp(min=1).double().log()
        sums += used * torch.stack([torch.ones_like(y), torch.full_like(y, x), y, x * y])
        squares += used * x * x
    number, xs, ys, products = sums
    measured = counts >= LEAST_BOXES
    spread = torch.where(measured, number * squares - xs * xs, 1.0)
    slopes = (number * products - xs * ys) / spread
    return torch.where(measured, slopes, 1.0).clamp(min=1)
