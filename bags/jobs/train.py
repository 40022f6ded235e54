"""Train rows in order, resume them, and score them."""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bags.config import config_to_dict, load_config, result_settings, save_config
from bags.errors import UserError
from bags.rows import row_beside, rows_of
from bags.sections import Config


def make_deterministic() -> None:
    """Of each operation the implementation that gives the same bits every time; torch raises where there is none."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def run_jobs(jobs: list[list[Config]], show: Callable[[dict[str, list[Path]]], None]) -> None:
    """Runs what is not complete, then `show`s the run folders of each row (one per job) in the main process."""
    from bags import distributed, preflight
    from bags.data import glyphs

    waiting = [config for configs in jobs for config in configs]
    with distributed.distributed(jobs[0][0].device) as device, contextlib.ExitStack() as locks:
        unfinished = distributed.on_main(lambda: _check(waiting))
        embedded = {(config.data.root, config.data.glyphs) for config in waiting if config.data.glyphs}
        for root, preset in sorted(embedded):
            distributed.on_main(functools.partial(glyphs.make_glyphs, root, glyphs.PRESETS[preset]))
        distributed.on_main(lambda: preflight.check_data([c for c in waiting if c.run_folder in unfinished]))
        for folder in unfinished:  # all of them now, so that no other command can stop this one half-way
            locks.enter_context(distributed.locked(folder, "set output="))
        while waiting:
            config = waiting[0]
            together = [other for other in waiting if other is config or _share_a_pass(config, other)]
            waiting = [other for other in waiting if other not in together]
            run(together, device)
        if distributed.is_main():
            rows: dict[str, list[Path]] = {}
            for config in (config for configs in jobs for config in configs):
                rows.setdefault(config.name, []).append(config.run_folder)
            show(rows)


def _check(configs: list[Config]) -> list[Path]:
    """Run folders of rows that are not complete, sorted.

    Raises UserError, before anything is trained, for rows that share a folder or a store, for other settings than
    those that a folder was trained with, and for a missing row to start from.
    """
    from bags import cached

    folders: dict[Path, Config] = {}
    stores: dict[Path, Config] = {}
    unfinished = []
    for config in configs:
        if config.run_folder in folders:
            raise UserError(f"{config.run_folder}: two rows of this job would share it: give each a name of its own")
        folders[config.run_folder] = config
        if not _is_complete(config.run_folder, config):
            unfinished.append(config.run_folder)
        source = config.init_file.parent if config.init_row and config.init_file else None
        if source and source not in folders and not _is_finished(source):
            raise UserError(f"{source}: no finished run; run the row {config.init_row} first")
        if config.is_cached:
            other = stores.setdefault(cached.store_folder(config), config)
            if cached.store_settings(other) != cached.store_settings(config):
                raise UserError(
                    f"{config.run_folder}: needs another store of features than {other.name}, in the same folder "
                    f"{cached.store_folder(config)}: give one of them a store.folder, or train.features=live"
                )
    return sorted(unfinished)


def _share_a_pass(first: Config, other: Config) -> bool:
    """Whether both rows are trained on (if at all) and scored from the same features, batch by batch."""
    from bags import cached

    both = first.shares_features and other.shares_features
    return both and cached.shared_settings(first) == cached.shared_settings(other)


def run(configs: list[Config], device) -> None:
    """Rows of one pass over the data (mostly one row): data, detectors, training, prediction, evaluation.

    Those that are complete are skipped.
    """
    from bags import build, cached, distributed
    from bags.analysis.tables import write_metrics, write_scores
    from bags.data.checks import what_does_not_train
    from bags.data.plausibility import implausible_boxes
    from bags.data.statistics import CategoryStats, disagreement
    from bags.engine.train import is_trained, train

    complete = distributed.on_main(lambda: [_is_complete(config.run_folder, config) for config in configs])
    for config in itertools.compress(configs, complete) if distributed.is_main() else ():
        print(f"{config.run_folder}: complete, not run again", flush=True)
    configs = [config for config, done in zip(configs, complete, strict=True) if not done]
    if not configs:
        return
    first = configs[0]
    index = build.open_index(first, "train")
    stats = CategoryStats.from_index(index)
    odd = [
        f"{index.path}: {kind}: {seen}; prepare_data.py check says more"
        for kind, seen in implausible_boxes(index).items()
    ]
    for line in (what_does_not_train(index), disagreement(index, stats), *odd):
        if line and distributed.is_main():
            print(f"note: {line}", file=sys.stderr)
    loader = build.build_train_loader(first, index, stats)
    validation = build.build_val_dataset(first)
    runs = []
    for config in configs:
        runs.append(begin(config, index, stats, device))
        if first.shares_features:
            cached.share_frozen(runs[-1].model, runs[0].model)
    distributed.barrier()

    trained = distributed.on_main(lambda: first.is_cached and is_trained(runs, loader))
    if first.is_cached and not trained:  # a store that was removed is not made to evaluate alone
        loader = cached.training_loader(first, runs, loader, device)
    elif first.train.part == "cls" and first.train.features is None and distributed.is_main():
        print(f"note: {first.name}: data.short_sides draws sizes anew, so nothing is stored: train.features=live")

    def validate(one, epoch: int) -> None:
        """Score a run between epochs, unless that was done before the run was resumed."""
        if distributed.on_main(lambda: one.done and _is_kept(one.folder, epoch)):
            return
        config, file = config_of[id(one)], one.folder / "validation.predictions.json"
        metrics, _ = build.predict_and_evaluate(one.model, config, stats, validation, file, device)
        if distributed.is_main():  # which alone has metrics, and has read the file
            _keep(one, epoch, metrics)
            file.unlink(missing_ok=True)

    config_of = {id(one): config for config, one in zip(configs, runs, strict=True)}
    train(runs, loader, device, validate)

    stored = None
    if first.shares_features and len(runs) > 1 and not first.detector.has_masks:  # masks need the whole detector
        stored = cached.validation_loader(first, runs[0].model, validation, device)
    for config, one in zip(configs, runs, strict=True):
        predictions = config.run_folder / "predictions.json"
        metrics, scores = build.predict_and_evaluate(one.model, config, stats, validation, predictions, device, stored)
        if distributed.is_main():
            write_scores(config.run_folder, config.name, scores, config.test.bins)
            write_metrics(config.run_folder, metrics)
            if config.train.evaluate_every:
                _keep(one, config.train.epochs, metrics)
    distributed.barrier()


def _keep(one, epoch: int, metrics: dict[str, float]) -> None:
    """Note a validation, in the main process, and keep the weights of the best one."""
    from bags.analysis.tables import without_nan
    from bags.engine.checkpoint import keep_best

    content = {**one.about, "model": one.model.state_dict()}
    keep_best(one.folder, content, {"epoch": epoch, **without_nan(metrics)})


def _is_kept(folder: Path, epoch: int) -> bool:
    """Whether the validation after an epoch was noted."""
    try:
        return any(entry["epoch"] == epoch for entry in json.loads((folder / "validation.json").read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return False  # none so far, or damaged: begun again


def begin(config: Config, index, stats, device):
    """The detector of a row with the weights that it starts from, and its run folder."""
    import torch

    from bags import build, distributed
    from bags.engine.checkpoint import load_checkpoint, weights_digest
    from bags.engine.train import Run

    torch.manual_seed(config.seed)
    detector = build.build_detector(config, stats)
    with distributed.main_first():  # it may fetch weights
        build.initialise(detector, config, index, stats)
    detector.to(device, memory_format=torch.channels_last)
    distributed.on_main(lambda: _describe(config))
    init = weights_digest(load_checkpoint(config.init_file)) if config.init_file else None
    about = {"config": config_to_dict(config), "stats": stats.to_dict(), "init": init}
    train = dataclasses.replace(config.train, accumulate=1) if config.is_cached else config.train  # no detector runs
    return Run(detector, train, config.run_folder, config.seed, config.name, about)


def _describe(config: Config) -> None:
    """Write what a run is into its folder."""
    config.run_folder.mkdir(parents=True, exist_ok=True)
    if not any((config.run_folder / name).exists() for name in ("last.pth", "previous.pth")):
        (config.run_folder / "validation.json").unlink(missing_ok=True)  # of a run whose checkpoints were removed
    save_config(config, config.run_folder / "config.yaml")
    _write_environment(config.run_folder)


def _is_complete(folder: Path, config: Config) -> bool:
    """True if the run is finished.

    Raises UserError if what was trained there had other settings, annotations or weights to start from.
    """
    from bags import build
    from bags.analysis.tables import read_metrics
    from bags.data.statistics import CategoryStats
    from bags.engine.checkpoint import load_checkpoint, load_latest, weights_digest

    if not any((folder / name).exists() for name in ("last.pth", "previous.pth")):
        return False
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder}: holds checkpoints but no config.yaml, which says what they are: remove the folder")
    change = _first_difference(result_settings(load_config(folder / "config.yaml")), result_settings(config))
    if change:
        raise UserError(
            f"{folder}: this run was trained with {change[0]}={change[1]}, now it is {change[2]}: "
            "remove the folder, or set output= to keep both"
        )
    latest, source = load_latest(folder), config.init_file
    assert latest is not None  # a file of it is there
    data = Path(config.data.root, config.data.train)
    if data.exists() and latest["stats"] != CategoryStats.from_index(build.open_index(config, "train")).to_dict():
        raise UserError(f"{folder}: {data} has changed since this run was trained: remove the folder, or set output=")
    if source and source.exists() and latest.get("init") != weights_digest(load_checkpoint(source)):
        raise UserError(
            f"{folder}: this run started from other weights than {source} holds now: "
            "remove the folder, or set output= to keep both"
        )
    try:
        load_checkpoint(folder / "last.pth")
    except UserError:
        return False  # goes on from previous.pth
    return (folder / "metrics.json").exists() and "ACC" in read_metrics(folder)


def _is_finished(folder: Path) -> bool:
    return (folder / "metrics.json").exists()


def _first_difference(old: dict, new: dict, prefix: str = "") -> tuple | None:
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = _first_difference(a, b, f"{prefix}{key}.")
            if inner:
                return inner
        elif a != b:
            return f"{prefix}{key}", a, b
    return None


def _write_environment(folder: Path) -> None:
    """`environment.json`: what the numbers of this run were made with; further starts of it are in `resumed`."""
    import torch

    from bags import distributed
    from bags.analysis.results import environment
    from bags.files import read_text, write_text

    content = {
        "command": sys.argv,
        **environment(),
        "ranks": distributed.world_size(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    path = folder / "environment.json"
    if path.exists() and any((folder / name).exists() for name in ("last.pth", "previous.pth")):
        with contextlib.suppress(ValueError):  # damaged: begun again
            first = json.loads(read_text(path))
            content = first | {"resumed": [*first.get("resumed", ()), content]}
    write_text(path, json.dumps(content, indent=1))


def in_order(
    paths: Sequence[Path], overrides: Sequence[str], seed: int | None = None, methods: Sequence[str] = ()
) -> list[Config]:
    """The configurations of datasets, rows, files and folders; a row comes after the row that it starts from.

    methods: rows of the datasets instead of their default ones; the rows that they start from are added.
    """
    rows = [row for path in paths for row in rows_of(path, methods)]
    if not rows:
        raise UserError("no configuration: expected a dataset, DATASET/METHOD, a YAML file or a folder of them")
    waiting = [load_config(row, overrides) for row in rows]
    for row, config in zip(rows, waiting, strict=False) if methods else ():  # grows with the rows that are added
        if config.init_row and config.init_row not in {other.name for other in waiting}:
            rows.append(row_beside(row, config.init_row))
            waiting.append(load_config(rows[-1], overrides))
    if seed is not None:
        seeded = [f"seed={seed}", f"output={waiting[0].output}/seed{seed}"]
        waiting = [load_config(row, [*overrides, *seeded]) for row in rows]
    ordered: list[Config] = []
    while waiting:
        names = {config.name for config in waiting}
        ready = [config for config in waiting if config.init_row not in names]
        if not ready:
            raise UserError(f"rows start from each other in a circle: {', '.join(sorted(names))}")
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return ordered
