"""Find the best classifier for a dataset: a row, or the mean of several rows' scores, and what it gains.

    bags choose configs/glyphs-100                             # 11 rows on one frozen detector
    bags choose configs/glyphs-100 --pool full                 # about 50
    bags choose configs/glyphs-100 --rows seesaw "bags x4" "bags_cosine classifier.scale=10"
    bags choose configs/custom data.root=mine --metric AP_tail
    bags choose configs/custom data.root=mine --members 1      # the best single row, no mean
    bags choose configs/glyphs-100 --seeds 0,1,2 --save results/x.json    # whole runs; mean and deviation
    bags choose configs/muscima --test test.json --test-images tiles/test    # scored once, at the end

In a checkout, `python scripts/choose.py` is the same command. The detector is trained if it is missing; then each row
takes seconds to minutes from the same stored features. A row is METHOD, and behind it xN (for N times as long),
adamw, or settings. The m best rows are averaged, and m is chosen; the whole choice is repeated without each part of
the validation images and scored on that part. This estimate is printed with its gains over the control
softmax_retrained and over the baseline's classifier. Where the interval of the gain over the better one of these two
includes 0, that one is recommended.

What is written: the folder `choose` beside the rows: last.pth, for predict, evaluate, report and --export;
choose.json, with every row, its seconds and its numbers; and all that other run folders hold. Repeat the command to go
on after it was stopped; a finished choice is printed again.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from bags.cli.arguments import for_this_machine, seeds_of, split_arguments
from bags.cli.checks import check_draws, check_save
from bags.core.errors import UserError
from bags.jobs.choose import choose_seeds, show
from bags.jobs.pool import POOLS


def main() -> None:
    """Parse the command line; rows, the choice, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", help="a dataset, and section.key=value overrides for all rows")
    parser.add_argument("--pool", help=f"{' or '.join(POOLS)} (default quick)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="instead of a pool; control and baseline are added")
    parser.add_argument("--metric", default="AP", help="AP (default), AP50, AP_tail, AP1, APr, AP_fixed, ...")
    parser.add_argument(
        "--folds", type=int, default=5, help="parts of the images that are left out in turn (default 5)"
    )
    parser.add_argument("--members", type=int, default=12, help="most rows in a mean (default 12; 1: a single row)")
    parser.add_argument("--draws", type=int, default=500, help="of the bootstrap over images (default 500)")
    parser.add_argument("--test", type=Path, metavar="JSON", help="annotations that nothing is chosen with")
    parser.add_argument("--test-images", type=Path, metavar="FOLDER", help="their images; default: data.val_images")
    parser.add_argument("--seeds", help="comma-separated; run folders go below <output>/seed<N>")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the numbers of all seeds in a JSON file")
    parser.add_argument("--json", action="store_true", help="print choose.json, of several seeds a list of them")
    arguments = parser.parse_intermixed_args()
    paths, overrides = split_arguments(arguments.config)
    if len(paths) != 1:
        raise UserError(f"{', '.join(map(str, paths)) or 'no configuration'}: expected one dataset")
    if arguments.pool is not None and arguments.rows:
        raise UserError("--pool and --rows: expected one of them")
    check_draws(arguments.draws)
    if arguments.draws < 100:
        raise UserError(f"--draws {arguments.draws}: expected 100 or more, for an interval of 95 %")
    check_save(arguments.save)
    paths = for_this_machine(paths, overrides)
    seeds = seeds_of(arguments.seeds)
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        contents = choose_seeds(
            paths[0],
            overrides,
            seeds,
            arguments.save,
            pool=arguments.rows or ("quick" if arguments.pool is None else arguments.pool),
            metric=arguments.metric,
            folds=arguments.folds,
            draws=arguments.draws,
            members=arguments.members,
            test=arguments.test,
            test_images=arguments.test_images,
        )
    print(json.dumps(contents if len(contents) > 1 else contents[0])) if arguments.json else show(contents)
