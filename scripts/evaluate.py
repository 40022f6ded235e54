"""Scores a checkpoint or a results file.

    python scripts/evaluate.py runs/glyphs-100/bags/last.pth              # predicts on its validation set
    python scripts/evaluate.py last.pth data.root=elsewhere --output out    # the same, other place
    python scripts/evaluate.py predictions.json --annotations val.json    # a results file, no model and no torch needed
    python scripts/evaluate.py predictions.json --annotations val.json --bins 20,400,8000 --engine pycocotools

Bins come from the training counts in the checkpoint, or from `instance_count` in the annotations. A results
file's numbers also go to metrics.json and categories.csv (counts, bin and AP of each category), in
--output or in the folder NAME_evaluation beside the file; they include AP_fixed (Dave et al. 2021).
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.errors import UserError, run_script


def main() -> None:
    """Parses the command line and prints the table; with --json the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="checkpoint (.pth) or results file (.json)")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for a checkpoint's configuration")
    parser.add_argument("--annotations", type=Path, help="ground truth of a results file")
    parser.add_argument("--bins", help="of a results file: rising training counts, default 10,100,1000")
    parser.add_argument("--engine", help="of a results file: hotcoco (default), or the official lvis or pycocotools")
    parser.add_argument("--output", type=Path, help="folder for what is written")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    arguments = parser.parse_intermixed_args()
    if arguments.source.suffix.lower() == ".json":
        if arguments.annotations is None:
            raise UserError(f"{arguments.source}: a results file needs --annotations, its ground truth")
        if arguments.overrides:
            raise UserError(f"{arguments.overrides[0]}: overrides are for a checkpoint, not for a results file")
        metrics, name = evaluate_results(arguments), arguments.source.stem
    else:
        for option in ("annotations", "bins", "engine"):
            if getattr(arguments, option):
                raise UserError(f"--{option} is for a results file; a checkpoint takes data.val=... or test.bins=...")
        metrics, name = evaluate_checkpoint(arguments.source, arguments.overrides, arguments.output)
    if metrics is None:  # not the main process
        return
    if arguments.json:
        print(json.dumps({k: None if math.isnan(v) else v for k, v in metrics.items()}))
    else:
        from bags.analysis.tables import render_table

        print(render_table({name: [metrics]}))


def evaluate_results(arguments: argparse.Namespace) -> dict[str, float]:
    """The numbers of boxes and, if the file has them, of masks (`mask_AP`, ...); also written."""
    from bags.analysis.tables import write_metrics
    from bags.evaluation.detection_ap import has_masks, score

    try:
        bins = tuple(int(text) for text in (arguments.bins or "10,100,1000").split(","))
    except ValueError:
        raise UserError(f"--bins {arguments.bins}: expected whole numbers separated by commas, as in 10,100") from None
    if list(bins) != sorted(set(bins)) or bins[0] < 1:
        raise UserError(f"--bins {arguments.bins}: expected rising numbers above 0")
    settings = {"boundaries": bins, "engine": arguments.engine or "hotcoco", "fixed": True}
    metrics, rows = score(arguments.annotations, arguments.source, **settings)
    if has_masks(arguments.source):
        masks, mask_rows = score(arguments.annotations, arguments.source, "segm", **settings)
        metrics |= {f"mask_{name}": value for name, value in masks.items()}
        for row, own in zip(rows, mask_rows, strict=True):
            row |= {"mask_AP": own["AP"], "mask_AP50": own["AP50"]}
    folder = arguments.output or arguments.source.with_name(f"{arguments.source.stem}_evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    write_metrics(folder, metrics)
    temporary = folder / "categories.tmp"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in rows)
    temporary.replace(folder / "categories.csv")
    print(f"written: {folder / 'metrics.json'} {folder / 'categories.csv'}", file=sys.stderr)
    return metrics


def evaluate_checkpoint(path: Path, overrides: list[str], output: Path | None) -> tuple[dict | None, str]:
    """(metrics, name of the configuration); metrics are None except in the main process."""
    import torch

    from bags import build, distributed

    detector, meta = build.load_detector(path, overrides=overrides)
    config, stats = meta["config"], meta["stats"]
    with distributed.distributed(config.device) as device:
        dataset = build.build_val_dataset(config)
        build.check_categories(stats, dataset.index, path)
        detector.to(device, memory_format=torch.channels_last)
        folder = output or path.parent / "evaluation"
        folder.mkdir(parents=True, exist_ok=True)
        metrics = build.predict_and_evaluate(detector, config, stats, dataset, folder / "predictions.json", device)
        return metrics if distributed.is_main() else None, config.name


if __name__ == "__main__":
    run_script(main)
