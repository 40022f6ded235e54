"""Detections of a test set that a JSON file describes, as a results file for its evaluation server."""

import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bags.core.errors import UnreadableImage, UserError
from bags.core.files import JsonList
from bags.core.progress import Progress, say
from bags.data.images import read_image
from bags.data.json_files import read_json
from bags.data.packing import category_name, file_name_of, unique_ids
from bags.data.statistics import CategoryStats

if TYPE_CHECKING:
    import torch

    from bags.detectors.faster_rcnn import FasterRCNN

NEAR = 3  # names that an unknown one is compared with


def listed_images(file: Path, folder: Path) -> list[tuple[int, Path]]:
    """(id, path) of the images of a COCO or LVIS JSON; annotations are not needed. Raises UserError for other files."""
    content = read_json(file)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images or not all(isinstance(image, dict) for image in images):
        raise UserError(f"{file}: expected an object with a list `images` of at least one image")
    ids = unique_ids(file, "images", images).tolist()
    paths = [folder / file_name_of(file, image) for image in images]
    absent = next((k for k, path in enumerate(paths) if not path.is_file()), None)
    if absent is not None:
        raise UserError(
            f"{paths[absent]}: image {ids[absent]} of {file} is missing; --image-folder says where they are"
        )
    return list(zip(ids, paths, strict=True))


def submitted_ids(file: Path, stats: CategoryStats) -> tuple[int, ...]:
    """The category id, in a file, of each category of a checkpoint: by name, or by equal ids where it lists none.

    Raises UserError for a name that the file lacks, with the nearest ones, or that it has twice.
    """
    content: Any = read_json(file)
    listed = content.get("categories")
    if not listed:
        return stats.category_ids
    if not isinstance(listed, list) or not all(isinstance(category, dict) for category in listed):
        raise UserError(f"{file}: `categories`: expected a list of objects")
    unique_ids(file, "categories", listed)
    ids: dict[str, list[int]] = {}
    for category in listed:
        ids.setdefault(category_name(category), []).append(category["id"])
    chosen = []
    for name, key in zip(stats.names, stats.category_ids, strict=True):
        same = ids.get(name, [])
        if key in same:  # of two equal names the one with our id
            chosen.append(key)
        elif len(same) == 1:
            chosen.append(same[0])
        elif same:
            raise UserError(f"{file}: {len(same)} categories are named '{name}' (ids {', '.join(map(str, same))})")
        else:
            near = difflib.get_close_matches(name, ids, NEAR) or sorted(ids)[:NEAR]
            names = ", ".join(f"'{other}'" for other in near)
            raise UserError(f"{file}: the detector's category '{name}' is not in it; nearest: {names}")
    return tuple(chosen)


def submit(
    detector: "FasterRCNN",
    meta: dict,
    file: Path,
    folder: Path,
    output: Path,
    least_score: float,
    max_pixels: int,
    device: "torch.device",
) -> None:
    """Write `results.json` to `output`: a list of {image_id, category_id, bbox, score, segmentation for masks}."""
    from bags.engine.predict import results_entries
    from bags.jobs.predict import detections_of

    images, ids = listed_images(file, folder), submitted_ids(file, meta["stats"])
    detector.transform.encode_masks = True
    output.mkdir(parents=True, exist_ok=True)
    path, objects, unreadable = output / "results.json", 0, 0
    try:
        results = JsonList(path)
    except BlockingIOError:
        raise UserError(f"{path}: another process writes it: choose another --output, or wait for it") from None
    with results:
        for image_id, image_path in Progress(images, desc="predict", unit="image"):
            try:
                image = read_image(image_path, meta["config"].data.exif, max_pixels)
            except UnreadableImage as error:
                say(f"warning: left out: {error}")
                unreadable += 1
                continue
            entries = results_entries(image_id, detections_of(detector, image, least_score, device), ids)
            results.extend(entries)
            objects += len(entries)
    if unreadable == len(images):
        raise UserError(f"{output}: nothing predicted: none of the {unreadable} images could be read")
    if unreadable:
        print(f"warning: {path}: {unreadable} images could not be read and have no detections", file=sys.stderr)
    print(f"{len(images) - unreadable} images, {objects} objects with a score of {least_score} or more: {path}")
