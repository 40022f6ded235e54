"""The one interface of the project: how a proposal's features become a loss and probabilities.

Shape shorthand: R proposals of the batch, C categories, D logits (private to each classifier).
Labels are 0..C and 0 is the background.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bags.core.errors import UserError
from bags.core.settings import Settings, need

Counts = Literal["instances", "images"]  # what a classifier counts of each category


class BoxFeatures(NamedTuple):
    """Features of R proposals, as the detector computes them."""

    pooled: Tensor  # [R, channels, 7, 7]  RoIAlign output
    fc: Tensor  # [R, in_features]  after the box head


class Affine(NamedTuple):
    """Logits as a matrix product with the features: `fc @ weight.T + bias`."""

    weight: Tensor  # [D, in_features]
    bias: Tensor  # [D]
    unit: bool  # of features that are scaled to length 1 first


class ProposalClassifier(nn.Module, ABC):
    """A layer with its loss and its scores. Subclasses set `num_categories`."""

    num_categories: int  # C, without the background

    @abstractmethod
    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute logits [R, D] from the features of R proposals."""

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute named scalar losses, to be added up. logits [R, D]; labels [R] int64 in 0..C, 0 = background."""

    @abstractmethod
    def probs(self, logits: Tensor) -> Tensor:
        """Compute scores [R, C+1] in 0..1 for ranking detections; column 0 is the background."""

    @abstractmethod
    def weight_norms(self) -> Tensor:
        """Return the norm of the weight vector that scores each label, [C+1]; entry 0 is the background."""

    def affine(self) -> "Affine | None":
        """Give the layer as one matrix, if the logits are an affine map of `fc`; None if they are anything else.

        An average of classifiers computes such members in one product. For others it calls `forward`.
        """
        return None

    def fit(self, batches: Iterable[tuple[BoxFeatures, Tensor]]) -> None:
        """Learn without gradients, in one pass over (features, labels [R]) of training proposals.

        The pass is made only for classifiers that override this, unless their `needs_fit` is False. For one that is
        trained, too, it comes before the first step.
        """

    @property
    def needs_fit(self) -> bool:
        """Whether `fit` is to be called."""
        return type(self).fit is not ProposalClassifier.fit

    def forget(self) -> None:
        """Drop tensors that only training needs, as the members of an average do."""

    def locate(self, centres: Tensor, labels: Tensor) -> None:
        """Learn where the objects of each category are, before anything else.

        centres: [K, 2] x, y of the training boxes in 0..1, as parts of the image's width and height; labels: [K] int64
        in 1..C. Called only for classifiers that override this; what they keep belongs into buffers.
        """


class TrainingCounts(Protocol):
    """The training counts that a classifier may use: C categories in label order, without the background.

    Entry c of each tuple belongs to label c + 1.
    """

    @property
    def category_ids(self) -> tuple[int, ...]:
        """[C] ids of the annotation file."""

    @property
    def instance_counts(self) -> tuple[int, ...]:
        """[C] boxes of each category, 0 or more."""

    @property
    def image_counts(self) -> tuple[int, ...]:
        """[C] images with at least one box of the category, 0 or more."""

    @property
    def num_categories(self) -> int:
        """Number of categories C, without the background."""


@dataclass(frozen=True)
class ClassifierSettings(Settings, ABC):
    """The section `classifier` of a configuration: every key of one classifier with its default and range."""

    name: str = ""  # in a configuration; empty for a base class, which cannot be chosen

    trained = True  # False: no gradients; a configuration then needs train.part=none
    is_softmax = False  # its scores are the softmax of its layer's outputs
    on_softmax = False  # works on, or beside, the layer of a softmax that is trained already
    fitted = False  # `ProposalClassifier.fit` must see training proposals
    fits_pooled = False  # and their pooled features, which are not stored
    located = False  # `ProposalClassifier.locate` must see the training boxes
    combines = False  # made of the classifiers of other runs, the `sources`

    @property
    def sources(self) -> tuple[str, ...]:
        """Other runs whose classifiers it is made of, as `row:NAME` or the path of a checkpoint: here none."""
        return ()

    @property
    def layers(self) -> int:
        """How many layers it has, at least, with a row for each category. Its memory is estimated from them."""
        return 1

    def made_of(self, members: "Sequence[ClassifierSettings]") -> "ClassifierSettings":
        """The same settings with those of the classifiers of `sources`, in that order."""
        return self

    @abstractmethod
    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> ProposalClassifier:
        """Make the untrained classifier. Sizes: numbers per proposal in BoxFeatures.fc and in BoxFeatures.pooled."""

    def columns(self, training: TrainingCounts) -> tuple:
        """Say what the rows of the layer stand for, here those of a plain softmax.

        Layers with equal columns can take each other's weights.
        """
        return ()


def counts_of(counted: Counts, training: TrainingCounts) -> tuple[int, ...]:
    """Give the training instances of each category, or the images with one: [C]."""
    return training.image_counts if counted == "images" else training.instance_counts


@contextlib.contextmanager
def told_as_setting() -> Iterator[None]:
    """Make a ValueError about an argument a UserError about the key `classifier.<argument>`."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"classifier.{error}") from None


