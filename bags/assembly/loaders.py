"""Configuration -> data: annotations, datasets and batches."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bags.config.sections import (
    ClassBalancedConfig,
    Config,
    RepeatFactorConfig,
    TailOnlyConfig,
    UniformConfig,
)
from bags.core.errors import UserError
from bags.data.copy_paste import CopyPaste
from bags.data.dataset import DetectionDataset, Loader, collate
from bags.data.index import AnnotationIndex
from bags.data.samplers import (
    ClassBalancedSampler,
    RepeatFactorSampler,
    ShardSampler,
    TrainSampler,
    repeat_factors,
)
from bags.data.statistics import CategoryStats
from bags.data.transforms import jitter_transform, training_transform
from bags.detectors.conventions import CONVENTIONS


def open_index(config: Config, split: str) -> AnnotationIndex:
    """The annotations of split "train" or "val"; those of "train" know whether masks are learnt."""
    index = AnnotationIndex.open(Path(config.data.root) / getattr(config.data, split))
    return dataclasses.replace(index, for_masks=config.detector.has_masks) if split == "train" else index


def annotations_digest(config: Config, index: AnnotationIndex) -> str:
    """Digest of what a row's training sees of its annotations."""
    return index.content_digest(segmentations=config.detector.has_masks or config.data.copy_paste > 0)


def build_val_dataset(config: Config) -> DetectionDataset:
    """All validation images, as they are."""
    data = config.data
    folder = Path(data.root) / data.val_images
    return DetectionDataset(open_index(config, "val"), folder, exif=data.exif, max_pixels=data.max_pixels)


def build_train_loader(config: Config, index: AnnotationIndex, stats: CategoryStats) -> DataLoader:
    """Training images, augmented, drawn by the sampler; endless reuse, one epoch per iteration.

    The batch is split over the ranks. index, stats: of the whole training set.
    """
    data = config.data
    if not data.empty_images:
        index = index.take(np.unique(index.owners[index.trained]))
    if isinstance(config.sampler, TailOnlyConfig):
        index = index.only(np.array([0, *stats.instance_counts]) < config.sampler.below)
        if not len(index):
            raise UserError(f"{index.path}: no category has fewer than sampler.below={config.sampler.below} instances")
    wide = index.image_sizes[:, 1] > index.image_sizes[:, 0] if data.aspect_batches else None
    batch_size, seed = config.train.batch_size, config.seed
    sampler: TrainSampler
    match config.sampler:
        case RepeatFactorConfig(threshold=threshold, released=released):
            sampler = RepeatFactorSampler(repeat_factors(index, threshold, released), batch_size, seed, wide)
        case ClassBalancedConfig():
            sampler = ClassBalancedSampler(index, batch_size, seed)
        case UniformConfig() | TailOnlyConfig():
            sampler = TrainSampler(len(index), batch_size, seed, wide)
    return make_loader(config, _train_dataset(config, index), sampler)


def _train_dataset(config: Config, index: AnnotationIndex) -> Dataset:
    """Some training images, augmented as the configuration says."""
    data = config.data
    check_copy_paste(config, index)
    if CONVENTIONS[config.detector.conventions].augments:
        transform = training_transform()
    elif data.jitter:
        side = data.jitter_size or config.detector.max_size
        transform = jitter_transform(data.jitter, side, config.detector.image_mean, data.flip)
    else:
        transform = training_transform(data.flip, data.short_sides, data.any_short_side, data.long_side)
    images = Path(data.root) / data.train_images
    semantic = Path(data.root) / data.train_semantic if data.train_semantic else None
    masks = config.detector.has_masks
    dataset = DetectionDataset(
        index,
        images,
        transform,
        masks or data.copy_paste > 0,
        data.exif,
        semantic,
        data.semantic_classes,
        data.max_bad_images,
        data.max_pixels,
        bool(data.jitter),
    )
    return CopyPaste(dataset, data.copy_paste, masks) if data.copy_paste > 0 else dataset


def check_copy_paste(config: Config, index: AnnotationIndex) -> None:
    """Refuse data.copy_paste where objects that are trained on have no mask. Raises UserError."""
    without = index.trained & ~index.has_segmentation  # of none where the detector learns masks
    if config.data.copy_paste > 0 and without.any():
        first = int(index.annotation_ids[np.argmax(without)])
        mend = "set data.copy_paste=0"
        if index.has_segmentation.any():
            mend += ", or detector.framework=mask_rcnn, which leaves these objects out"
        raise UserError(
            f"{index.path}: annotation {first}: data.copy_paste needs a segmentation of every object, but "
            f"{int(without.sum())} of {int(index.trained.sum())} have none: {mend}"
        )


def build_val_loader(config: Config, dataset: DetectionDataset) -> DataLoader:
    """This rank's share of the images, in order."""
    return make_loader(config, dataset, ShardSampler(len(dataset), config.test.batch_size))


def make_loader(config: Config, dataset: Dataset, batches: Iterable[list], join: Callable = collate) -> DataLoader:
    """Batches of items, each by its list of keys, `join`ed."""
    workers = config.data.workers
    return Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=join,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available() and config.device != "cpu",
    )
