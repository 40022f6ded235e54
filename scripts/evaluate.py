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
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags import locks
from bags.errors import UserError, run_script
from bags.terminal import printable

MOST = 8  # categories that --compare names on each side
OF_RESULTS = ("annotations", "bins", "engine", "train")
TRAIN = "--train takes training counts from train.json, a checkpoint (.pth) or a run folder"


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
    if arguments.compare:
        return compare_results(arguments)
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
        return None
    from bags.analysis.tables import render_table, without_nan

    if arguments.json:
        print(json.dumps(without_nan(metrics)))
    else:
        print(render_table({name: [metrics]}))


def boundaries(text: str | None) -> tuple[int, ...]:
    """The numbers of --bins."""
    try:
        bins = tuple(int(number) for number in (text or "10,100,1000").split(","))
    except ValueError:
        raise UserError(f"--bins {text}: expected whole numbers separated by commas, as in 10,100") from None
    if list(bins) != sorted(set(bins)) or bins[0] < 1:
        raise UserError(f"--bins {text}: expected rising numbers above 0")
    return bins


def training_counts(source: Path | None, truth) -> dict[str, list[int]]:
    """`instance_counts` and `image_counts` of the ground truth's categories, from --train; nothing without it."""
    from bags.data.index import AnnotationIndex
    from bags.data.statistics import CategoryStats

    if source is None:
        return {}
    if source.is_dir() or source.suffix.lower() == ".csv":
        from bags.analysis.tables import read_categories

        rows = read_categories(source if source.is_dir() else source.parent)
        columns = ("id", "name", "training_instances", "training_images")
        stats = CategoryStats(*(tuple(row[column] for row in rows) for column in columns))
    elif source.suffix.lower() == ".json":
        stats = CategoryStats.from_index(AnnotationIndex.open(source))
    else:
        from bags.engine.checkpoint import load_checkpoint

        stats = CategoryStats.from_dict(load_checkpoint(source)["stats"], source)
    return truth.training_counts(stats, f"--train {source}")


def say(notes: list[str], truth, counts: dict) -> None:
    """Print notes, each once, and where the bins come from."""
    if not counts and all("instance_count" in category for category in truth.counts):
        notes = [*notes, f"{truth.path}: its own instance_count makes the bins; {TRAIN}"]
    elif not counts:
        notes = [*notes, f"{truth.path}: no instance_count, so there are no bins and no AP_tail; {TRAIN}"]
    for note in dict.fromkeys(notes):
        print(f"note: {printable(note)}", file=sys.stderr)


def evaluate_results(arguments: argparse.Namespace) -> dict[str, float]:
    """The numbers of boxes and, if both files have them, of masks (`mask_AP`, ...); also written."""
    from bags.analysis.tables import write_metrics, write_scores
    from bags.evaluation.detection_ap import score
    from bags.evaluation.results_file import read_results
    from bags.evaluation.truth import read_truth

    source, bins = arguments.source, boundaries(arguments.bins)
    truth = read_truth(arguments.annotations)
    results = read_results(source, truth)
    counts: dict[str, Any] = training_counts(arguments.train, truth)
    settings = {"boundaries": bins, "engine": arguments.engine or "hotcoco", "fixed": True, **counts}
    scores = {"bbox": score(truth, results, **settings)}
    metrics = dict(scores["bbox"].numbers)
    if results.masks is not None and not (truth.lacks_masks() or results.lacks_masks()):
        scores["segm"] = score(truth, results, "segm", **settings)
        metrics |= {f"mask_{name}": value for name, value in scores["segm"].numbers.items()}
    say(scores["bbox"].notes, truth, counts)
    folder = arguments.output or source.with_name(f"{source.stem}_evaluation")
    with locks.alone(folder, "choose another --output"):
        write_metrics(folder, metrics)
        files = [folder / "metrics.json", *write_scores(folder, source.stem, scores, bins)]
    print(f"written: {' '.join(map(str, files))}", file=sys.stderr)
    return metrics


