"""Checks of a job's data before anything is trained."""

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

from bags.assembly.initialise import check_categories
from bags.assembly.loaders import check_copy_paste, open_index
from bags.config.sections import Config, TailOnlyConfig
from bags.core.errors import UserError
from bags.core.files import read_bytes
from bags.data.checks import why_nothing_scores, why_nothing_trains
from bags.data.findings import ONE_FILE
from bags.data.index import AnnotationIndex
from bags.data.statistics import CategoryStats
from bags.engine.board import need_tensorboard
from bags.evaluation.truth import read_truth


def check_data(configs: Iterable[Config]) -> None:
    """Refuse data that a row could not be trained on or scored with. Raises UserError.

    `prepare_data.py check` and the start of a training both call it, so that the first foresees the second.
    """
    checked: set[tuple] = set()
    configs = list(configs)
    if any(config.train.tensorboard for config in configs):
        need_tensorboard()
    for config in configs:
        index = open_index(config, "train")
        stats = CategoryStats.from_index(index)
        check_row(config, index, stats)
        pair = (config.data.root, config.data.train, config.data.val)
        if pair not in checked:
            check_validation(config, stats)
            if words := validated_on_training(config):
                print(f"warning: {words}", file=sys.stderr)
        checked.add(pair)


def check_row(config: Config, index: AnnotationIndex, stats: CategoryStats) -> None:
    """Refuse what the training data does not allow. Raises UserError."""
    if reason := why_nothing_trains(index):
        raise UserError(f"{index.path}: {reason}")
    check_copy_paste(config, index)
    config.classifier.columns(stats)  # refuses impossible groups
    tail = isinstance(config.sampler, TailOnlyConfig) and config.sampler.below
    if tail and not any(0 < count < tail for count in stats.instance_counts):
        raise UserError(f"{index.path}: no category has fewer than sampler.below={tail} instances")
    folder = Path(config.data.root) / config.data.train_semantic if config.data.train_semantic else None
    if folder and not folder.is_dir():
        raise UserError(f"{folder}: no such folder of label maps; set data.root or data.train_semantic")


def check_validation(config: Config, stats: CategoryStats) -> None:
    """Refuse validation data that the scorer would refuse after training, or that gives no AP. Raises UserError."""
    path = Path(config.data.root) / config.data.val
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path. {ONE_FILE}")
    truth = read_truth(path)
    if reason := why_nothing_scores(truth.content["annotations"]):
        raise UserError(f"{truth.path}: {reason}")
    index = open_index(config, "val")
    check_categories(stats, index, Path(config.data.root) / config.data.train)
    if not config.shares_features:  # whose features may be kept already
        check_present(index, Path(config.data.root) / config.data.val_images)


def validated_on_training(config: Config) -> str | None:
    """A sentence where the training and validation annotations are one file, or two with the same content."""
    train, val = (Path(config.data.root) / name for name in (config.data.train, config.data.val))
    try:
        if not train.samefile(val):
            if train.stat().st_size != val.stat().st_size:
                return None
            digests = [hashlib.sha256(read_bytes(path)).digest() for path in (train, val)]
            if digests[0] != digests[1]:
                return None
    except OSError:  # the data of a finished run may have moved
        return None
    return (
        f"{val}: validation has the images of training, so its numbers say nothing about new images; "
        "`prepare_data.py split` divides an annotation file into train and val"
    )


def check_present(index: AnnotationIndex, folder: Path) -> None:
    """Refuse a missing image, which prediction would come to after the training. Raises UserError."""
    for position, key in enumerate(index.image_ids.tolist()):
        path = index.image_path(folder, position)
        if not path.is_file():
            words = "not a regular file" if path.exists() else "missing"
            raise UserError(f"{path}: image {key} of {index.path} is {words}; `bags prepare-data check` lists all such")
