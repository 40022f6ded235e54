"""Datasets prepared from a checkout of a public repository: their folder, its files, and checks that all share.

A prepared folder holds instances_SPLIT.json and SPLIT/ with the images of each split, and settings.json. The folder
gets its name when it is complete.
"""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bags.core import locks
from bags.core.errors import UserError
from bags.core.files import naming, read_bytes, write_text
from bags.core.terminal import printable
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
    """Images and annotations of one split. Annotations name their category; `write_splits` replaces it by an id.

    source: the folder or the lists that it is made of, for messages.
    """

    source: str
    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)


@dataclass
class Made:
    """What is written to a prepared folder beside the images, and the number of pages or photographs behind it."""

    splits: dict[str, Split]
    categories: list[str]
    description: str
    sources: int


Make = Callable[[Path, Path], Made]  # (source, folder) -> content; writes the images below the folder


def prepare(origin: Origin, source: Path, output: Path, make: Make, published: int) -> Path:
    """Make a prepared folder from a checkout unless it exists, and return it.

    published: pages or photographs of the whole checkout; a note says where there are fewer or more. Raises UserError
    for a folder that is no checkout, for a split without images or objects, and for an output that holds anything else.
    After an error or a signal nothing of the output remains; what a killed command leaves (OUTPUT.partial) is removed
    by the next one.
    """
    settings = asdict(origin)
    if output.exists() or output.is_symlink():
        _note_number(output, _check_settings(output, settings) or published, published)
        return output
    if not (source / origin.mark).exists():
        words = f"expected a checkout of github.com/{origin.repository} (commit {origin.commit})"
        raise UserError(f"--source {source}: {origin.mark} is missing; {words}")
    folder = output.with_name(output.name + ".partial")
    with locks.alone(folder, "choose another --output"):
        try:
            _clear(folder)
            made = make(source, folder)
            _check_splits(made)
            write_splits(folder, made.splits, made.categories, made.description)
            if made.sources != published:
                settings["sources"] = made.sources
            write_text(folder / "settings.json", json.dumps(settings, indent=1))
            with naming(output):
                (folder / locks.NAME).unlink()
                os.replace(folder, output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    _note_number(output, made.sources, published)
    return output


def _check_splits(made: Made) -> None:
    """Raise UserError for a split without images, and for one without objects that count."""
    for name, split in made.splits.items():
        counted = any(not a["iscrowd"] and a["category"] in made.categories for a in split.annotations)
        if not counted:  # nor without images
            what = "objects" if name == "train" else "objects of the categories in train"
            words = f"{name} would have no {what if split.images else 'images'}"
            raise UserError(f"{split.source}: {words}; the checkout is not complete: fetch it again")


def _note_number(output: Path, sources: int, published: int) -> None:
    """Print a note where a dataset is made of fewer or more pages or photographs than were published."""
    if sources != published:
        words = f"is made of {sources} pages or photographs, and {published} were published: is the checkout complete?"
        print(f"note: {printable(output)}: {words} Remove this folder to prepare it again", file=sys.stderr)


def _clear(folder: Path) -> None:
    """Remove what an earlier command left; the lock stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != locks.NAME:
            path.unlink()


def _check_settings(output: Path, wanted: dict) -> int | None:
    """Raise UserError where a folder holds anything but the dataset that is wanted.

    Returns the number of pages or photographs behind it where that is not the published one.
    """
    try:
        settings = json.loads(read_bytes(output / "settings.json"))
    except (OSError, ValueError, RecursionError):
        settings = None
    sources = settings.pop("sources", None) if isinstance(settings, dict) else None
    if settings != wanted or not isinstance(sources, int | None):
        words = f"exists and is not {wanted['dataset']} as this version prepares it"
        raise UserError(f"--output {output}: {words}; remove it, or choose another folder")
    return sources


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
