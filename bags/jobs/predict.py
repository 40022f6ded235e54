"""Detect objects in any images, and draw them."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bags.core.errors import UnreadableImage, UserError
from bags.core.files import JsonList
from bags.core.progress import Progress, say
from bags.core.terminal import printable
from bags.data.images import SUFFIXES, read_image

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from bags.detectors.faster_rcnn import FasterRCNN

MOST_NAMED = 10  # skipped files of a folder that are named
DRAWING = re.compile(r"\d{6,}_.*\.png", re.S)
LONGEST_STEM = 230  # bytes of an image's name in that of its drawing, which has 255 at most


def image_files(paths: list[Path]) -> list[Path]:
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


def detect(
    detector: "FasterRCNN",
    meta: dict,
    files: list[Path],
    output: Path,
    least_score: float,
    max_pixels: int,
    device: "torch.device",
) -> None:
    """Writes drawings and predictions.json to `output`, image by image."""
    from bags.engine.predict import results_entries

    stats, exif = meta["stats"], meta["config"].data.exif
    name_of = dict(zip(stats.category_ids, stats.names, strict=True))
    detector.transform.encode_masks = True
    output.mkdir(parents=True, exist_ok=True)
    objects, unreadable, undrawn, drawn = 0, 0, 0, {file.name for file in files}
    with _results(output / "predictions.json") as results:
        for number, file in enumerate(Progress(files, desc="predict", unit="image")):
            try:
                image = read_image(file, exif, max_pixels)
            except UnreadableImage as error:
                say(f"warning: left out: {error}")
                unreadable += 1
                continue
            detection = detections_of(detector, image, least_score, device)
            entries = results_entries(number, detection, stats.category_ids)
            for entry in entries:
                del entry["image_id"]
            results.extend(
                {"file_name": str(file), "category": name_of[entry["category_id"]], **entry} for entry in entries
            )
            objects += len(entries)
            try:
                _draw(output / _drawing_name(number, file), image, detection, stats.names)
                drawn.add(_drawing_name(number, file))
            except OSError as error:
                say(f"warning: drawing of {file}: cannot be written ({error})")
                undrawn += 1
    if unreadable == len(files):
        raise UserError(f"{output}: nothing predicted: none of the {unreadable} images could be read")
    others = sorted({file.name for file in output.iterdir() if file.is_file()} - drawn)
    others = [name for name in others if DRAWING.fullmatch(name)]
    if others:
        words = f"drawings that this prediction has not made: {len(others)} (first: {printable(others[0])})"
        print(f"note: {output}: {words}; remove them, or choose another --output", file=sys.stderr)
    left_out = f" ({unreadable} more left out)" if unreadable else ""
    not_drawn = f" ({undrawn} of them without a drawing)" if undrawn else ""
    summary = f"{len(files) - unreadable} images{left_out}{not_drawn}"
    print(f"{summary}, {objects} objects with a score of {least_score} or more: {output}")


def _results(path: Path) -> JsonList:
    """The results file. Raises UserError where another process writes it."""
    try:
        return JsonList(path)
    except BlockingIOError:
        raise UserError(f"{path}: another process writes it: choose another --output, or wait for that one") from None


def detections_of(detector: "FasterRCNN", image: "Image.Image", least_score: float, device: "torch.device") -> dict:
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


def _draw(path: Path, image: "Image.Image", detection: dict, names: tuple[str, ...]) -> None:
    """Writes the image with its detections."""
    import matplotlib

    from bags.analysis.plots import save_drawing

    palette = [matplotlib.colors.to_hex(colour) for colour in matplotlib.colormaps["tab10"](range(10))]
    labels = detection["labels"].tolist()
    colours = [palette[label % len(palette)] for label in labels]
    texts = [names[label - 1] for label in labels]
    save_drawing(path, image, detection["boxes"].cpu(), texts, colours, detection["scores"].tolist())
