"""The second stage around a `ProposalClassifier`.

torchvision's RoIHeads fix softmax in the training loss and in the postprocessing. This subclass keeps their sampler
and matching, and leaves loss and scores to the classifier. Shape shorthand: R proposals of the batch, R_i of one image,
C categories; label 0 is the background.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import roi_heads as torchvision_roi_heads

from bags.classifiers.base import BoxFeatures, ProposalClassifier, at_least_float32
from bags.core.errors import UserError
from bags.detectors.conventions import STANDARD, Conventions
from bags.detectors.postprocess import select_detections
from bags.detectors.torchvision_private import BoxCoder


class Samples(NamedTuple):
    """Labelled proposals to train on; one tensor per image."""

    boxes: list[Tensor]  # [R_i, 4] x1, y1, x2, y2 in pixels of the resized image
    labels: list[Tensor]  # [R_i] in 0..C
    matched: list[Tensor]  # [R_i] position of the matched object in its image
    goals: list[Tensor]  # [R_i, 4] box of the matched object; in an image without objects the proposal itself
    is_object: list[Tensor]  # [R_i] bool: not a proposal but the box of an object, added to learn from

    def foreground(self) -> "Samples":
        """Keep the samples with labels from 1 on."""
        return self.take([torch.where(labels > 0)[0] for labels in self.labels])

    def take(self, chosen: list[Tensor]) -> "Samples":
        """Keep the samples at positions `chosen` [n] of each image; with masks, each field would wait for the GPU."""
        return Samples(*([field[rows] for field, rows in zip(images, chosen, strict=True)] for images in self))


class NormedConv(nn.Conv2d):
    """A 1 x 1 convolution whose outputs are 20 times the cosine of each pixel's features and each weight, plus a bias.

    The normalised mask predictor of Wang et al. 2021 (Seesaw), with their temperature. 1e-6 is added to each norm.
    """

    temperature = 20.0
    eps = 1e-6

    @classmethod
    def of(cls, plain: nn.Conv2d) -> "NormedConv":
        """The same weights with normalisation. No random number is drawn."""
        normed: NormedConv = nn.utils.skip_init(cls, plain.in_channels, plain.out_channels, 1)
        normed.load_state_dict(plain.state_dict())
        return normed

    def normed(self, features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Features [K, width, H, W] of norm 20 at each pixel, and weights [K, width] of norm 1, in float32 at least."""
        features, weight = at_least_float32(features), at_least_float32(weight)
        features = self.temperature * features / (features.norm(dim=1, keepdim=True) + self.eps)
        return features, weight / (weight.norm(dim=1, keepdim=True) + self.eps)

    def forward(self, features: Tensor) -> Tensor:
        """Features [K, width, H, W] -> logits [K, outputs, H, W]."""
        features, weight = self.normed(features, self.weight[:, :, 0, 0])
        return nn.functional.conv2d(features, weight[:, :, None, None], self.bias)


