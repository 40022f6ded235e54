"""Faster, Mask and Cascade R-CNN and HTC: torchvision's parts put together around any `ProposalClassifier`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from bags.classifiers.base import BoxFeatures, ProposalClassifier, at_least_float32
from bags.detectors.backbones import Backbone
from bags.detectors.cascade import STAGES, CascadeRoIHeads, Stage
from bags.detectors.conventions import CONVENTIONS, Conventions
from bags.detectors.htc import HTCRoIHeads, SemanticBranch, fuse_semantic
from bags.detectors.roi_heads import RoIHeads

POOLED = 7  # RoIAlign output side
MASK_POOLED = 14  # ... of the mask branch, whose masks have twice that


class FasterRCNN(GeneralizedRCNN):
    """torchvision's two-stage detector; `roi_heads` is ours.

    What of the backbone is frozen at construction stays so, whatever part is trained (`frozen_parameters`).
    """

    def __init__(self, backbone, rpn, roi_heads, transform):
        super().__init__(backbone, rpn, roi_heads, transform)
        self._frozen = [p for p in backbone.parameters() if not p.requires_grad]

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters that are never trained."""
        return self._frozen

    def classifiers(self) -> list[ProposalClassifier]:
        """One for each stage."""
        return [module for module in self.roi_heads.modules() if isinstance(module, ProposalClassifier)]

    @torch.no_grad()
    def training_proposals(
        self, images: list[Tensor], targets: list[dict]
    ) -> list[tuple[ProposalClassifier, BoxFeatures, Tensor]]:
        """What a training step would show each classifier: (classifier, features of R proposals, labels [R])."""
        batch, targets = self.transform(images, targets)
        features = self.backbone(batch.tensors)
        proposals, _ = self.rpn(batch, features, targets)
        return self.roi_heads.training_proposals(features, proposals, batch.image_sizes, targets)


