"""MUSCIMA++ 2.0: pages of handwritten music, drawn from the masks of their symbols and cut into tiles.

The repository holds no page scans, so each page is the union of its masks at half size. Tiles do not overlap. Lengths
below are pixels of the tiles, half a pixel of the page.

Command:  python scripts/prepare_data.py muscima --source muscima-pp --output data/muscima_tiles
"""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from bags.core.errors import UserError
from bags.core.files import read_bytes
from bags.data.prepared import Made, Origin, Split, clipped, image_folders, lines_of, prepare, trained_categories

ORIGIN = Origin(
    "muscima", "OMR-Research/muscima-pp", "9a1aa68d0ebd1169aad06621524139b944378be8", "v2.0/data/annotations"
)
PAGES = 140
TEST_LIST = "v2.0/specifications/testset-independent.txt"  # its writers are in no other page
VAL_WRITERS = (4, 16, 25, 37, 47)
TILE = 416
LARGEST = 1 << 13  # pixels of a side of a page; the longest has 3,437
LEAST_OBJECTS = 3  # that a tile needs, crowd regions not counted
LEAST_AREA = 9  # of a box of which less than half is visible
PAGE_WIDE = ("staff", "staffSpace", "staffLine", "staffGrouping", "measureSeparator")  # no objects
NOT_DRAWN = tuple(name for name in PAGE_WIDE if name != "staffLine")
SHADES = (255, 191, 127, 64, 0)  # of a pixel whose 2 x 2 pixels of the page have 0 to 4 of ink