class RoIHeads(torchvision_roi_heads.RoIHeads):
    """Box branch and, if given, torchvision's mask branch: proposals -> losses (training) or detections."""

    box_coder: BoxCoder
    report_proposals = False  # detections also hold the labels of all proposals, for `evaluation.proposal_accuracy`

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_head: nn.Module,
        classifier: ProposalClassifier,
        box_regressor: nn.Linear,
        conventions: Conventions = STANDARD,
        max_per_category: int = 0,
        agnostic_nms: bool = False,
        **settings: Any,
    ) -> None:
        """box_regressor has 4 or 4 * (C + 1) outputs; `settings` are those of torchvision's RoIHeads.

        max_per_category and agnostic_nms are those of `select_detections`.
        """
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
        """Return (detections, losses), of which one is empty.

        proposals are [R_i, 4] per image, in pixels of the resized image of `image_shapes` (height, width). A detection
        holds boxes [K, 4], scores [K] in 0..1 and labels [K] in 1..C; with a mask branch also masks [K, 1, 28, 28] in
        0..1, one of each box and its label. With `report_proposals` it also holds proposals [R_i, 4] and
        proposal_labels [R_i] in 0..C, the labels of the highest scores.
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

    def training_proposals(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> list[tuple[ProposalClassifier, BoxFeatures, Tensor]]:
        """Sample proposals as a training step does: [(classifier, BoxFeatures, labels [R] in 0..C)]."""
        samples = self.sample(proposals, targets)
        return [(self.classifier, self.box_features(features, samples.boxes, image_shapes), torch.cat(samples.labels))]

    @property
    def box_stages(self) -> list["RoIHeads"]:
        """The stages that classify boxes, in order: only this one."""
        return [self]

    def with_context(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The maps that boxes are pooled from: the pyramid's."""
        return features

    def stage_features(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[tuple[list[Tensor], BoxFeatures]]:
        """The boxes [R_i, 4] per image that each stage classifies in evaluation, and their features."""
        check_overflow(*features.values())
        return [(proposals, self.box_features(features, proposals, image_shapes))]

    def stage_detections(
        self, stages: list[tuple[list[Tensor], BoxFeatures]], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Detections of each image, without masks, from the result of `stage_features` (only `fc` is needed)."""
        [(boxes, box_features)] = stages
        scores = self.classifier.probs(self.classifier(box_features))
        return self.detect(scores, self.box_regressor(box_features.fc), boxes, image_shapes)

    def stage_losses(self, stages: list[tuple[BoxFeatures, Tensor]]) -> dict[str, Tensor]:
        """The classifiers' losses from the features and labels [R] in 0..C of each stage's samples."""
        [(box_features, labels)] = stages
        return self.classifier.loss(self.classifier(box_features), labels)

    def match(self, proposals: list[Tensor], targets: list[dict]) -> Samples:
        """Label all proposals [R_i, 4] and, after them, the objects' boxes [K, 4]."""
        objects = [target["boxes"].to(proposals[0].dtype) for target in targets]
        object_labels = [target["labels"] for target in targets]
        counts = [len(boxes) for boxes in proposals]
        boxes = self.add_gt_proposals(proposals, objects)
        to_match = boxes if self.conventions.matches_objects else proposals
        matched, labels = self.assign_targets_to_proposals(to_match, objects, object_labels)
        if not self.conventions.matches_objects:  # object k of an image has matched object k
            labels = [torch.cat(pair) for pair in zip(labels, object_labels, strict=True)]
            numbers = [torch.arange(len(o), device=m.device) for m, o in zip(matched, objects, strict=True)]
            matched = [torch.cat(pair) for pair in zip(matched, numbers, strict=True)]
        goals = [o[m] if len(o) else b for o, m, b in zip(objects, matched, boxes, strict=True)]
        is_object = [torch.arange(len(b), device=b.device) >= count for b, count in zip(boxes, counts, strict=True)]
        return Samples(boxes, labels, matched, goals, is_object)

    def sample(self, proposals: list[Tensor], targets: list[dict]) -> Samples:
        """Draw `batch_size_per_image` of each image's proposals and objects."""
        self.check_targets(targets)
        candidates = self.match(proposals, targets)
        return candidates.take(self.subsample(candidates.labels))

    def box_features(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> BoxFeatures:
        """The features of boxes [R_i, 4] per image, for the classifier and the box regression."""
        pooled = self.box_roi_pool(features, boxes, image_shapes)
        return BoxFeatures(pooled, self.box_head(pooled).flatten(1))

    def box_losses(self, box_features: BoxFeatures, regression: Tensor, samples: Samples) -> dict[str, Tensor]:
        """The classifier's losses and loss_box_reg, from regression [R, 4 or 4 * (C+1)]."""
        labels = torch.cat(samples.labels)
        deltas = torch.cat(self.box_coder.encode(samples.goals, samples.boxes))
        losses = self.classifier.loss(self.classifier(box_features), labels)
        return {**losses, "loss_box_reg": box_loss(regression, labels, deltas, self.conventions.box_beta)}

    def mask_logits(self, mask_features: Tensor, labels: Tensor) -> Tensor:
        """Mask logits [K, 28, 28] of one label [K] in 1..C each, from outputs of the mask head [K, width, 14, 14].

        The predictor's C other channels are not computed: with 1,203 categories they would take gigabytes. A predictor
        with one channel has one mask for all labels.
        """
        predictor = self.mask_predictor
        if predictor.mask_fcn_logits.out_channels == 1:
            labels = torch.zeros_like(labels)
        hidden = predictor.relu(predictor.conv5_mask(mask_features))
        weight, bias = predictor.mask_fcn_logits.weight[labels, :, 0, 0], predictor.mask_fcn_logits.bias[labels]
        if isinstance(predictor.mask_fcn_logits, NormedConv):
            hidden, weight = predictor.mask_fcn_logits.normed(hidden, weight)
        return torch.einsum("kchw,kc->khw", hidden, weight) + bias[:, None, None]

    def mask_loss(self, mask_features: Tensor, samples: Samples, targets: list[dict]) -> Tensor:
        """Mean binary cross entropy over the masks of K foreground samples; mask_features [K, width, 14, 14]."""
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
        """Move boxes [R_i, 4] per image by this stage's regression [R, 4], and clip them to their images."""
        moved = self.box_coder.decode_single(regression, torch.cat(boxes)).split([len(b) for b in boxes])
        return [self.conventions.clip(of_image, shape) for of_image, shape in zip(moved, image_shapes, strict=True)]

    def next_proposals(self, samples: Samples, regression: Tensor, image_shapes: list[tuple[int, int]]) -> list[Tensor]:
        """The samples' boxes [n, 4] per image for the next stage: moved, and without those of objects."""
        moved = self.refine(samples.boxes, regression, image_shapes)
        return [boxes[~is_object] for boxes, is_object in zip(moved, samples.is_object, strict=True)]

    def detect(
        self, scores: Tensor, regression: Tensor, boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Detections of each image, from scores [R, C+1] in 0..1 and regression [R, 4 or 4 * (C+1)] of boxes [R_i, 4].

        Column 0 of the scores is the background.
        """
        check_overflow(scores, regression)
        counts = [len(proposals) for proposals in boxes]
        images = zip(scores.split(counts), regression.split(counts), boxes, image_shapes, strict=True)
        detections = []
        for image_scores, image_regression, proposals, image_shape in images:
            kept_boxes, kept_scores, labels = select_detections(
                image_scores,
                image_regression,
                proposals,
                image_shape,
                self.box_coder,
                self.score_thresh,
                self.nms_thresh,
                self.detections_per_img,
                self.conventions,
                self.max_per_category,
                self.agnostic_nms,
            )
            detections.append({"boxes": kept_boxes, "scores": kept_scores, "labels": labels})
            if self.report_proposals:
                detections[-1] |= {"proposals": proposals, "proposal_labels": image_scores.argmax(1)}
        return detections


def refuse_tracing() -> None:
    """Raise UserError while a detector is traced: the trace would keep one image's size and counts as constants."""
    if torch.jit.is_tracing():
        raise UserError(
            "torch.jit.trace and torch.onnx.export would keep the size and the number of proposals of this image: "
            "use bags.export_onnx, or `bags export` for a checkpoint"
        )


def check_overflow(*values: Tensor) -> None:
    """Raise UserError for numbers that are not finite; of those, sorting and NMS make detections without a word."""
    if not torch.stack([value.isfinite().all() for value in values]).all():
        raise UserError("the detector's weights give numbers that are not finite, so it detects nothing: use others")


def add_masks(detections: list[dict[str, Tensor]], probabilities: Tensor) -> None:
    """Distribute mask probabilities [K, 28, 28] to the images' detections, as masks [K_i, 1, 28, 28] in 0..1."""
    counts = [len(detection["labels"]) for detection in detections]
    for detection, masks in zip(detections, probabilities.split(counts), strict=True):
        detection["masks"] = masks[:, None]


def box_loss(regression: Tensor, labels: Tensor, targets: Tensor, beta: float = 1.0) -> Tensor:
    """Smooth L1 of the foreground's deltas, summed and divided by R.

    regression  [R, 4 * (C+1)] deltas for each label, or [R, 4] shared by all labels
    labels      [R] in 0..C; the background, 0, has no box loss
    targets     [R, 4] true deltas
    beta        error at which the loss turns from square to linear: 1 in the paper's code, 1/9 in torchvision
    """
    positive = torch.where(labels > 0)[0]
    deltas = regression.unflatten(1, (-1, 4))
    deltas = deltas[positive, labels[positive] if deltas.shape[1] > 1 else 0]
    loss = F.smooth_l1_loss(deltas.float(), targets[positive], beta=beta, reduction="sum")
    return loss / max(len(labels), 1)
