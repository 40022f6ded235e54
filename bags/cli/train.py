"""Train the rows of one or more configurations and show what changed between them.

    bags train configs/glyphs-100                                  # the rows of a dataset
    bags train configs/glyphs-100 --methods seesaw bags_cosine     # other methods on it
    bags train configs/glyphs-100/bags train.lr=0.01               # one row, DATASET/METHOD
    bags train configs/glyphs-100 --seeds 0,1,2                    # mean and deviation
    bags train configs/glyphs-100 --list                           # the rows that there are
    torchrun --nproc_per_node 8 scripts/train.py configs/lvis_v0.5    # 8 GPUs

In a checkout, `python scripts/train.py` is the same command. A row that starts from another one (`init_from: row:NAME`)
runs after it. Finished rows are not run again; repeat the command to resume an interrupted run. SIGTERM, and Ctrl-C in
training, save first; the exit code is then 75.
"""

import argparse
import functools
import os
import signal
import sys
from pathlib import Path

from bags.analysis.paper import METHODS, PAPER
from bags.cli.arguments import for_this_machine, seeds_of, split_arguments
from bags.config.load import load_rows
from bags.config.rows import compose, find_dataset, methods_of, rows_of, summary
from bags.core.distributed import make_deterministic
from bags.core.errors import STOPPED, UserError
from bags.jobs.train import run_jobs


def main() -> None:
    """Parse the command line; rows, seeds, then the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", help="datasets, rows, YAML files or folders; section.key=value overrides")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", default=[], help="rows of the dataset to train")
    parser.add_argument("--list", action="store_true", help="show the rows of the dataset and of the paper's tables")
    parser.add_argument("--seeds", help="comma-separated; run folders go below <output>/seed<N>")
    parser.add_argument("--deterministic", action="store_true", help="refuse kernels that round differently each time")
    arguments = parser.parse_intermixed_args()
    paths, overrides = split_arguments(arguments.config)
    overrides += [text for text in arguments.methods if "=" in text]  # that stand after the methods
    methods = [name for text in arguments.methods if "=" not in text for name in text.split(",") if name]
    if arguments.methods and not methods:
        raise UserError(f"--methods {' '.join(arguments.methods)}: expected names of methods; --list shows them")
    if arguments.list:
        show_rows(paths)
        return None
    paths = for_this_machine(paths, overrides)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # outside training, which saves first
    if arguments.deterministic:
        make_deterministic()
    if os.environ.get("RANK", "0") == "0":
        show_files(paths, methods)
    from bags.jobs.tables import compare

    jobs = [load_rows(paths, overrides, seed, methods) for seed in seeds_of(arguments.seeds)]
    return run_jobs(jobs, functools.partial(compare, root=jobs[-1][-1].data.root))


def show_files(paths: list[Path], methods: list[str]) -> None:
    """Say which files each row of a dataset is composed of."""
    for row in [row for path in paths for row in rows_of(path, methods)]:
        files = compose(row).files
        if len(files) > 1:
            print(f"{row}: {' + '.join(map(str, files))}", file=sys.stderr)


def show_rows(paths: list[Path]) -> None:
    """Print the rows of datasets, which of them are in which table, and a line for each method."""
    for path in paths:
        dataset = find_dataset(path)
        if dataset is None:
            raise UserError(f"{path}: is no dataset; --list shows the rows of one")
        print(f"{dataset.name} ({dataset.file})\n  rows: {' '.join(dataset.rows)}")
        for name, table in {**PAPER, "methods": METHODS}.items():
            rows = [row.config for row in table.rows if not (table.optional and row.config in dataset.left_out)]
            print(f"  table {name}: {' '.join(rows)}")
        print("  methods:")
        for name, file in methods_of(dataset).items():
            print(f"    {name:<25}{summary(file)}".rstrip())
