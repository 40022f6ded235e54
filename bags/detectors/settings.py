"""The settings that a detector is built from. Any object with these attributes will do, such as a configuration's."""

from typing import Protocol


class RPNSettings(Protocol):
    """The region proposal network; sizes in pixels of the resized image, one tuple for each pyramid level."""

    @property
    def anchor_sizes(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def aspect_ratios(self) -> tuple[float, ...]: ...
    @property
    def batch_size(self) -> int: ...  # anchors of an image in the loss
    @property
    def train_proposals(self) -> int: ...  # of an image, in training
    @property
    def test_proposals(self) -> int: ...


class RoISettings(Protocol):
    """The second stage, which classifies proposals and moves their boxes."""

    @property
    def batch_size(self) -> int: ...  # proposals of an image in the loss
    @property
    def positive_fraction(self) -> float: ...  # most of them that are foreground, in 0..1
    @property
    def sampling_ratio(self) -> int: ...  # RoIAlign samples per bin side
    @property
    def fc(self) -> int: ...  # width of the two box-head layers
    @property
    def class_agnostic(self) -> bool: ...  # one box regression for all categories


class DetectorSettings(Protocol):
    """The network and the size of its images, in pixels."""

    @property
    def framework(self) -> str: ...  # faster_rcnn, mask_rcnn, cascade_rcnn, cascade_mask_rcnn or htc
    @property
    def has_masks(self) -> bool: ...
    @property
    def is_cascade(self) -> bool: ...
    @property
    def conventions(self) -> str: ...  # a name in CONVENTIONS
    @property
    def rpn(self) -> RPNSettings: ...
    @property
    def roi(self) -> RoISettings: ...
    @property
    def min_size(self) -> int: ...  # shorter side after resizing, unless that makes the longer exceed max_size
    @property
    def max_size(self) -> int: ...
    @property
    def image_mean(self) -> tuple[float, ...]: ...  # of RGB in 0..1
    @property
    def image_std(self) -> tuple[float, ...]: ...


class SelectionSettings(Protocol):
    """The detections that are kept; see `select_detections`."""

    @property
    def score_threshold(self) -> float: ...
    @property
    def nms_threshold(self) -> float: ...
    @property
    def max_detections(self) -> int: ...
    @property
    def max_per_category(self) -> int: ...
    @property
    def agnostic_nms(self) -> bool: ...
