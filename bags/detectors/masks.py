"""Masks of detections, cropped to their boxes and run-length encoded without an image-sized array for each."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

THRESHOLD = 0.5  # pixels with a higher probability belong to the object


def crops(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[tuple[int, int, Tensor]]:
    """Resize each mask to its box, inside the image: (left, top, probabilities [h, w]).

    masks [K, 1, M, M] in 0..1; boxes [K, 4] in pixels of an image of `size` (height, width). The values are those
    that torchvision's `paste_masks_in_image` writes.
    """
    height, width = size
    masks, scale = expand_masks(masks, padding=1)
    corners = expand_boxes(boxes, scale).to(torch.int64).tolist()
    for mask, (x1, y1, x2, y2) in zip(masks, corners, strict=True):
        box_size = (max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1))
        resized = F.interpolate(mask[None], size=box_size, mode="bilinear", align_corners=False)[0, 0]
        left, top = max(x1, 0), max(y1, 0)
        yield left, top, resized[top - y1 : max(height - y1, 0), left - x1 : max(width - x1, 0)]


def paste(placed: Iterable[tuple[int, int, Tensor]], number: int, size: tuple[int, int], like: Tensor) -> Tensor:
    """Put `number` crops into images: probabilities [number, 1, height, width], 0 outside the crops.

    placed: as from `crops`. The result has the dtype and device of `like`.
    """
    pasted = like.new_zeros(number, 1, *size)
    for k, (left, top, crop) in enumerate(placed):
        pasted[k, 0, top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    return pasted


def encode(placed: Iterable[tuple[int, int, Tensor]], size: tuple[int, int]) -> list[dict]:
    """Encode each crop's pixels above 0.5 in an image of `size` (height, width): compressed RLE {size, counts: str}.

    The bytes are those that pycocotools encodes from the whole image.
    """
    return [_encode(left, top, (crop > THRESHOLD).cpu().numpy(), size) for left, top, crop in placed]


def _encode(left: int, top: int, crop: np.ndarray, size: tuple[int, int]) -> dict:
    """RLE of one boolean crop: find the runs down its columns, then move them to their place in the image.

    An example: a crop of 2 x 2 pixels with only its lower row set, at left 1 and top 1 of an image of 3 x 3. `flat` is
    0 1 0 0 1 0 (with a row of zeros below), so runs begin and end at 1, 2, 4, 5, which are rows 1, 2 of columns 0 and
    1. In the image they are at 5, 6 and 8, 9, and the counts are 5 0s, 1 1, 2 0s, 1 1.
    """
    height, width = size
    columns = np.zeros((crop.shape[1], crop.shape[0] + 1), bool)  # one more row, so that runs end with their column
    columns[:, :-1] = crop.T
    flat = columns.ravel()
    starts_and_ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1  # of runs, in turn
    if flat.size and flat[0]:
        starts_and_ends = np.concatenate([[0], starts_and_ends])
    column, row = np.divmod(starts_and_ends, crop.shape[0] + 1)
    edges = (left + column) * height + top + row
    if crop.shape[0] == height:  # a run that ends at the bottom continues at the top of the next column
        joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
        edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(edges, prepend=0, append=height * width)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    rle = coco_mask.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
    text = rle["counts"]
    return {"size": list(size), "counts": text.decode("ascii") if isinstance(text, bytes) else text}
