"""The numeric conventions of the paper's released code, as parts that replace torchvision's.

That code counts pixels: a box x1, y1, x2, y2 includes its last column and row, so its width is x2 - x1 + 1. Here such a
box is always held as x1, y1, x2 + 1, y2 + 1, in the continuous coordinates of the rest of the package. Overlaps,
suppression and box deltas are then torchvision's. Everything else that differs is in this file: anchors, the clamp of
deltas, clipping, matching, RoIAlign, resizing and masks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, nms, roi_align

from bags.detectors.anchors import FixedStrideAnchors
from bags.detectors.masks import encode, paste
from bags.detectors.released_pixels import INCLUSIVE, crops, mask_targets, resize_image, resize_nearest
from bags.detectors.torchvision_private import BoxCoder, Matcher

__all__ = [
    "ReleasedAnchors",
    "ReleasedBoxCoder",
    "ReleasedMatcher",
    "ReleasedRPN",
    "ReleasedRoIAlign",
    "ReleasedTransform",
    "ResizedShape",
    "as_at_original_size",
    "clip_boxes",
    "mask_targets",
]


class ReleasedAnchors(FixedStrideAnchors):
    """Anchors around cell centres, with corners rounded as in the released code.

    sizes, aspect_ratios (height / width) and strides are as in `FixedStrideAnchors`, one entry per level.
    """

    def __init__(
        self, sizes: tuple[tuple[int, ...], ...], aspect_ratios: tuple[tuple[float, ...], ...], strides: tuple[int, ...]
    ) -> None:
        super().__init__(sizes, aspect_ratios, strides)
        levels = zip(self.sizes, self.aspect_ratios, strides, strict=True)
        self.cell_anchors = [_cell_anchors(*level) for level in levels]


def _cell_anchors(sizes: tuple[int, ...], aspect_ratios: tuple[float, ...], stride: int) -> Tensor:
    """Anchors [ratios * sizes, 4] of one cell; the order of the float32 operations decides ties of the rounding."""
    scales = torch.tensor(sizes, dtype=torch.float32) / stride
    h_ratios = torch.sqrt(torch.tensor(aspect_ratios, dtype=torch.float32))
    w_ratios = 1 / h_ratios
    widths, heights = ((stride * ratios[:, None] * scales[None]).flatten() for ratios in (w_ratios, h_ratios))
    centre, right, below = 0.5 * (stride - 1), 0.5 * (widths - 1), 0.5 * (heights - 1)
    corners = torch.stack([centre - right, centre - below, centre + right, centre + below], dim=1)
    return corners.round() + torch.tensor(INCLUSIVE)


class ReleasedBoxCoder(BoxCoder):
    """torchvision's box coder, which also limits log sizes from below, to -ln(1000 / 16)."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Deltas [R, 4 * L] of boxes [R, 4] (pixels) -> boxes [R, 4 * L], in float32 for half-precision deltas."""
        _, _, ww, wh = self.weights
        lowest = [-math.inf, -math.inf, -self.bbox_xform_clip * ww, -self.bbox_xform_clip * wh]
        codes = rel_codes.to(torch.promote_types(rel_codes.dtype, boxes.dtype))
        codes = torch.maximum(codes.unflatten(1, (-1, 4)), codes.new_tensor(lowest)).flatten(1)
        return super().decode_single(codes, boxes)


