"""Train the rows of a job in order, resume them, and score them."""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bags.analysis.run_files import without_nan, write_metrics, write_scored_on, write_scores
from bags.assembly import stored
from bags.assembly.initialise import check_members, initialise, load_members, locate_objects, with_members
from bags.assembly.loaders import annotations_digest, build_train_loader, build_val_dataset, open_index
from bags.assembly.models import build_detector
from bags.config.load import config_to_dict, load_rows
from bags.config.sections import Config
from bags.core import distributed
from bags.core.errors import UserError
from bags.core.files import read_text
from bags.core.tensor_files import check_finite
from bags.data import glyphs
from bags.data.checks import what_does_not_train
from bags.data.index import AnnotationIndex
from bags.data.plausibility import implausible_boxes
from bags.data.statistics import CategoryStats, disagreement
from bags.detectors.faster_rcnn import FasterRCNN
from bags.detectors.vitals import cause_of_death
from bags.engine import train as training
from bags.engine.checkpoint import keep_best, load_checkpoint, sources_digest
from bags.engine.train import Run
from bags.jobs import preflight
from bags.jobs.folders import describe, is_complete, is_finished
from bags.jobs.score import predict_and_evaluate
from bags.jobs.watching import draw_validation, picture_file, to_board

NOTHING = 0.01  # AP in 0..1 of a detector that is of no use to a classifier
LOOKED_AT = 4  # validation images that tell whether a detector is alive


def train(
    config: str | Path,
    overrides: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int | None] = (None,),
) -> dict[str, list[Path]]:
    """Train the rows of a dataset, a row, a YAML file or a folder of them; return the run folders of each row.

    config, overrides, methods: as on the command line, for example `bags.train("glyphs-100/bags", ["train.lr=0.1"])`.
    seeds: one run of each row for each; None is the seed of the configuration. Finished rows are not run again.
    Raises UserError for what cannot be trained.
    """
    folders: dict[str, list[Path]] = {}
    run_jobs([load_rows([Path(config)], overrides, seed, methods) for seed in seeds], folders.update)
    return folders


def run_jobs(jobs: list[list[Config]], show: Callable[[dict[str, list[Path]]], None]) -> None:
    """Runs what is not complete, then `show`s the run folders of each row (one per job) in the main process."""
    waiting = [config for configs in jobs for config in configs]
    with distributed.distributed(jobs[0][0].device) as device, contextlib.ExitStack() as locks:
        unfinished = distributed.on_main(lambda: check_rows(waiting))
        embedded = {(config.data.root, config.data.glyphs) for config in waiting if config.data.glyphs}
        for root, preset in sorted(embedded):
            distributed.on_main(functools.partial(glyphs.make_glyphs, root, glyphs.PRESETS[preset]))
        distributed.on_main(lambda: preflight.check_data([c for c in waiting if c.run_folder in unfinished]))
        for folder in unfinished:  # all of them now, so that no other command can stop this one half-way
            locks.enter_context(distributed.locked(folder, "set output="))
        while waiting:
            config = waiting[0]
            together = [other for other in waiting if other is config or _share_a_pass(config, other, waiting)]
            waiting = [other for other in waiting if other not in together]
            run(together, device)
        if distributed.is_main():
            rows: dict[str, list[Path]] = {}
            for config in (config for configs in jobs for config in configs):
                rows.setdefault(config.name, []).append(config.run_folder)
            show(rows)


def check_rows(configs: list[Config]) -> list[Path]:
    """Run folders of rows that are not complete, sorted.

    Raises UserError, before anything is trained, for rows that share a folder or a store, for other settings than
    those that a folder was trained with, and for a missing row to start from.
    """
    folders: dict[Path, Config] = {}
    stores: dict[Path, Config] = {}
    unfinished = []
    for config in configs:
        if config.run_folder in folders:
            raise UserError(f"{config.run_folder}: two rows of this job would share it: give each a name of its own")
        folders[config.run_folder] = config
        complete = is_complete(config.run_folder, config)
        if not complete:
            unfinished.append(config.run_folder)
        for row in config.source_rows if not complete else ():
            source = config.source_file(f"row:{row}").parent
            if source not in folders and not is_finished(source):
                raise UserError(f"{source}: no finished run; run the row {row} first")
        if config.is_cached:
            other = stores.setdefault(stored.store_folder(config), config)
            if stored.store_settings(other) != stored.store_settings(config):
                raise UserError(
                    f"{config.run_folder}: needs another store of features than {other.name}, in the same folder "
                    f"{stored.store_folder(config)}: give one of them a store.folder, or train.features=live"
                )
    return sorted(unfinished)


