"""Scores and boxes of R proposals -> detections of one image, exact at any number of categories.

Greedy survivors among the best M candidates do not depend on lower ones. So the best M are taken,
only their boxes are decoded and suppressed, and M grows until enough survive or all were seen.
"""

import math

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import nms, remove_small_boxes

from bags.detectors.conventions import STANDARD, Conventions

TIER = 20_000  # most candidates looked at together where all suppress each other, which takes their number squared


def select_detections(
    scores: Tensor,
    regression: Tensor,
    proposals: Tensor,
    image_size: tuple[int, int],
    box_coder: BoxCoder,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    conventions: Conventions = STANDARD,
    max_per_category: int = 0,
    agnostic_nms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `max_detections` best after suppression: boxes [K, 4], scores [K], labels [K].

    scores      [R, C+1] in 0..1, column 0 the background; candidates score above the threshold
    regression  [R, 4 * (C+1)] box deltas per label, or [R, 4] shared by all
    proposals   [R, 4] x1, y1, x2, y2 in pixels of an image of `image_size` (height, width)
    conventions say how boxes are clipped, which are too small, and whose overlaps count
    max_per_category  of each category at most so many are kept, after suppression; 0: any number
    agnostic_nms      boxes suppress those of every category, not of their own alone
    Equal to suppressing all R * C candidates at once; sorted by falling score, ties by proposal, then label.
    """
    scores = scores[:, 1:]
    deltas = regression.unflatten(1, (-1, 4))
    eligible = int(torch.count_nonzero(scores > score_threshold))
    budget, seen = 4 * max_detections, torch.zeros_like(scores, dtype=torch.bool)
    boxes, best, labels = proposals.new_zeros(0, 4), scores.new_zeros(0), deltas.new_zeros(0, dtype=torch.long)
    while True:
        reached = _best(scores, score_threshold, budget, eligible)
        rows, columns = torch.where(reached & ~seen)
        seen = reached
        new = deltas[rows, columns + 1 if deltas.shape[1] > 1 else 0]
        new = conventions.clip(box_coder.decode_single(new, proposals[rows]), image_size)
        solid = remove_small_boxes(new, min_size=conventions.least_side)
        rows, columns = rows[solid], columns[solid]
        # What survived so far has higher scores than all that is new, so it survives again.
        boxes, best = torch.cat([boxes, new[solid]]), torch.cat([best, scores[rows, columns]])
        labels = torch.cat([labels, columns + 1])
        overlapping = conventions.suppressed_as(boxes, image_size)
        keep = _suppress(overlapping, best, torch.zeros_like(labels) if agnostic_nms else labels, nms_threshold)
        boxes, best, labels = boxes[keep], best[keep], labels[keep]
        shown = _first_of_each(labels, max_per_category) if max_per_category else torch.arange(len(labels))
        if len(shown) >= max_detections or budget >= eligible:
            shown = shown[:max_detections].to(labels.device)
            return boxes[shown], best[shown], labels[shown]
        budget += min(budget, TIER) if agnostic_nms else budget


def _best(scores: Tensor, threshold: float, budget: int, eligible: int) -> Tensor:
    """A mask of candidates [R, C]: all that reach some score, at least `budget` and mostly less than twice as many.

    The score is found by counting: a sort of a million candidates takes more memory than all the rest.
    """
    best = scores > threshold
    if eligible <= budget:
        return best
    # As many as the budget lie above `low`, fewer above `high`; scores differ by powers, so their logarithm is halved.
    low, high = max(threshold, 1e-30), 2 * float(scores.detach().max())
    for _ in range(40):
        middle = math.sqrt(low * high)
        above = scores >= middle
        number = int(torch.count_nonzero(above))
        if number >= budget:
            best, low = above, middle
            if number <= 2 * budget:
                break
        else:
            high = middle
    return best


def _suppress(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Indices that survive suppression within their own label, by falling score, ties by index.

    torchvision's `batched_nms` shifts each label's boxes far apart instead, which rounds them.
    """
    order = labels.argsort(stable=True)
    sizes = torch.unique_consecutive(labels[order], return_counts=True)[1].tolist()
    kept = [
        members[nms(boxes[members], scores[members], threshold)] if len(members) > 1 else members
        for members in order.split(sizes)
    ]
    survivors = torch.cat(kept).sort().values if kept else order
    return survivors[scores[survivors].argsort(descending=True, stable=True)]


def _first_of_each(labels: Tensor, number: int) -> Tensor:
    """Indices, rising, of the first `number` of each label."""
    order = labels.argsort(stable=True)
    sizes = torch.unique_consecutive(labels[order], return_counts=True)[1].tolist()
    return torch.cat([members[:number] for members in order.split(sizes)]).sort().values if sizes else order
