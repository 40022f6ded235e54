"""Runs a row once for every combination of some keys' values, and compares the results.

    python scripts/sweep.py configs/glyphs-100/bags.yaml --over classifier.others_ratio 0 1 2 4 8 16 n all
    python scripts/sweep.py configs/glyphs-100/bags.yaml --over classifier.boundaries [100] [10,100] [10,100,1000]
    python scripts/sweep.py configs/glyphs-100/paper/tau_norm.yaml --over classifier.tau 0 0.25 0.5 1 --best AP_tail
    python scripts/sweep.py CONFIG --over classifier.gamma 0 0.6 --over test.max_detections 50 100   # all combinations
    python scripts/sweep.py CONFIG --over train.epochs 1 4 12 --seeds 0,1,2 --save results/x.json  # as tables.py

Rows that differ only in how a classifier is trained (part cls), or in how its scores are used (part none: tau-norm,
NorCal; thresholds and limits of section test), share one pass of the detector over each set of images. Finished rows
are not run again. More values: the same command with more of them.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.config import load_config
from bags.errors import UserError, run_script
from bags.sections import Config
from scripts.train import KEY, in_order, run_jobs, seeds_of, split_arguments

NUMBER = re.compile(r"(mask_)?(AP([0-9]+|[smlrcf]|_tail|_head)?|AR)|ACC([0-9]+|bg)?")
TAKEN = {"name": "rows are named by their values", "output": "rows share one folder"}
LONGEST = 60  # characters of a value in the name of its row, which is a folder
BEFORE = "put CONFIG and section.key=value before --over"


def main() -> None:
    """Parses the command line; rows, seeds, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", help="a YAML file, and section.key=value overrides for all rows")
    parser.add_argument("--over", nargs="+", action="append", required=True, metavar=("KEY", "VALUE"))
    parser.add_argument("--seeds", help="comma-separated; run folders go below <output>/seed<N>")
    parser.add_argument("--save", type=Path, metavar="JSON", help="keep the numbers, the command and the environment")
    parser.add_argument("--best", default="AP", help="the number that the best row is told by (default AP)")
    arguments = parser.parse_intermixed_args()
    paths, overrides = split_arguments(arguments.config)
    if not paths:
        raise UserError(f"no configuration: {BEFORE}")
    if len(paths) != 1 or paths[0].is_dir():
        raise UserError(f"{', '.join(map(str, paths))}: expected one YAML file")
    if not NUMBER.fullmatch(arguments.best):
        raise UserError(
            f"--best {arguments.best}: expected a column of the table, as AP, AP50, AP1, AP_tail, mask_AP, ACC"
        )
    seeds = seeds_of(arguments.seeds)
    own_rows = combinations(arguments.over, TAKEN if seeds[0] is None else TAKEN | {"seed": "--seeds gives it"})
    name = load_config(paths[0], overrides).name
    rows = [[*overrides, *own, f"name={json.dumps(row_name(name, own))}"] for own in own_rows]
    jobs = [[in_order(paths, row, seed)[0] for row in rows] for seed in seeds]
    refuse_equal(jobs[0])
    title = f"{name}: {', '.join(key for key, *_ in arguments.over)}"
    run_jobs(jobs, lambda folders: show(folders, arguments.best, title, arguments.save))


def combinations(over: list[list[str]], taken: dict[str, str]) -> list[tuple[str, ...]]:
    """Overrides of each row. taken: keys that cannot be swept, and why."""
    for key, *values in over:
        if not values or "=" in key:
            raise UserError(f"--over {key}: expected a key and its values, as in --over classifier.others_ratio 1 8")
        if len(set(values)) < len(values):
            raise UserError(f"--over {key}: a value is there twice")
        if key in taken:
            raise UserError(f"--over {key}: cannot be swept: {taken[key]}")
        late = next((value for value in values if "=" in value and KEY.fullmatch(value.partition("=")[0])), None)
        if late:
            raise UserError(f"--over {key}: {late}: {BEFORE}")
    return list(itertools.product(*([f"{key}={value}" for value in values] for key, *values in over)))


def refuse_equal(rows: list[Config]) -> None:
    """Raises UserError for two rows that differ in nothing but the spelling of a value."""
    names: dict[Config, str] = {}
    for row in rows:
        other = names.setdefault(dataclasses.replace(row, name="any"), row.name)
        if other != row.name:
            raise UserError(f"--over: {other} and {row.name} have equal settings: leave one out")


def row_name(name: str, overrides: tuple[str, ...]) -> str:
    """The row's folder: what is swept, without its section; a long value as its beginning and a digest."""
    parts = [name]
    for override in overrides:
        key, _, value = override.partition("=")
        if len(value) > LONGEST:
            value = f"{value[: LONGEST - 11]}...{hashlib.sha256(value.encode()).hexdigest()[:8]}"
        parts.append(f"{key.split('.')[-1]}={value}")
    return ",".join(parts).replace("/", "_")


def show(folders: dict[str, list[Path]], best: str, title: str, save: Path | None) -> None:
    """Prints the table, and the row whose mean of `best` is highest; keeps the numbers in `save`."""
    from bags.analysis.results import save_results, this_command
    from bags.analysis.tables import read_metrics, render_table

    rows = {name: [read_metrics(folder) for folder in own] for name, own in folders.items()}
    print(f"\n{render_table(rows)}")
    if save:
        save_results(save, title, this_command(), folders, rows)
    means = {name: sum(run.get(best, math.nan) for run in own) / len(own) for name, own in rows.items()}
    known = {name: value for name, value in means.items() if not math.isnan(value)}
    if not known:
        raise UserError(
            f"--best {best}: no row has that number: expected one of {', '.join(next(iter(rows.values()))[0])}"
        )
    print(f"\nhighest {best}: {max(known, key=lambda name: known[name])}, {100 * max(known.values()):.2f}")


if __name__ == "__main__":
    run_script(main)