def _share_a_pass(first: Config, other: Config, waiting: list[Config]) -> bool:
    """Whether both rows are trained on (if at all) and scored from the same features, batch by batch.

    waiting: the rows that are still to be run, which cannot yet be averaged.
    """
    later = {config.run_folder for config in waiting}
    both = first.shares_features and other.shares_features
    both = both and later.isdisjoint(file.parent for file in map(other.source_file, other.classifier.sources))
    return both and stored.shared_settings(first) == stored.shared_settings(other)


def run(configs: list[Config], device: torch.device) -> None:
    """Run the rows of one pass that are not complete."""
    complete = distributed.on_main(lambda: [is_complete(config.run_folder, config) for config in configs])
    for config in itertools.compress(configs, complete) if distributed.is_main() else ():
        print(f"{config.run_folder}: complete, not run again", flush=True)
    configs = [config for config, done in zip(configs, complete, strict=True) if not done]
    if configs:
        Pass(configs, device).run()


class Pass:
    """Rows that see the same batches (mostly one row): data, detectors, training, prediction, evaluation.

    configs: of the rows, none of which is complete. The caller holds the locks of their run folders.
    """

    def __init__(self, configs: Sequence[Config], device: torch.device):
        self.configs, self.first, self.device = configs, configs[0], device
        self.index = open_index(self.first, "train")
        self.stats = CategoryStats.from_index(self.index)
        if distributed.is_main():
            note_data(self.index)
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
        if self.first.train.part != "all" and self.first.detector.init_from:
            self.check_alive(self.runs[0], classifier_is_new=True)
        self.train()
        for config, run in zip(self.configs, self.runs, strict=True):
            if config.train.part in ("all", "head"):
                self.check_alive(run)
        self.score()

    def check_alive(self, run: Run, classifier_is_new: bool = False) -> None:
        """Raise UserError for a detector that cannot tell proposals apart: its numbers would mean nothing."""
        config = self.configs[self.runs.index(run)]
        if config.train.dead == "ignore":
            return

        def look() -> str | None:
            """Ask the main process's copy, which is as good as any."""
            detector = _detector(run).eval()
            number = min(LOOKED_AT, len(self.validation))
            return cause_of_death(
                detector, [self.validation[k][0].to(self.device) for k in range(number)], classifier_is_new
            )

        cause = distributed.on_main(look)
        if cause:
            source = config.init_file if classifier_is_new else run.folder / "last.pth"
            raise UserError(
                f"{source}: this detector is dead: {cause}. Its training has diverged: train it anew with a lower "
                "train.lr or train.clip_norm, in another folder (output=); train.dead=ignore goes on all the same"
            )

    def train(self) -> None:
        """Train from images, or from stored features; validate between epochs where that is asked for."""
        loader = self.loader
        cached = any(config.is_cached for config in self.configs)
        trained = distributed.on_main(lambda: cached and training.is_trained(self.runs, loader))
        if cached and not trained:  # a store that was removed is not made again only to evaluate
            loader = stored.training_loader(self.first, self.runs, loader, self.device)
        stage = self.first.train
        if not cached and stage.part == "cls" and stage.features is None and distributed.is_main():
            key = self.first.data.redrawn
            note = f"{key} makes images anew each time, so nothing is stored: train.features=live"
            print(f"note: {self.first.name}: {note}")
        early = None if self.first.is_cached else self.draw_first_epoch
        training.train(self.runs, loader, self.device, self.validate, early)

    def draw_first_epoch(self, runs: Sequence[Run]) -> None:
        """Draw detections in a few validation images, so that a mistake is seen early."""
        for run in runs:
            if file := self.draw(run, 1):
                print(f"{run.title}: first detections: {file}")

    def draw(self, run: Run, epoch: int) -> Path | None:
        """Draw detections after an epoch, in the main process; the file, or None where none is drawn."""
        config, file = self.configs[self.runs.index(run)], picture_file(run.folder, epoch)
        if not config.test.figures or not isinstance(run.model, FasterRCNN) or not len(self.validation.index.labels):
            return None
        done = draw_validation(run.model, self.validation, self.stats, file, epoch, self.device)
        return file if done else None

    def validate(self, run: Run, epoch: int) -> None:
        """Score a run between epochs, unless that was done before the run was resumed."""
        if distributed.on_main(lambda: run.done and _is_kept(run.folder, epoch)):
            return
        config, file = self.configs[self.runs.index(run)], run.folder / "validation.predictions.json"
        metrics, _ = predict_and_evaluate(_detector(run), config, self.stats, self.validation, file, self.device)
        if distributed.is_main():  # only this process has metrics, and has read the file
            _keep(run, epoch, metrics)
            file.unlink(missing_ok=True)
            if config.train.tensorboard:
                to_board(config, epoch, metrics, self.draw(run, epoch))

    def score(self) -> None:
        """Predict and score every row, from stored features where several rows share them."""
        features = None
        single = all(config.test.precision == "fp32" for config in self.configs)  # as stored features are computed
        if single and self.first.shares_features and len(self.runs) > 1 and not self.first.detector.has_masks:
            features = stored.validation_loader(self.first, _detector(self.runs[0]), self.validation, self.device)
        for config, run in zip(self.configs, self.runs, strict=True):
            file = config.run_folder / "predictions.json"
            metrics, scores = predict_and_evaluate(
                _detector(run), config, self.stats, self.validation, file, self.device, features
            )
            if distributed.is_main():
                write_scores(config.run_folder, config.name, scores, config.test.bins, config.test.figures)
                index, images = self.validation.index, stored.images_digest(self.validation)
                write_scored_on(config.run_folder, index.path, index.sha256, images)
                write_metrics(config.run_folder, metrics)  # last, since a run with metrics is finished
                if config.train.part == "all" and metrics["AP"] < NOTHING:
                    note_weakness(config, metrics["AP"])
                if config.train.evaluate_every:
                    _keep(run, config.train.epochs, metrics)
                if config.train.tensorboard:
                    to_board(config, config.train.epochs, metrics, self.draw(run, config.train.epochs))
        distributed.barrier()


