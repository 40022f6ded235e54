"""Any torchvision Faster or Mask R-CNN -> the same detector with another classifier, and back.

detector = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(weights="DEFAULT")
bags.balance(detector, instance_counts)
optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
detector.train()
for images, targets in loader:
    losses = detector(images, targets)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from bags.classifiers import classifier_settings
from bags.classifiers.base import ProposalClassifier, checked_counts, feature_widths
from bags.data.statistics import CategoryStats
from bags.detectors.conventions import CONVENTIONS, Transform
from bags.detectors.roi_heads import RoIHeads, refuse_tracing


def balance(
    detector: nn.Module,
    instance_counts: Sequence[int] | Tensor,
    boundaries: Sequence[int] | None = None,
    classifier: str | ProposalClassifier = "group_softmax",
    image_counts: Sequence[int] | Tensor | None = None,
    keep_weights: bool = False,
) -> nn.Module:
    """Gives a torchvision Faster or Mask R-CNN another classifier, in place, and freezes all the rest.

    Box head, box regression, mask branch, RPN, backbone, transform and thresholds stay the detector's own, and so does
    the way it is called: `detector(images, targets)` gives losses in training mode, `detector(images)` detections
    (labels 1..C, 0 is the background) in evaluation mode. Its losses are torchvision's, but for the classifier's: they
    are named by it, and only it has gradients. Whatever mode the frozen modules are put in, they work in
    evaluation mode (batch normalisation keeps its statistics, dropout drops nothing). The new state dict holds the
    old one and the classifier: to load it, build the same detector, `balance` it in the same way, and load.

    detector         of torchvision's model functions, or built from parts (torchvision's RoIHeads, and a predictor of
                     two linear layers cls_score [C+1 rows] and bbox_pred); trained on anything
    instance_counts  [C] training boxes per label 1..C
    boundaries       of the groups, only for "group_softmax" (Eq. 3); default: 10, 100, 1000
    classifier       name of a classifier, as in a configuration, with its published settings; or a classifier of
                     C categories for features as wide as the box head's
    image_counts     [C] training images per label, which some methods count; default: instance_counts
    keep_weights     the classifier starts from the detector's own layer instead of a new one; for methods whose layer
                     is a plain softmax's (with "softmax", detections stay exactly what they were). "norcal",
                     "tau_norm" (nothing of them is trained) and "simcal" need it.
    Returns the detector. Raises ValueError for what is no such detector, and for settings that do not fit it.
    """
    roi_heads, predictor = _parts(detector)
    kind = classifier_settings().get(classifier) if isinstance(classifier, str) else None
    if boundaries is not None and not hasattr(kind, "boundaries"):
        name = classifier if isinstance(classifier, str) else type(classifier).__name__
        raise ValueError(f"boundaries: expected None, as {name} takes none, got {tuple(boundaries)}")
    in_features, labels = predictor.cls_score.in_features, predictor.cls_score.out_features
    if isinstance(classifier, str):
        counts = _counts("instance_counts", instance_counts, labels - 1)
        images = counts if image_counts is None else _counts("image_counts", image_counts, labels - 1)
        settings = {} if boundaries is None else {"boundaries": tuple(boundaries)}
        classifier = new_classifier(classifier, settings, in_features, counts, images, keep_weights)
    check_fits(classifier, predictor.cls_score)
    if keep_weights:
        copy_layer(predictor.cls_score, classifier)
    trained = {name: parameter.requires_grad for name, parameter in detector.named_parameters()}
    detector.requires_grad_(False)
    weight = predictor.cls_score.weight
    classifier.to(weight.device, weight.dtype).requires_grad_(True)
    hook = detector.register_forward_pre_hook(keep_frozen, with_kwargs=True)
    transform: Any = detector.transform
    kind = type(transform)
    if kind is GeneralizedRCNNTransform:
        transform.__class__ = Transform  # the same settings; images whose shorter side would vanish keep one pixel
    detector.roi_heads = BalancedRoIHeads(roi_heads, classifier, (trained, hook, kind))
    return detector


def unbalance(detector: nn.Module) -> nn.Module:
    """The way back, in place: the original predictor, and training for what was trained before.

    Raises ValueError for a detector that `balance` did not change.
    """
    balanced = getattr(detector, "roi_heads", None)
    if not isinstance(balanced, BalancedRoIHeads):
        raise ValueError("detector: bags.balance has not been called on it: there is nothing to take back")
    detector.roi_heads = balanced.original[0].train(balanced.training)
    trained, hook, transform_class = balanced.state
    hook.remove()
    typing.cast(Any, detector.transform).__class__ = transform_class
    for name, parameter in detector.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    return detector


class BalancedRoIHeads(RoIHeads):
    """torchvision's RoIHeads, part by part, around another classifier; `box_predictor` stays for `unbalance`."""

    def __init__(self, original: torchvision_roi_heads.RoIHeads, classifier: ProposalClassifier, state: tuple):
        matcher, sampler = original.proposal_matcher, original.fg_bg_sampler
        super().__init__(
            original.box_roi_pool,
            original.box_head,
            classifier,
            original.box_predictor.bbox_pred,
            CONVENTIONS["torchvision"],
            fg_iou_thresh=matcher.high_threshold,
            bg_iou_thresh=matcher.low_threshold,
            batch_size_per_image=sampler.batch_size_per_image,
            positive_fraction=sampler.positive_fraction,
            bbox_reg_weights=original.box_coder.weights,
            score_thresh=original.score_thresh,
            nms_thresh=original.nms_thresh,
            detections_per_img=original.detections_per_img,
            mask_roi_pool=original.mask_roi_pool,
            mask_head=original.mask_head,
            mask_predictor=original.mask_predictor,
        )
        self.box_predictor = original.box_predictor
        self.box_coder, self.proposal_matcher, self.fg_bg_sampler = original.box_coder, matcher, sampler
        self.original = (original,)  # no submodule: its parts are here already
        self.state = state
        self.train(original.training)

    def mask_logits(self, mask_features: Tensor, labels: Tensor) -> Tensor:
        """As torchvision computes them, to the last bit, of any predictor: all labels', then each object's own."""
        logits = self.mask_predictor(mask_features)
        return logits[torch.arange(labels.shape[0], device=labels.device), labels]


