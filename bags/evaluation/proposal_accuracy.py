"""How often the classifier names a proposal rightly (the ACC columns of Table 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from bags.data.statistics import instance_bin


def assign_labels(proposals: Tensor, boxes: Tensor, labels: Tensor, threshold: float = 0.5) -> Tensor:
    """The label of each proposal, [P] in 0..C, 0 = background.

    A proposal takes the label of the object that it overlaps most, if by `threshold` or more; but an
    object's best proposals, if they reach the threshold, are its own (of several objects, the last one's).
    proposals [P, 4], boxes [G, 4]: x1, y1, x2, y2; labels [G] in 1..C.
    """
    if not len(boxes) or not len(proposals):
        return labels.new_zeros(len(proposals))
    overlap = box_iou(boxes, proposals)  # [G, P]
    best, owner = overlap.max(0)
    assigned = torch.where(best >= threshold, labels[owner], 0)
    claims = (overlap == overlap.max(1, keepdim=True).values) & (overlap >= threshold)
    last = (claims * torch.arange(1, len(boxes) + 1, device=boxes.device)[:, None]).max(0).values
    return torch.where(last > 0, labels[last - 1], assigned)


class ProposalAccuracy:
    """Counts proposals by their true label: counts int64 [2, C+1] holds all of them, and those named rightly."""

    def __init__(self, num_categories: int):
        self.counts = torch.zeros(2, num_categories + 1, dtype=torch.long)

    @staticmethod
    def judge(proposals: Tensor, predicted: Tensor, boxes: Tensor, labels: Tensor) -> list[list[int]]:
        """One image: all its proposals [P, 4] (no ground truth added), their labels [P], its objects.

        Returns [label, proposals of it, of these rightly named] for each true label that there is.
        """
        true = assign_labels(proposals, boxes, labels).cpu()
        right = true == predicted.cpu()
        return [
            [label, int((true == label).sum()), int(right[true == label].sum())] for label in true.unique().tolist()
        ]

    def add(self, judged: list[list[int]]) -> None:
        """Takes in what `judge` found of one image."""
        for label, number, right in judged:
            self.counts[0, label] += number
            self.counts[1, label] += right

    def summary(self, instance_counts: Sequence[int], boundaries: Sequence[int] = (10, 100, 1000)) -> dict[str, float]:
        """ACC (over all proposals), ACC1, ACC2, ... (of each instance bin), ACCbg: 0..1, NaN where there is none.

        Pooled over images and categories: rightly named proposals over proposals whose true label is
        in the bin. instance_counts: [C] training boxes.
        """
        bins = torch.from_numpy(instance_bin(instance_counts, boundaries))
        categories = {f"ACC{n + 1}": self.counts[:, 1:][:, bins == n] for n in range(len(boundaries) + 1)}
        parts = {"ACC": self.counts, **categories, "ACCbg": self.counts[:, :1]}
        sums = {name: part.sum(1).double() for name, part in parts.items()}
        return {name: float(right / every) for name, (every, right) in sums.items()}