@dataclass(frozen=True)
class Symbol:
    """A symbol: corner in pixels of the page, and its mask, uint8 [height, width] of 0 and 1."""

    name: str
    left: int
    top: int
    mask: np.ndarray

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom at half size."""
        height, width = self.mask.shape
        return self.left / 2, self.top / 2, (self.left + width) / 2, (self.top + height) / 2


def prepare_muscima(source: Path, output: Path) -> Path:
    """Make the tiles and instances_{train,val,test}.json of MUSCIMA++; see `prepare`."""
    return prepare(ORIGIN, source, output, _make, PAGES)


def _make(source: Path, folder: Path) -> Made:
    """Draw and cut all pages, in the order of their names. Ids count on over the splits."""
    pages = sorted((source / ORIGIN.mark).glob("*.xml"))
    if not pages:
        raise UserError(f"{source / ORIGIN.mark}: expected the XML files of {ORIGIN.repository}, one for each page")
    test = _test_pages(source / TEST_LIST, {path.stem for path in pages})
    splits = {name: Split(str(source / ORIGIN.mark)) for name in ("train", "val", "test")}
    image_folders(folder, tuple(splits))
    image_id = annotation_id = 0
    for path in tqdm(pages, desc="muscima", unit="page"):
        writer = _writer(path)
        split = "test" if path.stem in test else "val" if writer in VAL_WRITERS else "train"
        symbols = read_symbols(path)
        canvas = draw(symbols)
        for (row, column), objects in tiles(symbols):
            if sum(not entry["iscrowd"] for entry in objects) < LEAST_OBJECTS:
                continue
            image_id += 1
            name = f"{path.stem.removeprefix('CVC-MUSCIMA_').removesuffix('_D-ideal')}_{row}_{column}.png"
            ink = canvas[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            _save(folder / split / name, ink)
            entry = {"id": image_id, "file_name": name, "width": TILE, "height": TILE}
            splits[split].images.append(entry | {"page": path.stem, "writer": writer})
            for number, values in enumerate(objects, start=annotation_id + 1):
                splits[split].annotations.append({"id": number, "image_id": image_id, **values})
            annotation_id += len(objects)
    categories = trained_categories(splits["train"])
    return Made(splits, categories, "MUSCIMA++ v2.0 mask renders, tiles: {split}", len(pages))


def _test_pages(path: Path, pages: set[str]) -> set[str]:
    """The pages of the test list. Raises UserError for a list without any, and for a line that names no page."""
    test = set()
    for number, line in lines_of(path):
        if line not in pages:
            words = f"expected the name, without .xml, of a page in {ORIGIN.mark}, got {line[:60]!r}"
            raise UserError(f"{path}: line {number}: {words}; fetch the checkout again")
        test.add(line)
    if not test:
        raise UserError(f"{path}: names no page; the checkout is not complete: fetch it again")
    return test


def _writer(path: Path) -> int:
    """The writer's number in a page's name, as in CVC-MUSCIMA_W-01_N-10_D-ideal.xml."""
    match = re.search(r"_W-(\d+)_N-\d+_", path.name)
    if not match:
        raise UserError(f"{path}: expected a name such as CVC-MUSCIMA_W-01_N-10_D-ideal.xml")
    return int(match[1])


def read_symbols(path: Path) -> list[Symbol]:
    """The symbols of a page in the order of its file. Raises UserError for a file that is damaged or has none."""
    content = read_bytes(path)
    try:
        root = ET.fromstring(content)
    except (ET.ParseError, LookupError, ValueError) as error:  # the last two: encodings that are not known
        raise UserError(f"{path}: is not valid XML ({error}); fetch the checkout again") from None
    nodes = list(root.iter("Node"))
    if root.tag != "Nodes" or not nodes:
        raise UserError(f"{path}: expected the element Nodes with a Node for each symbol; fetch the checkout again")
    return [_symbol(path, node) for node in nodes]


def _symbol(path: Path, node: ET.Element) -> Symbol:
    """A symbol of a page. Nothing of the size that a damaged file may name is made before it is checked."""
    try:
        name = node.findtext("ClassName", "").strip()
        left, top, width, height = (int(node.findtext(key, "")) for key in ("Left", "Top", "Width", "Height"))
        inside = min(left, top) >= 0 and min(width, height) > 0 and max(left + width, top + height) <= LARGEST
        runs = np.array([run.split(":") for run in node.findtext("Mask", "").split()], np.int64)
        if not (name and inside and runs.ndim == 2 and runs.shape[1] == 2):
            raise ValueError("no symbol of a page")
        values, lengths = runs.T
        fitting = np.isin(values, (0, 1)).all() and lengths.min() >= 0 and lengths.max() <= height * width
        if not fitting or lengths.sum() != height * width:
            raise ValueError("no mask of the box")
    except (ValueError, OverflowError):
        words = f"Left, Top, Width, Height (within {LARGEST} pixels) and runs of 0 and 1 (Mask) that fill the box"
        where = f"{path}: node {str(node.findtext('Id'))[:60]}"
        raise UserError(f"{where}: expected ClassName, {words}; fetch the checkout again") from None
    return Symbol(name, left, top, np.repeat(values.astype(np.uint8), lengths).reshape(height, width))


def draw(symbols: list[Symbol]) -> np.ndarray:
    """The page at half size as uint8 [rows * TILE, columns * TILE]: how many of each 2 x 2 pixels have ink, 0 to 4."""
    rows, columns = _grid(symbols)
    page = np.zeros((rows * TILE * 2, columns * TILE * 2), np.uint8)
    for symbol in symbols:
        if symbol.name not in NOT_DRAWN:
            height, width = symbol.mask.shape
            page[symbol.top : symbol.top + height, symbol.left : symbol.left + width] |= symbol.mask
    return page[::2, ::2] + page[::2, 1::2] + page[1::2, ::2] + page[1::2, 1::2]


def _grid(symbols: list[Symbol]) -> tuple[int, int]:
    """Rows and columns of tiles that hold all symbols."""
    right, bottom = (max((symbol.box[side] for symbol in symbols), default=0) for side in (2, 3))
    return math.ceil(bottom / TILE), math.ceil(right / TILE)


def tiles(symbols: list[Symbol]) -> Iterator[tuple[tuple[int, int], list[dict]]]:
    """(row, column) and objects of each tile with any, in reading order; objects in the order of `symbols`.

    A box is clipped to the tile. One of which less than half is visible is a crowd region, and is dropped if less
    than LEAST_AREA remains.
    """
    objects: dict[tuple[int, int], list[dict]] = {}
    for symbol in symbols:
        if symbol.name in PAGE_WIDE:
            continue
        left, top, right, bottom = symbol.box
        for row in range(int(top // TILE), math.ceil(bottom / TILE)):
            for column in range(int(left // TILE), math.ceil(right / TILE)):
                if entry := _in_tile(symbol, row, column):
                    objects.setdefault((row, column), []).append(entry)
    yield from sorted(objects.items())


def _in_tile(symbol: Symbol, row: int, column: int) -> dict | None:
    """The object of a symbol in a tile."""
    left, top, right, bottom = symbol.box
    x, y = column * TILE, row * TILE
    part = clipped(symbol.box, (x, y, x + TILE, y + TILE))
    if part is None:
        return None
    width, height = part[2] - part[0], part[3] - part[1]
    area = width * height
    hidden = area / ((right - left) * (bottom - top)) < 0.5
    if hidden and area < LEAST_AREA:
        return None
    rows = slice(int((part[1] + y) * 2) - symbol.top, int((part[3] + y) * 2) - symbol.top)
    columns = slice(int((part[0] + x) * 2) - symbol.left, int((part[2] + x) * 2) - symbol.left)
    ink = float(symbol.mask[rows, columns].sum()) / 4
    box = [part[0], part[1], width, height]
    return {"category": symbol.name, "bbox": box, "area": area, "mask_area": ink, "iscrowd": int(hidden)}


def _save(path: Path, ink: np.ndarray) -> None:
    """Write a tile as PNG of five shades of grey."""
    image = Image.fromarray(ink, "P")
    image.putpalette([shade for shade in SHADES for _ in "rgb"])
    image.save(path)
