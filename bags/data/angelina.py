"""Angelina: photographs of Braille pages, scaled and cut into four tiles, with a box for each character.

A category is the pattern of the six dots: bit k of its number is dot k + 1.

Command:  python scripts/prepare_data.py angelina --source AngelinaDataset --output data/angelina
"""

from pathlib import Path

from PIL import Image
from tqdm import tqdm

from bags.core.errors import UserError
from bags.data.images import read_image
from bags.data.prepared import Made, Origin, Split, clipped, image_folders, lines_of, prepare, trained_categories

ORIGIN = Origin("angelina", "IlyaOvodov/AngelinaDataset", "e13038d483bb58e17046d640e078dc4768276e9b", "books/train.txt")
GROUPS = ("books", "handwritten")  # folders with train.txt and val.txt
PAGES = 240
SCALE = 0.625
LEAST_OBJECTS = 3  # that a tile needs, crowd regions not counted
LEAST_SIDE = 2  # pixels of a clipped box
QUALITY = 85


def prepare_angelina(source: Path, output: Path) -> Path:
    """Make the tiles and instances_{train,val}.json of Angelina; see `prepare`."""
    return prepare(ORIGIN, source, output, _make, PAGES)


def _make(source: Path, folder: Path) -> Made:
    """Cut the pages of all lists, books first. Ids begin at 1 in each split."""
    listed: dict[str, str] = {}
    pages = {split: _pages(source, split, listed) for split in ("train", "val")}
    splits = {name: Split(", ".join(str(path) for path in _lists(source, name))) for name in pages}
    image_folders(folder, tuple(splits))
    number = sum(map(len, pages.values()))
    with tqdm(total=number, desc="angelina", unit="page") as progress:
        for split, paths in pages.items():
            for name, path in paths:
                _cut(path, folder / split, name, splits[split])
                progress.update()
    return Made(splits, trained_categories(splits["train"]), "angelina {split}", number)


def _lists(source: Path, split: str) -> list[Path]:
    """The lists of a split."""
    return [source / group / f"{split}.txt" for group in GROUPS]


def _pages(source: Path, split: str, listed: dict[str, str]) -> list[tuple[str, Path]]:
    """Name and photograph of each page of a split. The lists have Windows' separators.

    listed: list and line of each name so far; those of the split are added. Raises UserError for an empty list, and
    for a line that leaves the folder of the list or that repeats a name.
    """
    pages = []
    for path in _lists(source, split):
        lines = list(lines_of(path))
        if not lines:
            raise UserError(f"{path}: names no page; the checkout is not complete: fetch it again")
        for number, line in lines:
            where, page = f"{path}: line {number}", Path(line.replace("\\", "/"))
            if page.is_absolute() or ".." in page.parts:
                words = f"expected the path of a photograph from {path.parent}, without .., got {line[:60]!r}"
                raise UserError(f"{where}: {words}; fetch the checkout again")
            name = "-".join((path.parent / page).relative_to(source).with_suffix("").parts).replace(".", "_")
            if name in listed:
                words = f"{line[:60]!r} gets the name {name}, as does {listed[name]}; expected each page once"
                raise UserError(f"{where}: {words}; fetch the checkout again")
            listed[name] = where
            pages.append((name, path.parent / page))
    return pages


def _cut(path: Path, folder: Path, name: str, split: Split) -> None:
    """Write the tiles of a page that have enough objects, and add them to the split."""
    photograph = read_image(path)
    size = round(photograph.width * SCALE), round(photograph.height * SCALE)
    page = photograph.resize(size, Image.Resampling.LANCZOS)
    width, height = size[0] // 2, size[1] // 2
    characters = read_boxes(path.with_suffix(".csv"), size)
    for row in range(2):
        for column in range(2):
            tile = (column * width, row * height, (column + 1) * width, (row + 1) * height)
            objects = [entry for box, pattern in characters if (entry := object_in(tile, box, pattern))]
            if sum(not entry["iscrowd"] for entry in objects) < LEAST_OBJECTS:
                continue
            image = {"id": len(split.images) + 1, "file_name": f"{name}_{row}{column}.jpg"}
            split.images.append(image | {"width": width, "height": height})
            for entry in objects:
                number = len(split.annotations) + 1
                split.annotations.append({"id": number, "image_id": image["id"], **entry})
            page.crop(tile).save(folder / str(image["file_name"]), "JPEG", quality=QUALITY)


def read_boxes(path: Path, size: tuple[int, int]) -> list[tuple[tuple[float, float, float, float], int]]:
    """Box (left, top, right, bottom) in a page of `size` pixels (width, height), and pattern, of each character.

    A line of the file is left;top;right;bottom;pattern, with sides from 0 to 1 and patterns from 1 to 63.
    """
    boxes = []
    for number, line in lines_of(path):
        try:
            left, top, right, bottom, pattern = (float(text) for text in line.split(";"))
            box = (left * size[0], top * size[1], right * size[0], bottom * size[1])
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1 and pattern in range(1, 64)):
                raise ValueError("not a box of a character")
        except ValueError:
            words = "expected left;top;right;bottom;pattern with 0 <= left < right <= 1, 0 <= top < bottom <= 1 and a "
            words += "pattern of 1 to 63"
            raise UserError(f"{path}: line {number}: {words}, got {line[:60]!r}") from None
        boxes.append((box, int(pattern)))
    return boxes


def object_in(tile: tuple[float, ...], box: tuple[float, ...], pattern: int) -> dict | None:
    """A character in a tile, a crowd region where less than half is visible; None where too little is.

    tile, box: left, top, right, bottom in pixels of the page.
    """
    part = clipped(box, tile)
    if part is None:
        return None
    width, height = part[2] - part[0], part[3] - part[1]
    if min(width, height) < LEAST_SIDE:
        return None
    visible = width * height / ((box[2] - box[0]) * (box[3] - box[1]))
    dots = "".join(str(k + 1) for k in range(6) if pattern >> k & 1)
    sides = [round(value, 2) for value in (part[0], part[1], width, height)]
    area, crowd = round(width * height, 2), int(visible < 0.5)
    return {"category": f"{pattern:02d} dots {dots}", "bbox": sides, "area": area, "iscrowd": crowd}
