"""Runs a row once for every combination of some keys' values, and compares the results.

    python scripts/sweep.py configs/glyphs-100/bags --over classifier.others_ratio 0 1 2 4 8 16 n all
    python scripts/sweep.py configs/glyphs-100/bags --over classifier.boundaries [100] [10,100] [10,100,1000]
    python scripts/sweep.py configs/glyphs-100/tau_norm --over classifier.tau 0 0.25 0.5 1 --best AP_tail
    python scripts/sweep.py CONFIG --over classifier.gamma 0 0.6 --over test.max_detections 50 100   # all combinations
    python scripts/sweep.py CONFIG --over train.epochs 1 4 12 --seeds 0,1,2 --save results/x.json  # as tables.py

Rows that differ only in how a classifier is trained (part cls), or in how its scores are used (part none: tau-norm,
NorCal; thresholds and limits of section test), share one pass of the detector over each set of images. Finished rows
are not run again. More values: the same command with more of them.
"""

import argparse
from pathlib import Path

from bags.cli.arguments import seeds_of, split_arguments
from bags.cli.checks import check_save
from bags.config.load import load_config, load_rows
from bags.config.rows import rows_of
from bags.core.errors import UserError
from bags.jobs.sweep import BEFORE, NUMBER, TAKEN, check_best, combinations, refuse_equal, row_name, show
from bags.jobs.train import run_jobs


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
    if len(paths) != 1 or rows_of(paths[0]) != paths:
        raise UserError(f"{', '.join(map(str, paths))}: expected one row, DATASET/METHOD or a YAML file")
    if not NUMBER.fullmatch(arguments.best):
        raise UserError(
            f"--best {arguments.best}: expected a column of the table, as AP, AP50, AP1, AP_tail, mask_AP, ACC"
        )
    check_save(arguments.save)
    seeds = seeds_of(arguments.seeds)
    combined = combinations(arguments.over, TAKEN if seeds[0] is None else TAKEN | {"seed": "--seeds gives it"})
    name = load_config(paths[0], overrides).name
    rows = [[*overrides, *values, f"name={row_name(name, values)}"] for values in combined]
    jobs = [[load_rows(paths, row, seed)[0] for row in rows] for seed in seeds]
    refuse_equal(jobs[0])
    check_best(arguments.best, jobs[0])
    title = f"{name}: {', '.join(key for key, *_ in arguments.over)}"
    run_jobs(jobs, lambda folders: show(folders, arguments.best, title, arguments.save))
