"""Shows what changed between finished runs: the paper's table, weight norms, example predictions.

    python scripts/tables.py runs/glyphs-100                       # all runs of a dataset
    python scripts/tables.py runs/seed*/glyphs-100                 # mean and deviation over seeds
    python scripts/tables.py runs/glyphs-100/softmax runs/glyphs-100/bags
    python scripts/tables.py --paper 1 configs/glyphs-100          # the paper's table; runs what is missing
    python scripts/tables.py --paper 1 configs/glyphs-100 --seeds 0,1,2 --save results/glyphs-100-table1.json
    python scripts/tables.py --norms figure_1.png runs/glyphs-100/softmax runs/glyphs-100-balanced/softmax
    python scripts/tables.py --gains gains.png results/*-choose.json    # what methods gain over the control, by dataset
    python scripts/tables.py --scale scale.png results/benchmark-scale_*.json       # how costs grow with sizes
    python scripts/tables.py --render README.md docs/results/*.md         # their tables anew, from results/*.json

`--paper` is 1, 2, 3, 4, fig4 or coco_lt, or methods: later ones beside BAGS, with the seconds of their training
steps and the published numbers that can be compared. It takes section.key=value overrides and --seeds as train.py
does. Without it, figures are written to `figures` beside the first seed's run folders: weight_norms.png (the paper's
Figures 1 and 3 for these runs) and predictions.png (validation images, every run's boxes). `--norms` draws Figure 1 for
runs of several datasets; an annotation file, or a list of categories with `instance_count`, adds its counts alone.
`--gains` takes files that `choose.py --save` has kept.
"""

import argparse
import os
from pathlib import Path

from bags.cli.arguments import seeds_of, split_arguments
from bags.cli.checks import check_save
from bags.core.errors import UserError
from bags.jobs.tables import compare, compare_gains, compare_norms, compare_scale, paper_table, render_pages


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, or folders of them; with --paper a folder of configs")
    parser.add_argument("--no-figures", action="store_true", help="print the table only")
    parser.add_argument("--paper", help="a table of the paper: 1, 2, 3, 4, fig4 or coco_lt; or methods")
    parser.add_argument("--seeds", help="with --paper: comma-separated, for mean and deviation")
    parser.add_argument("--save", type=Path, metavar="JSON", help="keep the numbers, the command and the environment")
    parser.add_argument("--norms", type=Path, metavar="PNG", help="draw weight norms of runs of several datasets")
    parser.add_argument("--gains", type=Path, metavar="PNG", help="draw gains over the control, of files of choose.py")
    parser.add_argument("--scale", type=Path, metavar="PNG", help="draw costs against sizes, of files of benchmark.py")
    parser.add_argument("--render", action="store_true", help="make the tables of pages (Markdown) anew")
    arguments = parser.parse_intermixed_args()
    paths = [Path(path) for path in arguments.runs]
    modes = {  # option -> what it takes
        "render": ("only pages: it shows numbers that --save has kept", lambda: render_pages(paths)),
        "norms": ("only run folders and annotation files", lambda: compare_norms(paths, arguments.norms)),
        "gains": ("only files that choose.py --save has kept", lambda: compare_gains(paths, arguments.gains)),
        "scale": ("only files that benchmark.py --save has kept", lambda: compare_scale(paths, arguments.scale)),
    }
    chosen = [mode for mode in modes if getattr(arguments, mode)]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]}: expected one of them in a command")
    for mode, (takes, run) in modes.items():
        if getattr(arguments, mode):
            if arguments.save or arguments.paper or arguments.seeds:
                raise UserError(f"--{mode} takes {takes}")
            run()
            return
    check_save(arguments.save)
    if arguments.paper:
        datasets, overrides = split_arguments(arguments.runs)
        if len(datasets) != 1:
            raise UserError(f"--paper {arguments.paper}: expected one dataset, got {datasets}")
        paper_table(arguments.paper, datasets[0], overrides, seeds_of(arguments.seeds), arguments.save)
        return
    if arguments.seeds or any("=" in run and not os.path.exists(run) for run in arguments.runs):
        raise UserError("--seeds and section.key=value go with --paper; finished runs are compared as they are")
    rows: dict[str, list[Path]] = {}
    for path in paths:
        for folder in [path] if (path / "config.yaml").exists() else sorted(path.glob("*/")):
            known = [other.resolve() for other in rows.get(folder.name, [])]
            if (folder / "metrics.json").exists() and folder.resolve() not in known:
                rows.setdefault(folder.name, []).append(folder)
    if not rows:
        raise UserError(f"{', '.join(map(str, arguments.runs))}: no finished run (with a metrics.json) in there")
    compare(rows, not arguments.no_figures, arguments.save)
