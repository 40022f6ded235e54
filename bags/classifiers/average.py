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
    checked_weights,
)
from bags.core.settings import NO_RESULT, Range, need


@dataclass(frozen=True)
class AverageSettings(ClassifierSettings):
    """The mean of the scores of classifiers that were trained on the same frozen detector."""

    trained = False

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
        need(len(self.members) in (0, len(self.of)), "members", "one for each run", len(self.members))

    @property
    def sources(self) -> tuple[str, ...]:
        """The runs whose classifiers are averaged."""
        return self.of

    def made_of(self, members: Sequence[ClassifierSettings]) -> "AverageSettings":
        """The same settings with their members. Raises ValueError for one that cannot be averaged."""
        names = [member.name for member in members]
        need(not any(member.fitted for member in members), "of", "classifiers with a layer of their own", names)
        return dataclasses.replace(self, members=tuple(members))

    def columns(self, training: TrainingCounts) -> tuple:
        """Those of all members."""
        return ("average", *((member.name, member.columns(training)) for member in self.members))

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "Average":
        """Make the members, whose weights are still to be loaded. Raises ValueError where they are not known."""
        need(bool(self.members), "of", "one run or more, with its classifier's settings in `members`", list(self.of))
        members = [member.build(in_features, pooled_features, training) for member in self.members]
        return Average(members, self.weights)


class Average(ProposalClassifier):
    """p = sum_m w_m p_m, of members m that keep their own kinds of scores.

    members  classifiers of the same categories and features, trained
    weights  a factor of 0 or more for each member, of any sum above 0, which is divided by; empty: equal

    Members that are an affine map of the features are computed together, in one matrix product. Shape shorthand:
    R proposals, C categories; logits [R, D] are those of all members side by side. Raises ValueError for members
    of different numbers of categories, and for weights that are not one for each.
    """

    shares: Tensor  # [M], sum 1

    def __init__(self, members: Sequence[ProposalClassifier], weights: Sequence[float] = AverageSettings.weights):
        super().__init__()
        need(len(members) > 0, "members", "one classifier or more", 0)
        numbers = [member.num_categories for member in members]
        need(len(set(numbers)) == 1, "members", "classifiers of the same categories", numbers)
        names = tuple(map(str, range(len(members))))
        settings = AverageSettings(of=names, weights=tuple(weights))
        self.num_categories = numbers[0]
        self.members = nn.ModuleList(members)
        self.register_buffer("shares", torch.zeros(len(members), dtype=torch.float64), persistent=False)
        self.mix(settings.weights or [1.0] * len(members))
        self.widths: list[int] = []  # logits of each used member, known after the first call

    def mix(self, weights: Sequence[float]) -> None:
        """Give the members other weights [M]. Those of 0 are not computed."""
        values = checked_weights("weights", weights, len(self.members)).double()
        need(bool(values.sum() > 0), "weights", "one above 0 or more", list(weights))
        self.shares.copy_(values / values.sum())
        self.used = [number for number, weight in enumerate(values.tolist()) if weight > 0]

    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute the logits of all members, [R, D]."""
        used = dict(zip(self.used, self._members(), strict=True))
        affine = {k: _affine(member) for k, member in used.items()}
        maps = {k: one for k, one in affine.items() if one is not None}
        logits: dict[int, Tensor] = {}
        if maps:
            fc = features.fc
            product = F.linear(fc, torch.cat([one.weight for one in maps.values()]))
            norm = fc.norm(dim=1, keepdim=True).clamp(min=1e-12)
            parts = product.split([len(one.weight) for one in maps.values()], dim=1)
            for (k, one), part in zip(maps.items(), parts, strict=True):
                logits[k] = (part / norm if one.unit else part) + one.bias
        ordered = [logits[k] if k in logits else member(features) for k, member in used.items()]
        self.widths = [part.shape[1] for part in ordered]
        return torch.cat(ordered, dim=1)

    def probs(self, logits: Tensor) -> Tensor:
        """Average the members' scores: [R, C+1], column 0 the background. Rows sum to 1 if all members' do."""
        parts = zip(self.shares[self.used], self._members(), logits.split(self.widths, dim=1), strict=True)
        return torch.stack([share * member.probs(part) for share, member, part in parts]).sum(0)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Average -log of the labels' scores over the R proposals, to watch; nothing is trained with it."""
        scores = at_least_float32(self.probs(logits)).clamp(min=1e-12)
        return {"loss_classifier": F.nll_loss(scores.log(), labels, reduction="sum") / max(len(labels), 1)}

    def weight_norms(self) -> Tensor:
        """Average the members' norms, [C+1]; entry 0 is the background."""
        pairs = zip(self.shares[self.used], self._members(), strict=True)
        return torch.stack([share * member.weight_norms() for share, member in pairs]).sum(0)

    def _members(self) -> list[ProposalClassifier]:
        """Those with a weight above 0."""
        return [cast(ProposalClassifier, self.members[number]) for number in self.used]


def _affine(member: ProposalClassifier) -> Affine | None:
    """The member's layer as one matrix; None where a derived class has another `forward` than `affine` speaks of."""
    kinds = type(member).__mro__
    of_affine, of_forward = (next(kind for kind in kinds if name in vars(kind)) for name in ("affine", "forward"))
    return member.affine() if issubclass(of_affine, of_forward) else None