def compare_results(arguments: argparse.Namespace) -> None:
    """Prints what changed from A to B: means with their intervals, and the categories that changed most."""
    from bags.analysis.tables import as_table, write_comparison
    from bags.evaluation.comparison import compare
    from bags.evaluation.detection_ap import notes_of
    from bags.evaluation.results_file import read_results
    from bags.evaluation.truth import read_truth

    if arguments.annotations is None:
        raise UserError("--compare needs --annotations, the ground truth of both files")
    if arguments.engine:
        raise UserError("--compare takes --annotations, --train, --bins, --draws, --output and --json")
    bins, truth = boundaries(arguments.bins), read_truth(arguments.annotations)
    files = [read_results(path, truth) for path in arguments.compare]
    counts: dict[str, Any] = training_counts(arguments.train, truth)
    masks = not truth.lacks_masks() and not any(file.masks is None or file.lacks_masks() for file in files)
    found = {
        kind: compare(truth, files[0], files[1], kind, arguments.draws, boundaries=bins, **counts)
        for kind in (["bbox", "segm"] if masks else ["bbox"])
    }
    say([note for file in files for note in notes_of(truth, file, own_counts=not counts)], truth, counts)
    if arguments.output:
        with locks.alone(arguments.output, "choose another --output"):
            write_comparison(arguments.output, found)
    if arguments.json:
        print(json.dumps({kind: as_table(result) for kind, result in found.items()}))
        return
    for kind, result in found.items():
        print_comparison(kind, result, [str(path) for path in arguments.compare])


def print_comparison(kind: str, result, names: list[str]) -> None:
    """One table of means, one of categories."""
    from bags.evaluation.comparison import changed_most

    print(
        f"\n{'boxes' if kind == 'bbox' else 'masks'}, A = {printable(names[0])}, B = {printable(names[1])}, in percent"
    )
    print(f"{'':<10}{'A':>8}{'B':>8}{'B - A':>8}   95 % of the draws")
    for name, first in result.first.items():
        second, low_high = result.second[name], result.intervals.get(name, (math.nan, math.nan))
        if math.isnan(first):
            continue
        spread = "" if math.isnan(low_high[0]) else f"{100 * low_high[0]:+8.2f} to {100 * low_high[1]:+.2f}"
        print(f"{name:<10}{100 * first:8.2f}{100 * second:8.2f}{100 * (second - first):+8.2f}{spread}")
    for title, rows in zip(("gained", "lost"), changed_most(result.rows, MOST), strict=True):
        print(f"\ncategories that {title} most" + ("" if rows else ": none"))
        for row in rows:
            count = f"{row['training_instances']} instances" if "training_instances" in row else ""
            print(f"{100 * row['difference']:+8.2f}  {100 * row['first']:6.2f} -> {100 * row['second']:6.2f}  "
                  f"{printable(row['name'])}  {count}".rstrip())  # fmt: skip


def evaluate_checkpoint(path: Path, overrides: list[str], output: Path | None) -> tuple[dict | None, str]:
    """(metrics, name of the configuration); metrics are None except in the main process."""
    import torch

    from bags import build, distributed
    from bags.analysis.tables import write_metrics, write_scores

    detector, meta = build.load_detector(path, overrides=overrides)
    config, stats = meta["config"], meta["stats"]
    with distributed.distributed(config.device) as device:
        dataset = build.build_val_dataset(config)
        build.check_categories(stats, dataset.index, path)
        detector.to(device, memory_format=torch.channels_last)
        folder = output or path.parent / "evaluation"
        with distributed.locked(folder, "choose another --output"):
            metrics, scores = build.predict_and_evaluate(
                detector, config, stats, dataset, folder / "predictions.json", device
            )
            if not distributed.is_main():
                return None, config.name
            write_metrics(folder, metrics)
            write_scores(folder, config.name, scores, config.test.bins)
        return metrics, config.name


if __name__ == "__main__":
    run_script(main)
