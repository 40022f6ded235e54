"""Cascade R-CNN (Cai & Vasconcelos 2018): three box stages, each on the boxes that the one before it has moved.

A stage is a `RoIHeads` with its own classifier, class-agnostic regression and matching threshold.
Training draws and labels the proposals anew in each stage; the objects' own boxes, added to learn
from, are not passed on. Scores come from the mean of the stages' logits, boxes from the last one.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from bags.classifiers.base import BoxFeatures, ProposalClassifier
from bags.detectors.roi_heads import RoIHeads, Samples, add_masks


class Stage(NamedTuple):
    """IoU from which a proposal is foreground, standard deviations of its box deltas, factor of its losses."""

    iou: float
    deviations: tuple[float, float, float, float]
    loss_weight: float


STAGES = (
    Stage(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    Stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    Stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)


class CascadeRoIHeads(nn.Module):
    """Stages in sequence: proposals -> losses (training) or detections; called as `RoIHeads`.

    With mask branches, each stage learns masks on its own foreground, and detections take the mean of the
    stages' probabilities.
    """

    def __init__(self, stages: Sequence[RoIHeads], loss_weights: Sequence[float]):
        super().__init__()
        self.stages, self.loss_weights = nn.ModuleList(stages), tuple(loss_weights)

    @property
    def report_proposals(self) -> bool:
        """As in RoIHeads; what is reported are the boxes that the last stage classifies."""
        return self.box_stages[-1].report_proposals

    @report_proposals.setter
    def report_proposals(self, value: bool) -> None:
        """Passed on to the last stage."""
        self.box_stages[-1].report_proposals = value

    def has_mask(self) -> bool:
        """Whether detections come with masks."""
        return self.box_stages[-1].has_mask()

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Returns (detections, losses); one of them is empty. See `RoIHeads.forward`.

        The losses of stage 1, 2, 3 end in _1, _2, _3 and are weighted already.
        """
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    @torch.no_grad()
    def training_proposals(
        self, features, proposals, image_shapes, targets
    ) -> list[tuple[ProposalClassifier, BoxFeatures, Tensor]]:
        """(classifier, BoxFeatures, labels [R]) of the proposals that a training step would sample in each stage."""
        shown = []
        for stage in self.box_stages:
            samples = stage.sample(proposals, targets)
            box_features = stage.box_features(features, samples.boxes, image_shapes)
            shown.append((stage.classifier, box_features, torch.cat(samples.labels)))
            proposals = self._next_proposals(stage, samples, stage.box_regressor(box_features.fc), image_shapes)
        return shown

    @property
    def box_stages(self) -> list[RoIHeads]:
        """The stages in order."""
        return cast(list[RoIHeads], list(self.stages))

    def stage_features(self, features, proposals, image_shapes) -> list[tuple[list[Tensor], BoxFeatures]]:
        """See `RoIHeads.stage_features`."""
        stages = []
        for stage in self.box_stages:
            box_features = stage.box_features(features, proposals, image_shapes)
            stages.append((proposals, box_features))
            if stage is not self.box_stages[-1]:
                proposals = stage.refine(proposals, stage.box_regressor(box_features.fc), image_shapes)
        return stages

    def stage_detections(self, stages: list[tuple[list[Tensor], BoxFeatures]], image_shapes) -> list[dict[str, Tensor]]:
        """See `RoIHeads.stage_detections`."""
        logits = [stage.classifier(shown) for stage, (_, shown) in zip(self.box_stages, stages, strict=True)]
        last, (boxes, box_features) = self.box_stages[-1], stages[-1]
        scores = last.classifier.probs(torch.stack(logits).mean(0))
        return last.detect(scores, last.box_regressor(box_features.fc), boxes, image_shapes)

    def stage_losses(self, stages: list[tuple[BoxFeatures, Tensor]]) -> dict[str, Tensor]:
        """See `RoIHeads.stage_losses`; named and weighted as in training."""
        losses: dict[str, Tensor] = {}
        for number, (stage, weight, shown) in enumerate(
            zip(self.box_stages, self.loss_weights, stages, strict=True), 1
        ):
            losses |= {f"{name}_{number}": weight * value for name, value in stage.stage_losses([shown]).items()}
        return losses

    def _losses(self, features, proposals, image_shapes, targets) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for number, (stage, weight) in enumerate(zip(self.box_stages, self.loss_weights, strict=True)):
            samples = stage.sample(proposals, targets)
            box_features = stage.box_features(features, samples.boxes, image_shapes)
            regression = stage.box_regressor(box_features.fc)
            own = stage.box_losses(box_features, regression, samples)
            proposals = self._next_proposals(stage, samples, regression, image_shapes)
            if self.has_mask():
                shown = self._mask_samples(stage, samples, proposals, targets).foreground()
                pooled = stage.mask_roi_pool(features, shown.boxes, image_shapes)
                [mask_features] = self._mask_features(pooled, [number])
                own["loss_mask"] = stage.mask_loss(mask_features, shown, targets)
            losses |= {f"{name}_{number + 1}": weight * value for name, value in own.items()}
        return losses

    def _next_proposals(self, stage: RoIHeads, samples: Samples, regression: Tensor, image_shapes) -> list[Tensor]:
        """The sampled proposals, moved; without the objects' own boxes."""
        moved = stage.refine(samples.boxes, regression, image_shapes)
        return [boxes[~own] for boxes, own in zip(moved, samples.is_object, strict=True)]

    def _mask_samples(self, stage: RoIHeads, samples: Samples, moved: list[Tensor], targets) -> Samples:
        """What a stage's mask branch is trained on: what its box branch is."""
        return samples

    def _mask_features(self, pooled: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Outputs [K, width, 14, 14] of some stages' mask heads for pooled features of the same shape."""
        return [self.box_stages[number].mask_head(pooled) for number in stages]

    def _detect(self, features, proposals, image_shapes) -> list[dict[str, Tensor]]:
        detections = self.stage_detections(self.stage_features(features, proposals, image_shapes), image_shapes)
        last = self.box_stages[-1]
        if self.has_mask():
            pooled = last.mask_roi_pool(features, [detection["boxes"] for detection in detections], image_shapes)
            labels = torch.cat([detection["labels"] for detection in detections])
            outputs = self._mask_features(pooled, range(len(self.box_stages)))
            pairs = zip(self.box_stages, outputs, strict=True)
            add_masks(detections, torch.stack([s.mask_logits(o, labels).sigmoid() for s, o in pairs]).mean(0))
        return detections
