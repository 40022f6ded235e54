"""Run on a GPU, in one command, all that a CPU cannot show; without a GPU run the same checks at tiny size.

    python scripts/check_gpu.py                        # every check, at most 6 minutes; result in runs/check_gpu.json
    python scripts/check_gpu.py --list                 # the checks
    python scripts/check_gpu.py --only steps --only throughput --output steps.json
    python scripts/check_gpu.py --minutes 3 --jobs 1   # those that are not reached are `not run`

Each check runs in a process of its own, so that one that crashes or hangs does not stop the others. Checks that measure
time or memory run alone; up to --jobs others run side by side. All data is made up. The result file is complete
after each check, and its lines are pass, fail, figure or not run. Exit code 1 if a line is fail.
"""

import argparse
import datetime
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.core.errors import UserError, run_script
from scripts.gpu_checks.running import Check, Result, Runner

NO_GPU = "torch sees no GPU: everything ran on the CPU at tiny size, and this is not a GPU result"
CHECKS = (  # in the order in which they are started: what is most important comes first
    Check("numbers", "environment", "versions, GPU", 60),
    Check("numbers", "classifiers", "losses, gradients and scores of all classifiers: the CPU's, in fp32", 60),
    Check("numbers", "postprocess", "detections from the same scores, and masks: the CPU's", 60),
    Check("numbers", "steps", "a training step of every framework: the CPU's losses and gradients", 100),
    Check("numbers", "detections", "what every framework detects: the CPU's", 60),
    Check("training", "bf16", "mixed precision: types, losses", 60),
    Check("training", "fp16", "mixed precision with loss scaling: types, losses", 60),
    Check("training", "channels_last", "a step in this memory order against the usual one", 60),
    Check("training", "fused", "fused SGD and AdamW against plain ones", 60),
    Check("training", "nccl", "a process group of one GPU", 60),
    Check("speed", "throughput", "images/s of training against torchvision's reference loop", 120, alone=True),
    Check("speed", "inference", "images/s of prediction with 1,203 categories against torchvision", 60, alone=True),
    Check("speed", "classifier_stage", "an epoch from simulated features, for 100,000 images", 60, alone=True),
    Check("speed", "memory", "peak memory and pace of steps, fp32 and bf16", 100, alone=True),
    Check("jobs", "stored", "a classifier from features that are stored on the GPU, against the CPU", 60),
    Check("jobs", "library", "bags.choose_classifier and bags.balance on the GPU", 60),
    Check("jobs", "job", "train, evaluate, predict and report as commands", 150),
    Check("jobs", "resume", "a run that was killed and resumed: the bits of an undisturbed one", 240),
    Check("training", "compiled", "train.compile against none, fp32 and bf16", 150),
    Check("training", "deterministic", "--deterministic: the same bits twice, every framework", 150),
    Check("speed", "whole", "scripts/benchmark.py whole, where there is one", 150, alone=True),
)


def main() -> None:
    """Parse the command line; run the checks, print their lines, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="run only this check; can be repeated")
    parser.add_argument("--list", action="store_true", help="show the checks and the seconds that each may take")
    parser.add_argument("--minutes", type=float, default=6.0, help="after which no check is started (default 6)")
    parser.add_argument("--jobs", type=int, help="checks side by side (default: 4 on a GPU, if the cores suffice)")
    parser.add_argument("--output", type=Path, default=Path("runs/check_gpu.json"), metavar="JSON")
    arguments = parser.parse_args()
    if arguments.list:
        for check in CHECKS:
            print(f"{check.name:<16} {check.seconds:>4} s  {check.about}")
        return
    for option in ("minutes", "jobs"):
        value = getattr(arguments, option)
        if value is not None and not 0 < value < 10_000:
            raise UserError(f"--{option} {value:g}: expected a number above 0")
    names = [check.name for check in CHECKS]
    for name in arguments.only or ():
        if name not in names:
            raise UserError(f"--only {name}: expected one of {', '.join(names)}")
    if arguments.output.is_dir():
        raise UserError(f"--output {arguments.output}: is a folder, expected a file")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sys.exit(1 if run(arguments) else 0)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen checks; return how many lines are fail."""
    import torch
    import torchvision  # noqa: F401  (so that forked checks have it)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = {
        "title": "Checks on a GPU" if device == "cuda" else NO_GPU,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "command": shlex.join(["python", "scripts/check_gpu.py", *sys.argv[1:]]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    print(head["title"], flush=True)
    result = Result(arguments.output, head)
    result.write()
    jobs = arguments.jobs or (max(1, min(4, (os.cpu_count() or 1) // 4)) if device == "cuda" else 1)
    checks = [check for check in CHECKS if not arguments.only or check.name in arguments.only]
    Runner(device, result, jobs, arguments.minutes).run(checks)
    counts = ", ".join(f"{result.count(status)} {status}" for status in ("pass", "fail", "figure", "not run"))
    print(f"{counts}; {arguments.output}")
    if device != "cuda":
        print(NO_GPU)
    return result.count("fail")


if __name__ == "__main__":
    run_script(main)
