"""Trains the runs of one or more configurations and shows what changed between them.

    python scripts/train.py configs/glyphs-100                        # every row of a folder
    python scripts/train.py configs/glyphs-100/bags.yaml train.lr=0.01
    python scripts/train.py configs/glyphs-100 --seeds 0,1,2          # mean and deviation
    torchrun --nproc_per_node 8 scripts/train.py configs/lvis_v0.5    # 8 GPUs

A row that starts from another one (`init_from: row:NAME`) runs after it. Finished rows are not run
again, and a killed one goes on from its last checkpoint: run the same command again. SIGTERM, and
Ctrl-C in training, save first; the exit code is then 75.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.config import config_to_dict, load_config, result_settings, save_config
from bags.errors import STOPPED, UserError, run_script
from bags.sections import Config

KEY = re.compile(rf"({'|'.join(field.name for field in dataclasses.fields(Config))})(\.\w+)*(?<!\.yaml)(?<!\.yml)")


def main() -> None:
    """Parses the command line; rows, seeds, then the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", help="YAML files, folders of them, and section.key=value overrides")
    parser.add_argument("--seeds", help="comma-separated; run folders go below <output>/seed<N>")
    parser.add_argument("--deterministic", action="store_true", help="refuse kernels that round as they please")
    arguments = parser.parse_intermixed_args()
    paths, overrides = split_arguments(arguments.config)
    seeds = seeds_of(arguments.seeds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # outside training, which saves first
    if arguments.deterministic:
        make_deterministic()
    from scripts.tables import compare as show

    run_jobs([in_order(paths, overrides, seed) for seed in seeds], show)


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


def split_arguments(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Paths (whatever exists, or has no "=") and overrides. Raises UserError for a key apart from its value.

    An override may be longer than a path can be, which `Path.exists` would raise for.
    """
    for k, argument in enumerate(arguments):
        key = argument.removesuffix("=")
        if KEY.fullmatch(key) and not os.path.exists(argument):
            after = [text.removeprefix("=") for text in arguments[k + 1 : k + 3] if text != "="][:1]
            value = next((text for text in after if "=" not in text and not os.path.exists(text)), None)
            if value or (key == argument and "." in key):  # `key=` alone is null, a bare word may be a folder
                raise UserError(f"{key}: write {key}={value or 'VALUE'}, without spaces")
    is_path = ["=" not in argument or os.path.exists(argument) for argument in arguments]
    pairs = list(zip(arguments, is_path, strict=True))
    return [Path(argument) for argument, path in pairs if path], [argument for argument, path in pairs if not path]


def seeds_of(text: str | None) -> list[int | None]:
    try:
        return [None] if text is None else list(dict.fromkeys(int(s) for s in text.split(",")))
    except ValueError:
        raise UserError(
            f"--seeds {text or repr(text)}: expected whole numbers separated by commas, as in 0,1,2"
        ) from None


def in_order(paths: list[Path], overrides: list[str], seed: int | None = None) -> list[Config]:
    """The configurations of files and folders; a row comes after the row that it starts from."""
    files = [f for p in paths for f in (sorted(p.glob("[!_]*.yaml")) if p.is_dir() else [p])]
    if not files:
        raise UserError(f"{', '.join(map(str, paths)) or 'no configuration'}: expected a YAML file or a folder of them")
    for file in files:
        if file.name.startswith("_") and file.exists():
            rows = ", ".join(row.name for row in sorted(file.parent.glob("[!_]*.yaml")))
            raise UserError(f"{file}: is a base of other files; its rows are {rows or 'still to be written'}")
    waiting = [load_config(file, overrides) for file in files]
    if seed is not None:
        seeded = [f"seed={seed}", f"output={waiting[0].output}/seed{seed}"]
        waiting = [load_config(file, [*overrides, *seeded]) for file in files]
    ordered: list[Config] = []
    while waiting:
        names = {config.name for config in waiting}
        ready = [config for config in waiting if config.init_row not in names]
        if not ready:
            raise UserError(f"rows start from each other in a circle: {', '.join(sorted(names))}")
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return ordered


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
        runs.append(_begin(config, index, stats, device))
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


def _begin(config: Config, index, stats, device):
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


if __name__ == "__main__":
    run_script(main)
