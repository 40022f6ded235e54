"""Datasets prepared from checkouts of public repositories, on small made-up sources worked out by hand."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import OUTSIDE, run_script
from PIL import Image
from pycocotools import mask as coco_mask

import bags
from bags.data.angelina import object_in, prepare_angelina, read_boxes
from bags.data.ccp import connected_parts, describe, objects_of, prepare_ccp
from bags.data.index import AnnotationIndex
from bags.data.matlab import read_matrix
from bags.data.muscima import TILE, prepare_muscima, read_symbols

CHECKOUTS = Path(os.environ.get("BAGS_TEST_SOURCES", "none"))  # muscima-pp, AngelinaDataset, clothing-co-parsing


# --------------------------------------------------------------------------- made-up sources


def node(number, name, left, top, width, height, mask=None):
    """A symbol of MUSCIMA++; without a mask all of its box is ink."""
    mask = mask or f"1:{width * height}"
    place = f"<Top>{top}</Top><Left>{left}</Left><Width>{width}</Width><Height>{height}</Height>"
    return f"<Node><Id>{number}</Id><ClassName>{name}</ClassName>{place}<Mask>{mask}</Mask></Node>"


# Pixels of the page; tiles begin at 832. Boxes below are half of these.
SYMBOLS = [
    node(5, "stem", 10, 20, 2, 41),
    node(1, "noteheadFull", 100, 100, 4, 2, "1:3 0:1 1:1 0:3"),
    node(2, "beam", 820, 40, 20, 10),  # 12 of 20 columns in the first tile: seen there, a crowd region in the second
    node(3, "staffLine", 0, 200, 1600, 2),  # drawn, but no object
    node(4, "staffSpace", 0, 202, 1600, 10),  # neither
    node(6, "rest8th", 826, 60, 100, 4),  # 3 x 2 pixels in the first tile: dropped there
    node(7, "slur", 900, 300, 10, 10),
]


@pytest.fixture
def music(tmp_path):
    """A checkout with a page of each split, of equal content but for a symbol of test that train does not have."""
    folder = tmp_path / "muscima-pp/v2.0"
    (folder / "data/annotations").mkdir(parents=True)
    (folder / "specifications").mkdir()
    (folder / "specifications/testset-independent.txt").write_text("CVC-MUSCIMA_W-12_N-01_D-ideal\n")
    for writer, more in ((1, ""), (4, ""), (12, node(9, "cClef", 8, 8, 8, 8))):
        text = f"<Nodes>{''.join(SYMBOLS)}{more}</Nodes>"
        (folder / f"data/annotations/CVC-MUSCIMA_W-{writer:02d}_N-01_D-ideal.xml").write_text(text)
    return tmp_path / "muscima-pp"


@pytest.fixture
def braille(tmp_path):
    """A checkout with a page of 64 x 96 pixels in each list, so four tiles of 20 x 30."""
    source = tmp_path / "AngelinaDataset"
    for group in ("books", "handwritten"):
        for split in ("train", "val"):
            (source / group / split).mkdir(parents=True)
            (source / group / f"{split}.txt").write_text(f"{split}\\p.1.labeled.jpg\n")
            Image.new("RGB", (64, 96), (9, 99, 199)).save(source / group / split / "p.1.labeled.jpg")
            lines = ["0.1;0.1;0.2;0.2;1", "0.25;0.1;0.35;0.2;5", "0.3;0.3;0.55;0.4;63", "0.6;0.1;0.7;0.2;5"]
            (source / group / split / "p.1.labeled.csv").write_text("\n".join(lines) + "\n")
    return source


def element(kind, data):
    """An element of a MATLAB file, padded to eight bytes."""
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(name, shape, kind, *parts):
    """A variable of a MATLAB file."""
    content = element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack(f"<{len(shape)}i", *shape))
    return element(14, content + element(1, name.encode()) + b"".join(parts))


def matlab(path, content, compressed=True):
    """Write a MATLAB file of one variable."""
    packed = zlib.compress(content)
    body = struct.pack("<II", 15, len(packed)) + packed if compressed else content
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + body)


def text_cell(text):
    """A cell with a text; those of up to four bytes are small elements."""
    data = text.encode()
    small = struct.pack("<HH", 16, len(data)) + data.ljust(4, b"\0")
    return matrix("", (1, len(data)), 4, small if len(data) <= 4 else element(16, data))


def labels_file(path, labels):
    """Labels of pixels as the source has them: bytes in a matrix of doubles, column by column."""
    matlab(path, matrix("groundtruth", labels.shape, 6, element(2, labels.tobytes(order="F"))))


NAMES = ["null", "hat", "shoes", "skin", "coat"]


@pytest.fixture
def clothes(tmp_path):
    """A checkout with photographs 1 (train) and 7 (val) of 320 x 160 pixels, which are scaled by two."""
    source = tmp_path / "clothing-co-parsing"
    (source / "photos").mkdir(parents=True)
    (source / "annotations/pixel-level").mkdir(parents=True)
    matlab(source / "label_list.mat", matrix("label_list", (1, 5), 1, *map(text_cell, NAMES)))
    labels = np.zeros((160, 320), np.uint8)
    labels[10:20, 100:110] = 1  # a hat of two parts, 10 x 10 and 6 x 6 pixels, far apart
    labels[40:46, 200:206] = 1
    labels[100:110, 50:70] = labels[120:130, 10:20] = 2  # two shoes
    labels[0:4, 0:4] = 2  # 16 pixels are no shoe
    labels[60:80, 60:80] = 3
    for name in ("0001", "0007"):
        Image.new("RGB", (320, 160), (200, 20, 30)).save(source / f"photos/{name}.jpg")
        labels_file(source / f"annotations/pixel-level/{name}.mat", labels)
    return source


def read(folder, split):
    """The annotation file of a split."""
    return json.loads((folder / f"instances_{split}.json").read_text())


# --------------------------------------------------------------------------- MUSCIMA++


def test_muscima_by_hand(music, tmp_path):
    """Boxes, areas and ink at half size, in the order of the symbols; ids count on over the splits."""
    output = prepare_muscima(music, tmp_path / "tiles")
    train = read(output, "train")
    assert [c["name"] for c in train["categories"]] == ["beam", "noteheadFull", "stem"]
    first = [(a["category_id"], a["bbox"], a["area"], a["mask_area"], a["iscrowd"]) for a in train["annotations"]]
    assert first == [
        (3, [5.0, 10.0, 1.0, 20.5], 20.5, 20.5, 0),
        (2, [50.0, 50.0, 2.0, 1.0], 2.0, 1.0, 0),
        (1, [410.0, 20.0, 6.0, 5.0], 30.0, 30.0, 0),
    ]
    image = train["images"][0]
    assert image == {
        **{"id": 1, "file_name": "W-01_N-01_0_0.png", "width": TILE, "height": TILE},
        **{"page": "CVC-MUSCIMA_W-01_N-01_D-ideal", "writer": 1},
    }
    assert len(train["images"]) == 1  # the second tile has two objects and a crowd region
    val, test = read(output, "val"), read(output, "test")
    assert (val["images"][0]["id"], val["annotations"][0]["id"]) == (2, 4)
    assert (test["images"][0]["id"], test["annotations"][0]["id"], len(test["annotations"])) == (3, 7, 3)
    assert val["categories"] == test["categories"] == train["categories"]
    counts = {c["name"]: (c["instance_count"], c["image_count"], c["frequency"]) for c in val["categories"]}
    assert set(counts.values()) == {(1, 1, "r")}


def test_muscima_pixels_by_hand(music, tmp_path):
    """The notehead has 3 and 1 of 4 pixels of ink in two pixels of the tile; staff lines are drawn, spaces not."""
    output = prepare_muscima(music, tmp_path / "tiles")
    tile = np.asarray(Image.open(output / "train/W-01_N-01_0_0.png").convert("RGB"))
    assert tile.shape == (TILE, TILE, 3) and (tile[50, 50:53] == [[64] * 3, [191] * 3, [255] * 3]).all()
    assert (tile[100] == 0).all() and (tile[101] == 255).all()
    assert (tile[30] == 0).all(1).sum() == 3 and (tile[29:31, 5] == [[0] * 3, [127] * 3]).all()  # rest; end of the stem


def test_muscima_refuses_damage(music, tmp_path):
    page = music / "v2.0/data/annotations/CVC-MUSCIMA_W-01_N-01_D-ideal.xml"
    for text, words in (
        ("<Nodes><Node>", "is not valid XML"),
        ("<?xml version='1.0' encoding='none'?><Nodes/>", "is not valid XML"),
        ("<Nodes></Nodes>", "W-01_N-01_D-ideal.xml: expected the element Nodes with a Node"),
        (f"<html>{node(8, 'stem', 1, 1, 2, 2)}</html>", "expected the element Nodes"),
    ):
        page.write_text(text)
        with pytest.raises(bags.UserError, match=words):
            prepare_muscima(music, tmp_path / "tiles")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["muscima-pp"]


MASKS = ["1:3", "1:x", "1:-1 0:5", "2:4", "257:4", "-1:4", "1:2:1 1:1:0", "1 0", "0:4 1"]  # not of 2 x 2 pixels


@pytest.mark.parametrize(
    "symbol",
    [
        *(("stem", 1, 1, 2, 2, mask) for mask in MASKS),
        ("stem", -1, 1, 2, 2, "1:4"),
        ("stem", 1, 1, 0, 0, "1:0"),
        ("stem", 1, 1, -2, -2, "1:4"),
        ("", 1, 1, 2, 2, "1:4"),
        ("stem", 8191, 1, 2, 2, "1:4"),
        ("stem", 10**12, 1, 2, 2, "1:4"),
        ("stem", 1, 1, 10**6, 10**6, f"1:{10**12}"),
        ("stem", 1, 1, 2, 2, f"1:{10**12}"),
        ("stem", 1, 1, 2, 2, f"1:{2**63}"),
        ("stem", 1, 1, 2, 2, f"1:{2**63 - 1} 0:{2**63 - 1} 1:6"),  # 4 in 64 bits
    ],
)
def test_muscima_refuses_impossible_symbols(tmp_path, symbol):
    """Damaged masks; places, sizes and run lengths beyond a page, without the memory that they ask for."""
    page = tmp_path / "page.xml"
    page.write_text(f"<Nodes>{node(8, *symbol)}</Nodes>")
    with pytest.raises(bags.UserError, match=r"page\.xml: node 8: expected ClassName, Left, Top"):
        read_symbols(page)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n", "independent.txt: names no page"),
        ("CVC-MUSCIMA_W-12_N-01_D-ideal\nCVC-MUSCIMA_W-12_N-01_D-ideal.xml\n", r"line 2: expected the name, without"),
    ],
)
def test_muscima_refuses_damaged_lists(music, tmp_path, text, words):
    """A test page would else be in train."""
    (music / "v2.0/specifications/testset-independent.txt").write_text(text)
    with pytest.raises(bags.UserError, match=words):
        prepare_muscima(music, tmp_path / "tiles")
    assert [path.name for path in tmp_path.iterdir()] == ["muscima-pp"]


# --------------------------------------------------------------------------- Angelina


def test_angelina_by_hand(braille, tmp_path):
    """The page is 40 x 60; 63 spans the two upper tiles, 0.3 * 40 = 12 to 22: 8 of 10 columns in the first."""
    output = prepare_angelina(braille, tmp_path / "out")
    train = read(output, "train")
    assert [c["name"] for c in train["categories"]] == ["01 dots 1", "05 dots 13", "63 dots 123456"]
    names = ["books-train-p_1_labeled_00.jpg", "handwritten-train-p_1_labeled_00.jpg"]
    assert [(i["id"], i["file_name"], i["width"], i["height"]) for i in train["images"]] == [
        (1, names[0], 20, 30),
        (2, names[1], 20, 30),
    ]
    assert [(a["category_id"], a["bbox"], a["area"], a["iscrowd"]) for a in train["annotations"][:3]] == [
        (1, [4.0, 6.0, 4.0, 6.0], 24.0, 0),
        (2, [10.0, 6.0, 4.0, 6.0], 24.0, 0),
        (3, [12.0, 18.0, 8.0, 6.0], 48.0, 0),
    ]
    assert [a["id"] for a in train["annotations"]] == list(range(1, 7))
    assert [(c["instance_count"], c["image_count"]) for c in train["categories"]] == [(2, 2)] * 3
    with Image.open(output / "train" / names[0]) as tile:
        assert tile.size == (20, 30) and np.abs(np.asarray(tile, int)[3, 3] - [9, 99, 199]).max() < 4


def test_clipped_characters():
    """Less than half visible is a crowd region, less than two pixels is nothing."""
    tile = (20, 0, 40, 30)
    assert object_in(tile, (15.0, 2.0, 25.0, 12.0), 40) == {
        **{"category": "40 dots 46", "bbox": [0, 2.0, 5.0, 10.0], "area": 50.0, "iscrowd": 0}
    }
    assert object_in(tile, (13.0, 2.0, 23.0, 12.0), 1)["iscrowd"] == 1
    assert object_in(tile, (11.5, 2.0, 21.5, 12.0), 1) is None and object_in(tile, (1.0, 2.0, 9.0, 9.0), 1) is None


@pytest.mark.parametrize(
    "line",
    [
        *("0.1;0.2;0.3;0.4", "0.1;0.2;0.1;0.4;3", "0.1;0.2;0.3;0.4;64", "0.1;0.2;x;0.4;1", "a"),
        *("100;200;300;400;1", "-0.1;0.2;0.3;0.4;1", "0.1;0.2;1.01;0.4;1", "0.1;0.2;inf;0.4;1", "0.1;-inf;0.3;0.4;1"),
        *("nan;0.2;0.3;0.4;1", "0.1;0.2;0.3;nan;1", "0.1;0.2;0.3;0.4;nan"),
    ],
)
def test_angelina_refuses_damaged_lines(tmp_path, line):
    path = tmp_path / "p.csv"
    path.write_text(f"0;0;1;1;1\n\n{line}\n")
    with pytest.raises(bags.UserError, match=r"p\.csv: line 3: expected left;top;right;bottom;pattern"):
        read_boxes(path, (10, 10))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("handwritten/val.txt", "\n", r"handwritten/val\.txt: names no page"),
        ("books/train.txt", "a\\p.jpg\n\na\\p.jpg\n", r"train\.txt: line 3: .*a-p, as does .*train\.txt: line 1"),
        ("books/train.txt", "a\\p.1.jpg\na\\p_1.jpg\n", r"train\.txt: line 2: .* gets the name books-a-p_1, as"),
        ("books/val.txt", "train\\p.1.labeled.jpg\n", r"val\.txt: line 1: .*, as does .*train\.txt: line 1"),
        ("books/train.txt", "/etc/p.jpg\n", r"train\.txt: line 1: expected the path of a photograph from .*books, wi"),
        ("books/train.txt", "..\\..\\p.jpg\n", r"train\.txt: line 1: expected the path of a photograph"),
        ("books/train.txt", ".\n", r"books: "),
    ],
)
def test_angelina_refuses_damaged_lists(braille, tmp_path, name, text, words):
    (braille / name).write_text(text)
    with pytest.raises(bags.UserError, match=words):
        prepare_angelina(braille, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["AngelinaDataset"]


# --------------------------------------------------------------------------- Clothing Co-Parsing


def test_ccp_by_hand(clothes, tmp_path):
    """Scaled by two: one hat of both parts, two shoes in the order of their first rows, no skin."""
    output = prepare_ccp(clothes, tmp_path / "out")
    for split, name in (("train", "0001.jpg"), ("val", "0007.jpg")):
        content = read(output, split)
        assert content["images"] == [{"id": 1, "file_name": name, "width": 640, "height": 320}]
        assert [c["name"] for c in content["categories"]] == ["hat", "shoes"]
        boxes = [(a["category_id"], a["bbox"], a["area"], a["iscrowd"]) for a in content["annotations"]]
        assert boxes == [
            (1, [200.0, 20.0, 212.0, 72.0], 4 * 136.0, 0),
            (2, [100.0, 200.0, 40.0, 20.0], 800.0, 0),
            (2, [20.0, 240.0, 20.0, 20.0], 400.0, 0),
        ]
        masks = [coco_mask.decode(a["segmentation"]) for a in content["annotations"]]
        assert [int(mask.sum()) for mask in masks] == [544, 800, 400] and masks[0][20:40, 200:220].all()
        with Image.open(output / split / name) as image:
            assert image.size == (640, 320)
    assert AnnotationIndex.open(output / "instances_train.json").category_names == ["hat", "shoes"]


@pytest.mark.parametrize(
    "content",
    [
        matrix("groundtruth", (160, 320), 8, element(1, bytes([255]) * 51200)),  # -1
        matrix("groundtruth", (160, 320), 9, element(2, bytes([5]) * 51200)),
        matrix("groundtruth", (160, 320, 1), 9, element(2, bytes(51200))),
        matrix("groundtruth", (0, 0), 9, element(2, b"")),
        matrix("groundtruth", (1, 1), 1, text_cell("hat")),
    ],
)
def test_ccp_refuses_other_labels(clothes, tmp_path, content):
    matlab(clothes / "annotations/pixel-level/0007.mat", content)
    with pytest.raises(bags.UserError, match=r"0007\.mat: groundtruth: expected a matrix of labels from 0 to 4"):
        prepare_ccp(clothes, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["clothing-co-parsing"]


def test_ccp_refuses_other_names(clothes, tmp_path):
    path = clothes / "annotations/pixel-level/\u00b2.mat"  # a digit, but no number
    path.write_bytes((clothes / "annotations/pixel-level/0007.mat").read_bytes())
    with pytest.raises(bags.UserError, match=r"\u00b2\.mat: expected a name such as 0001\.mat"):
        prepare_ccp(clothes, tmp_path / "out")
    path.unlink()
    matlab(clothes / "label_list.mat", matrix("label_list", (1, 5), 9, element(2, bytes(5))))
    with pytest.raises(bags.UserError, match=r"label_list\.mat: label_list: expected a cell with the name"):
        prepare_ccp(clothes, tmp_path / "out")


def labelled(mask):
    """Parts by a flood from each pixel: the slow second version."""
    left, parts = {tuple(point) for point in np.argwhere(mask).tolist()}, []
    for start in map(tuple, np.argwhere(mask).tolist()):
        if start not in left:
            continue
        part, edge = np.zeros_like(mask), [start]
        left.remove(start)
        while edge:
            row, column = edge.pop()
            part[row, column] = True
            near = {(row + i, column + k) for i in (-1, 0, 1) for k in (-1, 0, 1)} & left
            left -= near
            edge += near
        parts.append(part)
    return parts


def closed(mask):
    """Gaps of up to four pixels closed, pixel by pixel from the definition; nothing is known beyond the border."""

    def window(array, row, column):
        return array[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]

    places = list(np.ndindex(mask.shape))
    grown = np.array([window(mask, *place).any() for place in places]).reshape(mask.shape)
    return np.array([window(grown, *place).all() for place in places]).reshape(mask.shape)


@pytest.mark.parametrize("density", [0.005, 0.03, 0.08])
def test_parts_are_those_of_a_flood(density):
    """As sets of pixels, and in the order of first pixels."""
    mask = np.random.RandomState(3).random_sample((50, 60)) < density
    slow = [part & mask for part in labelled(closed(mask))]
    parts = connected_parts(mask)
    assert len(parts) == len(slow) > 1 and all((a == b).all() for a, b in zip(parts, slow, strict=True))


def test_small_parts():
    """Of a coat 2 % of the largest part are kept, of shoes 15 %; 30 pixels at least; the largest always."""
    labels = np.zeros((90, 200), np.uint8)
    labels[:50, :40] = 4  # 2,000 pixels
    labels[60:68, 60:65] = 4  # 40 = 2 %
    labels[80:83, 100:113] = 4  # 39
    ((name, coat),) = objects_of(labels, NAMES)
    assert name == "coat" and int(coat.sum()) == 2040
    labels[labels == 4] = 2
    assert [int(mask.sum()) for _, mask in objects_of(labels, NAMES)] == [2000]
    labels[:] = 0
    labels[3, 3] = 4
    assert [int(mask.sum()) for _, mask in objects_of(labels, NAMES)] == [1]


def test_a_mask_is_scaled():
    """Half of an image of 4 x 2 pixels, at 2 x 2: box and area are scaled per axis, and rounded to 0.01."""
    mask = np.array([[1, 1, 0, 0]] * 3, bool)
    entry = describe(mask, (2, 2))
    assert (entry["bbox"], entry["area"]) == ([0.0, 0.0, 1.0, 2.0], 2.0)
    assert coco_mask.decode(entry["segmentation"]).tolist() == [[1, 0], [1, 0]]
    assert describe(np.array([[0, 1, 1]], bool), (2, 1))["bbox"] == [0.67, 0.0, 1.33, 1.0]


# --------------------------------------------------------------------------- MATLAB files


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_matrices(tmp_path, compressed):
    values = np.arange(6, dtype="<u2").reshape(2, 3)
    content = matrix("other", (1, 1), 9, struct.pack("<HH4s", 2, 1, b"\7")) + matrix(
        "x", (2, 3), 11, element(4, values.tobytes(order="F"))
    )
    path = tmp_path / "x.mat"
    matlab(path, content, compressed and False)
    assert (read_matrix(path, "x") == values).all() and read_matrix(path, "other").tolist() == [[7]]
    matlab(path, matrix("t", (1, 2), 1, text_cell("t-shirt"), text_cell("tie")), compressed)
    assert read_matrix(path, "t") == ["t-shirt", "tie"]


def test_damaged_matlab_files(tmp_path):
    """Cut anywhere, or of another kind, a file is refused in one line."""
    path = tmp_path / "x.mat"
    matlab(path, matrix("x", (2, 3), 11, element(4, bytes(12))))
    whole = path.read_bytes()
    assert read_matrix(path, "x").shape == (2, 3)
    for content in (*(whole[:size] for size in range(0, len(whole), 3)), whole[:140] + b"zz" + whole[142:]):
        path.write_bytes(content)
        with pytest.raises(bags.UserError, match=r"x\.mat: expected a MATLAB 5 file with the variable x"):
            read_matrix(path, "x")
    with pytest.raises(bags.UserError, match="is missing"):
        read_matrix(tmp_path / "none.mat", "x")


# --------------------------------------------------------------------------- the command


def test_the_command(braille, tmp_path):
    """It says what to do next, repeats to no effect, and refuses wrong folders in one line."""
    output = tmp_path / "new/angelina"
    done = run_script("prepare_data", "angelina", "--source", braille, "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"next: python scripts/prepare_data.py check configs/angelina data.root={output}\n"
    checked = run_script("prepare_data", "check", output / "instances_train.json", "--images", output / "train")
    assert checked.returncode == 0 and "ready to train" in checked.stdout
    written = (output / "instances_train.json").stat().st_mtime_ns
    assert run_script("prepare_data", "angelina", "--source", braille, "--output", output).returncode == 0
    assert (output / "instances_train.json").stat().st_mtime_ns == written
    done = run_script("prepare_data", "muscima", "--source", braille, "--output", output)
    assert done.returncode == 2 and "exists and is not muscima as this version prepares it" in done.stderr
    done = run_script("prepare_data", "muscima", "--source", braille, "--output", tmp_path / "music")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "v2.0/data/annotations is missing; expected a checkout of github.com/OMR-Research/muscima-pp" in done.stderr
    assert "9a1aa68d0ebd1169aad06621524139b944378be8" in done.stderr and not (tmp_path / "music").exists()


def test_nothing_half_made_remains(braille, tmp_path):
    """After an error there is no output, and what a killed command has left is no obstacle."""
    page = braille / "handwritten/val/p.1.labeled.jpg"
    content = page.read_bytes()
    page.write_bytes(content[:50])
    output = tmp_path / "angelina"
    with pytest.raises(bags.UserError, match=r"p\.1\.labeled\.jpg"):
        prepare_angelina(braille, output)
    assert [path.name for path in tmp_path.iterdir()] == ["AngelinaDataset"]
    (tmp_path / "angelina.partial/train").mkdir(parents=True)
    (tmp_path / "angelina.partial/old.json").write_text("{}")
    page.write_bytes(content)
    files = sorted(path.name for path in prepare_angelina(braille, output).iterdir())
    assert files == ["instances_train.json", "instances_val.json", "settings.json", "train", "val"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["AngelinaDataset", "angelina"]


def without_objects(source):
    """Empty a file of each page of train below a checkout of Angelina."""
    for path in source.glob("*/train/*.csv"):
        path.write_text("")


def only_null(source):
    """Make all labels of ccp's photograph of val null."""
    labels_file(source / "annotations/pixel-level/0007.mat", np.zeros((160, 320), np.uint8))


