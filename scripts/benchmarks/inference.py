"""Postprocessing of an image at LVIS's settings, against torchvision's."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scripts.benchmarks.measuring import in_mb, in_process, measure, peak

if TYPE_CHECKING:
    from torch import Tensor

SIZE, CATEGORIES, PROPOSALS, DETECTIONS = (800, 1333), 1230, 1000, 300


def inference(arguments: argparse.Namespace) -> list[dict]:
    """1,000 proposals x 1,230 categories at score threshold 0, and 300 masks, in an image of 800 x 1333 pixels."""
    import torch

    slow = min(arguments.repeats, 5)  # torchvision takes many seconds
    results = []
    for kind, sharpness in (("flat", 1.0), ("peaked", 3.0)):
        case = detections_case(sharpness)
        ours, theirs = (run_detections(name, case) for name in ("ours", "torchvision"))
        equal = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        title = f"detections, {kind} scores"
        results.append(
            measure(
                title,
                lambda c=case: run_detections("ours", c),
                "torchvision",
                lambda c=case: run_detections("torchvision", c),
                slow,
                equal,
            )
        )
        memory = [in_process(detections_peak, name, sharpness) for name in ("ours", "torchvision")]
        results.append(in_mb(f"{title}, peak memory", memory[0], "torchvision", memory[1]))
    masks, boxes = masks_case()
    equal = run_masks("ours", masks, boxes) == run_masks("torchvision", masks, boxes)
    results.append(
        measure(
            f"{DETECTIONS} masks, pasted and encoded",
            lambda: run_masks("ours", masks, boxes),
            "torchvision + pycocotools",
            lambda: run_masks("torchvision", masks, boxes),
            slow,
            equal,
        )
    )
    memory = [in_process(masks_peak, name) for name in ("ours", "torchvision")]
    return [*results, in_mb(f"{DETECTIONS} masks, peak memory", memory[0], "torchvision + pycocotools", memory[1])]


def detections_case(sharpness: float) -> tuple["Tensor", "Tensor", "Tensor"]:
    """(logits, deltas, proposals) of one image; most proposals are background."""
    import torch

    torch.manual_seed(0)
    logits = torch.randn(PROPOSALS, CATEGORIES + 1) * sharpness
    logits[:, 0] += 6 * sharpness**0.5
    corners = torch.rand(PROPOSALS, 2) * torch.tensor([1000.0, 600.0])
    proposals = torch.cat([corners, corners + 10 + torch.rand(PROPOSALS, 2) * 200], 1)
    return logits, torch.randn(PROPOSALS, 4 * (CATEGORIES + 1)) * 0.5, proposals


def run_detections(name: str, case: tuple["Tensor", "Tensor", "Tensor"]) -> Sequence["Tensor"]:
    """(boxes, scores, labels) by our selection, or by torchvision's `postprocess_detections`."""
    from torchvision.models.detection import _utils, roi_heads

    from bags.detectors.postprocess import select_detections

    logits, deltas, proposals = case
    if name == "ours":
        coder = _utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
        return select_detections(logits.softmax(1), deltas, proposals, SIZE, coder, 0.0, 0.5, DETECTIONS)
    peer = roi_heads.RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, 0.0, 0.5, DETECTIONS)
    return [found[0] for found in peer.postprocess_detections(logits, deltas, [proposals], [SIZE])]


def detections_peak(name: str, sharpness: float) -> float:
    """MB above what the inputs take."""
    case = detections_case(sharpness)
    logits, deltas, proposals = (values[:10] for values in case)
    run_detections("ours", (logits, deltas, proposals))  # libraries are loaded
    return peak(lambda: run_detections(name, case))["mb"]


def masks_case() -> tuple["Tensor", "Tensor"]:
    """Smooth masks [300, 1, 28, 28] and boxes of 16 to 400 pixels."""
    import torch

    torch.manual_seed(0)
    sides = torch.rand(DETECTIONS, 2) * 384 + 16
    centres = torch.rand(DETECTIONS, 2) * torch.tensor([SIZE[1], SIZE[0]])
    limits = torch.tensor([SIZE[1], SIZE[0]] * 2)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], 1).clamp(min=0).minimum(limits)
    return torch.nn.functional.interpolate(torch.rand(DETECTIONS, 1, 4, 4), size=28, mode="bilinear"), boxes


def run_masks(name: str, masks: "Tensor", boxes: "Tensor") -> list:
    """RLE strings by our crops, or of torchvision's pasted masks by pycocotools."""
    import numpy as np
    from pycocotools import mask as coco_mask
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    from bags.detectors.masks import crops, encode

    if name == "ours":
        return [rle["counts"] for rle in encode(crops(masks, boxes, SIZE), SIZE)]
    pasted = (paste_masks_in_image(masks, boxes, SIZE)[:, 0] > 0.5).numpy()
    codes = [coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"] for mask in pasted]
    return [code if isinstance(code, str) else code.decode() for code in codes]


def masks_peak(name: str) -> float:
    """MB above what the inputs take."""
    masks, boxes = masks_case()
    run_masks("ours", masks[:2], boxes[:2])
    return peak(lambda: run_masks(name, masks, boxes))["mb"]
