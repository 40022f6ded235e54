"""Train the rows of a job in order, resume them, and score them."""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bags.assembly import stored
from bags.config.load import load_config
from bags.config.rows import row_beside, rows_of
from bags.config.sections import Config
from bags.core import distributed
from bags.core.errors import UserError
from bags.data import glyphs
from bags.jobs import preflight
from bags.jobs.folders import is_complete, is_finished
from bags.jobs.passes import Pass


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
    run_jobs([in_order([Path(config)], overrides, seed, methods) for seed in seeds], folders.update)
    return folders


def make_deterministic() -> None:
    """Of each operation the implementation that gives the same bits every time; torch raises where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


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
            together = [other for other in waiting if other is config or _share_a_pass(config, other)]
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
        if not is_complete(config.run_folder, config):
            unfinished.append(config.run_folder)
        source = config.init_file.parent if config.init_row and config.init_file else None
        if source and source not in folders and not is_finished(source):
            raise UserError(f"{source}: no finished run; run the row {config.init_row} first")
        if config.is_cached:
            other = stores.setdefault(stored.store_folder(config), config)
            if stored.store_settings(other) != stored.store_settings(config):
                raise UserError(
                    f"{config.run_folder}: needs another store of features than {other.name}, in the same folder "
                    f"{stored.store_folder(config)}: give one of them a store.folder, or train.features=live"
                )
    return sorted(unfinished)


def _share_a_pass(first: Config, other: Config) -> bool:
    """Whether both rows are trained on (if at all) and scored from the same features, batch by batch."""
    both = first.shares_features and other.shares_features
    return both and stored.shared_settings(first) == stored.shared_settings(other)


def run(configs: list[Config], device: torch.device) -> None:
    """Run the rows of one pass that are not complete."""
    complete = distributed.on_main(lambda: [is_complete(config.run_folder, config) for config in configs])
    for config in itertools.compress(configs, complete) if distributed.is_main() else ():
        print(f"{config.run_folder}: complete, not run again", flush=True)
    configs = [config for config, done in zip(configs, complete, strict=True) if not done]
    if configs:
        Pass(configs, device).run()


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
