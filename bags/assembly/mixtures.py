"""Mixtures of trained classifiers on one frozen detector, which detect from stored features of validation images."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bags.assembly.initialise import initialise, load_members, with_members
from bags.assembly.loaders import build_val_dataset, open_index
from bags.assembly.models import build_detector
from bags.assembly.stored import validation_loader
from bags.config.sections import Config
from bags.data.statistics import CategoryStats
from bags.detectors.faster_rcnn import FasterRCNN
from bags.detectors.from_features import FromFeatures, StoredProposals
from bags.evaluation.results_file import Results, results_of
from bags.evaluation.truth import Truth, ranks_of


class Mixtures:
    """The classifiers of P rows; each call detects in all validation images with a mixture of their scores."""

    def __init__(self, config: Config, truth: Truth, device: torch.device):
        """config: of an `average` of the rows, all trained. truth: the validation annotations.

        Makes the store of the validation images where it is not complete. Raises UserError for rows that cannot be
        averaged.
        """
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))  # read again and again
        index = open_index(config, "train")
        self.stats = CategoryStats.from_index(index)
        config, checkpoints = with_members(config)
        self.config, self.truth, self.device = config, truth, device
        self.detector = build_detector(config, self.stats)
        initialise(self.detector, config, index, self.stats)
        load_members(self.detector, config, checkpoints)
        self.detector.to(device, memory_format=torch.channels_last).eval()
        self.batches = validation_loader(config, self.detector, build_val_dataset(config), device)

    def __call__(self, mixture: tuple[float, ...]) -> Results:
        """The detections of a mixture: shares [P] of the rows, of any sum above 0."""
        for classifier in self.detector.classifiers():
            average: Any = classifier
            average.mix(mixture)
        ranks = ranks_of(self.truth.image_ids)
        batches = ((images, [ranks[target["image_id"]] for target in targets]) for images, targets in self.batches)
        return detect_stored(self.detector, batches, self.device, self.config.run_folder / "predictions.json")


@torch.inference_mode()
def detect_stored(
    detector: FasterRCNN, batches: Iterable[tuple[list[StoredProposals], list[int]]], device: torch.device, path: Path
) -> Results:
    """The detections of a detector in stored images, as if they had been read from `path`.

    batches: images, and the rank of each, from 1, among the images of the ground truth.
    """
    model = FromFeatures(detector).eval()
    ids, boxes, scores = [], [], []
    for images, ranks in batches:
        for rank, detection in zip(ranks, model([image.to(device) for image in images]), strict=True):
            corners = detection["boxes"].double().cpu().numpy()
            boxes.append(np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).round(3))
            scores.append(detection["scores"].double().cpu().numpy())
            labels = detection["labels"].cpu().numpy()
            ids.append(np.column_stack([np.full(len(labels), rank), labels]))
    return results_of(path, np.concatenate(ids), np.concatenate(boxes), np.concatenate(scores))
