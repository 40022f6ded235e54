"""Detects objects in any image, or in all images of a folder.

    python scripts/predict.py runs/glyphs-100/bags/last.pth photo.jpg folder/ --output out

    python scripts/predict.py runs/glyphs-100/bags/last.pth test.json --image-folder test --output submission

Writes one drawn PNG per image and predictions.json: a list of {file_name, category_id, category,
bbox (x, y, width, height in pixels), score, and segmentation (RLE) where the detector has masks}.

Images are read as in validation: the checkpoint's data.exif says whether they are turned as their EXIF orientation
says. predictions.json is a whole list after every image, so a run that is stopped loses nothing. Images that
cannot be read and drawings that cannot be written are named on stderr and counted in the last line; the exit code is
then still 0, unless no image could be read. Subfolders are not searched. In a folder that was used before,
predictions.json and drawings of the same names are replaced. Other drawings stay, and a note on stderr counts them.

For a test set that a COCO or LVIS JSON describes, with or without annotations, it writes results.json instead: the
results file that evaluation servers take, a list of {image_id, category_id, bbox, score, and segmentation with masks}.
Nothing is drawn. Scores are then kept from the run's test.score_threshold on. Category ids are those of the JSON, found
by name, where it lists categories, else those of training.
"""

import argparse
from pathlib import Path

from bags.cli.checks import check_output_folder
from bags.core.errors import UserError
from bags.jobs.predict import detect, image_files
from bags.jobs.submission import listed_images, submit

LEAST_SCORE = 0.3  # of a drawn object


def main() -> None:
    """Parses the command line; loads, detects, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", nargs="+", type=Path, help="image files or folders, or the JSON of a test set")
    parser.add_argument("--image-folder", type=Path, help="of the images of a JSON (default: the folder of the JSON)")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    parser.add_argument("--score", type=float, help="least score (default 0.3; for a JSON: that of the run)")
    parser.add_argument("--min-size", type=int, help="shorter side in pixels (default: as trained)")
    parser.add_argument("--max-size", type=int, help="longer side in pixels (default: as trained)")
    parser.add_argument("--max-pixels", type=int, help="of the largest image (default: the run's data.max_pixels)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    arguments = parser.parse_intermixed_args()
    for name in ("min_size", "max_size", "max_pixels"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected pixels, 1 or more")
    if arguments.score is not None and not 0 <= arguments.score <= 1:
        raise UserError(f"--score {arguments.score}: expected 0 to 1")
    if arguments.min_size and arguments.max_size and arguments.min_size > arguments.max_size:
        sizes = f"--min-size {arguments.min_size} --max-size {arguments.max_size}"
        raise UserError(f"{sizes}: the shorter side cannot be the longer one")
    check_output_folder(arguments.output)
    if arguments.output.resolve() in {path.resolve() for path in arguments.images}:
        raise UserError(f"--output {arguments.output}: is the folder of the images; choose another --output")
    listed = [path for path in arguments.images if path.suffix.lower() == ".json"]
    if listed and len(arguments.images) > 1:
        raise UserError(f"{listed[0]}: the JSON of a test set is given alone; --image-folder says where its images are")
    if arguments.image_folder and not listed:
        raise UserError(f"--image-folder {arguments.image_folder}: goes with the JSON of a test set")
    folder = arguments.image_folder or arguments.images[0].parent
    files = image_files(arguments.images) if not listed else []
    if listed:
        listed_images(listed[0], folder)  # before the detector is read
    from bags.assembly.models import load_detector
    from bags.core import distributed

    output = arguments.output
    with distributed.distributed(arguments.device) as device, distributed.locked(output, "choose another --output"):
        if distributed.world_size() > 1:
            raise UserError("predict.py works in one process: start it without torchrun")
        detector, meta = load_detector(arguments.checkpoint, arguments.min_size, arguments.max_size)
        max_pixels = arguments.max_pixels or meta["config"].data.max_pixels
        detector.to(device)
        if listed:
            score = arguments.score if arguments.score is not None else meta["config"].test.score_threshold
            submit(detector, meta, listed[0], folder, output, score, max_pixels, device)
        else:
            score = arguments.score if arguments.score is not None else LEAST_SCORE
            detect(detector, meta, files, output, score, max_pixels, device)
