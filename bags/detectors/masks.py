"""Masks of detections in their image: cropped to the box and run-length encoded, without an image for each."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

THRESHOLD = 0.5  # a pixel belongs to the object above it


def crops(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[tuple[int, int, Tensor]]:
    """What torchvision's `paste_masks_in_image` writes of each mask: (left, top, probabilities [h, w]).

    masks [K, 1, M, M] in 0..1; boxes [K, 4] in pixels of an image of `size` (height, width).
    """
    height, width = size
    masks, scale = expand_masks(masks, padding=1)
    corners = expand_boxes(boxes, scale).to(torch.int64).tolist()
    for mask, (x1, y1, x2, y2) in zip(masks, corners, strict=True):
        own = (max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1))
        values = F.interpolate(mask[None], size=own, mode="bilinear", align_corners=False)[0, 0]
        left, top = max(x1, 0), max(y1, 0)
        yield left, top, values[top - y1 : max(height - y1, 0), left - x1 : max(width - x1, 0)]


def paste(placed: Iterable[tuple[int, int, Tensor]], number: int, size: tuple[int, int], like: Tensor) -> Tensor:
    """[number, 1, height, width] probabilities of the image, 0 outside the crops; dtype and device of `like`."""
    pasted = like.new_zeros(number, 1, *size)
    for k, (left, top, values) in enumerate(placed):
        pasted[k, 0, top : top + values.shape[0], left : left + values.shape[1]] = values
    return pasted


def encode(placed: Iterable[tuple[int, int, Tensor]], size: tuple[int, int]) -> list[dict]:
    """Compressed RLE {size, counts: str} of each crop's pixels above 0.5 in an image of `size` (height, width).

    Byte for byte what pycocotools encodes of the whole image.
    """
    return [_encode(left, top, (values > THRESHOLD).cpu().numpy(), size) for left, top, values in placed]


def _encode(left: int, top: int, crop: np.ndarray, size: tuple[int, int]) -> dict:
    """Runs are counted down the columns of the crop, then moved to their place in the image."""
    height, width = size
    columns = np.zeros((crop.shape[1], crop.shape[0] + 1), bool)  # one row more, so that runs end with their column
    columns[:, :-1] = crop.T
    flat = columns.ravel()
    at = np.flatnonzero(flat[1:] != flat[:-1]) + 1  # begins and ends of runs, in turn
    if flat.size and flat[0]:
        at = np.concatenate([[0], at])
    column, row = np.divmod(at, crop.shape[0] + 1)
    edges = (left + column) * height + top + row
    if crop.shape[0] == height:  # a run to the bottom goes on at the top of the next column
        joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
        edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(edges, prepend=0, append=height * width)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    rle = coco_mask.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
    text = rle["counts"]
    return {"size": list(size), "counts": text.decode("ascii") if isinstance(text, bytes) else text}
