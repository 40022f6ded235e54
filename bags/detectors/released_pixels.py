"""Images and masks resized as OpenCV does, with its fixed-point arithmetic: what the released code calls.

OpenCV rounds on the way, downwards on the whole: a mask's target is often 0 where its exact value is
0.6. Boxes are in continuous coordinates unless said otherwise; see `released`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

INCLUSIVE = (0.0, 0.0, 1.0, 1.0)  # continuous minus released coordinates


def mask_targets(gt_masks: Tensor, boxes: Tensor, matched_idxs: Tensor, M: int) -> Tensor:
    """[K, M, M] float 0 or 1: of each box, the mask of its object, resized to M * M.

    gt_masks [G, H, W] of 0 and 1; boxes [K, 4] in pixels, within the image; matched_idxs [K] int64 in 0..G-1.
    """
    height, width = gt_masks.shape[-2:]
    x1, y1, x2, y2 = (boxes - boxes.new_tensor(INCLUSIVE)).long().unbind(1)  # fractions are cut off
    x1, y1 = x1.clamp(0, width - 1), y1.clamp(0, height - 1)
    left, right, *across = _taps((x2.clamp(max=width - 1) - x1 + 1).clamp(min=1), M, clamp_weights=True)
    top, bottom, *down = _taps((y2.clamp(max=height - 1) - y1 + 1).clamp(min=1), M, clamp_weights=False)
    columns = [(x1[:, None] + taps)[:, None] for taps in (left, right)]
    rows = [(y1[:, None] + taps)[:, :, None] for taps in (top, bottom)]
    objects = matched_idxs.long()[:, None, None]
    upper, lower = (
        gt_masks[objects, row, columns[0]].int() * across[0][:, None]
        + gt_masks[objects, row, columns[1]].int() * across[1][:, None]
        for row in rows
    )
    return _blend(upper, lower, *(w[:, :, None] for w in down)).to(boxes.dtype)


def crops(masks: Tensor, corners: Tensor, size: tuple[int, int]) -> Iterator[tuple[int, int, Tensor]]:
    """Mask probabilities [K, 1, M, M] in 0..1 -> (left, top, probabilities [h, w]) of each, inside the image.

    corners [K, 4] are the released code's, last pixel included; their fractions are cut off. What lies
    outside the image of `size` (height, width) is cropped.
    """
    height, width = size
    for mask, (x1, y1, x2, y2) in zip(masks.float(), corners.long().tolist(), strict=True):
        own = (max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1))
        values = F.interpolate(mask[None], own, mode="bilinear", align_corners=False)[0, 0]
        left, top = max(x1, 0), max(y1, 0)
        yield left, top, values[top - y1 : max(height - y1, 0), left - x1 : max(width - x1, 0)]


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, H, W] in 0..1 resized bilinearly in whole levels 0..255; unchanged if it has the size already."""
    if tuple(image.shape[-2:]) == size:
        return image
    levels = (image * 255).round().int()
    old = torch.tensor(image.shape[-2:], device=image.device)[:, None]
    top, bottom, *down = (taps[0] for taps in _taps(old[0], size[0], clamp_weights=False))
    left, right, *across = (taps[0] for taps in _taps(old[1], size[1], clamp_weights=True))
    lines = levels[..., left] * across[0] + levels[..., right] * across[1]
    lines = _blend(lines[:, top], lines[:, bottom], *(w[:, None] for w in down))
    return lines.to(image.dtype) / 255


def resize_nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., H, W] of any type, resized as OpenCV's INTER_NEAREST."""
    rows, columns = (
        (torch.arange(new, dtype=torch.float64, device=values.device) * (1 / (new / old))).long().clamp(max=old - 1)
        for new, old in zip(size, values.shape[-2:], strict=True)
    )
    return values[..., rows[:, None], columns]


def _taps(old: Tensor, new: int, clamp_weights: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """OpenCV's bilinear taps of `new` positions along sides of `old` [K] pixels, centres at half pixels.

    Two indices and their weights, in 2048ths, [K, new] each. Beyond the outermost centres one index
    repeats; OpenCV sets the weights to 1 and 0 there along rows, but not down columns.
    """
    scale = 1 / (new / old.double())
    centres = torch.arange(new, device=old.device) + 0.5
    at = (centres * scale[:, None] - 0.5).float()
    low, last = at.floor().long(), old[:, None] - 1
    part = at - low
    if clamp_weights:
        part = part.masked_fill((low < 0) | (low >= last), 0)
    first, second = ((share * 2048).round().int() for share in (1 - part, part))
    return low.clamp(min=0).minimum(last), (low + 1).clamp(min=0).minimum(last), first, second


def _blend(top: Tensor, bottom: Tensor, w_top: Tensor, w_bottom: Tensor) -> Tensor:
    """Levels from two lines in 2048ths, with OpenCV's losses of precision on the way."""
    return (((w_top * (top >> 4)) >> 16) + ((w_bottom * (bottom >> 4)) >> 16) + 2) >> 2
