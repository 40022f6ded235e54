"""Measures ours against its peer, interleaved in one run: medians, and peer / ours as ratio (more is better).

    python scripts/benchmark.py loss            # GroupSoftmax against plain cross entropy, forward + backward
    python scripts/benchmark.py inference       # detections and masks of an image against torchvision's postprocessing
    python scripts/benchmark.py evaluation      # LVIS evaluation against the official lvis, if it is installed
    python scripts/benchmark.py data            # AnnotationIndex on annotations like a tenth of LVIS v1 train
    python scripts/benchmark.py data --full     # ... like all of it (1.27 million; needs 10 GB of memory)
    python scripts/benchmark.py train_step      # a step of R50-FPN against torchvision's; GroupSoftmax against softmax
    python scripts/benchmark.py large_models --full --repeats 1  # memory and seconds of the models of Tables 2 and 3
    python scripts/benchmark.py throughput      # images/s of our training loop against torchvision's reference loop
    python scripts/benchmark.py classifier_stage  # BAGS from stored features, R50-FPN, against the live detector
    python scripts/benchmark.py whole --full --repeats 3      # validation of LVIS v1, from image files to AP, each step
    python scripts/benchmark.py scale_categories --full --repeats 3  # seconds and memory with 80 to 21,000 categories
    python scripts/benchmark.py scale_images --full --repeats 1  # ... and with 1,000 to 100,000 images
    python scripts/benchmark.py loss --json     # [{case, ours_s, peer, peer_s, ratio, identical}, ...]

Memory is measured in processes of its own; those cases have ours_mb and peer_mb instead of seconds.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.cli.checks import check_save
from bags.core.errors import UserError, run_script

NAMES = (
    "loss",
    "train_step",
    "large_models",
    "throughput",
    "classifier_stage",
    "inference",
    "evaluation",
    "data",
    "scale_categories",
    "scale_images",
    "whole",
)


def main() -> None:
    """Parses the command line; prints a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", type=Path, metavar="JSON", help="keep the cases, the command and the environment")
    parser.add_argument("--full", action="store_true", help="the full size, where there is one")
    parser.add_argument("--rows", help="comma-separated rows of lvis_v0.5, for large_models (default: all six)")
    parser.add_argument("--repeats", type=int, default=31, help="interleaved repeats of each case (default 31)")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        raise UserError(f"--repeats {arguments.repeats}: expected 1 or more")
    check_save(arguments.save)
    benchmark = importlib.import_module(f"scripts.benchmarks.{arguments.name}")
    results = getattr(benchmark, arguments.name)(arguments)
    if arguments.save:
        from bags.analysis.results import save_benchmark

        options = f"{' --full' if arguments.full else ''}{f' --rows {arguments.rows}' if arguments.rows else ''}"
        command = f"python scripts/benchmark.py {arguments.name}{options} --repeats {arguments.repeats}"
        save_benchmark(arguments.save, (benchmark.__doc__ or "").strip(), command, results)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    from bags.analysis.results import quantity, render_cases

    if "peer" not in results[0]:
        print(render_cases(results))
        return
    print(f"{'case':<62} {'ours':>10} {'peer':>10} {'peer/ours':>9} {'ours/peer':>9}  identical  peer is")
    for r in results:
        times = f"{quantity(r, 'ours'):>10} {quantity(r, 'peer'):>10}"
        ratios = f"{r['ratio']:>9.2f} {1 / r['ratio']:>9.2f}"
        print(f"{r['case']:<62} {times} {ratios}  {r['identical']!s:<9}  {r['peer']}")


if __name__ == "__main__":
    run_script(main)
