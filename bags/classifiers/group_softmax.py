"""Balanced Group Softmax (sections 4.1-4.4 of the paper).

Logit layout, equal to that of the released models: columns [background, foreground], then for each
group [others, its categories by ascending label]. C = 1230 and 4 groups give D = 1236.

Shape shorthand: R proposals, C categories, N foreground groups, L = C + 2 + N columns of the full layout.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bags.classifiers.base import (
    BoxFeatures,
    CosineLinear,
    ProposalClassifier,
    at_least_float32,
    checked_weights,
    need,
    need_not_negative,
    new_linear,
)
from bags.classifiers.groups import CategoryGroups

NEVER = -1e4  # the logit of a column that a variant lacks: probability 0, and finite even in float16


class GroupSoftmax(ProposalClassifier):
    """One softmax per group of similar frequency, each with `others`; background in a group of its own.

    others_ratio      the paper's beta: per foreground instance of a group in the batch, that many `others`
                      proposals train the group (drawn anew in every call from torch's global generator);
                      "n" takes all `others` of every group that has a foreground instance, "all" those of
                      every group (section 5.4, Figure 4)
    background_group  the paper's *b* (Table 4). Without it, scores are not rescaled, and the background's
                      score is the product of all groups' P(others)
    others            the paper's *o*. Without it, background proposals train no group but the background's,
                      which is then one logit (the background's) with sigmoid cross entropy (section 4.1)
    group_weights     [1 + N] factors >= 0 of the losses, the background group's first
    class_weights     [C + 1] factors >= 0 of each label's foreground samples (see `groups.within_group_weights`);
                      the released `with0_reweight` variant
    Not in the paper:
    scale             >= 0, of a cosine layer (its factor); 0 is the paper's linear layer
    temperatures      [1 + N] numbers above 0 that divide each group's logits before the softmax of the scores, the
                      background group's first, or "learned": factors of the logits, trained with the layer
    Raises ValueError for an impossible choice.
    """

    targets: Tensor
    columns: Tensor
    fill: Tensor
    real: Tensor
    factors: Tensor
    class_weights: Tensor
    sharpness: Tensor | None

    def __init__(
        self,
        in_features: int,
        groups: CategoryGroups,
        others_ratio: float | str = 8.0,
        background_group: bool = True,
        others: bool = True,
        group_weights: Sequence[float] | None = None,
        class_weights: Tensor | None = None,
        scale: float = 0.0,
        temperatures: Sequence[float] | str | None = None,
    ):
        super().__init__()
        number = len(groups.sizes)
        known = others_ratio in ("n", "all") if isinstance(others_ratio, str) else 0 <= others_ratio < math.inf
        need(known, "others_ratio", "a number of 0 or more, 'n' or 'all'", others_ratio)
        need_not_negative(scale=scale)
        learned = temperatures == "learned"
        fixed = None if temperatures is None or isinstance(temperatures, str) else tuple(temperatures)
        usable = fixed is not None and len(fixed) == number + 1 and all(0 < t < math.inf for t in fixed)
        need(learned or temperatures is None or usable, "temperatures",
             f"'learned' or {number + 1} numbers above 0", temperatures)  # fmt: skip
        self.groups, self.num_categories = groups, groups.num_categories
        self.others_ratio, self.background_group, self.others = others_ratio, background_group, others
        self.widths = [2, *(size + 1 for size in groups.sizes)]

        # For each label: its target in every group (0 = others), and its column in the full layout.
        targets = torch.zeros(number + 1, self.num_categories + 1, dtype=torch.long)
        columns = torch.zeros(self.num_categories + 1, dtype=torch.long)
        targets[0, 1:] = 1
        starts, start = [], 2
        for group, size in enumerate(groups.sizes):
            labels = torch.tensor(groups.members(group), dtype=torch.long)
            targets[group + 1, labels] = torch.arange(1, size + 1)
            columns[labels] = start + torch.arange(1, size + 1)
            starts.append(start)
            start += size + 1
        # A variant has fewer logits than the full layout has columns; the others hold a constant.
        fill = torch.full((start,), float("nan"))
        if not others:
            fill[[1, *starts]] = torch.tensor([0.0, *[NEVER] * number])  # sigmoid(z) is softmax over [z, 0]
        if not background_group:
            fill[:2] = torch.tensor([NEVER, 0.0])
        self.variant = not (others and background_group)
        factors = torch.ones(number + 1)
        if group_weights is not None:
            factors = checked_weights("group_weights", group_weights, number + 1)
        weights = torch.ones(self.num_categories + 1)
        if class_weights is not None:
            weights = checked_weights("class_weights", class_weights, self.num_categories + 1)
        self.uniform = class_weights is None
        real = fill.isnan().nonzero().squeeze(1)
        self.log_factors = nn.Parameter(torch.zeros(number + 1)) if learned else None
        sharpness = None if fixed is None else 1 / torch.tensor(fixed, dtype=torch.float64)
        self.register_buffer("sharpness", sharpness, persistent=False)
        buffers = {"targets": targets, "columns": columns, "fill": fill, "real": real, "factors": factors}
        for name, value in (buffers | {"class_weights": weights}).items():
            self.register_buffer(name, value, persistent=False)
        self.linear = CosineLinear(in_features, len(real), scale) if scale else new_linear(in_features, len(real))

    def forward(self, features: BoxFeatures) -> Tensor:
        """Features -> logits [R, D]; D = L = C + 2 + N with `others` and `background_group`, else fewer."""
        return self.linear(features.fc)

    def full_layout(self, logits: Tensor) -> Tensor:
        """[R, D] -> [R, L], at least float32."""
        logits = at_least_float32(logits)
        if self.variant:
            logits = self.fill.to(logits.dtype).repeat(len(logits), 1).index_copy(1, self.real, logits)
        return logits if self.log_factors is None else logits * self._by_column(self.log_factors.exp(), logits)

    def _by_column(self, of_group: Tensor, logits: Tensor) -> Tensor:
        """[1 + N] -> [L], in the logits' type."""
        widths = torch.tensor(self.widths, device=of_group.device)
        return of_group.to(logits.dtype).repeat_interleave(widths, output_size=sum(self.widths))

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Eq. 5 with the sampling of section 4.3: one cross entropy per group, to be added up.

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
        losses = cross_entropy(self.full_layout(logits), targets, weights, self.widths) * self.factors
        first = 0 if self.background_group else 1
        return {f"loss_group{n}": losses[n] for n in range(first, len(self.widths))}

    def sample_weights(self, targets: Tensor) -> Tensor:
        """Which proposals train which group: 0 or 1, float [1 + N, R], from targets [1 + N, R].

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
        if self.sharpness is not None:
            logits = logits * self._by_column(self.sharpness, logits)
        parts = [torch.softmax(part, -1) for part in logits.split(self.widths, dim=1)]
        foreground = parts[0][:, 1:]
        scores = torch.cat([parts[0], *(part * foreground for part in parts[1:])], dim=1)[:, self.columns]
        if self.others and not self.background_group:
            scores[:, 0] = torch.stack([part[:, 0] for part in parts[1:]]).prod(0)
        return scores

    def weight_norms(self) -> Tensor:
        """[C+1]; a category's vector is the one of its own group. NaN for a background without a vector."""
        own = self.linear.weight.detach().norm(dim=1)
        norms = self.fill.to(own.dtype).index_copy(0, self.real, own)[self.columns]
        if not self.background_group:
            norms[0] = float("nan")
        return norms


def dense_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, widths: list[int]) -> Tensor:
    """Weighted mean cross entropy of each block of columns, [G].

    logits [R, sum(widths)]; targets [G, R] within the block; weights [G, R] >= 0. The divisor is the
    sum of weights, but at least 1.
    """
    losses = [
        (weight * F.cross_entropy(block, target, reduction="none")).sum() / weight.sum().clamp(min=1)
        for block, target, weight in zip(logits.split(widths, 1), targets, weights, strict=True)
    ]
    return torch.stack(losses)


class SelectedCrossEntropy(torch.autograd.Function):
    """`dense_cross_entropy` from the rows with weight alone, its gradient made on the way.

    Most blocks are trained by few rows, which makes this several times faster on a CPU. Finding the
    rows would be a host synchronisation on a GPU.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, weights: Tensor, widths: list[int]) -> Tensor:
        """See the class; arguments as of `dense_cross_entropy`."""
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
    def backward(ctx, upstream: Tensor):
        """Scales each block's gradient."""
        (gradient,) = ctx.saved_tensors
        if not (upstream == 1).all():
            gradient = gradient * upstream.repeat_interleave(torch.tensor(ctx.widths))
        return gradient, None, None, None
