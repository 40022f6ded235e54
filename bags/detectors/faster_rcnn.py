"""Faster R-CNN from torchvision's parts around any `ProposalClassifier`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from bags.classifiers.base import BoxFeatures, ProposalClassifier
from bags.detectors.anchors import FixedStrideAnchors
from bags.detectors.roi_heads import RoIHeads

POOLED = 7  # RoIAlign output side


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

    @torch.no_grad()
    def training_proposals(
        self, images: list[Tensor], targets: list[dict]
    ) -> list[tuple[ProposalClassifier, BoxFeatures, Tensor]]:
        """What a training step would show each classifier: (classifier, features of R proposals, labels [R])."""
        images, targets = self.transform(images, targets)
        features = self.backbone(images.tensors)
        proposals, _ = self.rpn(images, features, targets)
        return self.roi_heads.training_proposals(features, proposals, images.image_sizes, targets)


def faster_rcnn(
    backbone: nn.Module,
    make_classifier: Callable[[int, int], ProposalClassifier],
    *,
    anchor_sizes: tuple[tuple[int, ...], ...],
    aspect_ratios: tuple[float, ...],
    fixed_strides: bool = True,
    rpn_batch_size: int,
    train_proposals: int,
    test_proposals: int,
    roi_batch_size: int,
    positive_fraction: float,
    sampling_ratio: int,
    fc: int,
    class_agnostic: bool,
    min_size: int,
    max_size: int,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    resize_in_training: bool = True,
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225),
    masks: bool = False,
) -> FasterRCNN:
    """A detector with torchvision's calling convention.

    `detector(images, targets)` gives a dict of losses in training mode and a list of
    {boxes, scores, labels} in evaluation mode; images are [3, H, W] float RGB in 0..1.
    make_classifier(fc, pooled) builds the classifier, from the numbers per proposal in BoxFeatures.
    The backbone is one of `build_backbone`. fixed_strides: anchors lie on the levels' own strides, else on
    those that torchvision derives. masks: Mask R-CNN, with a mask for each category; targets then hold
    masks [K, H, W], and detections masks [K, 1, H, W] in 0..1. Raises ValueError where anchors and
    levels differ.
    """
    ratios = (aspect_ratios,) * len(anchor_sizes)
    if fixed_strides:
        anchors = FixedStrideAnchors(anchor_sizes, ratios, backbone.strides)
    else:
        anchors = AnchorGenerator(anchor_sizes, ratios)
    rpn = _region_proposal_network(backbone.out_channels, anchors, rpn_batch_size, train_proposals, test_proposals)
    classifier = make_classifier(fc, backbone.out_channels * POOLED**2)
    regressed = 1 if class_agnostic else classifier.num_categories + 1
    box_head = _box_head(backbone.out_channels, fc)
    mask_branch = _mask_branch(backbone, classifier.num_categories + 1) if masks else {}
    roi_heads = RoIHeads(
        MultiScaleRoIAlign(backbone.roi_levels, POOLED, sampling_ratio),
        box_head,
        classifier,
        nn.Linear(fc, 4 * regressed),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=roi_batch_size,
        positive_fraction=positive_fraction,
        bbox_reg_weights=None,
        score_thresh=score_threshold,
        nms_thresh=nms_threshold,
        detections_per_img=max_detections,
        **mask_branch,
    )
    mean, std = list(image_mean), list(image_std)
    transform = GeneralizedRCNNTransform(min_size, max_size, mean, std, _skip_resize=not resize_in_training)
    return FasterRCNN(backbone, rpn, roi_heads, transform)


def _box_head(channels: int, fc: int) -> TwoMLPHead:
    head = TwoMLPHead(channels * POOLED**2, fc)
    for layer in (head.fc6, head.fc7):  # torchvision's default shrinks features from scratch
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return head


def _mask_branch(backbone: nn.Module, labels: int) -> dict[str, nn.Module]:
    """Four convolutions and a deconvolution, as in Mask R-CNN; their width is the pyramid's."""
    width = backbone.out_channels
    return {
        "mask_roi_pool": MultiScaleRoIAlign(backbone.roi_levels, 14, 2),
        "mask_head": MaskRCNNHeads(width, (width,) * 4, 1),
        "mask_predictor": MaskRCNNPredictor(width, width, labels),
    }


def _region_proposal_network(channels, anchors, batch_size, train_proposals, test_proposals) -> RegionProposalNetwork:
    per_cell = anchors.num_anchors_per_location()
    if len(set(per_cell)) > 1:
        raise ValueError(f"anchor_sizes: expected equally many sizes per level, got {anchors.sizes}")
    kept = {"training": train_proposals, "testing": test_proposals}
    return RegionProposalNetwork(
        anchors,
        RPNHead(channels, per_cell[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=batch_size,
        positive_fraction=0.5,
        pre_nms_top_n=kept,
        post_nms_top_n=kept,
        nms_thresh=0.7,
    )