def clip_boxes(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Clip boxes [..., 4] to an image of (height, width) pixels; left and top edges end at the last pixel's."""
    height, width = image_size
    x, y = boxes[..., 0::2], boxes[..., 1::2]
    corners = x[..., 0].clamp(0, width - 1), y[..., 0].clamp(0, height - 1)
    return torch.stack([*corners, x[..., 1].clamp(1, width), y[..., 1].clamp(1, height)], dim=-1)


class ResizedShape(tuple):
    """(height, width) of a resized image, with the `scale` by which it was resized."""

    scale: float

    def __new__(cls, size: tuple[int, int], scale: float) -> "ResizedShape":
        shape = super().__new__(cls, size)
        shape.scale = scale
        return shape


def as_at_original_size(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Widen boxes [K, 4] of a resized image so that they overlap as they do once scaled back.

    Detections are suppressed in the original image, where a box's last pixel counts as a whole one. An image_size that
    is not a `ResizedShape` counts as the original's.
    """
    extra = getattr(image_size, "scale", 1.0) - 1
    return boxes + boxes.new_tensor([0, 0, extra, extra])


class ReleasedMatcher(Matcher):
    """Match each box to its best object; then give each object the boxes that overlap it most.

    The second rule holds for objects whose best overlap reaches `low_threshold`. It ignores
    `allow_low_quality_matches`, which is only part of the signature: with equal thresholds the rule can only change
    which object a positive box gets. If several objects take one box, the last one gets it.
    """

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        """Match by overlaps [objects, N] in 0..1: int64 [N], an object's index, -1 below or -2 between thresholds."""
        overlaps = match_quality_matrix
        matches = torch.full(overlaps.shape[1:], self.BETWEEN_THRESHOLDS, dtype=torch.int64, device=overlaps.device)
        if overlaps.numel() == 0:
            return matches.fill_(self.BELOW_LOW_THRESHOLD)
        best, objects = overlaps.max(dim=0)
        matches[(best >= 0) & (best < self.low_threshold)] = self.BELOW_LOW_THRESHOLD
        matches = torch.where(best >= self.high_threshold, objects, matches)
        best_box = overlaps.max(dim=1, keepdim=True).values
        takers, taken = torch.where((overlaps == best_box) & (best_box >= self.low_threshold))
        last = torch.full_like(matches, -1).scatter_reduce(0, taken, takers, "amax")
        return torch.where(last >= 0, last, matches)


class ReleasedRPN(RegionProposalNetwork):
    """torchvision's RPN with the released matching and clipping, and without a least size of proposals.

    In training, anchors that cross the border of the resized, unpadded image are left out. An image without other
    anchors has no samples; if no image of the batch has samples, both losses are 0.
    """

    def __init__(
        self,
        anchor_generator: AnchorGenerator,
        head: nn.Module,
        fg_iou_thresh: float,
        bg_iou_thresh: float,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Take the arguments of torchvision's RPN."""
        super().__init__(anchor_generator, head, fg_iou_thresh, bg_iou_thresh, *args, **kwargs)
        self.box_coder = ReleasedBoxCoder((1.0, 1.0, 1.0, 1.0))
        self.proposal_matcher = ReleasedMatcher(fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches=True)

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return (proposals [P, 4] per image in pixels of the resized image, losses); evaluation mode has no losses.

        features: [B, channels, H, W] per level. targets hold boxes [objects, 4], possibly none.
        """
        if targets is not None:
            sized = zip(targets, images.image_sizes, strict=True)
            targets = [{**target, "image_size": size} for target, size in sized]
        return super().forward(images, features, targets)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Label the anchors [N, 4] of each image: (labels [N], matched boxes [N, 4]) per image.

        Labels are floats: 1 object, 0 background, -1 left out. A target holds boxes [objects, 4] and image_size,
        (height, width) in pixels.
        """
        labels, matched = [], []
        for boxes, target in zip(anchors, targets, strict=True):
            height, width = target["image_size"]
            beyond = boxes.new_tensor([width + 1, height + 1])
            inside = (boxes[:, :2] >= 0).all(1) & (boxes[:, 2:] < beyond).all(1)
            [inside_labels], [inside_boxes] = super().assign_targets_to_anchors([boxes[inside]], [target])
            labels.append(inside_labels.new_full((len(boxes),), -1).masked_scatter(inside, inside_labels))
            matched.append(boxes.clone())  # gives deltas of 0 to anchors without a match
            matched[-1][inside] = inside_boxes.to(boxes.dtype)
        return labels, matched

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return (objectness loss, box loss) of logits [N, 1] and deltas [N, 4].

        labels and regression_targets are [n] and [n, 4] per image: 1 object, 0 background, -1 left out; true deltas.
        """
        if all((of_image < 0).all() for of_image in labels):
            return objectness[:0].sum(), pred_bbox_deltas[:0].sum()
        losses = super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)
        # The released code divides by at least one positive and one negative anchor per image.
        drawn = counted = 0
        for of_image in labels:
            positive = min(int((of_image >= 1).sum()), int(self.fg_bg_sampler.batch_size_per_image * 0.5))
            negative = min(int((of_image == 0).sum()), self.fg_bg_sampler.batch_size_per_image - positive)
            drawn, counted = drawn + positive + negative, counted + max(positive, 1) + max(negative, 1)
        return losses[0] * drawn / counted, losses[1] * drawn / counted

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Select boxes [P, 4] and scores [P] in 0..1 per image, by falling score; P is at most `post_nms_top_n()`.

        proposals [B, N, 4] and objectness logits [B * N, 1] are those of all anchors, level after level. Each level is
        suppressed separately; torchvision shifts levels apart instead, which rounds coordinates.
        """
        logits = objectness.detach().reshape(len(image_shapes), -1)
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        kept = []
        for image_boxes, image_scores, size in zip(proposals, scores, image_shapes, strict=True):
            level_boxes = clip_boxes(image_boxes, size).split(num_anchors_per_level)
            level_scores = image_scores.split(num_anchors_per_level)
            levels = [self._suppressed(*level) for level in zip(level_boxes, level_scores, strict=True)]
            kept_boxes, kept_scores = (torch.cat(parts) for parts in zip(*levels, strict=True))
            best = kept_scores.argsort(descending=True, stable=True)[: self.post_nms_top_n()]
            kept.append((kept_boxes[best], kept_scores[best]))
        return [boxes for boxes, _ in kept], [image_scores for _, image_scores in kept]

    def _suppressed(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The best boxes [n, 4] and scores [n] of one level, after suppression."""
        scores, best = scores.topk(min(self.pre_nms_top_n(), len(scores)))
        boxes = boxes[best]
        keep = nms(boxes, scores, self.nms_thresh)[: self.post_nms_top_n()]
        keep = keep[scores[keep] >= self.score_thresh]
        return boxes[keep], scores[keep]


class ReleasedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign without a half-pixel shift, exact for regions smaller than a cell, with the released code's levels.

    A region of side s belongs to level floor(log2(s / (14 * finest stride) + 1e-6)), limited to the existing levels.
    """

    def __init__(self, featmap_names: list[str], output_size: int, sampling_ratio: int, strides: Sequence[int]) -> None:
        """Take the arguments of MultiScaleRoIAlign, and the strides of the named maps, in pixels."""
        super().__init__(featmap_names, output_size, sampling_ratio)
        self.strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool boxes [R_i, 4] per image (pixels of the resized image): [R, channels, *output_size], of the maps' dtype.

        x: name -> [B, channels, H, W], of which `featmap_names` are used, finest first. image_shapes is ignored.
        """
        maps = [value for name, value in x.items() if name in self.featmap_names]
        strides = self.strides
        images = torch.cat([of_image.new_full((len(of_image), 1), i) for i, of_image in enumerate(boxes)])
        corners = torch.cat(boxes).to(torch.promote_types(maps[0].dtype, images.dtype))
        corners = torch.cat([corners[:, :2], corners[:, 2:].maximum(corners[:, :2])], dim=1)
        side = (corners[:, 2:] - corners[:, :2]).prod(1).sqrt()
        levels = torch.log2(side / (14 * strides[0]) + 1e-6).floor().clamp(0, len(maps) - 1)
        pooled = maps[0].new_zeros(len(corners), maps[0].shape[1], *self.output_size)
        for level, (level_map, stride) in enumerate(zip(maps, strides, strict=True)):
            rows = torch.where(levels == level)[0]
            # `aligned` keeps the size of regions below a cell, and subtracts the half cell that is added here.
            rois = torch.cat([images[rows].to(corners), corners[rows] + stride / 2], dim=1)
            level_map = level_map.to(rois)
            on_level = roi_align(level_map, rois, self.output_size, 1 / stride, self.sampling_ratio, aligned=True)
            pooled[rows] = on_level.to(pooled)
        return pooled


class ReleasedTransform(GeneralizedRCNNTransform):
    """Resizing and normalising as in the released code; torchvision's `fixed_size` is not supported.

    An image of w * h pixels is resized by s = min(max_size / longer side, min_size / shorter side) to
    int(w * s + 0.5) * int(h * s + 0.5), in whole levels 0..255, and then normalised. Training images are mirrored at
    random after resizing, and may have other sizes.
    """

    encode_masks = False  # detections come with `rles` (see `masks.encode`) instead of image-sized masks
    resize_in_training = True  # False: training images stay unchanged
    flip = 0.0  # probability of mirroring a training image
    training_sides: tuple[int, ...] = ()  # shorter sides to draw from in training; empty: min_size
    training_long_side = 0  # longest side in training; 0: max_size

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Resize and normalise images [3, H, W] float RGB in 0..1 to a padded batch; targets as from `resize`."""
        pairs = zip(images, targets if targets is not None else [None] * len(images), strict=True)
        resized, resized_targets = zip(*(self.resize(*pair) for pair in pairs), strict=True)
        least = self.min_size[-1]
        sizes = [
            ResizedShape(image.shape[-2:], self._scale(original.shape[-2:], least))
            for image, original in zip(resized, images, strict=True)
        ]
        batch = self.batch_images([self.normalize(image) for image in resized], self.size_divisible)
        return ImageList(batch, sizes), None if targets is None else list(resized_targets)

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict | None]:
        """Resize one image [3, H, W] in 0..1 and its target; the given target stays unchanged.

        A target holds boxes [K, 4] in pixels, and optionally masks [K, H, W] uint8 and semantic [H, W] labels.
        """
        if self.training and not self.resize_in_training:
            return image, target
        side, long_side = self.min_size[-1], self.max_size
        if self.training:
            side = self.torch_choice(list(self.training_sides or self.min_size))
            long_side = self.training_long_side or self.max_size
        scale = min(long_side / max(image.shape[-2:]), side / min(image.shape[-2:]))
        height, width = (max(1, int(side * scale + 0.5)) for side in image.shape[-2:])
        size = (height, width)
        image = resize_image(image, size)
        if target is None:
            return image, None
        resized = dict(target)
        inclusive = target["boxes"].new_tensor(INCLUSIVE)
        resized["boxes"] = clip_boxes((target["boxes"] - inclusive) * scale + inclusive, size)
        for key in ("masks", "semantic"):
            if key in target:
                resized[key] = resize_nearest(target[key], size)
        if self.training and self.flip > 0 and float(torch.rand(())) < self.flip:
            image = image.flip(-1)
            x1, y1, x2, y2 = resized["boxes"].unbind(1)
            resized["boxes"] = torch.stack([size[1] - x2, y1, size[1] - x1, y2], dim=1)
            for key in ("masks", "semantic"):
                if key in target:
                    resized[key] = resized[key].flip(-1)
        return image, resized

    def postprocess(
        self,
        result: list[dict],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict]:
        """Map boxes [K, 4] and proposals [R, 4] to pixels of the original images, masks [K, 1, 28, 28] to [K, 1, H, W].

        Masks are in 0..1. With `encode_masks`, `rles` replace them.
        """
        if self.training:
            return result
        for detections, size in zip(result, original_image_sizes, strict=True):
            boxes = detections["boxes"].double()
            inclusive = boxes.new_tensor(INCLUSIVE)
            corners = (boxes - inclusive) / self._scale(size, self.min_size[-1])
            detections["boxes"] = (corners + inclusive).to(detections["boxes"].dtype)
            if "proposals" in detections:
                proposals = detections["proposals"].double()
                proposals = (proposals - inclusive) / self._scale(size, self.min_size[-1]) + inclusive
                detections["proposals"] = proposals.to(detections["boxes"].dtype)
            if "masks" in detections:
                masks = detections.pop("masks")
                placed = crops(masks, corners, size)
                if self.encode_masks:
                    detections["rles"] = encode(placed, size)
                else:
                    detections["masks"] = paste(placed, len(masks), size, masks)
        return result

    def _scale(self, size: Sequence[int], min_size: int) -> float:
        return min(self.max_size / max(size), min_size / min(size))
