"""Balanced Group Softmax (sections 4.1-4.4 of the paper).

Logit layout, equal to that of the released models: columns [background, foreground], then for each
group [others, its categories by ascending label]. C = 1230 and 4 groups give D = 1236.

Shape shorthand: R proposals, C categories, N foreground groups, L = C + 2 + N columns of the full layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bags.classifiers.base import (
    Affine,
    BoxFeatures,
    ClassifierSettings,
    CosineLinear,
    EuclideanLinear,
    ProposalClassifier,
    TrainingCounts,
    affine_of,
    at_least_float32,
    checked_weights,
    new_linear,
    told_as_setting,
)
from bags.classifiers.groups import CategoryGroups, assign_groups, equal_boundaries, given_groups, within_group_weights
from bags.core.settings import Range, need

NEVER = -1e4  # the logit of a column that must have probability 0; finite even in float16


@dataclass(frozen=True)
class GroupSoftmaxSettings(ClassifierSettings):
    """Balanced Group Softmax (Eq. 3-5)."""

    name: Literal["group_softmax"] = "group_softmax"
    boundaries: Annotated[tuple[int, ...], Range(gt=0, empty=False, rising=True)] = (10, 100, 1000)  # instances
    others_ratio: Annotated[float | Literal["n", "all"], Range(ge=0)] = 8.0  # beta
    background_group: bool = True  # b in Table 4
    others: bool = True  # o in Table 4
    group_weights: Annotated[tuple[float, ...] | None, Range(ge=0)] = None  # of the losses, the background group first
    reweight: bool = False  # samples of a group weighted by 1/n within it
    # The rest is not in the paper.
    equal_groups: Annotated[int, Range(ge=0)] = 0  # so many groups of equal total instances, in place of boundaries
    groups: tuple[tuple[int, ...], ...] | None = None  # category ids of each, in place of boundaries
    scale: Annotated[float, Range(ge=0)] = 0.0  # of a cosine layer; 0: a linear layer
    euclidean: Annotated[float, Range(ge=0)] = 0.0  # temperature of a layer of distances; 0: a linear layer
    temperatures: Annotated[tuple[float, ...] | Literal["learned"] | None, Range(gt=0)] = None  # one for each group

    def __post_init__(self) -> None:
        """Check also that every list for the groups has as many items as there are groups. Raises ValueError."""
        super().__post_init__()
        groups, weights, temperatures = self.groups, self.group_weights, self.temperatures
        need(groups is None or len(groups) > 0, "groups", "one list of category ids or more, got none")
        need(groups is None or not self.equal_groups, "groups", "only one of groups and equal_groups")
        need(not (self.scale and self.euclidean), "euclidean", "only one of scale and euclidean")
        number = (len(groups or ()) or self.equal_groups or len(self.boundaries) + 1) + 1
        fits = weights is None or len(weights) == number
        need(fits, "group_weights", f"{number} numbers, the background group's first", weights)
        fits = temperatures in (None, "learned") or len(temperatures or ()) == number
        need(fits, "temperatures", f"learned, or {number} numbers above 0", temperatures)

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "GroupSoftmax":
        """Make the untrained classifier. Raises UserError for groups that the categories do not allow."""
        groups = self.category_groups(training)
        return GroupSoftmax(
            in_features,
            groups,
            self.others_ratio,
            self.background_group,
            self.others,
            self.group_weights,
            within_group_weights(groups, training.instance_counts) if self.reweight else None,
            self.scale,
            self.temperatures,
            self.euclidean,
        )

    def columns(self, training: TrainingCounts) -> tuple:
        """Each category's group, and which columns the layer has."""
        return (
            self.category_groups(training).group_of,
            self.background_group,
            self.others,
            self.scale > 0,
            self.euclidean > 0,
        )

    def category_groups(self, training: TrainingCounts) -> CategoryGroups:
        """Divide the categories. Raises UserError, naming the key, for groups that they do not allow."""
        counts = training.instance_counts
        with told_as_setting():
            if self.groups is not None:
                return given_groups(self.groups, training.category_ids)
            if not self.equal_groups:
                return assign_groups(counts, self.boundaries)
            return assign_groups(counts, equal_boundaries(counts, self.equal_groups))


