"""Datasets prepared from a checkout of a public repository: their folder, its files, and checks that all share.

A prepared folder holds instances_SPLIT.json and SPLIT/ with the images of each split, and settings.json. The folder
gets its name when it is complete.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bags.core import locks
from bags.core.errors import UserError
from bags.core.files import naming, read_bytes, write_text
from bags.data.json_files import as_json

RARE, COMMON = 10, 100  # most training images of a rare and of a common category, as in LVIS


@dataclass(frozen=True)
class Origin:
    """A public repository, and a file or folder in it by which a checkout is known.

    format: raised when the prepared files change.
    """

    dataset: str
    repository: str  # owner/name on GitHub
    commit: str
    mark: str
    format: int = 1


@dataclass
class Split:
    """Images and annotations of one split. Annotations name their category; `write_splits` replaces it by an id."""

    images: list[dict]
    annotations: list[dict]


Make = Callable[[Path, Path], tuple[dict[str, Split], list[str], str]]  # (source, folder) -> splits, categories, info


def prepare(origin: Origin, source: Path, output: Path, make: Make) -> Path:
    """Make a prepared folder from a checkout unless it exists, and return it.

    make: writes the images below the folder that it is given. Raises UserError for a folder that is no checkout, and
    for an output that holds anything else. After an error or a signal nothing of the output remains; what a killed
    command leaves (OUTPUT.partial) is removed by the next one.
    """
    settings = asdict(origin)
    if output.exists() or output.is_symlink():
        _check_settings(output, settings)
        return output
    if not (source / origin.mark).exists():
        words = f"expected a checkout of github.com/{origin.repository} (commit {origin.commit})"
        raise UserError(f"--source {source}: {origin.mark} is missing; {words}")
    folder = output.with_name(output.name + ".partial")
    with locks.alone(folder, "choose another --output"):
        try:
            _clear(folder)
            splits, categories, description = make(source, folder)
            write_splits(folder, splits, categories, description)
            write_text(folder / "settings.json", json.dumps(settings, indent=1))
            with naming(output):
                (folder / locks.NAME).unlink()
                os.replace(folder, output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return output


def _clear(folder: Path) -> None:
    """Remove what an earlier command left; the lock stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != locks.NAME:
            path.unlink()


def _check_settings(output: Path, wanted: dict) -> None:
    """Raise UserError where a folder holds anything but the dataset that is wanted."""
    try:
        settings = json.loads(read_bytes(output / "settings.json"))
    except (OSError, ValueError, RecursionError):
        settings = None
    if settings != wanted:
        words = f"exists and is not {wanted['dataset']} as this version prepares it"
        raise UserError(f"--output {output}: {words}; remove it, or choose another folder")


def image_folders(folder: Path, names: tuple[str, ...]) -> None:
    """Make the image folder of each split."""
    for name in names:
        (folder / name).mkdir()


def write_splits(folder: Path, splits: dict[str, Split], categories: list[str], description: str) -> None:
    """Write instances_SPLIT.json of each split. Categories get ids from 1 in the given order, and train's counts.

    Crowd regions are not counted. Annotations of categories that are not listed are left out.
    """
    ids = {name: number for number, name in enumerate(categories, start=1)}
    trained = [a for a in splits["train"].annotations if not a["iscrowd"]]
    objects = Counter(a["category"] for a in trained)
    in_images = Counter(category for _, category in {(a["image_id"], a["category"]) for a in trained})
    listed = [
        {
            "id": ids[name],
            "name": name,
            "instance_count": objects[name],
            "image_count": in_images[name],
            "frequency": "r" if in_images[name] <= RARE else "c" if in_images[name] <= COMMON else "f",
        }
        for name in categories
    ]
    for split, content in splits.items():
        annotations = [
            {"id": a["id"], "image_id": a["image_id"], "category_id": ids[a["category"]]}
            | {key: value for key, value in a.items() if key not in ("id", "image_id", "category")}
            for a in content.annotations
            if a["category"] in ids
        ]
        path = folder / f"instances_{split}.json"
        info = {"description": description.format(split=split)}
        whole = {"info": info, "images": content.images, "annotations": annotations, "categories": listed}
        write_text(path, as_json(whole, path))


def trained_categories(train: Split) -> list[str]:
    """The categories with an object in train that is no crowd region, sorted."""
    return sorted({a["category"] for a in train.annotations if not a["iscrowd"]})


def clipped(box: tuple[float, ...], tile: tuple[float, ...]) -> tuple[float, ...] | None:
    """The part (left, top, right, bottom) of a box inside a tile, from the tile's corner; None where it has no area.

    box, tile: left, top, right, bottom in pixels.
    """
    left, top = max(box[0] - tile[0], 0), max(box[1] - tile[1], 0)
    right, bottom = min(box[2] - tile[0], tile[2] - tile[0]), min(box[3] - tile[1], tile[3] - tile[1])
    return (left, top, right, bottom) if right > left and bottom > top else None


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and text of the lines of a file that are not empty. Raises UserError where it is missing."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; the checkout is not complete") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; fetch the checkout again") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()
