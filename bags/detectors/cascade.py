"""Cascade R-CNN (Cai & Vasconcelos 2018): three box stages, each on the boxes that the previous stage has moved.

A stage is a `RoIHeads` with its own classifier, class-agnostic regression and matching threshold. Training draws and
labels the proposals again in each stage; the boxes of objects, which are added to learn from, are not passed on.
Scores come from the mean of the stages' logits, boxes from the last stage.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from bags.classifiers.base import BoxFeatures, ProposalClassifier
from bags.detectors.roi_heads import RoIHeads, Samples, add_masks, check_overflow


class Stage(NamedTuple):
    """The settings in which the stages differ."""

    iou: float  # from which a proposal is foreground
    deviations: tuple[float, float, float, float]  # standard deviations of the box deltas
    loss_weight: float


STAGES = (
    Stage(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    Stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    Stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)


class CascadeRoIHeads(nn.Module):
    """Stages in sequence: proposals -> losses (training) or detections; called like `RoIHeads`.

    With mask branches, each stage learns masks on its own foreground, and the masks of detections are the mean of the
    stages' probabilities.
    """

    def __init__(self, stages: Sequence[RoIHeads], loss_weights: Sequence[float]):
        super().__init__()
        self.stages, self.loss_weights = nn.ModuleList(stages), tuple(loss_weights)

    @property
    def report_proposals(self) -> bool:
        """As in RoIHeads; the reported boxes are those that the last stage classifies."""
        return self.box_stages[-1].report_proposals

    @report_proposals.setter
    def report_proposals(self, value: bool) -> None:
        """Set it for the last stage."""
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
        """Return (detections, losses), of which one is empty; see `RoIHeads.forward`.

        The names of the losses of stage 1, 2, 3 end in _1, _2, _3. They are already weighted.
        """
        if self.training:
            assert targets is not None
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    @torch.no_grad()
    def training_proposals(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> list[tuple[ProposalClassifier, BoxFeatures, Tensor]]:
        """Sample proposals as a training step does: (classifier, BoxFeatures, labels [R] in 0..C) of each stage.

        HTC's additional draws for masks are left out.
        """
        features, stages = self.with_context(features), []
        for stage in self.box_stages:
            samples = stage.sample(proposals, targets)
            box_features = stage.box_features(features, samples.boxes, image_shapes)
            stages.append((stage.classifier, box_features, torch.cat(samples.labels)))
            proposals = stage.next_proposals(samples, stage.box_regressor(box_features.fc), image_shapes)
        return stages

    @property
    def box_stages(self) -> list[RoIHeads]:
        """The stages in order."""
        return cast(list[RoIHeads], list(self.stages))

    def with_context(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The maps that boxes are pooled from: the pyramid's."""
        return features

    def stage_features(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[tuple[list[Tensor], BoxFeatures]]:
        """See `RoIHeads.stage_features`."""
        check_overflow(*features.values())
        features, stages = self.with_context(features), []
        for stage in self.box_stages:
            box_features = stage.box_features(features, proposals, image_shapes)
            stages.append((proposals, box_features))
            if stage is not self.box_stages[-1]:
                proposals = stage.refine(proposals, stage.box_regressor(box_features.fc), image_shapes)
        return stages

    def stage_detections(
        self, stages: list[tuple[list[Tensor], BoxFeatures]], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """See `RoIHeads.stage_detections`."""
        pairs = zip(self.box_stages, stages, strict=True)
        logits = [stage.classifier(box_features) for stage, (_, box_features) in pairs]
        last, (boxes, box_features) = self.box_stages[-1], stages[-1]
        scores = last.classifier.probs(torch.stack(logits).mean(0))
        return last.detect(scores, last.box_regressor(box_features.fc), boxes, image_shapes)

    def stage_losses(self, stages: list[tuple[BoxFeatures, Tensor]]) -> dict[str, Tensor]:
        """See `RoIHeads.stage_losses`; named and weighted as in training."""
        losses: dict[str, Tensor] = {}
        triples = zip(self.box_stages, self.loss_weights, stages, strict=True)
        for number, (stage, weight, samples) in enumerate(triples, start=1):
            losses |= {f"{name}_{number}": weight * value for name, value in stage.stage_losses([samples]).items()}
        return losses

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict],
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for number, (stage, weight) in enumerate(zip(self.box_stages, self.loss_weights, strict=True)):
            samples = stage.sample(proposals, targets)
            box_features = stage.box_features(features, samples.boxes, image_shapes)
            regression = stage.box_regressor(box_features.fc)
            stage_losses = stage.box_losses(box_features, regression, samples)
            proposals = stage.next_proposals(samples, regression, image_shapes)
            if self.has_mask():
                mask_samples = self._mask_samples(stage, samples, proposals, targets).foreground()
                pooled = stage.mask_roi_pool(features, mask_samples.boxes, image_shapes)
                [mask_features] = self._mask_features(pooled, [number])
                stage_losses["loss_mask"] = stage.mask_loss(mask_features, mask_samples, targets)
            losses |= {f"{name}_{number + 1}": weight * value for name, value in stage_losses.items()}
        return losses

    def _mask_samples(
        self, stage: RoIHeads, samples: Samples, moved: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> Samples:
        """The samples that a stage's mask branch is trained on: those of its box branch."""
        return samples

    def _mask_features(self, pooled: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Outputs [K, width, 14, 14] of the mask heads of stages (0-based) for pooled features of the same shape."""
        return [self.box_stages[number].mask_head(pooled) for number in stages]

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        detections = self.stage_detections(self.stage_features(features, proposals, image_shapes), image_shapes)
        last = self.box_stages[-1]
        if self.has_mask():
            pooled = last.mask_roi_pool(features, [detection["boxes"] for detection in detections], image_shapes)
            labels = torch.cat([detection["labels"] for detection in detections])
            outputs = self._mask_features(pooled, range(len(self.box_stages)))
            pairs = zip(self.box_stages, outputs, strict=True)
            add_masks(detections, torch.stack([s.mask_logits(o, labels).sigmoid() for s, o in pairs]).mean(0))
        return detections
