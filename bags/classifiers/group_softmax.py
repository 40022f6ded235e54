"""Balanced Group Softmax (sections 4.1-4.4 of the paper).

Logit layout, equal to that of the released models: columns [background, foreground], then for each
group [others, its categories by ascending label]. C = 1230 and 4 groups give D = 1236.

Shape shorthand: R proposals, C categories, N foreground groups, D = C + 2 + N logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import BoxFeatures, ProposalClassifier, new_linear
from bags.classifiers.groups import CategoryGroups


class GroupSoftmax(ProposalClassifier):
    """One softmax per group of similar frequency, each with `others`; background in a group of its own.

    others_ratio is the paper's beta: per foreground instance of a group in the batch, that many
    `others` proposals train the group (sampled anew in every call from torch's global generator).
    "n" takes all `others` of every group that has a foreground instance, "all" those of every group
    (section 5.4, Figure 4). Raises ValueError for any other value.
    """

    def __init__(self, in_features: int, groups: CategoryGroups, others_ratio: float | str = 8.0):
        super().__init__()
        if not (others_ratio in ("n", "all") if isinstance(others_ratio, str) else others_ratio >= 0):
            raise ValueError(f"others_ratio: expected a number >= 0, 'n' or 'all', got {others_ratio!r}")
        self.groups = groups
        self.num_categories = groups.num_categories
        self.others_ratio = others_ratio
        self.linear = new_linear(in_features, groups.num_categories + 2 + len(groups.sizes))
        self.widths = [2, *(size + 1 for size in groups.sizes)]

        # For each label: its target in every group (0 = others), and its column among the logits.
        targets = torch.zeros(1 + len(groups.sizes), self.num_categories + 1, dtype=torch.long)
        columns = torch.zeros(self.num_categories + 1, dtype=torch.long)
        targets[0, 1:] = 1
        start = 2
        for group, size in enumerate(groups.sizes):
            labels = torch.tensor(groups.members(group), dtype=torch.long)
            targets[group + 1, labels] = torch.arange(1, size + 1)
            columns[labels] = start + torch.arange(1, size + 1)
            start += size + 1
        self.register_buffer("targets", targets, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, features: BoxFeatures) -> Tensor:
        """Features -> logits [R, C + 2 + N]."""
        return self.linear(features.fc)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Eq. 5 with the sampling of section 4.3: one cross entropy per group, to be added up.

        Each group's loss is the mean over the proposals that train it: all R of them for the
        background group (`loss_group0`), the group's foreground and its sampled `others` for
        group n (`loss_group<n>`). A group without foreground in the batch has loss 0.
        """
        targets = self.targets[:, labels]  # [1 + N, R]
        weights = self.sample_weights(targets)
        losses = {}
        for n, group_logits in enumerate(logits.float().split(self.widths, dim=1)):
            entropy = F.cross_entropy(group_logits, targets[n], reduction="none")
            losses[f"loss_group{n}"] = (weights[n] * entropy).sum() / weights[n].sum().clamp(min=1)
        return losses

    def sample_weights(self, targets: Tensor) -> Tensor:
        """Which proposals train which group: 0 or 1, float [1 + N, R], from targets [1 + N, R].

        No host synchronisation: `others` are ranked by a random key and the first ones are taken.
        """
        foreground = targets > 0
        instances = foreground.sum(1, keepdim=True)
        if self.others_ratio == "all":
            chosen = torch.ones_like(foreground)
        elif self.others_ratio == "n":
            chosen = (instances > 0).expand_as(foreground)
        else:
            quota = (instances.double() * self.others_ratio).floor()  # m_n = beta * instances
            keys = torch.rand(targets.shape, device=targets.device).masked_fill(foreground, 2.0)
            chosen = keys.argsort(1).argsort(1) < quota
        weights = (foreground | chosen).float()
        weights[0] = 1.0
        return weights

    def probs(self, logits: Tensor) -> Tensor:
        """Section 4.4: softmax per group, `others` dropped, categories scaled by P(foreground).

        [R, C+1]; column 0 is P(background). Rows do not sum to 1.
        """
        parts = [torch.softmax(part, -1) for part in logits.float().split(self.widths, dim=1)]
        foreground = parts[0][:, 1:]
        scores = torch.cat([parts[0], *(part * foreground for part in parts[1:])], dim=1)
        return scores[:, self.columns]

    def label_weights(self) -> Tensor:
        """[C+1, in_features]; a category's row is the one of its own group."""
        return self.linear.weight.detach()[self.columns]
