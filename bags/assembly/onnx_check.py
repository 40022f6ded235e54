"""Detections of an exported file in ONNX Runtime, compared with those of the detector that it was made of."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES, BOXES, MASKS = 1e-4, 1e-2, 1e-2  # largest differences of scores, of boxes in pixels, of probabilities of masks
NOISE, TRIES = 2e-6, 8  # added to pixels in 0..1, which rounding in another order is comparable to

Detections = dict[str, Tensor]  # boxes [K, 4], scores [K], labels [K], with a mask branch also masks [K, 1, H, W]


class Difference(NamedTuple):
    """How far the detections of one image are apart."""

    detections: int  # of the detector
    scores: float  # largest difference
    boxes: float  # ... in pixels
    masks: float  # ... of probabilities; 0 without masks
    undecided: int  # detections of only one of the two, which rounding decides: see `compare`
    problem: str  # one line about a real difference; empty if there is none


def compare(
    detect: Callable[[Tensor], Detections], found: Detections, image: Tensor, threshold: float, most: int
) -> Difference:
    """Compare detections `found` in an image [3, H, W] with those of the detector, `detect(image)`, in any order.

    Two detections are the same if labels are equal and scores and boxes agree to 1e-4 and 1e-2 pixels. Rounding may
    decide whether a detection exists: its score is next to `threshold`, or to the last one of the `most` that are
    kept, or its overlap with another box is next to that of suppression. So a detection of only one side is no
    difference if the detector itself gains or loses it once its image changes by about 2e-6. At most twice as many as
    the detector itself gains and loses then may be of that kind, or two.
    """
    expected = detect(image)
    pairs = _pairs(expected, found)
    used: tuple[set[int], set[int]] = {row for row, _ in pairs}, {column for _, column in pairs}
    missing, extra = (
        [k for k in range(len(side["labels"])) if k not in with_partner]
        for side, with_partner in zip((expected, found), used, strict=True)
    )
    scores = boxes = masks = 0.0
    if pairs:
        rows, columns = (torch.tensor(used) for used in zip(*pairs, strict=True))
        scores = float((expected["scores"][rows] - found["scores"][columns]).abs().max())
        boxes = float((expected["boxes"][rows] - found["boxes"][columns]).abs().max())
        if "masks" in expected:
            masks = _mask_difference(expected, found, rows, columns)
    problem = ""
    if missing or extra:
        problem = _real_difference(detect, expected, found, (missing, extra), image, threshold, most)
    if not problem and masks > MASKS:
        problem = f"masks differ by {masks:.3g}, expected at most {MASKS}"
    return Difference(len(expected["labels"]), scores, boxes, masks, len(missing) + len(extra), problem)


def _pairs(expected: Detections, found: Detections) -> list[tuple[int, int]]:
    """Positions of the same detections on both sides, each at most once, the nearest boxes first."""
    near = (expected["boxes"][:, None] - found["boxes"][None]).abs().amax(2)
    same = (expected["labels"][:, None] == found["labels"][None]) & (near <= BOXES)
    same &= (expected["scores"][:, None] - found["scores"][None]).abs() <= SCORES
    candidates = same.nonzero()
    order = near[same].argsort(stable=True)
    rows: set[int] = set()
    columns: set[int] = set()
    pairs = []
    for row, column in candidates[order].tolist():
        if row not in rows and column not in columns:
            pairs.append((row, column))
            rows.add(row)
            columns.add(column)
    return pairs


def _mask_difference(expected: Detections, found: Detections, rows: Tensor, columns: Tensor) -> float:
    """The largest difference of the masks of pairs, of which a few pixels are left out.

    A mask is placed at whole pixels. A corner that lies on the border of two may fall into either one, which moves
    the whole mask by up to a pixel; such pairs are compared with the mask that is a pixel wider all around.
    """
    largest = 0.0
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        one, other = expected["masks"][row], found["masks"][column]
        difference = float((one - other).abs().max())
        if difference > MASKS:
            low, high = -F.max_pool2d(-one, 5, 1, 2), F.max_pool2d(one, 5, 1, 2)
            outside = torch.maximum(low - other, other - high).clamp(min=0)
            difference = float(outside.max())
        largest = max(largest, difference)
    return largest


def _real_difference(
    detect: Callable[[Tensor], Detections],
    expected: Detections,
    found: Detections,
    alone: tuple[list[int], list[int]],
    image: Tensor,
    threshold: float,
    most: int,
) -> str:
    """One line about a detection of one side that rounding does not explain; empty if there is none."""
    total = len(alone[0]) + len(alone[1])
    sides = [_take(side, rows) for side, rows in zip((expected, found), alone, strict=True)]
    full = len(expected["scores"]) == most or len(found["scores"]) == most
    lowest = max((float(side["scores"].min()) for side in (expected, found) if len(side["scores"])), default=0.0)
    edge = max(threshold, lowest if full else 0.0) + SCORES
    missing, extra = (_take(side, (side["scores"] > edge).nonzero().squeeze(1).tolist()) for side in sides)
    generator, unstable = torch.Generator().manual_seed(0), 1
    for _ in range(TRIES):
        if not len(missing["labels"]) and not len(extra["labels"]) and total <= 2 * unstable:
            break
        again = detect(image + NOISE * torch.randn(image.shape, generator=generator))
        both = len(_pairs(expected, again))
        unstable = max(unstable, len(expected["labels"]) + len(again["labels"]) - 2 * both)
        missing = _take(missing, [row for row, _ in _pairs(missing, again)])  # found in both: still expected
        known = {row for row, _ in _pairs(extra, again)}
        extra = _take(extra, [row for row in range(len(extra["labels"])) if row not in known])
    for words, side in (("is missing", missing), ("is not the detector's", extra)):
        if len(side["labels"]):
            corners = ", ".join(f"{value:.2f}" for value in side["boxes"][0].tolist())
            return f"label {int(side['labels'][0])} with score {float(side['scores'][0]):.4f} at ({corners}) {words}"
    if total > 2 * unstable:
        return f"{total} detections of {len(expected['labels'])} exist only on one side"
    return ""


def _take(detections: Detections, rows: Sequence[int]) -> Detections:
    """Boxes, scores and labels of some detections."""
    return {key: detections[key][list(rows)] for key in ("boxes", "scores", "labels")}


def run(session: Any, image: Tensor) -> Detections:
    """The detections of an exported file's session in an image [3, H, W], by output name."""
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {"image": image.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
