"""The mean of the scores of several trained classifiers over the same features. Nothing is trained.

Scores are averaged, not logits. Softmax, groups and sigmoids have logits of different kinds, but all have scores. The
mean of a softmax's logits is a geometric mean of its scores: one classifier that has never found a rare category then
silences all the others.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bags.classifiers.base import (
    Affine,
    BoxFeatures,
    ClassifierSettings,
    ProposalClassifier,
    TrainingCounts,
    at_least_float32,
    feature_widths,
)
from bags.core.settings import NO_RESULT, Range, need

MOST_CLASSIFIERS, MOST_DEPTH = 100, 8  # in an average; of averages of averages


@dataclass(frozen=True)
class AverageSettings(ClassifierSettings):
    """The mean of the scores of classifiers that were trained on the same frozen detector."""

    trained, combines = False, True

    name: Literal["average"] = "average"
    of: tuple[str, ...] = ()  # the runs that they come from: row:NAME, or checkpoints
    weights: Annotated[tuple[float, ...], Range(ge=0)] = ()  # one for each, of any sum above 0; none: equal
    # Their settings, which are read from the checkpoints of `of`.
    members: Annotated[tuple[ClassifierSettings, ...], NO_RESULT] = ()

    def __post_init__(self) -> None:
        """Check also that the keys go together. Raises ValueError, naming the key."""
        super().__post_init__()
        need(all(source not in ("", "row:") for source in self.of), "of", "row:NAME or checkpoints", list(self.of))
        need(len(set(self.of)) == len(self.of), "of", "each run once, with a weight", list(self.of))
        words = f"none, or one for each of the {len(self.of)} runs"
        need(len(self.weights) in (0, len(self.of)), "weights", words, list(self.weights))
        need(not self.weights or sum(self.weights) > 0, "weights", "one above 0 or more", list(self.weights))
        words = f"none, since they are read from the runs, or one for each of the {len(self.of)} runs of `of`"
        need(len(self.members) in (0, len(self.of)), "members", words, len(self.members))
        words = f"at most {MOST_CLASSIFIERS} classifiers in all"
        need(self.classifiers <= MOST_CLASSIFIERS, "of", words, self.classifiers)
        known = all(member.layers for member in self.members)
        need(known, "members", "averages with members of their own")
        pooled = ", ".join(member.name for member in self.members if member.fits_pooled)
        need(not pooled, "of", "runs whose classifiers need no pooled features", pooled)
        need(self.depth <= MOST_DEPTH, "members", f"averages of averages at most {MOST_DEPTH} deep")

    @property
    def layers(self) -> int:
        """Those of all members; 0 where these are not known."""
        return sum(member.layers for member in self.members)

    @property
    def classifiers(self) -> int:
        """How many classifiers there are in all, also in averages of averages."""
        inner = (member.classifiers if isinstance(member, AverageSettings) else 1 for member in self.members)
        return max(len(self.of), sum(inner))

    @property
    def depth(self) -> int:
        """1 for an average of other classifiers, 2 for an average of such averages, and so on."""
        return 1 + max((member.depth for member in self.members if isinstance(member, AverageSettings)), default=0)

    @property
    def sources(self) -> tuple[str, ...]:
        """The runs whose classifiers are averaged."""
        return self.of

    def made_of(self, members: Sequence[ClassifierSettings]) -> "AverageSettings":
        """The same settings with their members. Raises ValueError for one that cannot be averaged."""
        return dataclasses.replace(self, members=tuple(members))

    def columns(self, training: TrainingCounts) -> tuple:
        """Those of all members."""
        return ("average", *((member.name, member.columns(training)) for member in self.members))

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "Average":
        """Make the members, whose weights are still to be loaded. Raises ValueError where they are not known."""
        need(bool(self.members), "members", "the settings of the classifiers of all runs of `of`, got none")
        members = [member.build(in_features, pooled_features, training) for member in self.members]
        for member in members:
            member.forget()
        return Average(members, self.weights)


class Average(ProposalClassifier):
    """p = sum_m w_m p_m, of members m that keep their own kinds of scores.

    members  classifiers of the same categories and features, trained
    weights  a factor of 0 or more for each member, of any sum above 0, which is divided by; empty: equal

    Members that are an affine map of the features are computed together, in one matrix product. A member of weight 0
    changes nothing. Shape shorthand: R proposals, C categories; logits [R, D] are those of all members side by side, as
    `forward` made them last. Raises ValueError for members of different numbers of categories or widths of
    features, and for weights that are not one for each.
    """

    def __init__(self, members: Sequence[ProposalClassifier], weights: Sequence[float] = AverageSettings.weights):
        super().__init__()
        need(len(members) > 0, "members", "one classifier or more", 0)
        numbers = [member.num_categories for member in members]
        need(len(set(numbers)) == 1, "members", "classifiers of the same categories", numbers)
        widths = sorted(set().union(*map(feature_widths, members)))
        need(len(widths) <= 1, "members", "classifiers of features of one width", widths)
        self.num_categories = numbers[0]
        self.members = nn.ModuleList(members)
        self.widths: list[int] = []  # logits of each used member, known after the first call
        self.mix(weights)

    def mix(self, weights: Sequence[float]) -> None:
        """Give the members other weights; those of 0 are not computed. Raises ValueError as the constructor."""
        settings = AverageSettings(of=tuple(map(str, range(len(self.members)))), weights=tuple(weights))
        factors = [weight / max(settings.weights) for weight in settings.weights] or [1.0] * len(self.members)
        self.shares = [factor / sum(factors) for factor in factors]  # of each member, sum 1

    def requires_grad_(self, requires_grad: bool = True) -> "Average":
        """Switch gradients, as each member does; some keep a layer without."""
        for member in self.members:
            member.requires_grad_(requires_grad)
        return self

    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute the logits of all members, [R, D]."""
        members = self._used()
        affine = {k: _affine(member) for k, member in members.items()}
        maps = {k: one for k, one in affine.items() if one is not None}
        logits: dict[int, Tensor] = {}
        if maps:
            fc = features.fc
            product = F.linear(fc, torch.cat([one.weight for one in maps.values()]))
            norm = fc.norm(dim=1, keepdim=True).clamp(min=1e-12)
            parts = product.split([len(one.weight) for one in maps.values()], dim=1)
            for (k, one), part in zip(maps.items(), parts, strict=True):
                logits[k] = (part / norm if one.unit else part) + one.bias
        ordered = [logits[k] if k in logits else member(features) for k, member in members.items()]
        self.widths = [part.shape[1] for part in ordered]
        return torch.cat(ordered, dim=1)

    def probs(self, logits: Tensor) -> Tensor:
        """Average the members' scores: [R, C+1], column 0 the background. Rows sum to 1 if all members' do."""
        need(logits.shape[1] == sum(self.widths), "logits", "those of `forward`", tuple(logits.shape))
        parts = zip(self._used().items(), logits.split(self.widths, dim=1), strict=True)
        return torch.stack([self.shares[k] * member.probs(part) for (k, member), part in parts]).sum(0)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Average -log of the labels' scores over the R proposals, to watch; nothing is trained with it."""
        scores = at_least_float32(self.probs(logits)).clamp(min=1e-12)
        return {"loss_classifier": F.nll_loss(scores.log(), labels, reduction="sum") / max(len(labels), 1)}

    def weight_norms(self) -> Tensor:
        """Average the members' norms, [C+1]; entry 0 is the background."""
        return torch.stack([self.shares[k] * member.weight_norms() for k, member in self._used().items()]).sum(0)

    def _used(self) -> dict[int, ProposalClassifier]:
        """The members whose weight is not 0, by their place."""
        return {k: cast(ProposalClassifier, self.members[k]) for k, share in enumerate(self.shares) if share > 0}


def _affine(member: ProposalClassifier) -> Affine | None:
    """The member's layer as one matrix; None where a derived class has another `forward` than `affine` speaks of."""
    kinds = type(member).__mro__
    of_affine, of_forward = (next(kind for kind in kinds if name in vars(kind)) for name in ("affine", "forward"))
    return member.affine() if issubclass(of_affine, of_forward) else None
