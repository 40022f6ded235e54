"""The settings that a detector is built from. Any object with these attributes will do, such as a configuration's."""

from typing import Protocol


class RPNSettings(Protocol):
    """The region proposal network.

    anchor_sizes     one tuple for each pyramid level, the finest first; pixels of the resized image
    aspect_ratios    height / width of the anchors, above 0
    batch_size       anchors of an image in the loss
    train_proposals  most proposals of an image in training
    test_proposals   most proposals of an image otherwise
    """

    @property
    def anchor_sizes(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def aspect_ratios(self) -> tuple[float, ...]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def train_proposals(self) -> int: ...
    @property
    def test_proposals(self) -> int: ...


class RoISettings(Protocol):
    """The second stage, which classifies proposals and moves their boxes.

    batch_size         proposals of an image in the loss
    positive_fraction  largest part of them that is foreground, in 0..1
    sampling_ratio     samples of RoIAlign per side of a bin; 0 adapts them to the proposal
    fc                 width of the two layers of the box head
    class_agnostic     one box regression for all categories
    """

    @property
    def batch_size(self) -> int: ...
    @property
    def positive_fraction(self) -> float: ...
    @property
    def sampling_ratio(self) -> int: ...
    @property
    def fc(self) -> int: ...
    @property
    def class_agnostic(self) -> bool: ...


class DetectorSettings(Protocol):
    """The network and the size of its images.

    framework    faster_rcnn, mask_rcnn, cascade_rcnn, cascade_mask_rcnn or htc
    has_masks    the framework has a mask branch
    is_cascade   the framework has three stages of classification
    conventions  a name in `CONVENTIONS`
    rpn          the region proposal network
    roi          the second stage, or each stage of a cascade
    min_size     pixels of the shorter side after resizing, unless the longer side would exceed max_size
    max_size     largest number of pixels of the longer side after resizing
    image_mean   [3] of red, green and blue in 0..1
    image_std    [3] of red, green and blue, on the same scale
    """

    @property
    def framework(self) -> str: ...
    @property
    def has_masks(self) -> bool: ...
    @property
    def is_cascade(self) -> bool: ...
    @property
    def conventions(self) -> str: ...
    @property
    def rpn(self) -> RPNSettings: ...
    @property
    def roi(self) -> RoISettings: ...
    @property
    def min_size(self) -> int: ...
    @property
    def max_size(self) -> int: ...
    @property
    def image_mean(self) -> tuple[float, ...]: ...
    @property
    def image_std(self) -> tuple[float, ...]: ...


class SelectionSettings(Protocol):
    """The detections that are kept; see `select_detections`.

    score_threshold   scores in 0..1 at or below it are dropped
    nms_threshold     IoU in 0..1 above which the lower score of two boxes is suppressed
    max_detections    most detections of an image
    max_per_category  most detections of each category in an image; 0 sets no limit
    agnostic_nms      boxes of different categories suppress each other, too
    """

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