def note_weakness(config: Config, ap: float) -> None:
    """Say on stderr that a detector is too weak for a classifier to matter."""
    print(
        f"note: {config.name}: an AP of {100 * ap:.2f} % means that this detector finds next to nothing, and another "
        "classifier cannot help: train it for longer (train.epochs), or start from a trained one (docs/weights.md)",
        file=sys.stderr,
    )


def note_data(index: AnnotationIndex) -> None:
    """Say on stderr what of the training data is left out, or is probably not meant."""
    odd = [
        f"{index.path}: {kind}: {which}; prepare_data.py check says more"
        for kind, which in implausible_boxes(index).items()
    ]
    for line in (what_does_not_train(index), disagreement(index), *odd):
        if line:
            print(f"note: {line}", file=sys.stderr)


def begin(config: Config, index: AnnotationIndex, stats: CategoryStats, device: torch.device) -> Run:
    """The detector of a row with the weights that it starts from, and its run folder."""
    torch.manual_seed(config.seed)
    config, members = with_members(config)
    check_members(config, members, index, stats)
    detector = build_detector(config, stats)
    with distributed.main_first():  # it may fetch weights
        start = load_checkpoint(config.init_file) if config.init_file else None
        initialise(detector, config, index, stats, start)
    load_members(detector, config, members)
    locate_objects(detector, index)
    detector.to(device, memory_format=torch.channels_last)
    distributed.on_main(lambda: describe(config))
    init = sources_digest([*([start] if start else []), *members])
    about = {"config": config_to_dict(config), "stats": stats.to_dict(), "init": init}
    about["annotations"] = annotations_digest(config, index)
    schedule = dataclasses.replace(config.train, accumulate=1) if config.is_cached else config.train  # no detector runs
    return Run(detector, schedule, config.run_folder, config.seed, config.name, about)


def _detector(run: Run) -> FasterRCNN:
    """The trained detector of a run. Raises UserError for weights that are not finite."""
    assert isinstance(run.model, FasterRCNN)  # as `begin` made it
    check_finite(run.model.state_dict(), run.folder)
    return run.model


def _keep(run: Run, epoch: int, metrics: dict[str, float]) -> None:
    """Note a validation, in the main process, and keep the weights of the best one."""
    content = {**run.about, "model": run.model.state_dict()}
    keep_best(run.folder, content, {"epoch": epoch, **without_nan(metrics)})


def _is_kept(folder: Path, epoch: int) -> bool:
    """Whether the validation after an epoch was noted."""
    try:
        return any(entry["epoch"] == epoch for entry in json.loads(read_text(folder / "validation.json")))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False  # none so far, or damaged: begun again