def keep_frozen(detector: Any, inputs: tuple, named: dict) -> None:
    """A forward hook of balanced detectors: modules without anything to train work in evaluation mode.

    The detector itself, its RPN and RoIHeads know training mode by more than their layers: by what they return.
    """
    refuse_tracing()
    targets = named.get("targets", inputs[1] if len(inputs) > 1 else None)
    if detector.training and targets is not None:
        _check_labels(targets, detector.roi_heads.classifier.num_categories)
    rest = [module for name, module in detector.named_children() if name not in ("transform", "rpn", "roi_heads")]
    for module in (*rest, *detector.rpn.children(), *detector.roi_heads.children()):
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()


def _check_labels(targets: Sequence[dict[str, Tensor]], number: int) -> None:
    """Refuse labels that are not 1..C: 0 is the background, and an object cannot be that."""
    for position, target in enumerate(targets):
        labels = target["labels"]
        if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= number:
            raise ValueError(
                f"targets[{position}]['labels']: expected labels of 1 to {number} (0 is the background), "
                f"got {int(labels.min())} to {int(labels.max())}"
            )


def _parts(detector: nn.Module) -> tuple[torchvision_roi_heads.RoIHeads, Any]:
    """RoIHeads and box predictor of a detector that can be balanced. Raises ValueError for others, saying why."""
    kind = type(detector).__name__
    roi_heads: Any = getattr(detector, "roi_heads", None)
    if isinstance(roi_heads, RoIHeads):
        raise ValueError("detector: its classifier is one of this project's already; call bags.unbalance first")
    if type(roi_heads) is not torchvision_roi_heads.RoIHeads:
        found = f"its roi_heads are of {type(roi_heads).__name__}" if roi_heads is not None else "it has no roi_heads"
        raise ValueError(f"detector: expected torchvision's Faster or Mask R-CNN, got {kind}: {found}")
    if roi_heads.has_keypoint():
        raise ValueError(f"detector: {kind} predicts keypoints, which are not carried over")
    predictor = roi_heads.box_predictor
    classes, boxes = (getattr(predictor, name, None) for name in ("cls_score", "bbox_pred"))
    if not (isinstance(classes, nn.Linear) and isinstance(boxes, nn.Linear)):
        raise ValueError(f"detector: expected linear layers cls_score and bbox_pred in {type(predictor).__name__}")
    if boxes.out_features != 4 * classes.out_features:
        raise ValueError(
            f"detector: {boxes.out_features} box outputs for {classes.out_features} labels, not 4 for each"
        )
    training = predictor.training
    with torch.no_grad():
        probe = torch.linspace(-1, 1, 2 * classes.in_features).reshape(2, -1).to(classes.weight)
        same = all(map(torch.equal, predictor.eval()(probe), (classes(probe), boxes(probe))))
    predictor.train(training)
    if not same:
        raise ValueError(f"detector: {type(predictor).__name__} does more than its layers cls_score and bbox_pred")
    return roi_heads, predictor


