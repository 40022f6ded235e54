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

UNLIMITED = 10**6  # the highest `test.max_detections`
AT_ONCE = 5_000_000  # detections that are held before those that cannot count are dropped


class Mixtures:
    """The classifiers of P rows; each call detects in all validation images with a mixture of their scores."""

    def __init__(self, config: Config, truth: Truth, device: torch.device, most: int | None = None):
        """config: of an `average` of the rows, all trained. truth: the validation annotations.

        most: detections of a category that are kept in all images together; an image then keeps all of its own, not
        `test.max_detections`. Makes the store of the validation images where it is not complete. Raises UserError for
        rows that cannot be averaged.
        """
        if most is not None:
            config = dataclasses.replace(config, test=dataclasses.replace(config.test, max_detections=UNLIMITED))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))  # read again and again
        index = open_index(config, "train")
        self.stats = CategoryStats.from_index(index)
        config, checkpoints = with_members(config)
        self.config, self.truth, self.device, self.most = config, truth, device, most
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
        path = self.config.run_folder / "predictions.json"
        return detect_stored(self.detector, batches, self.device, path, self.most)


@torch.inference_mode()
def detect_stored(
    detector: FasterRCNN,
    batches: Iterable[tuple[list[StoredProposals], list[int]]],
    device: torch.device,
    path: Path,
    most: int | None = None,
) -> Results:
    """The detections of a detector in stored images, as if they had been read from `path`.

    batches: images, and the rank of each, from 1, among the images of the ground truth. most: only the best of each
    category are kept, so many and those that score like the last of them. From then on lower scores of a category are
    no candidates; they would suppress none that is higher.
    """
    model, last = FromFeatures(detector).eval(), detector.roi_heads.box_stages[-1]
    threshold = last.score_thresh
    parts: list[list[np.ndarray]] = []  # ids, boxes and scores
    held, full = 0, AT_ONCE
    for images, ranks in batches:
        for rank, detection in zip(ranks, model([image.to(device) for image in images]), strict=True):
            corners = detection["boxes"].double().cpu().numpy()
            boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).round(3)
            labels = detection["labels"].cpu().numpy()
            ids = np.column_stack([np.full(len(labels), rank), labels])
            parts.append([ids, boxes, detection["scores"].double().cpu().numpy()])
            held += len(labels)
        if most is not None and held > full:
            parts = [_best_of_each(parts, most)]
            held = len(parts[0][0])
            full = max(AT_ONCE, 2 * held)
            last.score_thresh = _below_lowest(parts[0], most, threshold, last.classifier.num_categories).to(device)
    last.score_thresh = threshold
    return results_of(path, *_best_of_each(parts, most))


def _below_lowest(part: list[np.ndarray], most: int, threshold: float, categories: int) -> torch.Tensor:
    """A score [C] just below the lowest of a category that holds `most` detections or more; `threshold` for others."""
    ids, _, scores = part
    lowest = np.full(categories + 1, np.inf, np.float32)
    np.minimum.at(lowest, ids[:, 1], scores.astype(np.float32))
    counts = np.bincount(ids[:, 1], minlength=categories + 1)
    below = np.where(counts >= most, np.nextafter(lowest, np.float32(-1)), np.float32(threshold))
    return torch.from_numpy(below[1:])


def _best_of_each(parts: list[list[np.ndarray]], most: int | None) -> list[np.ndarray]:
    """The parts in one; of each category the best `most` detections, with all that score like the last of them."""
    ids, boxes, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if most is None:
        return [ids, boxes, scores]
    order = np.lexsort([-scores, ids[:, 1]])
    _, starts, counts = np.unique(ids[order, 1], return_index=True, return_counts=True)
    last = scores[order[starts + np.minimum(counts, most) - 1]]
    kept = np.sort(order[scores[order] >= np.repeat(last, counts)])
    return [ids[kept], boxes[kept], scores[kept]]
