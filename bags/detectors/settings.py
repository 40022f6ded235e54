"""The settings that a detector is built from. Any object with these attributes will do, such as a configuration's."""

from typing import Protocol


class RPNSettings(Protocol):
    """The region proposal network."""

    @property
    def anchor_sizes(self) -> tuple[tuple[int, ...], ...]:
        """One tuple for each pyramid level, the finest first; pixels of the resized image."""

    @property
    def aspect_ratios(self) -> tuple[float, ...]:
        """Height / width of the anchors, above 0."""

    @property
    def batch_size(self) -> int:
        """Anchors of an image in the loss."""

    @property
    def train_proposals(self) -> int:
        """Most proposals of an image in training."""

    @property
    def test_proposals(self) -> int:
        """Most proposals of an image otherwise."""


class RoISettings(Protocol):
    """The second stage, which classifies proposals and moves their boxes."""

    @property
    def batch_size(self) -> int:
        """Proposals of an image in the loss."""

    @property
    def positive_fraction(self) -> float:
        """Largest part of them that is foreground, in 0..1."""

    @property
    def sampling_ratio(self) -> int:
        """Samples of RoIAlign per side of a bin; 0 adapts them to the proposal."""

    @property
    def fc(self) -> int:
        """Width of the two layers of the box head."""

    @property
    def class_agnostic(self) -> bool:
        """One box regression for all categories."""

    @property
    def class_agnostic_masks(self) -> bool:
        """One mask for all categories."""

    @property
    def normed_masks(self) -> bool:
        """Mask logits are cosines; see `NormedConv`."""


class DetectorSettings(Protocol):
    """The network and the size of its images."""

    @property
    def framework(self) -> str:
        """Faster_rcnn, mask_rcnn, cascade_rcnn, cascade_mask_rcnn or htc."""

    @property
    def has_masks(self) -> bool:
        """The framework has a mask branch."""

    @property
    def is_cascade(self) -> bool:
        """The framework has three stages of classification."""

    @property
    def conventions(self) -> str:
        """A name in `CONVENTIONS`."""

    @property
    def rpn(self) -> RPNSettings:
        """The region proposal network."""

    @property
    def roi(self) -> RoISettings:
        """The second stage, or each stage of a cascade."""

    @property
    def min_size(self) -> int:
        """Pixels of the shorter side after resizing, unless the longer side would exceed max_size."""

    @property
    def max_size(self) -> int:
        """Largest number of pixels of the longer side after resizing."""

    @property
    def image_mean(self) -> tuple[float, ...]:
        """[3] of red, green and blue in 0..1."""

    @property
    def image_std(self) -> tuple[float, ...]:
        """[3] of red, green and blue, on the same scale."""


class SelectionSettings(Protocol):
    """The detections that are kept; see `select_detections`."""

    @property
    def score_threshold(self) -> float:
        """Scores in 0..1 at or below it are dropped."""

    @property
    def nms_threshold(self) -> float:
        """IoU in 0..1 above which the lower score of two boxes is suppressed."""

    @property
    def max_detections(self) -> int:
        """Most detections of an image."""

    @property
    def max_per_category(self) -> int:
        """Most detections of each category in an image; 0 sets no limit."""

    @property
    def agnostic_nms(self) -> bool:
        """Boxes of different categories suppress each other, too."""

    @property
    def precision(self) -> str:
        """In which the detector computes outside training: fp32, bf16 or fp16; scores and boxes are float32 always."""
