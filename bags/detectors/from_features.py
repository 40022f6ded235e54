"""The two halves of a detector of which only the classifiers are trained.

`training_pool` and `proposals_to_store` run the frozen half; what they return can be kept on disk. `FromFeatures` is
the other half: it trains and predicts from the stored features. Shape shorthand: S stages, R rows of one image
(proposals, and after them its objects), D numbers in a feature.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import box_iou

from bags.classifiers.base import BoxFeatures, ProposalClassifier
from bags.core.few_bits import StoredRows
from bags.detectors.faster_rcnn import FasterRCNN
from bags.detectors.released import ResizedShape


class Pool(NamedTuple):
    """The rows of one image that a training step may draw from; a row is the same proposal in every stage."""

    fc: Tensor  # [R, S, D] after the box head
    labels: Tensor  # [R, S] in 0..C, 0 is the background
    overlaps: Tensor  # [R, S] in 0..1: IoU with the object that the row overlaps most, 0 without objects
    scores: Tensor  # [R] objectness in 0..1; 1 for objects
    is_object: Tensor  # [R] bool; objects are the last rows


class StoredProposals(NamedTuple):
    """The proposals of one image, as the last step of prediction needs them."""

    fc: Tensor  # [R, S, D]
    boxes: Tensor  # [R, 4] of the last stage, in pixels of the resized image
    size: tuple[int, int]  # height, width of the resized image
    scale: float  # by which the image was resized, if the detector's transform tells it; else 1
    original: tuple[int, int]  # height, width before resizing

    def to(self, device: torch.device) -> "StoredProposals":
        """Move the tensors to a device."""
        return self._replace(fc=self.fc.to(device), boxes=self.boxes.to(device))


@torch.inference_mode()
def training_pool(
    detector: FasterRCNN,
    images: list[Tensor],
    targets: list[dict],
    negatives: int,
    seeds: Sequence[int],
    hard: bool = False,
) -> list[Pool]:
    """Collect of each image all objects, all foreground proposals and up to `negatives` others, drawn by its seed.

    hard: the others of the highest objectness, instead of random ones; of equal ones those that come first.
    images and targets are as in training; the detector is in evaluation mode. Stage 1 decides what is foreground.
    Later stages see the same rows, moved by the stages before, as in training.
    """
    batch, targets = detector.transform(images, targets)
    assert len(images) == len(seeds) == len(targets)
    features = _maps(detector, batch.tensors)
    proposals, scores = _training_proposals(detector.rpn, batch, features)
    features = detector.roi_heads.with_context(features)
    stages = detector.roi_heads.box_stages
    samples = stages[0].match(proposals, targets)
    scores = [torch.cat([s, s.new_ones(len(t["boxes"]))]) for s, t in zip(scores, targets, strict=True)]
    rows = [
        _chosen(labels, is_object, negatives, score if hard else seed)
        for labels, is_object, score, seed in zip(samples.labels, samples.is_object, scores, seeds, strict=True)
    ]
    samples, scores = samples.take(rows), [score[chosen] for score, chosen in zip(scores, rows, strict=True)]
    fc: list[Sequence[Tensor]] = []
    labels, overlaps = [], []
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        box_features = stage.box_features(features, samples.boxes, batch.image_sizes)
        fc.append(box_features.fc.split([len(boxes) for boxes in samples.boxes]))
        labels.append(samples.labels)
        overlaps.append([overlap(boxes, target["boxes"]) for boxes, target in zip(samples.boxes, targets, strict=True)])
        if following is not None:
            regression = stage.box_regressor(box_features.fc)
            samples = following.match(stage.next_proposals(samples, regression, batch.image_sizes), targets)
    columns = ([torch.stack(image, 1) for image in zip(*column, strict=True)] for column in (fc, labels, overlaps))
    return [Pool(*image) for image in zip(*columns, scores, samples.is_object, strict=True)]


def _maps(detector: FasterRCNN, images: Tensor) -> dict[str, Tensor]:
    """Feature maps of images [B, 3, H, W]; torchvision's detectors may have a backbone that gives a single one."""
    features = detector.backbone(images)
    return {"0": features} if isinstance(features, Tensor) else features


def overlap(boxes: Tensor, objects: Tensor) -> Tensor:
    """IoU [R] of boxes [R, 4] with the object of [G, 4] that each overlaps most; 0 without objects."""
    return box_iou(boxes, objects).max(1).values if len(objects) else boxes.new_zeros(len(boxes))


def _chosen(labels: Tensor, is_object: Tensor, negatives: int, by: int | Tensor) -> Tensor:
    """Rows of one image, rising: its foreground, its objects, and `negatives` of the others.

    by: the seed that others are drawn with, or the scores [R] of which they have the highest.
    """
    others = torch.where((labels == 0) & ~is_object)[0]
    if isinstance(by, Tensor):
        order = by[others].argsort(descending=True, stable=True)[:negatives]
    else:
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(by))[:negatives]
    return torch.cat([torch.where((labels > 0) | is_object)[0], others[order.to(others.device)]]).sort().values


