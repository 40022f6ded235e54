"""A trained checkpoint as an ONNX file, compared on the user's own images."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from bags.assembly.loaders import build_val_dataset
from bags.assembly.models import load_detector
from bags.assembly.onnx_export import Exported, check_output, export_onnx
from bags.config.sections import Config
from bags.core.errors import UnreadableImage, UserError
from bags.data.images import read_image
from bags.data.transforms import to_input
from bags.jobs.predict import image_files

LONGEST = 1333  # pixels of a side that masks are compared at; those of a large photograph would fill the memory


def export(
    checkpoint: Path,
    output: Path,
    folders: Sequence[Path],
    number: int,
    overrides: Sequence[str],
    min_size: int | None = None,
    max_size: int | None = None,
) -> None:
    """Write a checkpoint as ONNX after a comparison on up to `number` images, and print how far the detections differ.

    folders: image files or folders; none: validation images of the checkpoint's own configuration, where they exist.
    Raises UserError, and leaves no file, where detections differ (see `export_onnx`).
    """
    check_output(output)
    detector, meta = load_detector(checkpoint, min_size, max_size, overrides)
    config = meta["config"]
    files = image_files(list(folders)) if folders else _validation_files(config)
    if not files:
        print("note: no validation images; --images FOLDER compares on your own, not only on noise", file=sys.stderr)
    images = list(_images(files, number, config))
    if files and not images:
        raise UserError(f"{files[0].parent}: none of the first images could be read; choose others with --images")
    exif = json.dumps(config.data.exif)  # whether images are turned as their EXIF orientation says
    texts = {"framework": config.detector.framework, "name": config.name, "exif": exif}
    exported = export_onnx(detector, output, images, meta["categories"], texts)
    print(summary(exported))
    if not exported.detections:
        words = "nothing was detected in these images, so no scores and boxes were compared"
        print(f"warning: {words}: choose others with --images, or a lower test.score_threshold", file=sys.stderr)


def summary(exported: Exported) -> str:
    """One line about an exported file."""
    size = f"{exported.path.stat().st_size / 1e6:.1f} MB"
    masks = f", masks by {exported.masks:.1g}" if exported.masks else ""
    undecided = f"; rounding decides about {exported.undecided} more" if exported.undecided else ""
    return (
        f"exported: {exported.path} ({size}). ONNX Runtime detects the same in {exported.images} images of "
        f"{exported.sizes} sizes: {exported.detections} detections with equal labels; scores differ by at most "
        f"{exported.scores:.1g}, boxes by {exported.boxes:.1g} pixels{masks}{undecided}"
    )


def _validation_files(config: Config) -> list[Path]:
    """The validation images of a configuration, none where they do not exist."""
    try:
        dataset = build_val_dataset(config)
    except (UserError, OSError):
        return []
    index, folder = dataset.index, dataset.folder
    files = [index.image_path(folder, image) for image in range(len(index))]
    return [file for file in files if file.is_file()]


def _images(files: Sequence[Path], number: int, config: Config) -> Iterator[Tensor]:
    """Up to `number` of the images that can be read, spread over all files, as the detector takes them."""
    step = max(1, len(files) // number)
    read = 0
    for file in files[::step]:
        if read == number:
            return
        try:
            image = read_image(file, config.data.exif, config.data.max_pixels)
        except UnreadableImage as error:
            print(f"warning: left out: {error}", file=sys.stderr)
            continue
        if config.detector.has_masks:
            image.thumbnail((LONGEST, LONGEST))
        read += 1
        yield to_input(image)
