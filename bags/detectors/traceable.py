"""The evaluation of a detector for one image, written so that it can be traced: images of every size, any detections.

`torch.jit.trace` of the detector itself would keep the traced image's sizes and counts as constants. Here the same
modules are called, and everything between them uses the operations of `traceable_ops`. Proposals are filled up to a
fixed number, so that a classifier always sees the rows that it was traced with. Filled-up proposals never score.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import clip_boxes_to_image

from bags.classifiers.base import BoxFeatures
from bags.core.errors import UserError
from bags.detectors.cascade import CascadeRoIHeads
from bags.detectors.conventions import Transform
from bags.detectors.htc import HTCRoIHeads
from bags.detectors.released import ReleasedRPN, ReleasedTransform, clip_boxes
from bags.detectors.released_pixels import INCLUSIVE
from bags.detectors.roi_heads import RoIHeads
from bags.detectors.traceable_ops import best, length, paste, pool, resize, resize_levels, sigmoid, suppress

FEW = 1000  # proposals of an image up to which torchvision shifts levels apart on a CPU instead of separating them
OUTPUTS = ("boxes", "scores", "labels", "category_ids", "masks")  # of `Traceable`; masks only with a mask branch


class Traceable(nn.Module):
    """One image -> its detections as a tuple of tensors, equal to those of `detector([image])[0]`.

    detector      this project's, or one that `bags.balance` has changed; in evaluation mode, on the CPU, in float32.
                  It must have been called once.
    category_ids  [C] ids of labels 1..C
    Raises UserError, naming the part, for a detector with parts that are not known here.
    """

    category_ids: Tensor  # [C + 1] int64; entry 0 is the background's, which no detection has

    def __init__(self, detector: Any, category_ids: tuple[int, ...]):
        super().__init__()
        _check_parts(detector)
        self.detector = detector
        heads: RoIHeads | CascadeRoIHeads = detector.roi_heads
        self.stages, self.released = heads.box_stages, isinstance(detector.transform, ReleasedTransform)
        self.has_masks = heads.has_mask()
        self.register_buffer("category_ids", torch.tensor([0, *category_ids]), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Detect in an image [3, H, W], RGB in 0..1.

        Returns boxes [K, 4] in pixels of that image, scores [K] in 0..1, labels [K] int64 in 1..C, category ids [K]
        int64 and, with a mask branch, masks [K, 1, H, W] in 0..1. All are sorted by falling score.
        """
        old = torch._shape_as_tensor(image)[1:]
        size, scale = self._resized_size(old)
        batch = self._batch(image, size)
        features = self.detector.backbone(batch)
        if isinstance(features, Tensor):
            features = {"0": features}
        proposals, valid = self._proposals(ImageList(batch, [(batch.shape[2], batch.shape[3])]), features, size)
        if isinstance(self.detector.roi_heads, HTCRoIHeads):
            features = {**features, "semantic": self.detector.roi_heads.semantic(features)[0]}
        scores, boxes = self._classified(features, proposals, size)
        boxes, scores, labels = self._selected(scores * valid[:, None], boxes, scale)
        original = self._at_original_size(boxes, old, size, scale)
        found = original, scores, labels, self.category_ids[labels]
        return (*found, self._masks(features, boxes, original, labels, old)) if self.has_masks else found

    def _resized_size(self, old: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width [2] int64 after resizing, and the scale, float64, for an image of size `old` [2]."""
        transform = self.detector.transform
        if getattr(transform, "fixed_size", None) is not None:
            width, height = transform.fixed_size
            return torch.tensor([height, width]) + 0 * old, torch.ones((), dtype=torch.float64)
        sides = old.double()
        limits = torch.tensor([transform.min_size[-1], transform.max_size], dtype=torch.float64)
        scale = (limits / torch.stack([sides.min(), sides.max()])).min()
        rounding = 0.5 if self.released else 0.0
        return (sides * scale + rounding).floor().clamp(min=1).long(), scale

    def _batch(self, image: Tensor, size: Tensor) -> Tensor:
        """The normalised, resized image in a padded batch [1, 3, H', W']."""
        transform = self.detector.transform
        if self.released:
            image = transform.normalize(resize_levels(image, size))
        else:
            image = resize(transform.normalize(image), size)
        divisor = transform.size_divisible
        missing = (divisor - size % divisor) % divisor
        return F.pad(image, [0, missing[1], 0, missing[0]])[None]

    def _proposals(self, images: ImageList, features: dict[str, Tensor], size: Tensor) -> tuple[Tensor, Tensor]:
        """The best proposals [P, 4] of the RPN, and which of them [P] are no filling, 0 or 1; P is a constant."""
        rpn, maps = self.detector.rpn, list(features.values())
        logits, deltas = rpn.head(maps)
        [anchors] = rpn.anchor_generator(images, maps)
        boxes, scores, start = [], [], torch.zeros((), dtype=torch.long)
        for level_logits, level_deltas in zip(logits, deltas, strict=True):
            level_logits = level_logits[0].permute(1, 2, 0).reshape(-1)
            level_deltas = level_deltas[0].reshape(-1, 4, *level_deltas.shape[2:]).permute(2, 3, 0, 1).reshape(-1, 4)
            level_scores = sigmoid(level_logits)
            top = best(level_scores if self.released else level_logits, rpn.pre_nms_top_n())
            moved = rpn.box_coder.decode_single(level_deltas[top], anchors[start + top])
            start = start + length(level_logits)
            boxes.append(self._clip(moved, size))
            scores.append(level_scores[top])
        kept = self._suppressed_levels(boxes, scores)
        boxes, scores = ([v[k] for v, k in zip(values, kept, strict=True)] for values in (boxes, scores))
        if self.released:
            above = [(s >= rpn.score_thresh).nonzero().squeeze(1) for s in scores]
            boxes, scores = ([v[k] for v, k in zip(values, above, strict=True)] for values in (boxes, scores))
        number = rpn.post_nms_top_n()
        chosen = torch.cat(boxes)[best(torch.cat(scores), number)]
        filling = torch.tensor([[0.0, 0, 1, 1]]).repeat(number, 1)
        valid = torch.cat([torch.ones_like(chosen[:, 0]), torch.zeros(number)])
        return torch.cat([chosen, filling])[:number].reshape(number, 4), valid[:number].reshape(number)

    def _suppressed_levels(self, boxes: list[Tensor], scores: list[Tensor]) -> list[Tensor]:
        """Indices of the boxes that survive within each level, of levels [n, 4] with scores [n] in 0..1.

        Few boxes are shifted as torchvision shifts them, because that rounds their overlaps.
        """
        rpn = self.detector.rpn
        eligible = []
        for level_boxes, level_scores in zip(boxes, scores, strict=True):
            if self.released:
                eligible.append(torch.ones_like(level_scores))
            else:
                sides = level_boxes[:, 2:] - level_boxes[:, :2]
                eligible.append(((sides.amin(1) >= rpn.min_size) & (level_scores >= rpn.score_thresh)).float())
        kept, shift = [], torch.zeros(())
        if not self.released:
            used = torch.cat([b * e[:, None] for b, e in zip(boxes, eligible, strict=True)])
            largest = torch.cat([used.flatten(), torch.zeros(1)]).max()
            shift = (largest + 1) * (torch.cat(eligible).sum() <= FEW).float()
        for level, (level_boxes, level_scores, mask) in enumerate(zip(boxes, scores, eligible, strict=True)):
            shifted = level_boxes + level * shift
            candidates = torch.where(mask > 0, level_scores, torch.full_like(level_scores, -1))
            chosen = suppress(shifted[None], candidates[None, None], rpn.post_nms_top_n(), rpn.nms_thresh, -0.5)
            kept.append(chosen[:, 2])
        return kept

    def _classified(self, features: dict[str, Tensor], proposals: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [P, C+1] and boxes [P, 1 or C+1, 4] of the last stage."""
        logits = []
        for stage in self.stages:
            pooled = pool(stage.box_roi_pool, features, proposals)
            box_features = BoxFeatures(pooled, stage.box_head(pooled).flatten(1))
            logits.append(stage.classifier(box_features))
            moved = stage.box_coder.decode_single(stage.box_regressor(box_features.fc), proposals)
            moved = self._clip(moved.reshape(proposals.shape[0], -1, 4), size)
            proposals = moved[:, 0]
        classifier = self.stages[-1].classifier
        return classifier.probs(logits[0] if len(logits) == 1 else torch.stack(logits).mean(0)), moved

    def _clip(self, boxes: Tensor, size: Tensor) -> Tensor:
        """Clip boxes [..., 4] to an image of `size` [2] (height, width), as the detector's conventions say."""
        height, width = size.float().unbind(0)
        x1, y1, x2, y2 = boxes.unbind(-1)
        low, margin = (1, 1) if self.released else (0, 0)
        x1, x2 = x1.clamp(min=0).minimum(width - margin), x2.clamp(min=low).minimum(width)
        y1, y2 = y1.clamp(min=0).minimum(height - margin), y2.clamp(min=low).minimum(height)
        return torch.stack([x1, y1, x2, y2], dim=-1)

    def _selected(self, scores: Tensor, boxes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best detections (boxes [K, 4], scores [K], labels [K]), as `select_detections` selects them."""
        last, labels = self.stages[-1], self.stages[-1].classifier.num_categories
        every_candidate = self.detector.rpn.post_nms_top_n() * labels
        boxes = boxes[:, 1:] if boxes.shape[1] > 1 else boxes  # [P, 1 or C, 4]
        sides = boxes[..., 2:] - boxes[..., :2]
        scores = torch.where(sides.amin(2) >= last.conventions.least_side, scores[:, 1:], -1.0)
        extra = (scale - 1).float() if self.released else torch.zeros(())
        overlapping = boxes + torch.stack([0 * extra, 0 * extra, extra, extra])
        most = last.max_per_category if last.max_per_category and not last.agnostic_nms else last.detections_per_img
        most, iou, least = min(most, last.detections_per_img), last.nms_thresh, last.score_thresh
        if last.agnostic_nms:
            flattened = overlapping.expand(-1, labels, 4).reshape(1, -1, 4)
            most = every_candidate if last.max_per_category else most
            place = suppress(flattened, scores.reshape(1, 1, -1), most, iou, least)[:, 2]
        elif boxes.shape[1] > 1:
            rows = suppress(overlapping.transpose(0, 1), scores.T[:, None], most, iou, least)
            place = rows[:, 2] * labels + rows[:, 0]
        else:
            rows = suppress(overlapping.transpose(0, 1), scores.T[None], most, iou, least)
            place = rows[:, 2] * labels + rows[:, 1]
        place = place.sort().values  # ties of scores are in the order of proposals, then of labels
        flat = scores.reshape(-1)
        place = place[best(flat[place], every_candidate)]
        if last.agnostic_nms and last.max_per_category:
            same = (place % labels)[:, None] == (place % labels)[None]
            before = torch.tril(torch.ones_like(same).long(), -1) * same
            place = place[(before.sum(1) < last.max_per_category).nonzero().squeeze(1)]
        place = place[: last.detections_per_img]
        row, column = torch.div(place, labels, rounding_mode="floor"), place % labels
        return boxes[row, column if boxes.shape[1] > 1 else 0], flat[place], column + 1

    def _at_original_size(self, boxes: Tensor, old: Tensor, size: Tensor, scale: Tensor) -> Tensor:
        """Map boxes [K, 4] to pixels of the original image."""
        if self.released:
            inclusive = torch.tensor(INCLUSIVE, dtype=torch.float64)
            return ((boxes.double() - inclusive) / scale + inclusive).float()
        ratio = old.float() / size.float()
        return boxes * torch.stack([ratio[1], ratio[0], ratio[1], ratio[0]])

    def _masks(
        self, features: dict[str, Tensor], boxes: Tensor, original: Tensor, labels: Tensor, old: Tensor
    ) -> Tensor:
        """Masks [K, 1, H, W] in 0..1 of boxes [K, 4] in the resized and in the original image.

        One more box is added and its mask dropped, so that no layer sees an empty batch.
        """
        boxes = torch.cat([boxes, torch.tensor([[0.0, 0, 1, 1]])])
        labels = torch.cat([labels, torch.ones(1, dtype=torch.long)])
        pooled = pool(self.stages[-1].mask_roi_pool, features, boxes)
        heads = self.detector.roi_heads
        if isinstance(heads, CascadeRoIHeads):
            outputs = heads._mask_features(pooled, range(len(self.stages)))
        else:
            outputs = [heads.mask_head(pooled)]
        pairs = zip(self.stages, outputs, strict=True)
        probabilities = [stage.mask_logits(output, labels).sigmoid() for stage, output in pairs]
        masks = torch.stack(probabilities).mean(0)[:-1]
        if not self.released:
            return paste(F.pad(masks, (1, 1, 1, 1)), _expanded(original, masks.shape[-1]), old)
        return paste(masks, (original - torch.tensor(INCLUSIVE)).long(), old)


def _expanded(boxes: Tensor, side: int) -> Tensor:
    """Corners [K, 4] int64 of boxes that are wider by one cell of a mask of `side` all around, as torchvision's."""
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((side + 2) / side)
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    return torch.cat([centre - half, centre + half], dim=1).long()


def _check_parts(detector: Any) -> None:
    """Raise UserError for parts whose arithmetic is not known here."""
    kind = type(detector).__name__
    heads = getattr(detector, "roi_heads", None)
    if not isinstance(heads, RoIHeads | CascadeRoIHeads):
        raise UserError(f"export: expected a detector of bags.load_detector or bags.balance, got {kind}")
    transform, rpn = detector.transform, detector.rpn
    if type(transform) not in (Transform, ReleasedTransform):
        raise UserError(f"export: {kind}.transform is of {type(transform).__name__}, which cannot be exported")
    if type(rpn) not in (RegionProposalNetwork, ReleasedRPN):
        raise UserError(f"export: {kind}.rpn is of {type(rpn).__name__}, which cannot be exported")
    clips = {stage.conventions.clip for stage in cast(Any, heads).box_stages}
    released = isinstance(transform, ReleasedTransform)
    if clips != {clip_boxes if released else clip_boxes_to_image} or released != isinstance(rpn, ReleasedRPN):
        raise UserError(f"export: {kind} mixes the parts of different conventions, which cannot be exported")
