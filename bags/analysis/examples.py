"""Detections of runs in validation images: boxes judged right or wrong, and crops around single objects."""

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from PIL import Image

from bags.core.errors import UserError, system_error
from bags.core.files import read_bytes

TRUTH, CORRECT, WRONG, ASIDE = "#1b6ca8", "#2e933c", "#d1495b", "#9a9a9a"
LEAST_SCORE = 0.4  # of a drawn detection
BEST_FEW = 3  # detections of an image that are drawn whatever their scores
SAME = 0.5  # IoU from which a detection belongs to an object
LEAST_CROP, AROUND = 120, 2.5  # least side of a crop in pixels, and in multiples of the object's longer side
GUESSES = 3  # detections of an object that are listed


class Example(NamedTuple):
    """A crop around an object of a category. A drawing holds arguments of `plots.draw_boxes`, in the crop's pixels."""

    category: dict  # its row of categories.csv
    image: Image.Image
    source: str  # the image's file name
    truth: dict
    drawings: dict[str, dict]  # run -> drawing of its detections
    guesses: dict[str, list[tuple[str, float]]]  # run -> category names and scores of detections of it, best first


def read_detections(folder: Path, categories: Container[int]) -> list[dict]:
    """Read the `predictions.json` of a run. Raises UserError for other content or other categories."""
    path = folder / "predictions.json"
    mend = f"remove {folder / 'metrics.json'} and train again: only the evaluation is run"
    try:
        entries = orjson.loads(read_bytes(path))
        if not isinstance(entries, list):
            raise TypeError
        for entry in entries:
            image_id, category_id, score, box = (entry[key] for key in ("image_id", "category_id", "score", "bbox"))
            numbers = [score, *box]
            whole = type(image_id) is type(category_id) is int
            if len(numbers) != 5 or not whole or not all(type(n) in (int, float) for n in numbers):
                raise TypeError
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {mend}") from None
    except OSError as error:
        raise UserError(system_error(error, path)) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not this run's results: expected a list of detections; {mend}") from None
    unknown = next((entry["category_id"] for entry in entries if entry["category_id"] not in categories), None)
    if unknown is not None:
        raise UserError(f"{path}: not this run's results: category_id {unknown!r:.60} is unknown; {mend}")
    return entries


def by_image(entries: Iterable[dict]) -> dict[int, list[dict]]:
    """Group detections by image id."""
    detections: dict[int, list[dict]] = {}
    for entry in entries:
        detections.setdefault(entry["image_id"], []).append(entry)
    return detections


def corners(entries: list[dict]) -> np.ndarray:
    """Boxes float32 [K, 4] x1, y1, x2, y2 of detections, in pixels."""
    boxes = np.array([entry["bbox"] for entry in entries], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU [K, L] in 0..1 of boxes [K, 4] and [L, 4]; 0 for empty boxes."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(2)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def judged(
    entries: list[dict], truth: dict, name_of: dict[int, str], least: float = LEAST_SCORE, best: int = 0
) -> dict:
    """Drawing of an image's detections: green if object and category are right, else red.

    Those with at least `least` as score are drawn, and the `best` ones of the image whatever their scores.
    """
    ranked = sorted(entries, key=lambda entry: -entry["score"]) if best else entries
    kept = [entry for rank, entry in enumerate(ranked) if rank < best or entry["score"] >= least]
    boxes = corners(kept)
    names = [name_of[entry["category_id"]] for entry in kept]
    same = overlap(boxes, np.asarray(truth["boxes"], np.float32).reshape(-1, 4)) >= SAME
    right = [
        any(o and name == true for o, true in zip(row, truth["names"], strict=True))
        for row, name in zip(same.tolist(), names, strict=True)
    ]
    colours = [CORRECT if r else WRONG for r in right]
    return {"boxes": boxes, "names": names, "colours": colours, "scores": [entry["score"] for entry in kept]}


def examples(dataset: Any, rows: list[dict], runs: dict[str, dict[int, list[dict]]], name_of: dict[int, str]) -> list:
    """Choose for each category (a row of categories.csv) its validation object of median size: a list of Examples.

    dataset: a DetectionDataset; runs: name -> detections `by_image`. Categories without an object are left out.
    """
    index, chosen = dataset.index, []
    label_of = {category: label for label, category in enumerate(index.category_ids.tolist(), start=1)}
    for row in rows:
        objects = np.flatnonzero((index.labels == label_of[row["id"]]) & ~index.crowd)
        if len(objects):
            areas = (index.boxes[objects, 2:] - index.boxes[objects, :2]).prod(1)
            median = objects[np.argsort(areas, kind="stable")[len(objects) // 2]]
            chosen.append(_example(dataset, row, int(median), runs, name_of))
    return chosen


def _example(dataset: Any, row: dict, annotation: int, runs: dict[str, dict], name_of: dict[int, str]) -> Example:
    index = dataset.index
    position = int(index.owners[annotation])
    image, target = dataset.read(position)
    box = np.asarray(index.boxes[annotation])
    window = crop_window(box, image.size)
    names = [name_of[int(index.category_ids[label - 1])] for label in target["labels"].tolist()]
    truth = {"boxes": target["boxes"].numpy(), "names": names}
    drawings, guesses = {}, {}
    for run, detections in runs.items():
        entries = sorted(detections.get(target["image_id"], ()), key=lambda entry: -entry["score"])
        on_object = overlap(corners(entries), box[None])[:, 0] >= SAME
        of_object = [entry for entry, on in zip(entries, on_object, strict=True) if on]
        guesses[run] = [(name_of[entry["category_id"]], entry["score"]) for entry in of_object[:GUESSES]]
        others = [e for e, on in zip(entries, on_object, strict=True) if not on and e["score"] >= LEAST_SCORE]
        drawing = judged([*others, *of_object[:1]], truth, name_of, least=0)
        for k, entry in enumerate(others):  # names of other categories nearby would hide the object
            drawing["names"][k] = row["name"] if entry["category_id"] == row["id"] else ""
        drawings[run] = cropped(drawing, window)
    truth["names"] = [name if name == row["name"] else "" for name in names]
    truth["colours"] = [TRUTH if name == row["name"] else ASIDE for name in names]
    file_name = index.file_name(position)
    return Example(row, image.crop(window), file_name, cropped(truth, window), drawings, guesses)


def crop_window(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop around a box [4], inside an image of (width, height) pixels."""
    side = max(LEAST_CROP, AROUND * float(max(box[2:] - box[:2])))
    low, high = [], []
    for first, last, limit in zip(box[:2].tolist(), box[2:].tolist(), size, strict=True):
        length = min(limit, round(side))
        start = min(max(0, round((first + last - length) / 2)), limit - length)
        low.append(start)
        high.append(start + length)
    return (*low, *high)


def cropped(drawing: dict, window: tuple[int, int, int, int]) -> dict:
    """Keep the boxes that reach into the window, in its pixels."""
    left, top, right, bottom = window
    boxes = drawing["boxes"] - np.array([left, top, left, top], np.float32)
    boxes = np.clip(boxes, 0, [right - left, bottom - top] * 2)
    visible = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] > 1).all(1)).tolist()
    rest = {key: [column[k] for k in visible] for key, column in drawing.items() if key != "boxes"}
    return {"boxes": boxes[visible]} | rest
