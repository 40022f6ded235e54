"""Writes a trained detector as ONNX, which runs without this project and without PyTorch.

    python scripts/export.py runs/glyphs-100/bags/last.pth --output model.onnx --images photos/
    python scripts/export.py runs/glyphs-100/bags/last.pth --output model.onnx test.score_threshold=0.3

Every classifier and every framework can be written. The file takes one RGB image [3, height, width] of any size, as
float32 in 0..1, and gives boxes in pixels of that image, scores, labels, category ids and masks. Before it is
written, its detections in ONNX Runtime are compared with the detector's, on up to --number images and on noise.
If they differ, nothing is written and one line says what differs. scripts/run_onnx.py shows how to run the file.
"""

import argparse
from pathlib import Path

from bags.cli.arguments import split_arguments
from bags.core.errors import UserError


def main() -> None:
    """Parse the command line, and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="+", help="a checkpoint, and test.key=value overrides")
    parser.add_argument("--output", type=Path, required=True, help="file to write, which ends in .onnx")
    parser.add_argument("--images", type=Path, help="an image or a folder to compare on (default: validation images)")
    parser.add_argument("--number", type=int, default=20, help="most images to compare on (default 20)")
    parser.add_argument("--min-size", type=int, help="shorter side in pixels (default: as trained)")
    parser.add_argument("--max-size", type=int, help="longer side in pixels (default: as trained)")
    arguments = parser.parse_intermixed_args()
    for name in ("number", "min_size", "max_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    paths, overrides = split_arguments(arguments.checkpoint)
    if len(paths) != 1:
        raise UserError(f"expected one checkpoint, got {len(paths)}: {', '.join(map(str, paths)) or 'none'}")
    from bags.jobs.export import export

    sizes = arguments.min_size, arguments.max_size
    images = [arguments.images] if arguments.images else []
    export(paths[0], arguments.output, images, arguments.number, overrides, *sizes)
