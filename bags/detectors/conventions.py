"""The numeric conventions of a detector: the variant of each part that its weights were trained with.

Published detectors differ in details: where anchors lie, how a box is clipped, which proposals match, how masks are
pasted. A preset names one choice of all of them, and the code that builds a detector takes its parts from the preset.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image

from bags.classifiers.base import at_least_float32
from bags.detectors import released
from bags.detectors.anchors import FixedStrideAnchors, PreciseAnchors
from bags.detectors.masks import crops, encode
from bags.detectors.torchvision_private import BoxCoder, Matcher


class PreciseBoxCoder(BoxCoder):
    """torchvision's box coder, whose boxes are in float32 at least, also from autocast's half-precision deltas."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Deltas [R, 4 * L] of boxes [R, 4] (pixels) -> boxes [R, 4 * L]."""
        return super().decode_single(at_least_float32(rel_codes), boxes)


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor, side: int) -> Tensor:
    """Crop the masks [G, H, W] of objects to boxes [R, 4] (pixels): targets [R, side, side] in 0..1.

    matched [R] in 0..G-1 says whose mask a box takes. The result is that of torchvision's `project_masks_on_boxes`,
    whose deterministic kernels on a GPU are slow because they also compute gradients, which targets do not need.
    """
    regions = torch.cat([matched[:, None].to(boxes), boxes], dim=1)
    return torch.ops.torchvision.roi_align(masks[:, None].to(boxes), regions, 1.0, side, side, -1, False)[:, 0]


class Transform(GeneralizedRCNNTransform):
    """torchvision's normalisation, resizing and padding, which also resizes `semantic` label maps [H, W] (nearest).

    encode_masks        detections come with `rles` (see `masks.encode`) instead of image-sized masks
    resize_in_training  False: training images have their final size already
    """

    encode_masks = False
    resize_in_training = True
    fixed_size: tuple[int, int] | None

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        """Resize one image [3, H, W] and its target as min_size and max_size say, to at least one pixel."""
        if self.training and not self.resize_in_training:
            return image, target
        fixed_size = self.fixed_size
        if fixed_size is None:
            height, width = image.shape[-2:]
            scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
            if min(height, width) * scale < 1:  # torchvision would round to 0 pixels
                self.fixed_size = max(1, int(width * scale)), max(1, int(height * scale))
        image, target = super().resize(image, target)
        self.fixed_size = fixed_size
        if target is not None and "semantic" in target and target["semantic"].shape != image.shape[-2:]:
            labels = target["semantic"][None, None].float()
            target["semantic"] = F.interpolate(labels, size=image.shape[-2:])[0, 0].to(target["semantic"].dtype)
        return image, target

    def postprocess(self, result: list[dict], image_shapes: list, original_image_sizes: list) -> list[dict]:
        """Map boxes [K, 4], masks [K, 1, 28, 28] in 0..1 and proposals [R, 4] to pixels of the original images."""
        if self.training:
            return result
        for detection, shape, size in zip(result, image_shapes, original_image_sizes, strict=True):
            if "proposals" in detection:
                detection["proposals"] = resize_boxes(detection["proposals"], shape, size)
        masks = [detection.pop("masks", None) for detection in result] if self.encode_masks else []
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for detection, of_image, size in zip(result, masks, original_image_sizes, strict=False):
            if of_image is not None:
                detection["rles"] = encode(crops(of_image, detection["boxes"], size), size)
        return result


def _unchanged(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return boxes


def _roi_align(names: list[str], side: int, samples: int, strides: list[int]) -> nn.Module:
    return MultiScaleRoIAlign(names, side, samples)


@dataclass(frozen=True)
class Conventions:
    """Parts with torchvision's calling conventions. All boxes are continuous x1, y1, x2, y2 in pixels.

    anchors           (sizes, aspect_ratios, strides) -> anchor generator
    rpn               as torchvision's RegionProposalNetwork
    matcher           (foreground IoU, background IoU) -> the object that a proposal belongs to
    matches_objects   whether an object's box is matched like a proposal; otherwise it always gets its object
    box_coder         (weights) -> deltas to boxes and back
    clip              (boxes [..., 4], (height, width)) -> boxes inside the image
    least_side        narrower or lower detections are dropped (pixels)
    suppressed_as     (boxes [K, 4], (height, width)) -> the boxes whose overlaps decide suppression
    roi_align         (level names, output side, samples per bin side, strides) -> pooling over the pyramid
    transform         (min_size, max_size, mean, std) -> resizing there and back
    augments          whether the transform, not the dataset, mirrors training images and draws their size
    mask_targets      (masks, boxes, matched objects, side) -> targets [K, side, side] in 0..1
    box_beta          error at which smooth L1 of the second stage turns from square to linear
    semantic_padding  label of the padding in semantic maps (255 is ignored)
    """

    anchors: Callable[..., AnchorGenerator] = FixedStrideAnchors
    rpn: type[RegionProposalNetwork] = RegionProposalNetwork
    matcher: Callable[[float, float], Matcher] = Matcher
    matches_objects: bool = True
    box_coder: Callable[[tuple[float, ...]], BoxCoder] = PreciseBoxCoder
    clip: Callable[[Tensor, tuple[int, int]], Tensor] = clip_boxes_to_image
    least_side: float = 1e-2
    suppressed_as: Callable[[Tensor, tuple[int, int]], Tensor] = _unchanged
    roi_align: Callable[..., nn.Module] = _roi_align
    transform: type[GeneralizedRCNNTransform] = Transform
    augments: bool = False
    mask_targets: Callable[[Tensor, Tensor, Tensor, int], Tensor] = mask_targets
    box_beta: float = 1.0
    semantic_padding: int = 255


def _torchvision_anchors(
    sizes: tuple[tuple[int, ...], ...], aspect_ratios: tuple[tuple[float, ...], ...], strides: tuple[int, ...]
) -> AnchorGenerator:
    """Anchors whose strides torchvision derives from the sizes of image and feature maps, rounded down."""
    return PreciseAnchors(sizes, aspect_ratios)


STANDARD = Conventions()
CONVENTIONS = {
    "standard": STANDARD,
    "torchvision": replace(STANDARD, anchors=_torchvision_anchors, box_beta=1 / 9),
    "released": Conventions(
        anchors=released.ReleasedAnchors,
        rpn=released.ReleasedRPN,
        matcher=released.ReleasedMatcher,
        matches_objects=False,
        box_coder=released.ReleasedBoxCoder,
        clip=released.clip_boxes,
        least_side=-float("inf"),
        suppressed_as=released.as_at_original_size,
        roi_align=released.ReleasedRoIAlign,
        transform=released.ReleasedTransform,
        augments=True,
        mask_targets=released.mask_targets,
        box_beta=1.0,
        semantic_padding=0,
    ),
}