@pytest.mark.parametrize(
    ("checkout", "prepare", "damage", "words"),
    [
        ("music", prepare_muscima, "data/annotations/CVC-MUSCIMA_W-01_N-01_D-ideal.xml", "train would have no images"),
        ("music", prepare_muscima, "data/annotations/CVC-MUSCIMA_W-04_N-01_D-ideal.xml", "val would have no images"),
        ("clothes", prepare_ccp, "pixel-level/0001.mat", "pixel-level: train would have no images"),
        ("clothes", prepare_ccp, "pixel-level/0007.mat", "pixel-level: val would have no images"),
        ("clothes", prepare_ccp, only_null, "val would have no objects of the categories in train; the checkout is"),
        ("braille", prepare_angelina, without_objects, r"books/train.txt, .*/train.txt: train would have no images"),
    ],
)
def test_partial_checkouts(checkout, prepare, damage, words, request, tmp_path):
    """A split without images or objects is refused, and nothing of the dataset stays. A text: the file to remove."""
    source = request.getfixturevalue(checkout)
    if callable(damage):
        damage(source)
    else:
        (path,) = (path for path in source.rglob("*.*") if str(path).endswith(damage))
        path.unlink()
    with pytest.raises(bags.UserError, match=words):
        prepare(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_note_on_the_number_of_pages(braille, tmp_path, capsys, monkeypatch):
    """It comes with each call, and not with as many pages as were published."""
    words = "out: is made of 4 pages or photographs, and 240 were published: is the checkout complete?"
    for _ in range(2):
        prepare_angelina(braille, tmp_path / "out")
        assert capsys.readouterr().err.count(words) == 1
    monkeypatch.setattr("bags.data.angelina.PAGES", 4)
    for _ in range(2):
        prepare_angelina(braille, tmp_path / "whole")
        assert "note" not in capsys.readouterr().err


# --------------------------------------------------------------------------- the real sources


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("dataset", "checkout", "prepare"),
    [
        ("muscima_tiles", "muscima-pp", prepare_muscima),
        ("angelina", "AngelinaDataset", prepare_angelina),
        ("ccp", "clothing-co-parsing", prepare_ccp),
    ],
)
def test_the_annotations_of_the_results(dataset, checkout, prepare, split, tmp_path_factory):
    """Images, boxes, areas and crowd flags are those that the saved results are from; masks of ccp are not compared."""
    reference = OUTSIDE / "data" / dataset
    if not (CHECKOUTS / checkout).is_dir() or not reference.is_dir():
        pytest.skip("no checkouts (BAGS_TEST_SOURCES) or no reference here")
    output = prepare(CHECKOUTS / checkout, tmp_path_factory.getbasetemp() / dataset)
    contents = [read(reference, split), read(output, split)]
    assert contents[0]["images"] == contents[1]["images"]
    kept = ("image_id", "category_id", "bbox", "area", "mask_area", "iscrowd")
    objects = [sorted([[a.get(key, 0) for key in kept] for a in content["annotations"]]) for content in contents]
    assert objects[0] == objects[1]
    for entry in contents[0]["categories"]:
        entry.pop("supercategory", None)
    assert contents[0]["categories"] == contents[1]["categories"]
