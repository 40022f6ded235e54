"""Resizing of images and masks with OpenCV's fixed-point arithmetic, as in the paper's released code.

OpenCV rounds intermediate values, mostly down: a mask's target is often 0 where its exact value is 0.6. Boxes are in
continuous coordinates unless said otherwise; see `released`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

INCLUSIVE = (0.0, 0.0, 1.0, 1.0)  # continuous minus released coordinates


def mask_targets(gt_masks: Tensor, boxes: Tensor, matched_idxs: Tensor, M: int) -> Tensor:
    """Crop the mask of each box's object and resize it to M * M: [K, M, M], floats of 0 or 1.

    gt_masks [G, H, W] of 0 and 1; boxes [K, 4] in pixels, within the image; matched_idxs [K] int64 in 0..G-1.
    """
    height, width = gt_masks.shape[-2:]
    x1, y1, x2, y2 = (boxes - boxes.new_tensor(INCLUSIVE)).long().unbind(1)  # rounded towards 0
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
    """Resize each mask [K, 1, M, M] in 0..1 to its box, inside the image: (left, top, probabilities [h, w]).

    corners [K, 4] are the released code's, with the last pixel included, and are rounded towards 0. The crops end at
    the border of the image of `size` (height, width).
    """
    height, width = size
    for mask, (x1, y1, x2, y2) in zip(masks.float(), corners.long().tolist(), strict=True):
        box_size = (max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1))
        resized = F.interpolate(mask[None], box_size, mode="bilinear", align_corners=False)[0, 0]
        left, top = max(x1, 0), max(y1, 0)
        yield left, top, resized[top - y1 : max(height - y1, 0), left - x1 : max(width - x1, 0)]


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [C, H, W] in 0..1 bilinearly, in whole levels 0..255; return it unchanged if it has the size already."""
    if tuple(image.shape[-2:]) == size:
        return image
    levels = (image * 255).round().int()
    old = torch.tensor(image.shape[-2:], device=image.device)[:, None]
    top, bottom, *down = (taps[0] for taps in _taps(old[0], size[0], clamp_weights=False))
    left, right, *across = (taps[0] for taps in _taps(old[1], size[1], clamp_weights=True))
    lines = levels[..., left] * across[0] + levels[..., right] * across[1]
    lines = _blend(lines[:, top], lines[:, bottom], *(w[:, None] for w in down))
    return lines.to(image.dtype) / 255


def resize_nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [..., H, W] of any type as OpenCV's INTER_NEAREST does."""
    rows, columns = (
        (torch.arange(new, dtype=torch.float64, device=maps.device) * (1 / (new / old))).long().clamp(max=old - 1)
        for new, old in zip(size, maps.shape[-2:], strict=True)
    )
    return maps[..., rows[:, None], columns]


def _taps(old: Tensor, new: int, clamp_weights: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """OpenCV's bilinear taps of `new` positions along sides of `old` [K] pixels, centres at half pixels.

    Returns two indices and their weights in 2048ths, [K, new] each. Beyond the outermost centres one index repeats.
    There OpenCV sets the weights to 1 and 0 along rows (clamp_weights), but not down columns.
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
    """Blend two lines of levels by weights in 2048ths, losing precision where OpenCV does."""
    return (((w_top * (top >> 4)) >> 16) + ((w_bottom * (bottom >> 4)) >> 16) + 2) >> 2
