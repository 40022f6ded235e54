"""Faster, Mask and Cascade R-CNN and HTC: torchvision's parts put together around any `ProposalClassifier`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from bags.classifiers.base import BoxFeatures, ProposalClassifier, at_least_float32
from bags.core.precision import autocast
from bags.detectors.backbones import Backbone
from bags.detectors.cascade import STAGES, CascadeRoIHeads, Stage
from bags.detectors.conventions import CONVENTIONS, Conventions
from bags.detectors.htc import HTCRoIHeads, SemanticBranch, fuse_semantic
from bags.detectors.roi_heads import NormedConv, RoIHeads, refuse_tracing
from bags.detectors.settings import DetectorSettings, RPNSettings, SelectionSettings

POOLED = 7  # side of the box branch's RoIAlign output
MASK_POOLED = 14  # ... and of the mask branch's, whose masks have twice that side


class FasterRCNN(GeneralizedRCNN):
    """torchvision's two-stage detector with this project's `roi_heads`.

    Parameters of the backbone that are frozen at construction stay frozen, whatever part is trained.
    """

    def __init__(
        self,
        backbone: Backbone,
        rpn: RegionProposalNetwork,
        roi_heads: RoIHeads | CascadeRoIHeads,
        transform: GeneralizedRCNNTransform,
        precision: str = "fp32",
    ) -> None:
        super().__init__(backbone, rpn, roi_heads, transform)
        self.precision = precision  # outside training
        self._frozen = [p for p in backbone.parameters() if not p.requires_grad]

    def forward(self, images: list[Tensor], targets: list[dict] | None = None) -> Any:
        """See `faster_rcnn`. Raises UserError in a trace, which would hold for the traced image only."""
        refuse_tracing()
        if self.training or self.precision == "fp32":
            return super().forward(images, targets)
        with autocast(images[0].device.type if images else "cpu", self.precision):
            return super().forward(images, targets)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters that are never trained."""
        return self._frozen

    def classifiers(self) -> list[ProposalClassifier]:
        """The classifier of each stage, in order."""
        return [stage.classifier for stage in self.roi_heads.box_stages]

    def semantic_layers(self) -> list[nn.Module]:
        """The layer that predicts HTC's label maps; none in other frameworks."""
        return [self.roi_heads.semantic.logits] if isinstance(self.roi_heads, HTCRoIHeads) else []

    def category_layers(self) -> list[nn.Module]:
        """The layers whose outputs stand for categories: of classifiers, of box regression and masks unless shared."""
        layers: list[nn.Module] = [*self.classifiers()]
        for stage in self.roi_heads.box_stages:
            if stage.box_regressor.out_features > 4:
                layers.append(stage.box_regressor)
            if stage.has_mask() and stage.mask_predictor.mask_fcn_logits.out_channels > 1:
                layers.append(stage.mask_predictor.mask_fcn_logits)
        return layers

    def prefixes(self, modules: Iterable[nn.Module]) -> tuple[str, ...]:
        """Prefixes of the names of the modules' tensors in the state dict, such as `roi_heads.classifier.`."""
        names = {module: f"{name}." for name, module in self.named_modules()}
        return tuple(names[module] for module in modules)

    @torch.no_grad()
    def training_proposals(
        self, images: list[Tensor], targets: list[dict]
    ) -> list[tuple[ProposalClassifier, BoxFeatures, Tensor]]:
        """Sample proposals as a training step does: for each stage (classifier, features of R proposals, labels [R]).

        Labels are in 0..C, 0 is the background.
        """
        batch, targets = self.transform(images, targets)
        features = self.backbone(batch.tensors)
        proposals, _ = self.rpn(batch, features, targets)
        return self.roi_heads.training_proposals(features, proposals, batch.image_sizes, targets)


def faster_rcnn(
    backbone: Backbone,
    make_classifier: Callable[[int, int], ProposalClassifier],
    settings: DetectorSettings,
    selection: SelectionSettings,
    semantic_classes: int = 0,
) -> FasterRCNN:
    """Build a detector with torchvision's calling convention and new weights.

    `detector(images, targets)` returns a dict of losses in training mode, `detector(images)` a list of
    {boxes, scores, labels} in evaluation mode. Images are [3, H, W] float RGB in 0..1, labels 1..C. Frameworks with
    masks take targets with masks [K, H, W], and their detections hold masks [K, 1, H, W] in 0..1; htc also takes
    `semantic` (see SemanticBranch).

    backbone          as from `build_backbone`
    make_classifier   (fc, pooled) -> the classifier of a stage, from the numbers per proposal in BoxFeatures
    semantic_classes  labels of htc's semantic branch

    Raises ValueError where anchors and levels differ, and for a cascade that is not class-agnostic.
    """
    parts = CONVENTIONS[settings.conventions]
    rpn = _region_proposal_network(backbone, parts, settings.rpn)
    roi_heads = _roi_heads(backbone, parts, make_classifier, settings, selection, semantic_classes)
    mean, std = list(settings.image_mean), list(settings.image_std)
    transform = parts.transform(settings.min_size, settings.max_size, mean, std)
    return FasterRCNN(backbone, rpn, roi_heads, transform, selection.precision)


