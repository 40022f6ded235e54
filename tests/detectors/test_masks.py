"""Cropped and encoded masks against torchvision's pasting and pycocotools' encoding of whole images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from bags.detectors.masks import crops, encode, paste
from bags.detectors.released_pixels import crops as released_crops


def whole(masks, size):
    return [coco_mask.encode(np.asfortranarray((m[0] > 0.5).numpy(), np.uint8)) for m in masks]


def smooth(count, seed):
    torch.manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4)
    return torch.nn.functional.interpolate(coarse, size=28, mode="bilinear")


def assert_same(rles, expected, size):
    for rle, other in zip(rles, expected, strict=True):
        assert rle == {"size": list(size), "counts": other["counts"].decode()}


BOXES = [
    [10, 5, 30, 25],
    [0, 0, 64, 48],
    [-20, -10, 80, 70],
    [60.5, 40.2, 64, 48],
    [63.9, 47.9, 64, 48],
    [5, 0, 20, 48],
    [0, 3, 64, 20],
    [12.3, 7.7, 12.3, 7.7],
    [-5, -5, -2, -2],
    [3, 30, 4, 47.5],
]


@pytest.mark.parametrize("fill", [None, 0.0, 1.0])
def test_byte_for_byte(fill):
    """Boxes that fill the image, leave it, have no size; masks that are empty or full."""
    size, boxes = (48, 64), torch.tensor(BOXES)
    masks = smooth(len(boxes), 0) if fill is None else torch.full((len(boxes), 1, 28, 28), fill)
    pasted = paste_masks_in_image(masks, boxes, size)
    assert torch.equal(paste(crops(masks, boxes, size), len(boxes), size, masks), pasted)
    assert_same(encode(crops(masks, boxes, size), size), whole(pasted, size), size)
    released = paste(released_crops(masks, boxes, size), len(boxes), size, masks)
    assert_same(encode(released_crops(masks, boxes, size), size), whole(released, size), size)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.floats(0.05, 3))
def test_byte_for_byte_at_random(height, width, seed, spread):
    size, masks = (height, width), smooth(6, seed)
    corners = torch.rand(6, 2) * torch.tensor([width, height])
    boxes = torch.cat([corners, corners + torch.rand(6, 2) * spread * max(size)], 1) - spread * 3
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height]))  # as detections are
    pasted = paste_masks_in_image(masks, boxes, size)
    assert_same(encode(crops(masks, boxes, size), size), whole(pasted, size), size)


def test_no_masks():
    assert encode(crops(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (5, 6)), (5, 6)) == []
    assert paste([], 0, (5, 6), torch.zeros(0)).shape == (0, 1, 5, 6)
