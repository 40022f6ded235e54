"""Scores and boxes of R proposals -> detections of one image, exact at any number of categories.

Greedy survivors among the best M candidates do not depend on lower ones. So the best M are taken,
only their boxes are decoded and suppressed, and M doubles until enough survive or all were seen.
"""

import math

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import nms, remove_small_boxes

from bags.detectors.conventions import STANDARD, Conventions


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The `max_detections` best after per-category suppression: boxes [K, 4], scores [K], labels [K].

    scores      [R, C+1] in 0..1, column 0 the background; candidates score above the threshold
    regression  [R, 4 * (C+1)] box deltas per label, or [R, 4] shared by all
    proposals   [R, 4] x1, y1, x2, y2 in pixels of an image of `image_size` (height, width)
    conventions say how boxes are clipped, which are too small, and whose overlaps count
    Equal to suppressing all R * C candidates at once; sorted by falling score.
    """
    scores = scores[:, 1:]
    eligible = int((scores > score_threshold).sum())
    budget = 4 * max_detections
    while True:
        rows, columns = torch.where(_best(scores, score_threshold, budget, eligible))
        labels = columns + 1
        deltas = regression.unflatten(1, (-1, 4))
        deltas = deltas[rows, labels if deltas.shape[1] > 1 else 0]
        boxes = box_coder.decode_single(deltas, proposals[rows])
        boxes = conventions.clip(boxes, image_size)
        solid = remove_small_boxes(boxes, min_size=conventions.least_side)
        boxes, labels, best = boxes[solid], labels[solid], scores[rows[solid], columns[solid]]
        keep = _suppress(conventions.suppressed_as(boxes, image_size), best, labels, nms_threshold)
        if len(keep) >= max_detections or len(rows) == eligible:
            keep = keep[:max_detections]
            return boxes[keep], best[keep], labels[keep]
        budget *= 2


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
        number = int(above.sum())
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