def checked_counts(name: str, counts: Sequence[int] | Tensor, number: int | None = None) -> Tensor:
    """Return counts of labels 1..C as int64 [C] on the CPU. Raises ValueError for others, or unless C is `number`."""
    try:
        values = torch.as_tensor(counts, device="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected one count per category, got {counts!r}") from error
    shape = tuple(values.shape)
    need(values.ndim == 1 and len(values) > 0, name, "one count per category", shape)
    need(number in (None, len(values)), name, f"{number}, one for each label 1 to {number}", shape)
    whole = torch.equal(values, values.long().to(values.dtype))
    need(whole and bool((values >= 0).all()), name, "whole numbers of 0 or more", values.tolist())
    return values.long()


def checked_shares(counts: Sequence[int] | Tensor, total: int = 0) -> Tensor:
    """Return counts of labels 1..C, 0 taken as 1, divided by `total`, or by their sum if it is 0: float64 [C].

    Raises ValueError for other counts, and for a total below one of them.
    """
    numbers = checked_counts("counts", counts).double().clamp(min=1)
    largest = int(numbers.max())
    need(total == 0 or total >= largest, "total", f"0 (for the sum) or {largest} or more, the largest count", total)
    return numbers / (total or numbers.sum())


def checked_weights(name: str, weights: Sequence[float] | Tensor, number: int) -> Tensor:
    """Return factors [number]. Raises ValueError unless they are that many numbers of 0 or more."""
    values = torch.as_tensor(weights)
    usable = values.shape == (number,) and bool(((values >= 0) & (values < math.inf)).all())
    need(usable, name, f"{number} numbers of 0 or more", values.tolist() if number < 10 else tuple(values.shape))
    return values


def new_linear(in_features: int, outputs: int) -> nn.Linear:
    """Make a classification layer as in the paper's code: weights N(0, 0.01), biases 0."""
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
        """Map [R, in_features] to [R, outputs]."""
        return F.linear(self.scale * F.normalize(features, dim=1), F.normalize(self.weight, dim=1), self.bias)


class EuclideanLinear(nn.Linear):
    """Minus the squared distance of feature and centre over temperature^2, without the feature's own square.

    -||x - c||^2 / T^2 = (2 x c - ||c||^2) / T^2 - ||x||^2 / T^2. The last term is the same for all outputs, so a
    softmax over them does not depend on it. The rows of `weight` are the centres c.
    """

    def __init__(self, in_features: int, outputs: int, temperature: float):
        super().__init__(in_features, outputs, bias=False)
        self.temperature = temperature
        nn.init.normal_(self.weight, std=0.01)

    def matrix(self) -> tuple[Tensor, Tensor]:
        """The map as weight [outputs, in_features] and bias [outputs] of a linear layer."""
        factor = self.temperature**-2
        return 2 * factor * self.weight, -factor * self.weight.square().sum(1)

    def forward(self, features: Tensor) -> Tensor:
        """Map [R, in_features] to [R, outputs]."""
        return F.linear(features, *self.matrix())


def affine_of(layer: nn.Module) -> Affine | None:
    """Describe one of the layers of this file as one matrix; None for any other layer, of which nothing is known."""
    if type(layer) is CosineLinear:
        return Affine(layer.scale * F.normalize(layer.weight, dim=1), layer.bias, True)
    if type(layer) is EuclideanLinear:
        return Affine(*layer.matrix(), False)
    if type(layer) is nn.Linear and layer.bias is not None:
        return Affine(layer.weight, layer.bias, False)
    return None


def feature_widths(classifier: nn.Module) -> set[int]:
    """Numbers per proposal that the layers called `linear` of a classifier, or of its members, are made for."""
    layers = (getattr(module, "linear", None) for module in classifier.modules())
    return {layer.in_features for layer in layers if isinstance(layer, nn.Linear)}


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place, so that each of them holds the same counts."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def at_least_float32(logits: Tensor) -> Tensor:
    """Return half-precision logits, as autocast makes them, in float32, and others unchanged."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
