"""Turns a detector of another project into a checkpoint of this one, or a checkpoint into torchvision's weights.

    python scripts/import_weights.py COCO_V1 configs/coco/softmax --output weights/coco.pth
    python scripts/import_weights.py released.pth configs/lvis_v0.5/htc_bags --output weights/htc_bags.pth
    python scripts/import_weights.py --export runs/coco/softmax/last.pth --output for_torchvision.pth

The first argument is a file, of torchvision's detectors or of the paper's code (mmdet 1.0), or the name
of torchvision's own weights; the configuration says what it holds, and is checked against it: framework,
backbone, categories, groups. Categories and their training counts come from --annotations, by default
the configuration's training file: a COCO or LVIS JSON, or only LVIS's list of categories.
"""

import argparse
from pathlib import Path

from bags.config.load import load_config
from bags.core.errors import UserError
from bags.engine.checkpoint import write_checkpoint
from bags.jobs.import_weights import export, import_weights


def main() -> None:
    """Parses the command line; imports or exports, and says what it did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="*", help="weights, then their configuration and section.key=value overrides")
    parser.add_argument("--annotations", type=Path, help="where categories and training counts come from")
    parser.add_argument("--eps", type=float, help="of the file's frozen batch normalisation (COCO_V1: 0, else 1e-5)")
    parser.add_argument("--export", type=Path, help="a checkpoint, to be written as torchvision's state dict")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    arguments = parser.parse_intermixed_args()
    if arguments.output.suffix != ".pth":
        raise UserError(f"--output {arguments.output}: expected a file name that ends in .pth")
    if arguments.output.exists():
        raise UserError(f"--output {arguments.output}: exists already: remove it, or choose another name")
    if arguments.eps is not None and not 0 <= arguments.eps < 1:
        raise UserError(f"--eps {arguments.eps}: expected a number from 0 to 1")
    if arguments.export:
        if arguments.source or arguments.annotations or arguments.eps is not None:
            raise UserError("--export takes only a checkpoint and --output")
        export(arguments.export, arguments.output)
        return
    if len(arguments.source) < 2:
        raise UserError("expected weights (a .pth file, or COCO_V1) and the configuration that describes them")
    source, file, *overrides = arguments.source
    config = load_config(file, overrides)
    content, lines = import_weights(source, config, arguments.annotations, arguments.eps)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(arguments.output, content)
    print("\n".join(lines), f"written: {arguments.output}", sep="\n")