def check_fits(classifier: ProposalClassifier, layer: nn.Linear) -> None:
    """Refuse a classifier of other categories or features than the detector's own layer [C+1, in_features]."""
    in_features, number = layer.in_features, layer.out_features - 1
    if classifier.num_categories != number:
        raise ValueError(f"classifier: has {classifier.num_categories} categories, the detector {number}")
    for width in feature_widths(classifier) - {in_features}:
        raise ValueError(f"classifier: takes {width} features, the detector's box head gives {in_features}")


def _counts(name: str, counts: Sequence[int] | Tensor, number: int) -> tuple[int, ...]:
    return tuple(checked_counts(name, counts, number).tolist())


def new_classifier(
    name: str,
    settings: Mapping[str, Any],
    in_features: int,
    counts: tuple[int, ...],
    images: tuple[int, ...],
    keep_weights: bool,
) -> ProposalClassifier:
    """Make an untrained classifier by its name. Raises ValueError for settings that it does not have.

    settings: keys of a configuration's section. counts, images: [C] training boxes and images. keep_weights: the
    detector's own layer will be copied to it.
    """
    unusable = ("fitted", "located", "combines")  # need more than counts
    kinds = {key: k for key, k in classifier_settings().items() if not any(getattr(k, flag) for flag in unusable)}
    if name not in kinds:
        raise ValueError(f"classifier: expected a classifier or one of {', '.join(sorted(kinds))}, got {name!r}")
    if kinds[name].on_softmax and not keep_weights:
        raise ValueError(f"classifier {name}: works with the detector's own layer, so it needs keep_weights=True")
    keys = {field.name for field in dataclasses.fields(kinds[name])} - {"name"}
    for key in settings.keys() - keys:
        raise ValueError(f"classifier {name}: has no setting {key!r}, but {', '.join(sorted(keys)) or 'none'}")
    made = kinds[name](**settings)
    ids = tuple(range(1, len(counts) + 1))
    stats = CategoryStats(ids, tuple(map(str, ids)), counts, images)
    if keep_weights and made.columns(stats) != kinds["softmax"]().columns(stats):
        raise ValueError(f"keep_weights: the layer of {name} is not a softmax's")
    classifier = made.build(in_features, 0, stats)
    if classifier.needs_fit:
        raise ValueError(
            f"classifier {name}: these settings need a pass over training proposals, which is not made here"
        )
    return classifier


def copy_layer(layer: nn.Linear, classifier: ProposalClassifier) -> None:
    """Give a classifier the weights of a detector's layer. Raises ValueError where its layer is of another kind."""
    linear = getattr(classifier, "linear", None)
    if type(linear) is not nn.Linear or linear.weight.shape != layer.weight.shape:
        raise ValueError(f"keep_weights: the layer of {type(classifier).__name__} is not a softmax's")
    with torch.no_grad():
        linear.weight.copy_(layer.weight)
        linear.bias.copy_(layer.bias)
