"""Scores a checkpoint or a results file.

    python scripts/evaluate.py runs/glyphs-100/bags/last.pth              # predicts on its validation set
    python scripts/evaluate.py last.pth data.root=elsewhere --output out  # the same, other place
    python scripts/evaluate.py predictions.json --annotations val.json    # a results file, no model needed

Bins come from the training counts in the checkpoint, or from `instance_count` in the annotations.
"""

import argparse
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
    parser.add_argument(
        "--output", type=Path, help="folder for predictions.json; default: `evaluation` beside the checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    arguments = parser.parse_intermixed_args()
    if arguments.source.suffix.lower() == ".json":
        if arguments.annotations is None:
            raise UserError(f"{arguments.source}: a results file needs --annotations, its ground truth")
        if arguments.overrides:
            raise UserError(f"{arguments.overrides[0]}: overrides are for a checkpoint, not for a results file")
        from bags.evaluation.detection_ap import evaluate

        metrics, name = evaluate(arguments.annotations, arguments.source), arguments.source.stem
    else:
        if arguments.annotations:
            raise UserError("--annotations is for a results file; a checkpoint takes data.val=...")
        metrics, name = evaluate_checkpoint(arguments.source, arguments.overrides, arguments.output)
    if metrics is None:  # not the main process
        return
    if arguments.json:
        print(json.dumps({k: None if math.isnan(v) else v for k, v in metrics.items()}))
    else:
        from bags.analysis.tables import render_table

        print(render_table({name: [metrics]}))


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