class GroupSoftmax(ProposalClassifier):
    """One softmax per group of similar frequency, each with `others`; background in a group of its own.

    others_ratio      the paper's beta: per foreground instance of a group in the batch, that many `others`
                      proposals train the group (drawn anew in every call from torch's global generator);
                      "n" takes all `others` of every group that has a foreground instance, "all" those of
                      every group (section 5.4, Figure 4)
    background_group  the paper's *b* (Table 4). Without it, scores are not rescaled, and the background's
                      score is the product of all groups' P(others)
    others            the paper's *o*. Without it, background proposals train only the background's group,
                      which is then one logit (the background's) with sigmoid cross entropy (section 4.1)
    group_weights     [1 + N] factors >= 0 of the losses, the background group's first
    class_weights     [C + 1] factors >= 0 of each label's foreground samples (see `groups.within_group_weights`);
                      the released `with0_reweight` variant
    Not in the paper:
    scale             >= 0, of a cosine layer (its factor); 0 is the paper's linear layer
    euclidean         >= 0, the temperature T of a layer whose logits are -||x - c||^2 / T^2 for a learned centre c (the
                      Euclidean cross entropy of Gaba 2025, arXiv 2511.16619, with the features as embedding)
    temperatures      [1 + N] numbers above 0 that divide each group's logits before the softmax of the scores, the
                      background group's first, or "learned": factors of the logits, trained with the layer
    Raises ValueError for an impossible choice.
    """

    # Not in the state dict. L columns of the full layout; label 0 is the background, target 0 is `others`.
    targets: Tensor  # [1 + N, C + 1] int64, each label's target within every group
    label_columns: Tensor  # [C + 1] int64, each label's column of the full layout
    learned_columns: Tensor  # [D] int64, the column of each logit of the layer
    constants: Tensor  # [L], logits of the columns that the layer lacks
    group_weights: Tensor  # [1 + N]
    class_weights: Tensor  # [C + 1]
    inverse_temperatures: Tensor | None  # [1 + N] float64

    def __init__(
        self,
        in_features: int,
        groups: CategoryGroups,
        others_ratio: float | Literal["n", "all"] = GroupSoftmaxSettings.others_ratio,
        background_group: bool = GroupSoftmaxSettings.background_group,
        others: bool = GroupSoftmaxSettings.others,
        group_weights: Sequence[float] | None = None,
        class_weights: Tensor | None = None,
        scale: float = GroupSoftmaxSettings.scale,
        temperatures: Sequence[float] | Literal["learned"] | None = None,
        euclidean: float = GroupSoftmaxSettings.euclidean,
    ):
        super().__init__()
        fixed = None if temperatures is None or isinstance(temperatures, str) else tuple(temperatures)
        GroupSoftmaxSettings(
            others_ratio=others_ratio,
            background_group=background_group,
            others=others,
            group_weights=None if group_weights is None else tuple(group_weights),
            groups=tuple(tuple(groups.members(group)) for group in range(len(groups.sizes))),  # as labels
            scale=scale,
            temperatures=temperatures if isinstance(temperatures, str) else fixed,
            euclidean=euclidean,
        )
        self.groups, self.num_categories = groups, groups.num_categories
        self.others_ratio, self.background_group, self.others = others_ratio, background_group, others
        self.widths = [2, *(size + 1 for size in groups.sizes)]
        self.variant = not (others and background_group)  # a variant has fewer logits than the full layout has columns
        self.uniform = class_weights is None
        number = len(groups.sizes) + 1
        group_factors, weights = torch.ones(number), torch.ones(self.num_categories + 1)
        if group_weights is not None:
            group_factors = torch.as_tensor(group_weights)
        if class_weights is not None:
            weights = checked_weights("class_weights", class_weights, self.num_categories + 1)
        # [1 + N], the logarithm of each group's inverse temperature; the name is a key of checkpoints.
        self.log_factors = nn.Parameter(torch.zeros(number)) if temperatures == "learned" else None
        inverse = None if fixed is None else 1 / torch.tensor(fixed, dtype=torch.float64)
        self.register_buffer("inverse_temperatures", inverse, persistent=False)
        layout = _layout(groups, background_group, others)
        learned = layout.is_learned.nonzero().squeeze(1)
        buffers = {"targets": layout.targets, "label_columns": layout.label_columns, "constants": layout.constants}
        buffers |= {"learned_columns": learned, "group_weights": group_factors, "class_weights": weights}
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        self.linear = _layer(in_features, len(learned), scale, euclidean)

    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute logits [R, D]; D = L = C + 2 + N with `others` and `background_group`, else fewer."""
        return self.linear(features.fc)

    def affine(self) -> Affine | None:
        """Give the layer as one matrix."""
        return affine_of(self.linear)

    def full_layout(self, logits: Tensor) -> Tensor:
        """Spread logits [R, D] over the columns of the full layout, [R, L], at least float32."""
        logits = at_least_float32(logits)
        if self.variant:
            constants = self.constants.to(logits.dtype).repeat(logits.shape[0], 1)
            logits = constants.index_copy(1, self.learned_columns, logits)
        return logits if self.log_factors is None else logits * self._by_column(self.log_factors.exp(), logits)

    def _by_column(self, of_group: Tensor, logits: Tensor) -> Tensor:
        """Repeat a number of each group, [1 + N], for the group's columns: [L], in the logits' type."""
        widths = torch.tensor(self.widths, device=of_group.device)
        return of_group.to(logits.dtype).repeat_interleave(widths, output_size=sum(self.widths))

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute Eq. 5 with the sampling of section 4.3: one cross entropy per group, to be added up.

        Each group's loss is the mean over the proposals that train it: all R of them for the
        background group (`loss_group0`), the group's foreground and its sampled `others` for
        group n (`loss_group<n>`). A group without foreground in the batch has loss 0 (but for
        others_ratio "all").
        """
        targets = self.targets[:, labels]  # [1 + N, R]
        weights = self.sample_weights(targets).to(at_least_float32(logits).dtype)
        if not self.uniform:
            weights[1:] *= torch.where(targets[1:] > 0, self.class_weights.to(weights.dtype)[labels], 1)
        selective = logits.device.type == "cpu" and not torch.compiler.is_compiling()
        cross_entropy = SelectedCrossEntropy.apply if selective else dense_cross_entropy
        losses = cross_entropy(self.full_layout(logits), targets, weights, self.widths) * self.group_weights
        first = 0 if self.background_group else 1
        return {f"loss_group{n}": losses[n] for n in range(first, len(self.widths))}

    def sample_weights(self, targets: Tensor) -> Tensor:
        """Choose which proposals train which group: 0 or 1, float [1 + N, R], from targets [1 + N, R].

        No host synchronisation: `others` are ranked by a random key and the first ones are taken.
        """
        foreground = targets > 0
        instances = foreground.sum(1, keepdim=True)
        if not self.others:
            chosen = torch.zeros_like(foreground)
        elif self.others_ratio == "all":
            chosen = torch.ones_like(foreground)
        elif self.others_ratio == "n":
            chosen = (instances > 0).expand_as(foreground)
        else:
            quota = (instances.double() * float(self.others_ratio)).floor()  # m_n = beta * instances
            keys = torch.rand(targets.shape, device=targets.device).masked_fill(foreground, 2.0)
            chosen = keys.argsort(1).argsort(1) < quota
        weights = (foreground | chosen).float()
        weights[0] = float(self.background_group)
        return weights

    def probs(self, logits: Tensor) -> Tensor:
        """Section 4.4: softmax per group, `others` dropped, categories scaled by P(foreground).

        [R, C+1]; column 0 is P(background). Rows do not sum to 1.
        """
        logits = self.full_layout(logits)
        if self.inverse_temperatures is not None:
            logits = logits * self._by_column(self.inverse_temperatures, logits)
        parts = [torch.softmax(part, -1) for part in logits.split(self.widths, dim=1)]
        foreground = parts[0][:, 1:]
        scores = torch.cat([parts[0], *(part * foreground for part in parts[1:])], dim=1)[:, self.label_columns]
        if self.others and not self.background_group:
            scores[:, 0] = torch.stack([part[:, 0] for part in parts[1:]]).prod(0)
        return scores

    def weight_norms(self) -> Tensor:
        """Norms [C+1] of the layer's rows, for a category that in its group. NaN for a background without a row."""
        rows = self.linear.weight.detach().norm(dim=1)
        norms = rows.new_zeros(len(self.constants)).index_copy(0, self.learned_columns, rows)[self.label_columns]
        if not self.background_group:
            norms[0] = float("nan")
        return norms


