"""Rows that share a pass over the data: their detectors, their training, their scores."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bags.analysis.tables import without_nan, write_metrics, write_scores
from bags.assembly import stored
from bags.assembly.initialise import initialise
from bags.assembly.loaders import build_train_loader, build_val_dataset, open_index
from bags.assembly.models import build_detector
from bags.config.load import config_to_dict
from bags.config.sections import Config
from bags.core import distributed
from bags.data.checks import what_does_not_train
from bags.data.index import AnnotationIndex
from bags.data.plausibility import implausible_boxes
from bags.data.statistics import CategoryStats, disagreement
from bags.detectors.faster_rcnn import FasterRCNN
from bags.engine.checkpoint import keep_best, load_checkpoint, weights_digest
from bags.engine.train import Run, is_trained, train
from bags.jobs.folders import describe
from bags.jobs.score import predict_and_evaluate


class Pass:
    """Rows that see the same batches (mostly one row): data, detectors, training, prediction, evaluation.

    configs: of the rows, none of which is complete. The caller holds the locks of their run folders.
    """

    def __init__(self, configs: Sequence[Config], device: torch.device):
        self.configs, self.first, self.device = configs, configs[0], device
        self.index = open_index(self.first, "train")
        self.stats = CategoryStats.from_index(self.index)
        if distributed.is_main():
            note_data(self.index, self.stats)
        self.loader = build_train_loader(self.first, self.index, self.stats)
        self.validation = build_val_dataset(self.first)
        self.runs: list[Run] = []
        for config in configs:
            self.runs.append(begin(config, self.index, self.stats, device))
            if self.first.shares_features:
                stored.share_frozen(self.runs[-1].model, self.runs[0].model)
        distributed.barrier()

    def run(self) -> None:
        """Train every row to its end, then predict and score."""
        self.train()
        self.score()

    def train(self) -> None:
        """Train from images, or from stored features; validate between epochs where that is asked for."""
        loader = self.loader
        trained = distributed.on_main(lambda: self.first.is_cached and is_trained(self.runs, loader))
        if self.first.is_cached and not trained:  # a store that was removed is not made again only to evaluate
            loader = stored.training_loader(self.first, self.runs, loader, self.device)
        elif self.first.train.part == "cls" and self.first.train.features is None and distributed.is_main():
            note = "data.short_sides draws sizes anew, so nothing is stored: train.features=live"
            print(f"note: {self.first.name}: {note}")
        train(self.runs, loader, self.device, self.validate)

    def validate(self, run: Run, epoch: int) -> None:
        """Score a run between epochs, unless that was done before the run was resumed."""
        if distributed.on_main(lambda: run.done and _is_kept(run.folder, epoch)):
            return
        config, file = self.configs[self.runs.index(run)], run.folder / "validation.predictions.json"
        metrics, _ = predict_and_evaluate(_detector(run), config, self.stats, self.validation, file, self.device)
        if distributed.is_main():  # only this process has metrics, and has read the file
            _keep(run, epoch, metrics)
            file.unlink(missing_ok=True)

    def score(self) -> None:
        """Predict and score every row, from stored features where several rows share them."""
        features = None
        if self.first.shares_features and len(self.runs) > 1 and not self.first.detector.has_masks:
            features = stored.validation_loader(self.first, _detector(self.runs[0]), self.validation, self.device)
        for config, run in zip(self.configs, self.runs, strict=True):
            file = config.run_folder / "predictions.json"
            metrics, scores = predict_and_evaluate(
                _detector(run), config, self.stats, self.validation, file, self.device, features
            )
            if distributed.is_main():
                write_scores(config.run_folder, config.name, scores, config.test.bins)
                write_metrics(config.run_folder, metrics)
                if config.train.evaluate_every:
                    _keep(run, config.train.epochs, metrics)
        distributed.barrier()


def note_data(index: AnnotationIndex, stats: CategoryStats) -> None:
    """Say on stderr what of the training data is left out, or is probably not meant."""
    odd = [
        f"{index.path}: {kind}: {seen}; prepare_data.py check says more"
        for kind, seen in implausible_boxes(index).items()
    ]
    for line in (what_does_not_train(index), disagreement(index, stats), *odd):
        if line:
            print(f"note: {line}", file=sys.stderr)


def begin(config: Config, index: AnnotationIndex, stats: CategoryStats, device: torch.device) -> Run:
    """The detector of a row with the weights that it starts from, and its run folder."""
    torch.manual_seed(config.seed)
    detector = build_detector(config, stats)
    with distributed.main_first():  # it may fetch weights
        initialise(detector, config, index, stats)
    detector.to(device, memory_format=torch.channels_last)
    distributed.on_main(lambda: describe(config))
    init = weights_digest(load_checkpoint(config.init_file)) if config.init_file else None
    about = {"config": config_to_dict(config), "stats": stats.to_dict(), "init": init}
    schedule = dataclasses.replace(config.train, accumulate=1) if config.is_cached else config.train  # no detector runs
    return Run(detector, schedule, config.run_folder, config.seed, config.name, about)


def _detector(run: Run) -> FasterRCNN:
    assert isinstance(run.model, FasterRCNN)  # as `begin` made it
    return run.model


def _keep(run: Run, epoch: int, metrics: dict[str, float]) -> None:
    """Note a validation, in the main process, and keep the weights of the best one."""
    content = {**run.about, "model": run.model.state_dict()}
    keep_best(run.folder, content, {"epoch": epoch, **without_nan(metrics)})


def _is_kept(folder: Path, epoch: int) -> bool:
    """Whether the validation after an epoch was noted."""
    try:
        return any(entry["epoch"] == epoch for entry in json.loads((folder / "validation.json").read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return False  # none so far, or damaged: begun again
