"""Is a detector alive? One whose training diverged sees no difference between proposals, or between images."""

import torch
from torch import Tensor

from bags.detectors.faster_rcnn import FasterRCNN

LEAST_ALIVE = 0.02  # share of a box head's units that must differ between proposals
LEAST_CHANGE = 1e-6  # difference of scores, in 0..1, below which they count as equal


@torch.inference_mode()
def cause_of_death(detector: FasterRCNN, images: list[Tensor], classifier_is_new: bool = False) -> str | None:
    """What shows that a detector in evaluation mode cannot tell proposals apart, or None if it can.

    images: [3, H, W] in 0..1, on the detector's device. classifier_is_new: only the features of proposals are looked
    at, not the scores. Nothing is said where the images have no two proposals.
    """
    batch, _ = detector.transform(images)
    maps = detector.backbone(batch.tensors)
    proposals, _ = detector.rpn(batch, maps)
    if sum(map(len, proposals)) < 2:
        return None
    stages = detector.roi_heads.stage_features(maps, proposals, batch.image_sizes)
    for (_, features), classifier in zip(stages, detector.classifiers(), strict=True):
        changes = features.fc.amax(0) > features.fc.amin(0)
        dead = int((~changes).sum())
        if len(changes) - dead < LEAST_ALIVE * len(changes):
            return f"{dead} of the {len(changes)} units of its box head are the same for all proposals of all images"
        if classifier_is_new:
            continue
        scores = classifier.probs(classifier(features))
        if not (scores.amax(0) - scores.amin(0)).max() > LEAST_CHANGE:
            return "all proposals of all images get the same scores"
    return None
