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

FEW = 24  # candidates of one category that are compared in pairs; `nms` for each category takes longer to start
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
    best = scores.argsort(descending=True, stable=True)
    order = best[labels[best].argsort(stable=True)]
    counts = torch.unique_consecutive(labels[order], return_counts=True)[1]
    few = (counts <= FEW).repeat_interleave(counts)
    groups = order[~few].split(counts[counts > FEW].tolist())
    kept = [_suppress_few(boxes, order[few], counts[counts <= FEW], threshold)]
    kept += [members[nms(boxes[members], scores[members], threshold)] for members in groups if len(members)]
    survivors = torch.cat(kept).sort().values
    return survivors[scores[survivors].argsort(descending=True, stable=True)]


def _suppress_few(boxes: Tensor, order: Tensor, counts: Tensor, threshold: float) -> Tensor:
    """What survives of many small groups at once: all pairs are compared, then losers' victims come back.

    order: indices, group by group, each by falling score; counts: members of each group.
    """
    boxes, place = boxes[order], torch.arange(len(order), device=order.device)
    rest = counts.cumsum(0).repeat_interleave(counts) - place - 1  # of its group after each
    first = place.repeat_interleave(rest)
    second = torch.arange(len(first), device=order.device) - (rest.cumsum(0) - rest - place - 1)[first]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    one, other = boxes[first], boxes[second]
    sides = (torch.minimum(one[:, 2:], other[:, 2:]) - torch.maximum(one[:, :2], other[:, :2])).clamp(min=0)
    inter = sides[:, 0] * sides[:, 1]
    overlap = inter / (area[first] + area[second] - inter)  # rounded as in `nms`
    close = overlap.double() > threshold
    first, second = first[close], second[close]
    kept = torch.ones_like(order, dtype=torch.bool)
    while True:  # right for all that have n above them after n rounds
        now = torch.ones_like(kept)
        now[second[kept[first]]] = False
        if torch.equal(now, kept):
            return order[kept]
        kept = now


def _first_of_each(labels: Tensor, number: int) -> Tensor:
    """Indices, rising, of the first `number` of each label."""
    order = labels.argsort(stable=True)
    sizes = torch.unique_consecutive(labels[order], return_counts=True)[1].tolist()
    return torch.cat([members[:number] for members in order.split(sizes)]).sort().values if sizes else order
