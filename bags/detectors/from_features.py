"""The two halves of a detector whose classifiers alone are trained: what never changes, and what is left to do.

`training_pool` and `stage_features` make the proposals and features that can be kept on disk;
`FromFeatures` goes on from there. Shape shorthand: S stages, R rows of one image (proposals, and after them
its objects), D numbers in a feature.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from bags.classifiers.base import BoxFeatures
from bags.detectors.faster_rcnn import FasterRCNN
from bags.detectors.released import ResizedShape


class Pool(NamedTuple):
    """What a training step may draw from one image; a row stands for the same proposal in every stage."""

    fc: Tensor  # [R, S, D] after the box head
    labels: Tensor  # [R, S] in 0..C
    overlaps: Tensor  # [R, S] IoU with the object that it overlaps most, 0 without any
    scores: Tensor  # [R] objectness in 0..1; 1 for objects
    is_object: Tensor  # [R] bool; objects are the last rows


class Seen(NamedTuple):
    """What the last step of prediction needs of one image."""

    fc: Tensor  # [R, S, D]
    boxes: Tensor  # [R, 4] those of the last stage, pixels of the resized image
    size: tuple[int, int]  # height, width of the resized image
    scale: float  # by which the image was resized, where the detector's transform says so; else 1
    original: tuple[int, int]  # height, width before

    def to(self, device: torch.device) -> "Seen":
        """With its tensors on a device."""
        return self._replace(fc=self.fc.to(device), boxes=self.boxes.to(device))


@torch.inference_mode()
def training_pool(
    detector: FasterRCNN, images: list[Tensor], targets: list[dict], negatives: int, seeds: Sequence[int]
) -> list[Pool]:
    """Of each image all objects, all foreground proposals and up to `negatives` others, drawn by its seed.

    images and targets as in training, the detector in evaluation mode. Stage 1 decides what is foreground. A
    later stage sees the same rows, moved by the stages before it, as it does in training.
    """
    batch, targets = detector.transform(images, targets)
    assert len(images) == len(seeds) == len(targets)
    features = detector.backbone(batch.tensors)
    proposals, scores = _training_proposals(detector.rpn, batch, features)
    if hasattr(detector.roi_heads, "with_context"):
        features = detector.roi_heads.with_context(features)
    shapes, stages = batch.image_sizes, detector.roi_heads.box_stages
    samples = stages[0].match(proposals, targets)
    chosen = [
        _chosen(labels, is_object, negatives, seed)
        for labels, is_object, seed in zip(samples.labels, samples.is_object, seeds, strict=True)
    ]
    samples = samples.take(chosen)
    scores = [torch.cat([s, s.new_ones(len(t["boxes"]))])[c] for s, t, c in zip(scores, targets, chosen, strict=True)]
    found: list[tuple] = []
    for stage in stages:
        if found:
            moved = stages[len(found) - 1].refine(samples.boxes, found[-1][1], shapes)
            kept = [boxes[~own] for boxes, own in zip(moved, samples.is_object, strict=True)]
            samples = stage.match(kept, targets)
        fc = stage.box_features(features, samples.boxes, shapes).fc
        regression = stage.box_regressor(fc) if stage is not stages[-1] else None
        overlaps = [overlap(boxes, target["boxes"]) for boxes, target in zip(samples.boxes, targets, strict=True)]
        found.append((fc.split([len(boxes) for boxes in samples.boxes]), regression, samples.labels, overlaps))
    pools = []
    for image in range(len(targets)):
        rows, labels, highest = (torch.stack([of[k][image] for of in found], 1) for k in (0, 2, 3))
        pools.append(Pool(rows, labels, highest, scores[image], samples.is_object[image]))
    return pools


def overlap(boxes: Tensor, objects: Tensor) -> Tensor:
    """IoU of boxes [R, 4] with the object [G, 4] that each overlaps most: [R], 0 without objects."""
    return box_iou(boxes, objects).max(1).values if len(objects) else boxes.new_zeros(len(boxes))


def _chosen(labels: Tensor, is_object: Tensor, negatives: int, seed: int) -> Tensor:
    """Rows of one image, rising: foreground, objects, and `negatives` of the rest."""
    rest = torch.where((labels == 0) & ~is_object)[0]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:negatives]
    return torch.cat([torch.where((labels > 0) | is_object)[0], rest[order.to(rest.device)]]).sort().values


def _training_proposals(
    rpn: RegionProposalNetwork, images, features: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes [R, 4] and objectness [R] of each image, as many as in training, without the RPN's losses."""
    scores: list[Tensor] = []
    plain = rpn.filter_proposals

    def kept(*given):
        """`filter_proposals`, whose scores the RPN's own forward drops."""
        boxes, found = plain(*given)
        scores.extend(found)
        return boxes, found

    with _as_many_as_in_training(rpn):
        rpn.filter_proposals = kept
        try:
            return rpn(images, features)[0], scores
        finally:
            del rpn.filter_proposals