def _layer(in_features: int, outputs: int, scale: float, euclidean: float) -> nn.Linear:
    """Make a cosine layer with a scale, one of distances with a temperature, or a linear one where both are 0."""
    if euclidean:
        return EuclideanLinear(in_features, outputs, euclidean)
    return CosineLinear(in_features, outputs, scale) if scale else new_linear(in_features, outputs)


class _Layout(NamedTuple):
    targets: Tensor  # [1 + N, C + 1] int64, each label's target within every group, 0 = others
    label_columns: Tensor  # [C + 1] int64, each label's column
    is_learned: Tensor  # [L] bool, columns whose logits the layer computes
    constants: Tensor  # [L], logits of the other columns


def _layout(groups: CategoryGroups, background_group: bool, others: bool) -> _Layout:
    """Lay out the columns: [background, foreground], then for each group [others, its categories by label].

    Without `others` or `background_group` a column that the variant lacks holds a constant instead of a logit.
    """
    targets = torch.zeros(len(groups.sizes) + 1, groups.num_categories + 1, dtype=torch.long)
    label_columns = torch.zeros(groups.num_categories + 1, dtype=torch.long)
    targets[0, 1:] = 1
    columns_of_others, start = [], 2
    for group, size in enumerate(groups.sizes):
        labels = torch.tensor(groups.members(group), dtype=torch.long)
        targets[group + 1, labels] = torch.arange(1, size + 1)
        label_columns[labels] = start + torch.arange(1, size + 1)
        columns_of_others.append(start)
        start += size + 1
    is_learned = torch.ones(start, dtype=torch.bool)
    constants = torch.zeros(start)
    if not others:
        is_learned[[1, *columns_of_others]] = False  # the foreground's logit is 0: sigmoid(z) is softmax over [z, 0]
        constants[columns_of_others] = NEVER
    if not background_group:
        is_learned[:2] = False
        constants[0] = NEVER  # P(foreground) is 1
    return _Layout(targets, label_columns, is_learned, constants)


