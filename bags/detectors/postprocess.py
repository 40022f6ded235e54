"""Scores and boxes of R proposals -> detections of one image, exact for any number of categories.

Which of the best M candidates survive greedy suppression does not depend on the candidates below them. So only the
boxes of the best M are decoded and suppressed, and M grows until enough of them survive or none is left.
"""

import math

import torch
from torch import Tensor
from torchvision.ops import nms, remove_small_boxes

from bags.detectors.conventions import STANDARD, Conventions
from bags.detectors.torchvision_private import BoxCoder

FEW = 24  # categories with at most so many candidates are suppressed together; a call of `nms` for each is slower
TIER = 20_000  # most candidates added at a time with agnostic_nms, which takes memory for all pairs of them


def select_detections(
    scores: Tensor,
    regression: Tensor,
    proposals: Tensor,
    image_size: tuple[int, int],
    box_coder: BoxCoder,
    score_threshold: float | Tensor,
    nms_threshold: float,
    max_detections: int,
    conventions: Conventions = STANDARD,
    max_per_category: int = 0,
    agnostic_nms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the `max_detections` best candidates after suppression: boxes [K, 4], scores [K], labels [K] in 1..C.

    scores            [R, C+1] in 0..1, column 0 is the background; candidates score above `score_threshold`,
                      which may differ by category: [C]
    regression        [R, 4 * (C+1)] box deltas for each label, or [R, 4] shared by all labels
    proposals         [R, 4] x1, y1, x2, y2 in pixels of an image of `image_size` (height, width)
    conventions       how boxes are clipped, which boxes are too small, and which overlaps suppress
    max_per_category  most detections of a category, after suppression; 0: any number
    agnostic_nms      boxes suppress boxes of every category, not only of their own

    The result equals suppressing all R * C candidates at once. It is sorted by falling score; ties are in the order of
    proposals, then of labels.
    """
    scores = scores[:, 1:]
    deltas = regression.unflatten(1, (-1, 4))
    eligible = int(torch.count_nonzero(scores > score_threshold))
    budget, considered = 4 * max_detections, torch.zeros_like(scores, dtype=torch.bool)
    boxes, kept_scores, labels = proposals.new_zeros(0, 4), scores.new_zeros(0), deltas.new_zeros(0, dtype=torch.long)
    while True:
        reached = _best(scores, score_threshold, budget, eligible)
        rows, columns = torch.where(reached & ~considered)
        considered = reached
        new = deltas[rows, columns + 1 if deltas.shape[1] > 1 else 0]
        new = conventions.clip(box_coder.decode_single(new, proposals[rows]), image_size)
        solid = remove_small_boxes(new, min_size=conventions.least_side)
        rows, columns = rows[solid], columns[solid]
        # Earlier survivors score higher than all new candidates, so they survive again.
        boxes, kept_scores = torch.cat([boxes, new[solid]]), torch.cat([kept_scores, scores[rows, columns]])
        labels = torch.cat([labels, columns + 1])
        overlapping = conventions.suppressed_as(boxes, image_size)
        groups = torch.zeros_like(labels) if agnostic_nms else labels
        keep = _suppress(overlapping, kept_scores, groups, nms_threshold)
        boxes, kept_scores, labels = boxes[keep], kept_scores[keep], labels[keep]
        shown = _first_of_each(labels, max_per_category) if max_per_category else torch.arange(len(labels))
        if len(shown) >= max_detections or budget >= eligible:
            shown = shown[:max_detections].to(labels.device)
            return boxes[shown], kept_scores[shown], labels[shown]
        budget += min(budget, TIER) if agnostic_nms else budget


def _best(scores: Tensor, threshold: float | Tensor, budget: int, eligible: int) -> Tensor:
    """Mask [R, C] of all candidates above some score: at least `budget`, and mostly less than twice as many.

    The score is found by counting, because sorting a million candidates takes more memory than everything else.
    """
    best = candidates = scores > threshold
    if eligible <= budget:
        return best
    # At least `budget` candidates reach `low`, fewer reach `high`. Scores differ by powers, so bisect their logarithm.
    low, high = max(float(torch.as_tensor(threshold).min()), 1e-30), 2 * float(scores.detach().max())
    for _ in range(40):
        middle = math.sqrt(low * high)
        above = candidates & (scores >= middle)
        number = int(torch.count_nonzero(above))
        if number >= budget:
            best, low = above, middle
            if number <= 2 * budget:
                break
        else:
            high = middle
    return best


def _suppress(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes that survive suppression within their label, by falling score, ties by index.

    torchvision's `batched_nms` shifts the boxes of each label far apart instead, which rounds coordinates.
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
    """Suppress many small groups at once: compare all pairs, then iterate to a fixed point.

    order: indices of boxes, group by group, each by falling score. counts: members of each group, at most FEW.
    Returns the indices that survive. The pairs of groups of 3, 1 and 2 members are, as places in `order`:
    (0, 1), (0, 2), (1, 2), and (4, 5).
    """
    boxes, place = boxes[order], torch.arange(len(order), device=order.device)
    end = counts.cumsum(0).repeat_interleave(counts)  # 3, 3, 3, 4, 6, 6
    later = place[:, None] + torch.arange(1, FEW, device=order.device)
    first, step = torch.where(later < end[:, None])
    second = first + step + 1
    close = _overlap(boxes[first], boxes[second]).double() > threshold
    first, second = first[close], second[close]
    kept = torch.ones_like(order, dtype=torch.bool)
    while True:  # after n rounds right for the first n + 1 members of every group
        survives = torch.ones_like(kept)
        survives[second[kept[first]]] = False
        if torch.equal(survives, kept):
            return order[kept]
        kept = survives


def _overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU [P] of pairs of boxes [P, 4], rounded as in `nms`."""
    area, other_area = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, others))
    sides = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(min=0)
    common = sides[:, 0] * sides[:, 1]
    return common / (area + other_area - common)


def _first_of_each(labels: Tensor, number: int) -> Tensor:
    """Indices, rising, of the first `number` entries of each label."""
    order = labels.argsort(stable=True)
    sizes = torch.unique_consecutive(labels[order], return_counts=True)[1].tolist()
    return torch.cat([members[:number] for members in order.split(sizes)]).sort().values if sizes else order
