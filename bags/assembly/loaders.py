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
from bags.data.transforms import training_transform
from bags.detectors.conventions import CONVENTIONS


def open_index(config: Config, split: str) -> AnnotationIndex:
    """The annotations of split "train" or "val"; those of "train" know whether masks are learnt."""
    index = AnnotationIndex.open(Path(config.data.root) / getattr(config.data, split))
    return dataclasses.replace(index, for_masks=config.detector.has_masks) if split == "train" else index


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
    if CONVENTIONS[config.detector.conventions].augments:
        transform = training_transform()
    else:
        transform = training_transform(data.flip, data.short_sides, data.any_short_side, data.long_side)
    images = Path(data.root) / data.train_images
    semantic = Path(data.root) / data.train_semantic if data.train_semantic else None
    masks = config.detector.has_masks
    dataset = DetectionDataset(
        index,
        images,
        transform,
        masks,
        data.exif,
        semantic,
        data.semantic_classes,
        data.max_bad_images,
        data.max_pixels,
    )
    return make_loader(config, dataset, sampler)


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
