"""Groups of categories that compete: those of similar training frequency (Eq. 3), or others."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bags.classifiers.base import checked_counts


@dataclass(frozen=True)
class CategoryGroups:
    """A partition of C categories into N groups, by number of training instances in the paper.

    num_categories  C
    sizes           [N] categories per group, without `others`; a group may be empty
    group_of        [C] 0-based group of category c + 1
    boundaries      [N - 1] rising instance counts; a count equal to a boundary goes up. Empty where the groups were
                    given (`given_groups`)
    """

    num_categories: int
    sizes: tuple[int, ...]
    group_of: tuple[int, ...]
    boundaries: tuple[int, ...]

    def members(self, group: int) -> list[int]:
        """Return the labels (1..C) of a group's categories, ascending."""
        return [label for label, g in enumerate(self.group_of, start=1) if g == group]


def assign_groups(
    instance_counts: Sequence[int] | Tensor, boundaries: Sequence[int] = (10, 100, 1000)
) -> CategoryGroups:
    """Put category j into group n if boundaries[n-1] <= count_j < boundaries[n] (Eq. 3).

    instance_counts: [C] training boxes per category, in the order of labels 1..C; each >= 0.
    boundaries: strictly rising, above 0; N - 1 of them make N groups.
    Raises ValueError for negative, fractional or missing counts and for boundaries that do not rise.
    """
    counts = checked_counts("instance_counts", instance_counts)
    edges = tuple(int(b) for b in boundaries)
    if any(high <= low for low, high in itertools.pairwise((0, *edges))) or edges != tuple(boundaries):
        raise ValueError(f"boundaries: expected whole numbers, rising and above 0, got {tuple(boundaries)}")
    group_of = torch.bucketize(counts, torch.tensor(edges, dtype=torch.long), right=True)
    sizes = torch.bincount(group_of, minlength=len(edges) + 1)
    return CategoryGroups(len(counts), tuple(sizes.tolist()), tuple(group_of.tolist()), edges)


def equal_boundaries(instance_counts: Sequence[int] | Tensor, number: int) -> tuple[int, ...]:
    """Return boundaries of `number` groups whose total training instances are as equal as they can be.

    That is, the sum of the squared totals is least (found exactly, by dynamic programming over the distinct
    counts). instance_counts: [C]. Raises ValueError where there are fewer distinct counts than groups.
    """
    counts = checked_counts("instance_counts", instance_counts)
    values, times = counts.unique(return_counts=True)
    if not 1 <= number <= len(values):
        raise ValueError(
            f"equal_groups: expected 1 to {len(values)}, as many as there are distinct counts, got {number}"
        )
    upto = torch.cat([torch.zeros(1), (values * times).double().cumsum(0)]).double() / max(int(counts.sum()), 1)
    cost = (upto[None, :] - upto[:, None]) ** 2  # of a group of the distinct counts [row, column)
    cost[torch.ones_like(cost, dtype=torch.bool).tril()] = torch.inf
    best, starts = cost[0], []
    for _ in range(number - 1):
        best, start = (best[:, None] + cost).min(0)
        starts.append(start)
    edges, end = [], len(values)
    for start in reversed(starts):
        end = int(start[end])
        edges.append(int(values[end]))
    return tuple(reversed(edges))


def given_groups(groups: Sequence[Sequence[int]], category_ids: Sequence[int]) -> CategoryGroups:
    """Make groups of one's own choice (not in the paper), each a list of category ids.

    category_ids: [C] in the order of labels 1..C. Raises ValueError unless each of them is in exactly one group.
    """
    listed = Counter(itertools.chain.from_iterable(groups))
    known = set(category_ids)
    for what, ids in (
        ("there is no category", [i for i in listed if i not in known]),
        ("no group has category", [i for i in category_ids if i not in listed]),
        ("more than one place has category", [i for i, times in listed.items() if times > 1]),
    ):
        if ids:
            more = f" (and {len(ids) - 1} more)" if len(ids) > 1 else ""
            raise ValueError(f"groups: expected each category id in one list: {what} {ids[0]}{more}")
    group_of = {i: group for group, ids in enumerate(groups) for i in ids}
    return CategoryGroups(len(category_ids), tuple(map(len, groups)), tuple(group_of[i] for i in category_ids), ())


def within_group_weights(groups: CategoryGroups, instance_counts: Sequence[int] | Tensor) -> Tensor:
    """Weigh each label by 1/n over its mean within the category's group, clipped to [0.1, 5]: float64 [C+1].

    Entry 0, the background, is 1. This is the released `with0_reweight` variant. instance_counts: [C], 0 is taken as 1.
    Raises ValueError for counts that are not whole numbers of 0 or more.
    """
    counts = checked_counts("instance_counts", instance_counts, groups.num_categories)
    inverse = 1 / counts.double().clamp(min=1)
    weights = torch.ones(groups.num_categories + 1, dtype=torch.float64)
    for group, size in enumerate(groups.sizes):
        if size:
            labels = torch.tensor(groups.members(group))
            members = inverse[labels - 1]
            weights[labels] = (members / members.mean()).clamp(0.1, 5)
    return weights