def faster_rcnn(
    backbone: Backbone,
    make_classifier: Callable[[int, int], ProposalClassifier],
    *,
    framework: str = "faster_rcnn",
    conventions: str = "standard",
    anchor_sizes: tuple[tuple[int, ...], ...],
    aspect_ratios: tuple[float, ...],
    rpn_batch_size: int,
    train_proposals: int,
    test_proposals: int,
    roi_batch_size: int,
    positive_fraction: float,
    sampling_ratio: int,
    fc: int,
    class_agnostic: bool,
    semantic_classes: int = 0,
    min_size: int,
    max_size: int,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    max_per_category: int = 0,
    agnostic_nms: bool = False,
    resize_in_training: bool = True,
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> FasterRCNN:
    """A detector with torchvision's calling convention.

    `detector(images, targets)` gives a dict of losses in training mode and a list of
    {boxes, scores, labels} in evaluation mode; images are [3, H, W] float RGB in 0..1.
    make_classifier(fc, pooled) builds the classifier of a stage, from the numbers per proposal in BoxFeatures.
    The backbone is one of `build_backbone`.
    framework: faster_rcnn, mask_rcnn, cascade_rcnn, cascade_mask_rcnn or htc. Those with masks take targets with
    masks [K, H, W], and detections hold masks [K, 1, H, W] in 0..1; htc also takes `semantic` (see SemanticBranch).
    conventions: a name in CONVENTIONS. semantic_classes: labels of htc's semantic branch.
    Raises ValueError where anchors and levels differ, and for a cascade that is not class-agnostic.
    """
    parts = CONVENTIONS[conventions]
    anchors = parts.anchors(anchor_sizes, (aspect_ratios,) * len(anchor_sizes), backbone.strides)
    rpn = _region_proposal_network(
        parts, backbone.out_channels, anchors, rpn_batch_size, train_proposals, test_proposals
    )
    roi_heads = _roi_heads(
        parts, framework, semantic_classes, backbone, make_classifier, fc, class_agnostic, sampling_ratio,
        batch_size_per_image=roi_batch_size, positive_fraction=positive_fraction, score_thresh=score_threshold,
        nms_thresh=nms_threshold, detections_per_img=max_detections, max_per_category=max_per_category,
        agnostic_nms=agnostic_nms,
    )  # fmt: skip
    mean, std = list(image_mean), list(image_std)
    transform = parts.transform(min_size, max_size, mean, std, _skip_resize=not resize_in_training)
    return FasterRCNN(backbone, rpn, roi_heads, transform)


def _roi_heads(
    parts: Conventions,
    framework: str,
    semantic_classes: int,
    backbone: Backbone,
    make_classifier: Callable[[int, int], ProposalClassifier],
    fc: int,
    class_agnostic: bool,
    sampling_ratio: int,
    **settings: Any,
) -> RoIHeads | CascadeRoIHeads:
    """One second stage, or three of them; settings: those of RoIHeads."""
    semantic = None
    if framework == "htc":
        semantic = SemanticBranch(backbone.out_channels, backbone.strides, semantic_classes, parts.semantic_padding)
    one = partial(
        _second_stage, parts, framework, semantic, backbone, make_classifier, fc, class_agnostic, sampling_ratio
    )
    if framework in ("faster_rcnn", "mask_rcnn"):
        return one(STAGES[0], **settings)
    if not class_agnostic:
        raise ValueError("class_agnostic: the stages of a cascade have one box regression for all categories")
    stages, weights = [one(of, **settings) for of in STAGES], [of.loss_weight for of in STAGES]
    if semantic:
        return HTCRoIHeads(stages, weights, backbone.out_channels, semantic)
    return CascadeRoIHeads(stages, weights)


def _second_stage(
    parts: Conventions,
    framework: str,
    semantic: SemanticBranch | None,
    backbone: Backbone,
    make_classifier: Callable[[int, int], ProposalClassifier],
    fc: int,
    class_agnostic: bool,
    sampling_ratio: int,
    of: Stage,
    **settings,
) -> RoIHeads:
    """The heads of one stage; `settings` are torchvision's."""
    classifier = make_classifier(fc, backbone.out_channels * POOLED**2)
    labels = classifier.num_categories + 1
    strides = backbone.strides[: len(backbone.roi_levels)]
    box_pool = parts.roi_align(backbone.roi_levels, POOLED, sampling_ratio, strides)
    masks: dict[str, Any] = {}
    if framework in ("mask_rcnn", "cascade_mask_rcnn", "htc"):
        masks = _mask_branch(parts, backbone, labels, strides)
    if semantic:
        box_pool = fuse_semantic(box_pool, parts, sampling_ratio, semantic)
        masks["mask_roi_pool"] = fuse_semantic(masks["mask_roi_pool"], parts, 2, semantic)
    return RoIHeads(
        box_pool,
        _box_head(backbone.out_channels, fc),
        classifier,
        nn.Linear(fc, 4 if class_agnostic else 4 * labels),
        parts,
        fg_iou_thresh=of.iou,
        bg_iou_thresh=of.iou,
        bbox_reg_weights=tuple(1 / deviation for deviation in of.deviations),
        **settings,
        **masks,
    )


def _box_head(channels: int, fc: int) -> TwoMLPHead:
    head = TwoMLPHead(channels * POOLED**2, fc)
    for layer in (head.fc6, head.fc7):  # torchvision's default shrinks features from scratch
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return head


def _mask_branch(parts: Conventions, backbone: Backbone, labels: int, strides) -> dict[str, nn.Module]:
    """Four convolutions and a deconvolution, as in Mask R-CNN; their width is the pyramid's."""
    width = backbone.out_channels
    return {
        "mask_roi_pool": parts.roi_align(backbone.roi_levels, MASK_POOLED, 2, strides),
        "mask_head": MaskRCNNHeads(width, (width,) * 4, 1),
        "mask_predictor": MaskRCNNPredictor(width, width, labels),
    }


class PreciseRPNHead(RPNHead):
    """torchvision's, whose outputs are in float32 at least: proposals are computed, sorted and suppressed in it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Feature maps -> objectness [B, A, H, W] and deltas [B, 4 * A, H, W] of each level."""
        logits, deltas = super().forward(x)
        return [at_least_float32(level) for level in logits], [at_least_float32(level) for level in deltas]


def _region_proposal_network(
    parts: Conventions, channels: int, anchors, batch_size: int, train_proposals: int, test_proposals: int
) -> RegionProposalNetwork:
    per_cell = anchors.num_anchors_per_location()
    if len(set(per_cell)) > 1:
        raise ValueError(f"anchor_sizes: expected equally many sizes per level, got {anchors.sizes}")
    kept = {"training": train_proposals, "testing": test_proposals}
    return parts.rpn(
        anchors,
        PreciseRPNHead(channels, per_cell[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=batch_size,
        positive_fraction=0.5,
        pre_nms_top_n=kept,
        post_nms_top_n=kept,
        nms_thresh=0.7,
    )