@contextlib.contextmanager
def _as_many_as_in_training(rpn: RegionProposalNetwork) -> Iterator[None]:
    limits = rpn._pre_nms_top_n, rpn._post_nms_top_n
    rpn._pre_nms_top_n, rpn._post_nms_top_n = ({"testing": limit["training"]} for limit in limits)
    try:
        yield
    finally:
        rpn._pre_nms_top_n, rpn._post_nms_top_n = limits


@torch.inference_mode()
def seen(detector: FasterRCNN, images: list[Tensor]) -> list[Seen]:
    """What is left of each image [3, H, W] for the classifiers; the detector in evaluation mode."""
    batch, _ = detector.transform(images)
    features = detector.backbone(batch.tensors)
    proposals, _ = detector.rpn(batch, features)
    stages = detector.roi_heads.stage_features(features, proposals, batch.image_sizes)
    boxes = stages[-1][0]
    fc = torch.stack([shown.fc for _, shown in stages], 1).split([len(b) for b in boxes])
    return [
        Seen(own, moved, tuple(size), getattr(size, "scale", 1.0), (image.shape[-2], image.shape[-1]))
        for own, moved, size, image in zip(fc, boxes, batch.image_sizes, images, strict=True)
    ]


class FromFeatures(nn.Module):
    """A detector's classifiers and last box regression, called on kept features instead of images.

    Training mode: forward([fc [R, D] per stage], [{"labels": [R]} per stage]) -> the classifiers' losses.
    Evaluation mode: forward([Seen per image]) -> detections, as the detector's own but without masks.
    With `resident`, all rows [N, S, D] of a store, the training features may be row numbers [R] instead.
    """

    def __init__(self, detector: FasterRCNN, resident: Tensor | None = None):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList([stage.classifier, stage.box_regressor]) for stage in detector.roi_heads.box_stages
        )
        self.detector = (detector,)  # no submodule: it may stay where it is
        self.resident = resident
        self.train()

    def train(self, mode: bool = True) -> "FromFeatures":
        """Of the detector only the classifiers follow: the rest, its transform too, does what it does in prediction."""
        self.detector[0].eval()
        return super().train(mode)

    def forward(self, images: list, targets: list[dict] | None = None):
        """See the class."""
        detector = self.detector[0]
        if self.training:
            return detector.roi_heads.stage_losses(self._samples(images, targets or []))
        counts = [len(image.boxes) for image in images]
        fc = torch.cat([image.fc for image in images])
        boxes = torch.cat([image.boxes for image in images]).split(counts)
        sizes = [ResizedShape(image.size, image.scale) for image in images]
        stages = [(list(boxes), _fc_alone(fc[:, number])) for number in range(fc.shape[1])]
        detections = detector.roi_heads.stage_detections(stages, sizes)
        return detector.transform.postprocess(detections, sizes, [image.original for image in images])

    def _samples(self, images: list[Tensor], targets: list[dict]) -> list[tuple[BoxFeatures, Tensor]]:
        """Features and labels of each stage."""
        stages = []
        for number, (shown, target) in enumerate(zip(images, targets, strict=True)):
            fc = shown if self.resident is None or shown.is_floating_point() else self.resident[shown, number]
            stages.append((_fc_alone(fc), target["labels"]))
        return stages


def _fc_alone(fc: Tensor) -> BoxFeatures:
    """Features [R, D] of any type as float32; what was pooled is not kept."""
    return BoxFeatures(fc.new_zeros(len(fc), 0, dtype=torch.float32), fc.float())
