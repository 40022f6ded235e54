"""Score a checkpoint or a results file, and compare two results files."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bags.core import locks
from bags.core.errors import UserError
from bags.core.terminal import printable

if TYPE_CHECKING:
    from bags.evaluation.comparison import Comparison
    from bags.evaluation.truth import Truth

MOST = 8  # categories that --compare names on each side
OF_RESULTS = ("annotations", "bins", "engine", "train")
TRAIN = "--train takes training counts from train.json, a checkpoint (.pth) or a run folder"


def boundaries(text: str | None) -> tuple[int, ...]:
    """The numbers of --bins."""
    try:
        bins = tuple(int(number) for number in ("10,100,1000" if text is None else text).split(","))
    except ValueError:
        raise UserError(f"--bins {text:.200}: expected whole numbers separated by commas, as in 10,100") from None
    if list(bins) != sorted(set(bins)) or bins[0] < 1 or bins[-1] >= 2**63:
        raise UserError(f"--bins {text:.200}: expected rising numbers above 0 and below 2**63")
    return bins


def training_counts(source: Path | None, truth: "Truth") -> dict[str, list[int]]:
    """`instance_counts` and `image_counts` of the ground truth's categories, from --train; nothing without it."""
    from bags.data.index import AnnotationIndex
    from bags.data.statistics import CategoryStats

    if source is None:
        return {}
    if source.is_dir() or source.suffix.lower() == ".csv":
        from bags.analysis.run_files import read_categories

        rows = read_categories(source)
        columns = ("id", "name", "training_instances", "training_images")
        stats = CategoryStats(*(tuple(row[column] for row in rows) for column in columns))
    elif source.suffix.lower() == ".json":
        stats = CategoryStats.from_index(AnnotationIndex.open(source))
    else:
        from bags.engine.checkpoint import load_checkpoint

        stats = CategoryStats.from_dict(load_checkpoint(source)["stats"], source)
    return truth.training_counts(stats, f"--train {source}")


def say(notes: list[str], truth: "Truth", counts: dict) -> None:
    """Print notes, each once, and where the bins come from."""
    if not counts and all("instance_count" in category for category in truth.counts):
        doubt = ", although these are the numbers of its own objects, hardly those of training" * truth.counts_itself()
        notes = [*notes, f"{truth.path}: its own instance_count makes the bins{doubt}; {TRAIN}"]
    elif not counts:
        notes = [*notes, f"{truth.path}: no instance_count, so there are no bins and no AP_tail; {TRAIN}"]
    for note in dict.fromkeys(notes):
        print(f"note: {printable(note)}", file=sys.stderr)


def evaluate_results(arguments: argparse.Namespace) -> dict[str, float]:
    """The numbers of boxes and, if both files have them, of masks (`mask_AP`, ...); also written."""
    from bags.analysis.run_files import write_metrics, write_scores
    from bags.evaluation.detection_ap import ENGINES, score
    from bags.evaluation.results_file import read_results
    from bags.evaluation.truth import read_truth

    source, bins, engine = arguments.source, boundaries(arguments.bins), arguments.engine or "hotcoco"
    if engine not in ENGINES:
        raise UserError(f"engine {engine}: expected one of {', '.join(ENGINES)}")
    truth = read_truth(arguments.annotations)
    results = read_results(source, truth)
    counts: dict[str, Any] = training_counts(arguments.train, truth)
    settings = {"boundaries": bins, "engine": engine, "fixed": True, **counts}
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
    from bags.analysis.run_files import as_table, write_comparison
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
    comparisons = {
        kind: compare(truth, files[0], files[1], kind, arguments.draws, boundaries=bins, **counts)
        for kind in (["bbox", "segm"] if masks else ["bbox"])
    }
    say([note for file in files for note in notes_of(truth, file, own_counts=not counts)], truth, counts)
    if arguments.output:
        with locks.alone(arguments.output, "choose another --output"):
            write_comparison(arguments.output, comparisons)
    if arguments.json:
        print(json.dumps({kind: as_table(result) for kind, result in comparisons.items()}))
        return
    for kind, result in comparisons.items():
        print_comparison(kind, result, [str(path) for path in arguments.compare])


def print_comparison(kind: str, result: "Comparison", names: list[str]) -> None:
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
            print(
                f"{100 * row['difference']:+8.2f}  {100 * row['first']:6.2f} -> {100 * row['second']:6.2f}  "
                f"{printable(row['name'])}  {count}".rstrip()
            )


def evaluate_checkpoint(path: Path, overrides: list[str], output: Path | None) -> tuple[dict | None, str]:
    """(metrics, name of the configuration); metrics are None except in the main process."""
    import torch

    from bags.analysis.run_files import write_metrics, write_scores
    from bags.assembly.initialise import check_categories
    from bags.assembly.loaders import build_val_dataset
    from bags.assembly.models import load_detector
    from bags.core import distributed
    from bags.jobs.score import predict_and_evaluate

    detector, meta = load_detector(path, overrides=overrides)
    config, stats = meta["config"], meta["stats"]
    with distributed.distributed(config.device) as device:
        dataset = build_val_dataset(config)
        check_categories(stats, dataset.index, path)
        detector.to(device, memory_format=torch.channels_last)
        folder = output or path.parent / "evaluation"
        with distributed.locked(folder, "choose another --output"):
            metrics, scores = predict_and_evaluate(
                detector, config, stats, dataset, folder / "predictions.json", device
            )
            if not distributed.is_main():
                return None, config.name
            write_metrics(folder, metrics)
            write_scores(folder, config.name, scores, config.test.bins, config.test.figures)
        return metrics, config.name