def _region_proposal_network(backbone: Backbone, parts: Conventions, settings: RPNSettings) -> RegionProposalNetwork:
    ratios = (settings.aspect_ratios,) * len(settings.anchor_sizes)
    anchors = parts.anchors(settings.anchor_sizes, ratios, backbone.strides)
    per_cell = anchors.num_anchors_per_location()
    if len(set(per_cell)) > 1:
        raise ValueError(f"anchor_sizes: expected equally many sizes per level, got {anchors.sizes}")
    kept = {"training": settings.train_proposals, "testing": settings.test_proposals}
    return parts.rpn(
        anchors,
        PreciseRPNHead(backbone.out_channels, per_cell[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=settings.batch_size,
        positive_fraction=0.5,
        pre_nms_top_n=kept,
        post_nms_top_n=kept,
        nms_thresh=0.7,
    )


class PreciseRPNHead(RPNHead):
    """torchvision's head with outputs in float32 at least, in which proposals are computed, sorted and suppressed."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Feature maps [B, channels, H, W] -> objectness logits [B, A, H, W] and deltas [B, 4 * A, H, W], per level."""
        logits, deltas = super().forward(x)
        return [at_least_float32(level) for level in logits], [at_least_float32(level) for level in deltas]


def _roi_heads(
    backbone: Backbone,
    parts: Conventions,
    make_classifier: Callable[[int, int], ProposalClassifier],
    settings: DetectorSettings,
    selection: SelectionSettings,
    semantic_classes: int,
) -> RoIHeads | CascadeRoIHeads:
    """One second stage, or the three of a cascade."""
    if settings.is_cascade and not settings.roi.class_agnostic:
        raise ValueError("class_agnostic: the stages of a cascade have one box regression for all categories")
    semantic = None
    if settings.framework == "htc":
        semantic = SemanticBranch(backbone.out_channels, backbone.strides, semantic_classes, parts.semantic_padding)
    stages = [
        _second_stage(stage, backbone, parts, make_classifier, settings, selection, semantic)
        for stage in (STAGES if settings.is_cascade else STAGES[:1])
    ]
    if not settings.is_cascade:
        return stages[0]
    weights = [stage.loss_weight for stage in STAGES]
    if semantic:
        return HTCRoIHeads(stages, weights, backbone.out_channels, semantic)
    return CascadeRoIHeads(stages, weights)


def _second_stage(
    stage: Stage,
    backbone: Backbone,
    parts: Conventions,
    make_classifier: Callable[[int, int], ProposalClassifier],
    settings: DetectorSettings,
    selection: SelectionSettings,
    semantic: SemanticBranch | None,
) -> RoIHeads:
    """The heads of one stage."""
    roi = settings.roi
    classifier = make_classifier(roi.fc, backbone.out_channels * POOLED**2)
    labels = classifier.num_categories + 1
    strides = backbone.strides[: len(backbone.roi_levels)]
    box_pool = parts.roi_align(backbone.roi_levels, POOLED, roi.sampling_ratio, strides)
    masks = {}
    if settings.has_masks:
        number = 1 if roi.class_agnostic_masks else labels
        masks = _mask_branch(parts, backbone, number, strides, roi.normed_masks)
    if semantic:
        box_pool = fuse_semantic(box_pool, parts, roi.sampling_ratio, semantic)
        masks["mask_roi_pool"] = fuse_semantic(masks["mask_roi_pool"], parts, 2, semantic)
    return RoIHeads(
        box_pool,
        _box_head(backbone.out_channels, roi.fc),
        classifier,
        nn.Linear(roi.fc, 4 if roi.class_agnostic else 4 * labels),
        parts,
        selection.max_per_category,
        selection.agnostic_nms,
        fg_iou_thresh=stage.iou,
        bg_iou_thresh=stage.iou,
        batch_size_per_image=roi.batch_size,
        positive_fraction=roi.positive_fraction,
        bbox_reg_weights=tuple(1 / deviation for deviation in stage.deviations),
        score_thresh=selection.score_threshold,
        nms_thresh=selection.nms_threshold,
        detections_per_img=selection.max_detections,
        **masks,
    )


def _box_head(channels: int, fc: int) -> TwoMLPHead:
    head = TwoMLPHead(channels * POOLED**2, fc)
    for layer in (head.fc6, head.fc7):  # torchvision's default shrinks features when trained from scratch
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return head


def _mask_branch(
    parts: Conventions, backbone: Backbone, masks: int, strides: Sequence[int], normed: bool
) -> dict[str, nn.Module]:
    """Four convolutions and a deconvolution, as in Mask R-CNN, for C + 1 masks or one; their width is the pyramid's.

    normed: the logits are cosines, see `NormedConv`.
    """
    width = backbone.out_channels
    head = MaskRCNNHeads(width, (width,) * 4, 1)  # made first: the order of random numbers is that of the weights
    predictor = MaskRCNNPredictor(width, width, masks)
    if normed:
        predictor.mask_fcn_logits = NormedConv.of(predictor.mask_fcn_logits)
    return {
        "mask_roi_pool": parts.roi_align(backbone.roi_levels, MASK_POOLED, 2, strides),
        "mask_head": head,
        "mask_predictor": predictor,
    }
