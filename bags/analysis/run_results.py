"""The content of a finished run's folder, and its settings in words."""

import dataclasses
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bags.analysis.results import read_environment
from bags.analysis.run_files import read_categories, read_log, read_metrics, read_seconds
from bags.config.load import config_to_dict, load_config, override_config
from bags.config.sections import Config
from bags.core.errors import UserError
from bags.core.settings import NO_RESULT, marks


@dataclass
class RunResults:
    """The content of a finished run's folder."""

    label: str  # its name on the page
    folder: Path
    config: Config
    metrics: dict[str, float]
    rows: list[dict]  # of categories.csv
    environment: dict
    log: list[dict]
    norms: np.ndarray | None = None  # [C+1]


def read_run(folder: Path, overrides: Sequence[str] = ()) -> RunResults:
    """Read a run folder. Raises UserError if it holds no finished run."""
    missing = [name for name in ("config.yaml", "metrics.json") if not (folder / name).exists()]
    if missing:
        known = f"no {missing[0]} in there" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: no finished run ({known}); expected a run folder, such as runs/glyphs-100/bags")
    config = override_config(load_config(folder / "config.yaml"), overrides)
    log = [step for step in read_log(folder) if type(step.get("epoch")) in (int, float)]
    numbers, rows = read_metrics(folder), read_categories(folder)
    return RunResults(config.name, folder, config, numbers, rows, read_environment(folder), log)


def about(run: RunResults) -> dict[str, str]:
    """Describe the six choices that make a row of the paper, and the run's software and hardware."""
    config, made = run.config, run.environment
    train, seconds, command = config.train, read_seconds(run.folder), made.get("command")
    packages, epochs = made.get("packages"), f"{train.epochs} epoch{'s' * (train.epochs > 1)}"
    resumed = made.get("resumed")
    devices = [f"{key} {made[key]}" for key in ("threads", "ranks") if key in made]
    return {
        "folder": str(run.folder),
        "detector": f"{config.detector.framework}, {config.detector.backbone}",
        "starts from": config.detector.init_from or config.detector.backbone_weights or "random weights",
        "classifier": _choice(config.classifier),
        "sampler": _choice(config.sampler),
        "trained part": train.part,
        "schedule": f"{epochs} of {train.batch_size} images a step, {train.optimizer}, rate {train.lr:g}",
        "seconds of steps": "-" if math.isnan(seconds) else f"{seconds:.0f}",
        "seed": str(config.seed),
        "command": shlex.join(map(str, command)) if isinstance(command, list) else "-",
        "started": f"{made.get('started', '-')}"
        + (f", resumed {len(resumed)} times" if isinstance(resumed, list) else ""),
        "revision": str(made.get("revision") or "-"),
        "python": str(made.get("python", "-")),
        "packages": ", ".join(f"{k} {v}" for k, v in packages.items()) if isinstance(packages, dict) else "-",
        "device": ", ".join([str(made.get("device", "-")), *devices]),
    }


def _choice(section: Any) -> str:
    """The name of a section's choice, and its settings that differ from the defaults and can change a result."""
    left_out = {"name", *(key for key, notes in marks(type(section)).items() if NO_RESULT in notes)}
    settings = {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if f.name not in left_out}
    changed = [f"{key}={value}" for key, value in settings.items() if value != getattr(type(section)(), key)]
    return ", ".join([section.name, *changed])


def differences(
    first: Config, second: Config, plain: Callable[[Config], dict] = config_to_dict
) -> list[tuple[str, object, object]]:
    """Settings that differ, as (key, first value, second value), with - for a missing key.

    plain: the settings that are compared, as nested dicts.
    """
    left, right = (dict(_leaves(plain(config))) for config in (first, second))
    triples = [(key, left.get(key, "-"), right.get(key, "-")) for key in {**left, **right}]
    return [triple for triple in triples if triple[1] != triple[2]]


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
