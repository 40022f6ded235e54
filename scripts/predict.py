"""Detects objects in any image, or in all images of a folder.

    python scripts/predict.py runs/glyphs-100/bags/last.pth photo.jpg folder/ --output out

Writes one drawn PNG per image and predictions.json: a list of {file_name, category_id, category,
bbox (x, y, width, height in pixels), score, and segmentation (RLE) where the detector has masks}.

Images are read as in validation: the checkpoint's data.exif says whether they are turned as their EXIF orientation
says. predictions.json is a whole list after every image, so a run that is stopped loses nothing. Images that
cannot be read and drawings that cannot be written are named on stderr and counted in the last line; the exit code is
then still 0, unless no image could be read. Subfolders are not searched.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.data.images import SUFFIXES, read_image
from bags.errors import UnreadableImage, UserError, run_script
from bags.files import JsonList

MOST_NAMED = 10  # skipped files of a folder that are named
LONGEST_STEM = 230  # bytes of an image's name in that of its drawing, which has 255 at most


def main() -> None:
    """Parses the command line; loads, detects, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", nargs="+", type=Path, help="image files or folders")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    parser.add_argument("--score", type=float, default=0.3, help="least score (default 0.3)")
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
    if not 0 <= arguments.score <= 1:
        raise UserError(f"--score {arguments.score}: expected 0 to 1")
    files = _image_files(arguments.images)
    from bags import distributed
    from bags.build import load_detector

    output = arguments.output
    with distributed.distributed(arguments.device) as device, distributed.locked(output, "choose another --output"):
        if distributed.world_size() > 1:
            raise UserError("predict.py works in one process: start it without torchrun")
        detector, meta = load_detector(arguments.checkpoint, arguments.min_size, arguments.max_size)
        max_pixels = arguments.max_pixels or meta["config"].data.max_pixels
        detect(detector.to(device), meta, files, output, arguments.score, max_pixels, device)


def _image_files(paths: list[Path]) -> list[Path]:
    """The images among files and folders. Says what of a folder is skipped."""
    files = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.iterdir())
            chosen = [p for p in inside if p.suffix.lower() in SUFFIXES and not p.is_dir()]
            files += chosen
            skipped = [f"{p.name}/" if p.is_dir() else p.name for p in inside if p not in set(chosen)]
            if chosen and skipped:
                more = f" and {len(skipped) - MOST_NAMED} more" if len(skipped) > MOST_NAMED else ""
                names = f"{', '.join(skipped[:MOST_NAMED])}{more}"
                print(f"note: {path}: skipped, by their suffix no images: {names}", file=sys.stderr)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such image'}")
    if not files:
        raise UserError(f"{', '.join(map(str, paths))}: no image in there ({' '.join(sorted(SUFFIXES))})")
    return files


def detect(detector, meta: dict, files: list[Path], output: Path, least_score: float, max_pixels: int, device) -> None:
    """Writes drawings and predictions.json to `output`, image by image."""
    from tqdm import tqdm

    from bags.engine.predict import results_entries

    stats, exif = meta["stats"], meta["config"].data.exif
    name_of = dict(zip(stats.category_ids, stats.names, strict=True))
    detector.transform.encode_masks = True
    output.mkdir(parents=True, exist_ok=True)
    objects, unreadable, undrawn = 0, 0, 0
    with _results(output / "predictions.json") as results:
        for number, file in enumerate(tqdm(files, unit="image")):
            try:
                image = read_image(file, exif, max_pixels)
            except UnreadableImage as error:
                tqdm.write(f"warning: left out: {error}", file=sys.stderr)
                unreadable += 1
                continue
            detection = _detections(detector, image, least_score, device)
            entries = results_entries(number, detection, stats.category_ids)
            for entry in entries:
                del entry["image_id"]
            results.extend(
                {"file_name": str(file), "category": name_of[entry["category_id"]], **entry} for entry in entries
            )
            objects += len(entries)
            try:
                _draw(output / _drawing_name(number, file), image, detection, stats.names)
            except OSError as error:
                tqdm.write(f"warning: drawing of {file}: cannot be written ({error})", file=sys.stderr)
                undrawn += 1
    if unreadable == len(files):
        raise UserError(f"{output}: nothing predicted: none of the {unreadable} images could be read")
    left_out = f" ({unreadable} more left out)" if unreadable else ""
    not_drawn = f" ({undrawn} of them without a drawing)" if undrawn else ""
    seen = f"{len(files) - unreadable} images{left_out}{not_drawn}"
    print(f"{seen}, {objects} objects with a score of {least_score} or more: {output}")


def _results(path: Path) -> JsonList:
    """The results file. Raises UserError where another process writes it."""
    try:
        return JsonList(path)
    except BlockingIOError:
        raise UserError(f"{path}: another process writes it: choose another --output, or wait for that one") from None


def _detections(detector, image, least_score: float, device) -> dict:
    """The detections of one image with a score of `least_score` or more: boxes, labels, scores, and rles of masks."""
    import torch

    from bags.data.transforms import to_input

    with torch.inference_mode():
        detection = detector([to_input(image).to(device)])[0]
    kept = torch.where(detection["scores"] >= least_score)[0]
    rles = detection.pop("rles", [])
    detection = {key: value[kept] for key, value in detection.items()}
    detection["rles"] = [rles[k] for k in kept.tolist()] if rles else []
    return detection


def _drawing_name(number: int, file: Path) -> str:
    """The number keeps names apart; a stem that would make the name too long is cut."""
    return f"{number:06d}_{os.fsencode(file.stem)[:LONGEST_STEM].decode(errors='ignore')}.png"


def _draw(path: Path, image, detection: dict, names: tuple[str, ...]) -> None:
    """Writes the image with its detections."""
    import matplotlib

    from bags.analysis.plots import save_drawing

    palette = [matplotlib.colors.to_hex(colour) for colour in matplotlib.colormaps["tab10"](range(10))]
    labels = detection["labels"].tolist()
    colours = [palette[label % len(palette)] for label in labels]
    texts = [names[label - 1] for label in labels]
    save_drawing(path, image, detection["boxes"].cpu(), texts, colours, detection["scores"].tolist())


if __name__ == "__main__":
    run_script(main)
