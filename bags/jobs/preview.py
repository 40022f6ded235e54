"""A picture of what a row's training sees."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bags.assembly.loaders import build_train_loader, open_index
from bags.assembly.models import set_training_sizes
from bags.config.load import load_config
from bags.config.rows import rows_of
from bags.config.sections import ClassBalancedConfig, Config
from bags.core import distributed
from bags.core.errors import UserError
from bags.data import glyphs
from bags.data.index import AnnotationIndex
from bags.data.statistics import CategoryStats
from bags.detectors.conventions import CONVENTIONS
from bags.engine.train import iteration_seed
from bags.jobs.preflight import check_row

MOST_IMAGES = 400  # of one picture


def preview(source: Path, overrides: Sequence[str], batches: int, output: Path) -> None:
    """Draw the first `batches` training batches of a row, of a dataset its first row, to a PNG file.

    The images are those of the row's loader in its first epoch, resized as the detector resizes them in training.
    """
    config = load_config(rows_of(source)[0], overrides)
    number = batches * config.train.batch_size
    if not 1 <= number <= MOST_IMAGES:
        most = max(1, MOST_IMAGES // config.train.batch_size)
        raise UserError(f"--batches {batches}: expected 1 to {most} of {config.train.batch_size} images each")
    if output.suffix != ".png" or output.is_dir():
        raise UserError(f"--output {output}: expected a file whose name ends with .png")
    if config.data.glyphs:
        glyphs.make_glyphs(config.data.root, glyphs.PRESETS[config.data.glyphs])
    index = open_index(config, "train")
    stats = CategoryStats.from_index(index)
    check_row(config, index, stats)
    if isinstance(config.sampler, ClassBalancedConfig):
        text = "draws an image for each category in turn; only proposals of that category, and background, train"
        print(f"note: {config.name} {text}", file=sys.stderr)
    elif config.is_cached:
        what = "is trained from stored features" + " of images that are not mirrored" * (not config.store.mirrored)
        print(f"note: {config.name} {what}; this is what train.features=live would see", file=sys.stderr)
    elif config.train.part == "none":
        print(f"note: {config.name} trains nothing; this is what a trained part would see", file=sys.stderr)
    from bags.analysis.preview import save_preview

    images, targets = zip(*resized_batches(config, index, stats, batches), strict=True)
    save_preview(output, images, targets, stats.names)
    objects = sum(len(target["labels"]) for target in targets)
    print(f"{output}: {config.data.name}/{config.name}: {len(images)} training images, {objects} objects")


def resized_batches(
    config: Config, index: AnnotationIndex, stats: CategoryStats, batches: int
) -> Iterator[tuple[Tensor, dict]]:
    """The (image [3, H, W] in 0..1, target) pairs of the first training batches, as they enter the backbone.

    Without the padding of a batch. The random numbers are those of training in one process.
    """
    detector = config.detector
    mean, std = list(detector.image_mean), list(detector.image_std)
    transform = CONVENTIONS[detector.conventions].transform(detector.min_size, detector.max_size, mean, std)
    set_training_sizes(transform, config)
    loader = build_train_loader(config, index, stats)
    for iteration, (images, targets) in zip(range(batches), loader, strict=False):
        distributed.seed_rank(iteration_seed(config.seed, iteration), torch.device("cpu"))
        batch, resized = transform(images, targets)
        pixels = batch.tensors * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        for image, (height, width), target in zip(pixels, batch.image_sizes, resized or (), strict=True):
            yield image[:, :height, :width], target