def dense_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, widths: list[int]) -> Tensor:
    """Compute the weighted mean cross entropy of each block of columns, [G].

    logits [R, sum(widths)]; targets [G, R] within the block; weights [G, R] >= 0. The divisor is the
    sum of weights, but at least 1.
    """
    losses = [
        (weight * F.cross_entropy(block, target, reduction="none")).sum() / weight.sum().clamp(min=1)
        for block, target, weight in zip(logits.split(widths, 1), targets, weights, strict=True)
    ]
    return torch.stack(losses)


class SelectedCrossEntropy(torch.autograd.Function):
    """`dense_cross_entropy` that reads only the rows with weight, and computes its gradient on the way.

    Most blocks are trained by few rows, which makes this several times faster on a CPU. On a GPU, selecting the rows
    would be a host synchronisation.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, widths: list[int]) -> Tensor:
        """Compute what `dense_cross_entropy` computes, from the same arguments."""
        gradient = torch.zeros_like(logits)
        losses = []
        divisors = weights.sum(1).clamp(min=1)
        for n, (block, into) in enumerate(zip(logits.split(widths, 1), gradient.split(widths, 1), strict=True)):
            rows = weights[n].nonzero().squeeze(1)
            share = weights[n, rows] / divisors[n]
            target = targets[n, rows, None]
            log_probs = torch.log_softmax(block[rows], 1)
            losses.append(-(share * log_probs.gather(1, target)[:, 0]).sum())
            into[rows] = log_probs.exp_().mul_(share[:, None]).scatter_add_(1, target, -share[:, None])
        ctx.save_for_backward(gradient)
        ctx.widths = widths
        return torch.stack(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        """Scale each block's gradient."""
        (gradient,) = ctx.saved_tensors
        if not (upstream == 1).all():
            gradient = gradient * upstream.repeat_interleave(torch.tensor(ctx.widths))
        return gradient, None, None, None
