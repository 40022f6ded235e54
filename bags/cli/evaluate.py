"""Scores a checkpoint or a results file, or compares two results files.

    python scripts/evaluate.py runs/glyphs-100/bags/last.pth              # predicts on its validation set
    python scripts/evaluate.py last.pth data.root=elsewhere --output out    # the same, other place
    python scripts/evaluate.py predictions.json --annotations val.json    # a results file, no model and no torch needed
    python scripts/evaluate.py predictions.json --annotations val.json --train train.json   # bins by training counts
    python scripts/evaluate.py predictions.json --annotations val.json --bins 20,400,8000 --engine pycocotools
    python scripts/evaluate.py --compare old.json new.json --annotations val.json   # differences, by how much luck

A checkpoint has its training counts. For results files, --train takes them from training annotations, a checkpoint,
or a run folder (its categories.csv); without --train they are the `instance_count` of the annotations, where there
is one, and otherwise there are no bins. Detections with equal scores are ordered by image, category and box.

The numbers of a results file include AP_fixed (Dave et al. 2021). What is written: metrics.json, categories.csv
(counts, bin and AP of each category) and figures/ (precision and recall by bin; AP by training instances), in
--output or in the folder NAME_evaluation beside the file. The intervals of --compare are a bootstrap over the images.
"""

import argparse
import json
from pathlib import Path

from bags.cli.checks import check_draws, check_output_folder
from bags.core.errors import UserError
from bags.jobs.evaluate import OF_RESULTS, compare_results, evaluate_checkpoint, evaluate_results


def main() -> None:
    """Parses the command line and prints the table; with --json the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="checkpoint (.pth) or results file (.json)")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for a checkpoint's configuration")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results files: B minus A")
    parser.add_argument("--draws", type=int, default=1000, help="of --compare's bootstrap (default 1000; 0: none)")
    parser.add_argument("--annotations", type=Path, help="ground truth of a results file")
    parser.add_argument("--train", type=Path, help="training counts of results files: train.json, last.pth, run folder")
    parser.add_argument("--bins", help="of a results file: rising training counts, default 10,100,1000")
    parser.add_argument("--engine", help="of a results file: hotcoco (default), or the official lvis or pycocotools")
    parser.add_argument("--output", type=Path, help="folder for what is written")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    arguments = parser.parse_intermixed_args()
    if arguments.compare and arguments.source:
        raise UserError(f"{arguments.source}: --compare takes two results files and options, nothing else")
    if arguments.source is None and arguments.compare is None:
        raise UserError("expected a checkpoint or a results file, or --compare with two results files")
    for path in (arguments.output, *arguments.output.parents) if arguments.output else ():
        if path.exists() and not path.is_dir():
            raise UserError(f"--output {arguments.output}: {path} is a file, not a folder")
    if arguments.output:
        check_output_folder(arguments.output)
    check_draws(arguments.draws)
    if arguments.compare:
        compare_results(arguments)
        return
    metrics: dict[str, float] | None
    if arguments.source.suffix.lower() == ".json":
        if arguments.annotations is None:
            raise UserError(f"{arguments.source}: a results file needs --annotations, its ground truth")
        if arguments.overrides:
            raise UserError(f"{arguments.overrides[0]}: overrides are for a checkpoint, not for a results file")
        metrics, name = evaluate_results(arguments), arguments.source.stem
    else:
        for option in OF_RESULTS:
            if getattr(arguments, option):
                raise UserError(f"--{option} is for a results file; a checkpoint takes data.val=... or test.bins=...")
        metrics, name = evaluate_checkpoint(arguments.source, arguments.overrides, arguments.output)
    if metrics is None:  # not the main process
        return
    from bags.analysis.run_files import without_nan
    from bags.analysis.tables import render_table

    if arguments.json:
        print(json.dumps(without_nan(metrics)))
    else:
        print(render_table({name: [metrics]}))