def _training_proposals(
    rpn: RegionProposalNetwork, images: ImageList, features: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes [R, 4] and objectness [R] in 0..1 of each image, as many as in training; the RPN is in evaluation mode.

    The steps are those of `RegionProposalNetwork.forward`, which does not return the objectness.
    """
    maps = list(features.values())
    objectness, deltas = rpn.head(maps)
    anchors = rpn.anchor_generator(images, maps)
    anchors_per_level = [level[0].numel() for level in objectness]
    objectness, deltas = concat_box_prediction_layers(objectness, deltas)
    boxes = rpn.box_coder.decode(deltas, anchors).view(len(anchors), -1, 4)
    rpn.training = True  # makes filter_proposals keep as many as in training, and changes nothing else
    try:
        return rpn.filter_proposals(boxes, objectness, images.image_sizes, anchors_per_level)
    finally:
        rpn.training = False


@torch.inference_mode()
def proposals_to_store(detector: FasterRCNN, images: list[Tensor]) -> list[StoredProposals]:
    """Run the frozen half for prediction on images [3, H, W]; the detector is in evaluation mode."""
    batch, _ = detector.transform(images)
    features = _maps(detector, batch.tensors)
    proposals, _ = detector.rpn(batch, features)
    stages = detector.roi_heads.stage_features(features, proposals, batch.image_sizes)
    boxes = stages[-1][0]
    fc = torch.stack([box_features.fc for _, box_features in stages], 1).split([len(b) for b in boxes])
    return [
        StoredProposals(rows, moved, tuple(size), getattr(size, "scale", 1.0), (image.shape[-2], image.shape[-1]))
        for rows, moved, size, image in zip(fc, boxes, batch.image_sizes, images, strict=True)
    ]


class FromFeatures(nn.Module):
    """A detector's classifiers and last box regression, called with stored features instead of images.

    Training mode: forward([fc [R, D] per stage], [{"labels": [R]} per stage]) returns the classifiers' losses.
    Evaluation mode: forward([StoredProposals per image]) returns the detector's detections, without masks.
    With `resident`, all rows of a store, training features may be row numbers [R] instead.
    """

    def __init__(self, detector: FasterRCNN, resident: StoredRows | None = None):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList([stage.classifier, stage.box_regressor]) for stage in detector.roi_heads.box_stages
        )
        self.detector = (detector,)  # not a submodule: it may stay on another device
        self.resident = resident
        self.train()

    def train(self, mode: bool = True) -> "FromFeatures":
        """Set the mode of the classifiers; the rest of the detector, including its transform, stays in evaluation."""
        self.detector[0].eval()
        return super().train(mode)

    def forward(self, images: list, targets: list[dict] | None = None) -> Any:
        """See the class."""
        detector = self.detector[0]
        if self.training:
            return detector.roi_heads.stage_losses(self._samples(images, targets or []))
        fc = torch.cat([image.fc for image in images])
        boxes = [image.boxes for image in images]
        sizes = [ResizedShape(image.size, image.scale) for image in images]
        stages = [(boxes, _without_pooled(fc[:, number])) for number in range(fc.shape[1])]
        detections = detector.roi_heads.stage_detections(stages, sizes)
        return detector.transform.postprocess(detections, sizes, [image.original for image in images])

    @torch.no_grad()
    def training_proposals(
        self, features: list[Tensor], targets: list[dict]
    ) -> list[tuple[ProposalClassifier, BoxFeatures, Tensor]]:
        """List for each stage (classifier, features of R proposals, labels [R]), as the detector's method does.

        Pooled features are [R, 0]: they are not stored.
        """
        classifiers = [stage.classifier for stage in self.detector[0].roi_heads.box_stages]
        samples = self._samples(features, targets)
        return [(classifier, *sample) for classifier, sample in zip(classifiers, samples, strict=True)]

    def _samples(self, features: list[Tensor], targets: list[dict]) -> list[tuple[BoxFeatures, Tensor]]:
        """Features and labels of each stage."""
        stages = []
        for number, (fc, target) in enumerate(zip(features, targets, strict=True)):
            if self.resident is not None and not fc.is_floating_point():
                fc = self.resident.take(fc, number)
            stages.append((_without_pooled(fc), target["labels"]))
        return stages


def _without_pooled(fc: Tensor) -> BoxFeatures:
    """Features [R, D] of any type as float32; the pooled features are not stored."""
    return BoxFeatures(fc.new_zeros(len(fc), 0, dtype=torch.float32), fc.float())
