"""The second stage around a `ProposalClassifier`.

torchvision fixes softmax in the training loss and in the postprocessing of its RoIHeads. This
subclass keeps its matcher, sampler, RoIAlign and box coder, and leaves loss and scores to the
classifier. Shape shorthand: R proposals of the batch, C categories; label 0 is the background.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import roi_heads as torchvision_roi_heads

from bags.classifiers.base import BoxFeatures, ProposalClassifier
from bags.detectors.postprocess import select_detections


class RoIHeads(torchvision_roi_heads.RoIHeads):
    """Box branch, and torchvision's mask branch if it is given: proposals -> losses (training) or detections."""

    report_proposals = False  # what `evaluation.proposal_accuracy` looks at

    def __init__(self, box_roi_pool, box_head, classifier: ProposalClassifier, box_regressor: nn.Linear, **settings):
        """`settings` are torchvision's; box_regressor has 4 outputs, or 4 * (C + 1)."""
        super().__init__(box_roi_pool, box_head, box_predictor=None, **settings)
        self.classifier = classifier
        self.box_regressor = box_regressor

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
        set, also proposals [R_i, 4] in 0..1 of the image's width and height, and proposal_labels [R_i],
        the label of highest score (0: background).
        """
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        box_features = self._features(features, proposals, image_shapes)
        scores = self.classifier.probs(self.classifier(box_features))
        detections = self._detect(scores, self.box_regressor(box_features.fc), proposals, image_shapes)
        if self.has_mask():
            boxes = [detection["boxes"] for detection in detections]
            logits = self._mask_logits(features, boxes, image_shapes)
            masks = torchvision_roi_heads.maskrcnn_inference(logits, [detection["labels"] for detection in detections])
            for detection, mask in zip(detections, masks, strict=True):
                detection["masks"] = mask
        return detections, {}

    def training_proposals(self, features, proposals, image_shapes, targets):
        """(classifier, BoxFeatures, labels [R]) of the proposals that a training step would sample."""
        proposals, _, labels, _ = self.select_training_samples(proposals, targets)
        return [(self.classifier, self._features(features, proposals, image_shapes), torch.cat(labels))]

    def _features(self, features, proposals, image_shapes) -> BoxFeatures:
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        return BoxFeatures(pooled, self.box_head(pooled))

    def _losses(self, features, proposals, image_shapes, targets) -> dict[str, Tensor]:
        self.check_targets(targets)
        proposals, matched, labels, regression_targets = self.select_training_samples(proposals, targets)
        box_features, all_labels = self._features(features, proposals, image_shapes), torch.cat(labels)
        losses = self.classifier.loss(self.classifier(box_features), all_labels)
        regression = self.box_regressor(box_features.fc)
        losses = {**losses, "loss_box_reg": box_loss(regression, all_labels, torch.cat(regression_targets))}
        if self.has_mask():  # on the foreground proposals alone
            positive = [torch.where(own > 0)[0] for own in labels]
            boxes, objects = ([x[p] for x, p in zip(values, positive, strict=True)] for values in (proposals, matched))
            losses["loss_mask"] = torchvision_roi_heads.maskrcnn_loss(
                self._mask_logits(features, boxes, image_shapes),
                boxes,
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                objects,
            )
        return losses

    def _mask_logits(self, features, boxes, image_shapes) -> Tensor:
        """[all boxes, C + 1, 28, 28]; channel 0, of the background, is not used."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))

    def _detect(self, scores, regression, proposals, image_shapes) -> list[dict[str, Tensor]]:
        counts = [len(p) for p in proposals]
        detections = []
        for image in zip(scores.split(counts), regression.split(counts), proposals, image_shapes, strict=True):
            boxes, best, labels = select_detections(
                *image, self.box_coder, self.score_thresh, self.nms_thresh, self.detections_per_img
            )
            detections.append({"boxes": boxes, "scores": best, "labels": labels})
            if self.report_proposals:
                own_scores, _, own, (height, width) = image
                detections[-1]["proposals"] = own / own.new_tensor([width, height, width, height])
                detections[-1]["proposal_labels"] = own_scores.argmax(1)
        return detections


def box_loss(regression: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 (beta 1, as in the paper's code) over the foreground's deltas [R, 4 or 4 * (C+1)], divided by R."""
    positive = torch.where(labels > 0)[0]
    deltas = regression.unflatten(1, (-1, 4))
    deltas = deltas[positive, labels[positive] if deltas.shape[1] > 1 else 0]
    loss = F.smooth_l1_loss(deltas.float(), targets[positive], beta=1.0, reduction="sum")
    return loss / max(len(labels), 1)
