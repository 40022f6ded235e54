"""The second stage around a `ProposalClassifier`.

torchvision fixes softmax in the training loss and in the postprocessing of its RoIHeads. This
subclass keeps its sampler and matching, and leaves loss and scores to the classifier. Shape
shorthand: R proposals of the batch, R_i of one image, C categories; label 0 is the background.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.models.detection._utils import BoxCoder

from bags.classifiers.base import BoxFeatures, ProposalClassifier
from bags.detectors.conventions import STANDARD, Conventions
from bags.detectors.postprocess import select_detections


class Samples(NamedTuple):
    """The proposals that a training step looks at; one tensor per image."""

    boxes: list[Tensor]  # [R_i, 4] x1, y1, x2, y2 in pixels of the resized image
    labels: list[Tensor]  # [R_i] in 0..C
    matched: list[Tensor]  # [R_i] position of the matched object in its image
    goals: list[Tensor]  # [R_i, 4] that object's box; in an image without objects the proposal's own
    is_object: list[Tensor]  # [R_i] bool: no proposal but an object's own box, added to learn from

    def foreground(self) -> "Samples":
        """Those of label 1 and above."""
        return self.take([torch.where(labels > 0)[0] for labels in self.labels])

    def take(self, chosen: list[Tensor]) -> "Samples":
        """Some of each image, by their positions (of masks, a GPU would have to be waited for by each field)."""
        return Samples(*([v[own] for v, own in zip(values, chosen, strict=True)] for values in self))


class RoIHeads(torchvision_roi_heads.RoIHeads):
    """Box branch, and torchvision's mask branch if it is given: proposals -> losses (training) or detections."""

    box_coder: BoxCoder
    report_proposals = False  # what `evaluation.proposal_accuracy` looks at

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_head: nn.Module,
        classifier: ProposalClassifier,
        box_regressor: nn.Linear,
        conventions: Conventions = STANDARD,
        max_per_category: int = 0,
        agnostic_nms: bool = False,
        **settings,
    ):
        """`settings` are torchvision's, other ones `select_detections`'; box_regressor: 4 outputs, or 4 * (C + 1)."""
        super().__init__(box_roi_pool, box_head, box_predictor=None, **settings)
        self.classifier = classifier
        self.box_regressor = box_regressor
        self.conventions = conventions
        self.max_per_category, self.agnostic_nms = max_per_category, agnostic_nms
        self.proposal_matcher = conventions.matcher(settings["fg_iou_thresh"], settings["bg_iou_thresh"])
        self.box_coder = conventions.box_coder(self.box_coder.weights)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Returns (detections, losses); one of them is empty.

        proposals: per image [R_i, 4] in pixels of the resized image, whose sizes (height, width)
        are `image_shapes`. A detection holds boxes [K, 4], scores [K] and labels [K] in 1..C; with a mask
        branch also masks [K, 1, 28, 28] in 0..1, of the box and its label; where `report_proposals` is
        set, also proposals [R_i, 4] and proposal_labels [R_i], the label of highest score (0: background).
        """
        if self.training:
            assert targets is not None
            samples = self.sample(proposals, targets)
            box_features = self.box_features(features, samples.boxes, image_shapes)
            losses = self.box_losses(box_features, self.box_regressor(box_features.fc), samples)
            if self.has_mask():
                samples = samples.foreground()
                pooled = self.mask_roi_pool(features, samples.boxes, image_shapes)
                losses["loss_mask"] = self.mask_loss(self.mask_head(pooled), samples, targets)
            return [], losses
        stages = self.stage_features(features, proposals, image_shapes)
        detections = self.stage_detections(stages, image_shapes)
        if self.has_mask():
            pooled = self.mask_roi_pool(features, [detection["boxes"] for detection in detections], image_shapes)
            labels = torch.cat([detection["labels"] for detection in detections])
            add_masks(detections, self.mask_logits(self.mask_head(pooled), labels).sigmoid())
        return detections, {}

    def training_proposals(self, features, proposals, image_shapes, targets):
        """[(classifier, BoxFeatures, labels [R])] of the proposals that a training step would sample."""
        samples = self.sample(proposals, targets)
        return [(self.classifier, self.box_features(features, samples.boxes, image_shapes), torch.cat(samples.labels))]

    @property
    def box_stages(self) -> list["RoIHeads"]:
        """The stages that classify boxes, in order: this one alone."""
        return [self]

    def stage_features(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes
    ) -> list[tuple[list[Tensor], BoxFeatures]]:
        """What each stage classifies in evaluation: its boxes per image, and their features."""
        return [(proposals, self.box_features(features, proposals, image_shapes))]

    def stage_detections(self, stages: list[tuple[list[Tensor], BoxFeatures]], image_shapes) -> list[dict[str, Tensor]]:
        """Detections of each image, without masks, from what `stage_features` gives (`fc` is enough)."""
        [(boxes, box_features)] = stages
        scores = self.classifier.probs(self.classifier(box_features))
        return self.detect(scores, self.box_regressor(box_features.fc), boxes, image_shapes)

    def stage_losses(self, stages: list[tuple[BoxFeatures, Tensor]]) -> dict[str, Tensor]:
        """The classifiers' losses from the features and labels [R] of each stage's samples."""
        [(box_features, labels)] = stages
        return self.classifier.loss(self.classifier(box_features), labels)

    def match(self, proposals: list[Tensor], targets: list[dict]) -> Samples:
        """All proposals, and after them the objects' own boxes [K, 4], each with its label."""
        objects = [target["boxes"].to(proposals[0].dtype) for target in targets]
        counts = [len(boxes) for boxes in proposals]
        boxes, own = self.add_gt_proposals(proposals, objects), [target["labels"] for target in targets]
        matched, labels = self.assign_targets_to_proposals(
            boxes if self.conventions.matches_objects else proposals, objects, own
        )
        if not self.conventions.matches_objects:
            labels = [torch.cat(pair) for pair in zip(labels, own, strict=True)]
            matched = [torch.cat([m, torch.arange(len(o), device=m.device)]) for m, o in zip(matched, own, strict=True)]
        goals = [o[m] if len(o) else b for o, m, b in zip(objects, matched, boxes, strict=True)]
        is_object = [torch.arange(len(b), device=b.device) >= count for b, count in zip(boxes, counts, strict=True)]
        return Samples(boxes, labels, matched, goals, is_object)

    def sample(self, proposals: list[Tensor], targets: list[dict]) -> Samples:
        """Of proposals and objects, `batch_size_per_image` drawn of each image."""
        self.check_targets(targets)
        everything = self.match(proposals, targets)
        return everything.take(self.subsample(everything.labels))

    def box_features(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes) -> BoxFeatures:
        """What the classifier and the box regression see of the boxes."""
        pooled = self.box_roi_pool(features, boxes, image_shapes)
        return BoxFeatures(pooled, self.box_head(pooled).flatten(1))

    def box_losses(self, box_features: BoxFeatures, regression: Tensor, samples: Samples) -> dict[str, Tensor]:
        """The classifier's losses and loss_box_reg."""
        labels = torch.cat(samples.labels)
        deltas = torch.cat(self.box_coder.encode(samples.goals, samples.boxes))
        losses = self.classifier.loss(self.classifier(box_features), labels)
        return {**losses, "loss_box_reg": box_loss(regression, labels, deltas, self.conventions.box_beta)}

    def mask_logits(self, mask_features: Tensor, labels: Tensor) -> Tensor:
        """Outputs of the mask head [K, width, 14, 14] -> logits [K, 28, 28], each for its own label [K] in 1..C alone.

        The other C channels of the predictor are not computed: at 1,203 categories they would be gigabytes.
        """
        predictor = self.mask_predictor
        hidden = predictor.relu(predictor.conv5_mask(mask_features))
        weight, bias = predictor.mask_fcn_logits.weight[labels, :, 0, 0], predictor.mask_fcn_logits.bias[labels]
        return torch.einsum("kchw,kc->khw", hidden, weight) + bias[:, None, None]

    def mask_loss(self, mask_features: Tensor, samples: Samples, targets: list[dict]) -> Tensor:
        """Mean binary cross entropy over the masks of foreground `samples`, whose features are [K, width, 14, 14]."""
        logits = self.mask_logits(mask_features, torch.cat(samples.labels))
        if not len(logits):
            return logits.sum() * 0
        goals = [
            self.conventions.mask_targets(target["masks"], boxes, matched, logits.shape[-1])
            for target, boxes, matched in zip(targets, samples.boxes, samples.matched, strict=True)
        ]
        return F.binary_cross_entropy_with_logits(logits.float(), torch.cat(goals))

    @torch.no_grad()
    def refine(self, boxes: list[Tensor], regression: Tensor, image_shapes: list[tuple[int, int]]) -> list[Tensor]:
        """Boxes moved by this stage's regression [R, 4], inside their images."""
        moved = self.box_coder.decode_single(regression, torch.cat(boxes)).split([len(b) for b in boxes])
        return [self.conventions.clip(own, shape) for own, shape in zip(moved, image_shapes, strict=True)]

    def detect(self, scores: Tensor, regression: Tensor, boxes: list[Tensor], image_shapes) -> list[dict[str, Tensor]]:
        """Detections of each image from the scores [R, C+1] and the regression of its boxes."""
        counts = [len(p) for p in boxes]
        detections = []
        for image in zip(scores.split(counts), regression.split(counts), boxes, image_shapes, strict=True):
            found, best, labels = select_detections(
                *image,
                self.box_coder,
                self.score_thresh,
                self.nms_thresh,
                self.detections_per_img,
                self.conventions,
                self.max_per_category,
                self.agnostic_nms,
            )
            detections.append({"boxes": found, "scores": best, "labels": labels})
            if self.report_proposals:
                own_scores, _, own, _ = image
                detections[-1] |= {"proposals": own, "proposal_labels": own_scores.argmax(1)}
        return detections


def add_masks(detections: list[dict[str, Tensor]], probabilities: Tensor) -> None:
    """Gives each detection its share of the masks [K, 28, 28], as [K_i, 1, 28, 28]."""
    counts = [len(detection["labels"]) for detection in detections]
    for detection, masks in zip(detections, probabilities.split(counts), strict=True):
        detection["masks"] = masks[:, None]


def box_loss(regression: Tensor, labels: Tensor, targets: Tensor, beta: float = 1.0) -> Tensor:
    """Smooth L1 over the foreground's deltas [R, 4 or 4 * (C+1)], summed and divided by R.

    beta: where it turns linear; 1 in the paper's code, 1/9 in torchvision.
    """
    positive = torch.where(labels > 0)[0]
    deltas = regression.unflatten(1, (-1, 4))
    deltas = deltas[positive, labels[positive] if deltas.shape[1] > 1 else 0]
    loss = F.smooth_l1_loss(deltas.float(), targets[positive], beta=beta, reduction="sum")
    return loss / max(len(labels), 1)
