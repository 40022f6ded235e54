"""Is the estimate of `choose` honest? Chooses among equal rows, on simulated data sets of nothing but noise.

    python scripts/noise.py                                        # 200 data sets of each of four shapes
    python scripts/noise.py --shapes 20x5 --data-sets 50 --rows 4  # 20 images, 5 categories

All rows, and all means of them, detect equally well: their detections are drawn from one distribution. So the true gain
of any choice over the control is 0. Printed for each shape: how often the interval of the estimated gain holds 0, how
often the choice was called better than the control, and the mean gain, estimated honestly (on images that were not used
to choose) and optimistically (on those that were), each with its standard error.

Exit code 1 if less than 95 of 100 intervals hold 0, or if the mean honest gain is more than three standard errors
above 0.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bags.cli.checks import check_draws
from bags.core.errors import UserError, run_script
from bags.evaluation import selection
from bags.evaluation.comparison import IOUS, Detections
from bags.evaluation.selection import Choice, File, Mixture, Validation

SHAPES = ("20x5", "150x5", "20x100", "150x100")  # images x categories

MOST = 100_000  # images and categories of a simulated data set


def main() -> None:
    """Parses the command line; prints one line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help=f"images x categories (default {' '.join(SHAPES)})")
    parser.add_argument("--data-sets", type=int, default=200, help="of each shape (default 200)")
    parser.add_argument("--rows", type=int, default=6, help="the control and others (default 6)")
    parser.add_argument("--draws", type=int, default=200, help="of the bootstrap over images (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for shape in arguments.shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape) or int(shape.partition("x")[0]) < 5:
            raise UserError(f"--shapes {shape}: expected IMAGESxCATEGORIES, as 20x5, with 5 images or more")
        if max(map(int, shape.split("x"))) > MOST:
            raise UserError(f"--shapes {shape}: expected at most {MOST} images and categories")
    for name, least in (("data_sets", 1), ("rows", 2), ("draws", 100)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected {least} or more")
    check_draws(arguments.draws)
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: expected 0 or more")
    print(f"{'shape':<10} {'data sets':>9} {'holds 0':>8} {'better':>7} {'honest gain':>16} {'optimistic gain':>16}")
    good = [report(shape, arguments) for shape in arguments.shapes]
    sys.exit(0 if all(good) else 1)


def report(shape: str, arguments: argparse.Namespace) -> bool:
    """Prints the line of a shape; returns whether the estimate kept its promises there."""
    images, categories = map(int, shape.split("x"))
    gains, optimistic, holds, better = [], [], 0, 0
    for number in range(arguments.data_sets):
        choice = choose_from_noise(images, categories, arguments.rows, arguments.draws, (arguments.seed, number))
        gain, low, high = choice.honest.gain(choice.rows[0], "AP")
        holds += low <= 0 <= high
        better += gain > 0 and low > 0
        gains.append(100 * gain)
        optimistic.append(100 * choice.optimistic.gain(choice.rows[0], "AP")[0])
    numbers = [(np.mean(values), np.std(values) / len(values) ** 0.5) for values in (gains, optimistic)]
    shares = [f"{count / arguments.data_sets:.1%}" for count in (holds, better)]
    cells = [f"{mean:+.2f} ±{error:.2f}" for mean, error in numbers]
    print(f"{shape:<10} {len(gains):>9} {shares[0]:>8} {shares[1]:>7} {cells[0]:>16} {cells[1]:>16}", flush=True)
    return bool(holds >= 0.95 * len(gains) and numbers[0][0] <= 3 * numbers[0][1])


def choose_from_noise(images: int, categories: int, rows: int, draws: int, seed: tuple[int, int]) -> Choice:
    """Choose among equal rows on one simulated data set. images: 5 or more."""
    random = np.random.default_rng(seed)
    numbers = np.ceil(3 * images / (1 + np.arange(categories))).astype(int)  # objects of each category: a long tail
    holders = [random.integers(0, images, number) for number in numbers]  # the image of each object
    objects = [np.column_stack(np.unique(holder, return_counts=True)) for holder in holders]

    def detect(mixture: Mixture) -> File:
        """Detections of a row or a mean of rows: the same at each call, independent of the others, equally good."""
        own = np.random.default_rng([*seed, *(1 + np.flatnonzero(mixture))])
        return [_detections(holder, images, own) for holder in holders]

    validation = Validation(objects, images, {"AP": np.ones(categories, bool)}, "AP", np.arange(images))
    return selection.choose(detect, rows, validation, draws=draws, seed=seed[1])


def _detections(holder: np.ndarray, images: int, random: np.random.Generator) -> Detections:
    """Objects of one category found with 80 %, at an IoU of 0.4 to 1, among false ones with lower scores."""
    found = holder[random.random(len(holder)) < 0.8]
    false = random.integers(0, images, random.poisson(1 + len(holder)))
    image = np.concatenate([found, false])
    score = random.normal(np.repeat([1.0, 0.0], [len(found), len(false)]))
    iou = np.concatenate([random.uniform(0.4, 1, len(found)), np.zeros(len(false))])
    order = np.argsort(-score)
    hit = iou[order] > np.linspace(0.5, 0.95, IOUS)[:, None]
    return Detections(image[order], hit, np.ones(hit.shape, bool), score[order])


if __name__ == "__main__":
    run_script(main)
