"""Broken datasets: each defect is refused with one line, or has its line in `check`."""

import http.server
import json
import shutil
import threading
import zipfile
from collections import Counter

import numpy as np
import pytest
from conftest import OUTSIDE, run_script
from PIL import Image
from pycocotools import mask as coco_mask

import bags
from bags.data.checks import check_annotations
from bags.data.dataset import DetectionDataset
from bags.data.findings import DEFECTS, STOP
from bags.data.lvis import download, unpack
from bags.data.packing import is_drawable
from bags.data.transforms import training_transform
from bags.evaluation.results_file import read_results
from bags.evaluation.truth import is_mask, mask_area, read_truth

IMAGES = [
    {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
    {"id": 3, "file_name": "b.png", "width": 20, "height": 20},
]
RLE = coco_mask.encode(np.asfortranarray(np.eye(30, 40, dtype=np.uint8)))["counts"].decode()
ANNOTATION = {"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 2, 10, 5]}
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "cup"}]
ANOTHER = {"id": 2, "image_id": 3, "category_id": 1, "bbox": [0, 0, 9, 9]}
CLEAN = {
    "images": IMAGES,
    "annotations": [ANNOTATION, ANOTHER],
    "categories": CATEGORIES,
}


def annotation(**changes):
    return {"annotations": [{**ANNOTATION, **changes}, ANOTHER]}


def rle(size, counts):
    return annotation(segmentation={"size": size, "counts": counts})


def image(**changes):
    return {"images": [{**IMAGES[0], **changes}, IMAGES[1]]}


def category(**changes):
    return {"categories": [{**CATEGORIES[0], **changes}, CATEGORIES[1]]}


REFUSED = {  # change -> (kind in `check`, words of the refusal)
    "no images list": ({"images": None}, "file", "no list `images`"),
    "no annotations list": ({"annotations": {}}, "file", "no list `annotations`"),
    "no images": ({"images": []}, "file", "`images` is empty"),
    "no categories": ({"categories": []}, "file", "`categories` is empty"),
    "image is no object": ({"images": [3]}, "file", "entry 0: expected an object"),
    "annotation is null": ({"annotations": [None]}, "file", "entry 0: expected an object"),
    "image id is text": (image(id="7"), "bad id", "whole-number id"),
    "image id is missing": ({"images": [{"file_name": "a.png"}]}, "bad id", "whole-number id"),
    "image id is a fraction": (image(id=7.5), "bad id", "whole-number id"),
    "image id is huge": (image(id=2**64), "bad id", "whole-number id"),
    "image id twice": (image(id=3), "duplicate id", "id 3 occurs 2 times"),
    "category id twice": (category(id=2), "duplicate id", "id 2 occurs 2 times"),
    "category id is a list": (category(id=[1]), "bad id", "whole-number id"),
    "annotation id twice": (annotation(id=2), "duplicate id", "id 2 occurs 2 times"),
    "annotation id is null": (annotation(id=None), "bad id", "whole-number id"),
    "width is 0": (image(width=0), "image size", "image 7: expected width and height"),
    "height is missing": (image(height=None), "image size", "image 7: expected width and height"),
    "height is text": (image(height="30"), "image size", "image 7: expected width and height"),
    "width is a fraction": (image(width=40.5), "image size", "image 7: expected width and height"),
    "width is absurd": (image(width=2**40), "image size", "image 7: expected width and height"),
    "no file name": (image(file_name=None), "file name", "image 7: expected a file_name"),
    "empty file name": (image(file_name=""), "file name", "image 7: expected a file_name"),
    "NUL in the file name": (image(file_name="a\0.png"), "file name", "image 7: expected a file_name"),
    "file name is a number": (image(file_name=7), "file name", "image 7: expected a file_name"),
    "no such image": (annotation(image_id=8), "dangling image_id", "image_id 8 is not among"),
    "image_id is null": (annotation(image_id=None), "bad field", "annotation 1: image_id"),
    "no such category": (annotation(category_id=3), "dangling category_id", "category_id 3 is not among"),
    "category_id is text": (annotation(category_id="2"), "bad field", "annotation 1: category_id"),
    "no box": (annotation(bbox=None), "bad box", "annotation 1: bbox"),
    "box of three": (annotation(bbox=[1, 2, 3]), "bad box", "annotation 1: bbox"),
    "box of text": (annotation(bbox=["1", 2, 3, 4]), "bad box", "annotation 1: bbox"),
    "box of booleans": (annotation(bbox=[True, 2, 3, 4]), "bad box", "annotation 1: bbox"),
    "box is an object": (annotation(bbox={"x": 1}), "bad box", "annotation 1: bbox"),
    "box with NaN": (annotation(bbox=[1, 2, float("nan"), 4]), "bad box", "annotation 1: bbox"),
    "box with infinity": (annotation(bbox=[1, 2, float("inf"), 4]), "bad box", "annotation 1: bbox"),
    "box of huge numbers": (annotation(bbox=[1, 2, 10**30, 4]), "bad box", "annotation 1"),
    "box beyond floats": (annotation(bbox=[1, 2, 10**400, 4]), "bad box", "annotation 1"),
    "crowd is text": (annotation(iscrowd="0"), "bad field", "annotation 1: iscrowd"),
    "crowd is null": (annotation(iscrowd=None), "bad field", "annotation 1: iscrowd"),
    "crowd is 2": (annotation(iscrowd=2), "bad field", "annotation 1: iscrowd"),
    "polygon is flat": (annotation(segmentation=[1, 2, 3, 4, 5, 6]), "bad segmentation", "annotation 1: segm"),
    "polygon of odd length": (annotation(segmentation=[[1] * 7]), "bad segmentation", "annotation 1: segm"),
    "polygon of text": (annotation(segmentation=[["1"] * 6]), "bad segmentation", "annotation 1: segm"),
    "polygon far off": (annotation(segmentation=[[0, 0, 9e8, 0, 9e8, 9e8]]), "bad segmentation", "annotation 1: segm"),
    "polygon of huge outline": (
        annotation(segmentation=[[131071, 0, -131071, 9] * 200]),
        "bad segmentation",
        "outlines",
    ),
    "RLE size of fractions": (rle([30.0, 40.0], RLE), "bad segmentation", "annotation 1: segm"),
    "polygon with NaN": (annotation(segmentation=[[float("nan")] * 6]), "bad segmentation", "annotation 1: segm"),
    "segmentation is text": (annotation(segmentation="x"), "bad segmentation", "annotation 1: segm"),
    "RLE of another size": (rle([40, 30], RLE), "bad segmentation", "annotation 1"),
    "RLE without size": (annotation(segmentation={"counts": RLE}), "bad segmentation", "annotation 1: segm"),
    "RLE of no image": (annotation(image_id=8, segmentation={"counts": RLE}), "bad segmentation", "1: segm"),
    "RLE cut off": (rle([30, 40], RLE[:-3]), "bad segmentation", "annotation 1"),
    "RLE counts too long": (rle([30, 40], [1201]), "bad segmentation", "add up"),
    "RLE counts negative": (rle([30, 40], [-1, 1201]), "bad segmentation", "add up"),
    "RLE counts overflow": (rle([30, 40], "o" * 50), "bad segmentation", "add up"),
}
NOTED = {  # change -> (kind in `check`, does `open` keep the annotation)
    "area is text": (annotation(area="5"), "impossible area"),
    "area is NaN": (annotation(area=float("nan")), "impossible area"),
    "area is negative": (annotation(area=-5), "impossible area"),
    "area is 0": (annotation(area=0), "impossible area"),
    "crowd": (annotation(iscrowd=1), "crowd region"),
    "zero width": (annotation(bbox=[1, 2, 0, 5]), "empty box"),
    "negative height": (annotation(bbox=[1, 2, 5, -5]), "empty box"),
    "outside": (annotation(bbox=[50, 2, 5, 5]), "box outside image"),
    "across the border": (annotation(bbox=[35, 2, 15, 5]), "box across border"),
    "polygon elsewhere": (annotation(segmentation=[[50, 2, 60, 2, 60, 9]]), "polygon off the image"),
    "two points": (annotation(segmentation=[[1, 2, 3, 4]]), "short polygon"),
    "id gap": (
        {"categories": [CATEGORIES[0], {"id": 9}], "annotations": [{**ANNOTATION, "category_id": 9}, ANOTHER]},
        "ids with gaps",
    ),
    "empty image": ({"annotations": [ANNOTATION]}, "image without objects"),
    "twin categories": ({"categories": [*CATEGORIES, {**CATEGORIES[0], "id": 9}]}, "categories of one name"),
    "unused category": ({"annotations": [ANNOTATION]}, "category without instances"),
    "same object twice": ({"annotations": [*CLEAN["annotations"], {**ANNOTATION, "id": 5}]}, "duplicated annotation"),
    "same file twice": (image(file_name="b.png"), "duplicated file name"),
    "wrong counts": (category(instance_count=5), "counts disagree"),
}


def write(folder, changes=None):
    path = folder / "x.json"
    path.write_text(json.dumps({**CLEAN, **(changes or {})}))
    return path


def test_a_clean_file_has_no_findings(tmp_path):
    assert check_annotations(write(tmp_path)) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_refuses(tmp_path, name):
    changes, kind, words = REFUSED[name]
    path = write(tmp_path, changes)
    with pytest.raises(bags.UserError) as error:
        bags.AnnotationIndex.open(path)
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)
    found = {finding.kind: finding for finding in check_annotations(path)}
    assert found[kind].level == STOP and found[kind].count >= 1 and found[kind].examples
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_polygons_are_limited_in_length_by_one_rule(tmp_path):
    """Real outlines of thousands of points pass, and so does a long one; the same annotation is refused everywhere."""
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 5000)
    around = 320 + rng.uniform(200, 300, 5000) * np.stack([np.cos(angles), np.sin(angles)])
    real = around.T.ravel().tolist()
    far = [131071, 0, -131071, 9, 0, 131071]
    odd = [[131072, 0, 1, 9, 0, 1], [131071, 0, -131071, 9] * 200]
    size, huge = [131071, 131071], [{**ANNOTATION, "segmentation": [real]}]
    for ring in (real, far, [*real, *far]):
        assert is_drawable(ring) and is_mask([ring], size)
        assert len(bags.AnnotationIndex.open(write(tmp_path, annotation(segmentation=[ring]))).labels) == 2
    for ring in odd:
        assert not is_drawable(ring) and not is_mask([ring], size) and mask_area([real, ring], (30, 40)) is None
        with pytest.raises(bags.UserError, match="annotation 2: segmentation: expected polygons within"):
            content = {"annotations": [*huge, {**ANOTHER, "segmentation": [real, far, ring]}]}
            bags.AnnotationIndex.open(write(tmp_path, content))
        with pytest.raises(bags.UserError, match="annotation 2: segmentation: expected polygons within"):
            read_truth(tmp_path / "x.json").check_masks()


@pytest.mark.parametrize("name", NOTED)
def test_what_training_can_live_with(tmp_path, name):
    changes, kind = NOTED[name]
    path = write(tmp_path, changes)
    found = {finding.kind: finding for finding in check_annotations(path)}
    assert found[kind].level != STOP and found[kind].effect == DEFECTS[kind][1]
    assert len(bags.AnnotationIndex.open(path).labels) == len(json.loads(path.read_text())["annotations"])


EMPTY = [None, [], [[1, 2, 3, 4]], {}, {"size": [30, 40], "counts": ""}, {"size": [30, 40], "counts": []}]


@pytest.mark.parametrize("value", EMPTY)
def test_empty_segmentations_are_none_everywhere(tmp_path, value):
    """In `check`, in training, as ground truth and in results."""
    path = write(tmp_path, annotation(segmentation=value))
    kinds = {finding.kind: finding.count for finding in check_annotations(path, masks=True)}
    assert kinds["no segmentation"] == 2 and "bad segmentation" not in kinds
    index = bags.AnnotationIndex.open(path)
    assert not index.has_segmentation.any() and index.segmentation(1) is None
    truth = read_truth(path)
    assert "2 of 2 objects have no segmentation" in truth.lacks_masks()
    result = {"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5, "segmentation": value}
    (tmp_path / "r.json").write_text(json.dumps([result]))
    assert read_results(tmp_path / "r.json", truth).masks is None


def test_empty_groups(tmp_path):
    found = {finding.kind: finding for finding in check_annotations(write(tmp_path), (1, 2, 3))}
    assert found["empty group"].count == 3 and "no category has 0 to 1" in found["empty group"].examples[0]


@pytest.fixture
def broken(tmp_path):
    """A configuration with defects of every kind of file."""
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 10} for i in range(1, 6)]
    images.append({"id": 6, "file_name": "6.jpg", "width": 20, "height": 10})
    annotations = [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 5, 5]} for i in range(1, 7)]
    for i in (1, 2, 5):
        Image.new("RGB", (20, 10)).save(tmp_path / f"train/{i}.png")
    Image.new("RGB", (10, 20)).save(tmp_path / "train/2.png")
    (tmp_path / "train/3.png").write_text("no image")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "train/5.png", exif=exif)  # 10 x 20 when turned
    Image.effect_noise((20, 10), 50).convert("RGB").save(tmp_path / "train/6.jpg")
    (tmp_path / "train/6.jpg").write_bytes((tmp_path / "train/6.jpg").read_bytes()[:-100])
    for name, categories in (("train", ["a", "b"]), ("val", ["a", "c"])):
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k, "name": n} for k, n in enumerate(categories, start=1)],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "c.yaml").write_text(f"data: {{root: {tmp_path}, train_images: train, val_images: train}}")
    return tmp_path


def test_check_looks_at_the_images_and_at_both_splits(broken):
    done = run_script("prepare_data", "check", broken / "c.yaml", "--json")
    assert done.returncode == 1, done.stderr
    found = Counter()
    for finding in json.loads(done.stdout):
        found[finding["kind"]] += finding["count"]
    assert found["missing image"] == 2 and found["size differs"] == 2 and found["unreadable image"] == 2
    assert found["EXIF rotation"] == 2 and found["train and val share images"] == 5
    assert found["category lists differ"] == 1 and found["category without instances"] == 1
    decoded = run_script("prepare_data", "check", broken / "c.yaml", "--json", "--decode")
    counts = [f["count"] for f in json.loads(decoded.stdout) if f["kind"] == "unreadable image"]
    assert sum(counts) == 4  # the truncated one too
    turned = run_script("prepare_data", "check", broken / "c.yaml", "data.exif=true", "--json")
    kinds = Counter({f["kind"]: f["count"] for f in json.loads(turned.stdout)})
    assert kinds["EXIF rotation"] == 0 and kinds["size differs"] == 2  # of the second split; 2.png and now 5.png
    text = run_script("prepare_data", "check", broken / "c.yaml").stdout
    assert "missing image: 1. Training stops when it comes to it." in text and "image 4: 4.png" in text


def test_check_takes_overrides_after_an_option(broken):
    row = broken / "c.yaml"
    done = run_script("prepare_data", "check", row, "seed=1", "--json", "train.epochs=x")
    assert done.returncode == 2 and "c.yaml: train.epochs: expected a whole number" in done.stderr
    done = run_script("prepare_data", "check", row, "--json", "--nothing", "seed=1")
    assert done.returncode == 2 and "unrecognized arguments: --nothing" in done.stderr
    done = run_script("prepare_data", "glyphs-100", "seed=1")
    assert done.returncode == 2 and "unrecognized arguments: seed=1" in done.stderr


def test_a_key_given_twice(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"info": 1, "info": 2, ' + json.dumps(CLEAN)[1:])
    with pytest.raises(bags.UserError, match="given twice"):
        bags.AnnotationIndex.open(path)
    assert [finding.kind for finding in check_annotations(path)] == ["file"]


def test_check_notes_keys_that_an_entry_has_twice(tmp_path):
    path = write(tmp_path, {**rle([30, 40], RLE), "info": {"a": 1}})
    text = path.read_text().replace('"category_id": 2', '"category_id": 1, "category_id": 2', 1)
    path.write_text(text.replace('"size"', '"size": 3, "size"').replace('"a": 1', '"a": 1, "a": 2'))
    found = {finding.kind: finding for finding in check_annotations(path)}["key given twice"]
    assert found.level == "note" and found.count == 2
    assert found.examples == ["annotations: id 1: size", "annotations: id 1: category_id"]
    assert len(bags.AnnotationIndex.open(path).labels) == 2


def test_file_names_that_are_odd_but_fine(tmp_path):
    for name in ("Screenshot 9.41.00\u202fAM.png", "a\u00a0b.png", "\U0001f468\u200d\U0001f467.png"):
        assert bags.AnnotationIndex.open(write(tmp_path, image(file_name=name))).file_name(0) == name


def test_a_linked_image_folder_is_the_users_choice(shapes, tmp_path):
    (tmp_path / "linked").symlink_to(shapes)
    (shapes / "x.json").write_text((shapes / "x.json").read_text().replace("a.png", "linked/a.png"))
    assert DetectionDataset(bags.AnnotationIndex.open(shapes / "x.json"), tmp_path)[0][0].shape == (3, 30, 40)


def test_check_of_the_embedded_data_and_of_nothing(glyphs, tmp_path):
    done = run_script("prepare_data", "check", glyphs / "train.json", "--images", glyphs)
    assert done.returncode == 0 and "[stops]" not in done.stdout, done.stderr
    assert run_script("prepare_data", "check", tmp_path / "none.json").returncode == 1
    done = run_script("prepare_data", "check", glyphs / "train.json", "--images", tmp_path / "none")
    assert done.returncode == 1 and "[stops]" in done.stdout and "no such image folder: 1" in done.stdout
    assert "categories by training objects" in done.stdout and done.stdout.endswith("\nnot ready: 1 problem\n")


# --------------------------------------------------------------------------- images to tensors


@pytest.fixture
def shapes(tmp_path):
    """One image of 40 x 30 with a polygon, an RLE, a box alone, and a crowd."""
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "a.png")
    mask = np.zeros((30, 40), np.uint8, order="F")
    mask[20:28, 4:10] = 1
    rle = coco_mask.encode(mask)["counts"].decode()
    entries = [
        {"bbox": [2, 2, 10, 6], "segmentation": [[2, 2, 12, 2, 12, 8, 2, 8]]},
        {"bbox": [4, 20, 6, 8], "segmentation": {"size": [30, 40], "counts": rle}},
        {"bbox": [20, 5, 10, 10]},
        {"bbox": [0, 0, 40, 30], "segmentation": {"size": [30, 40], "counts": rle}, "iscrowd": 1},
    ]
    annotations = [{"id": k, "image_id": 7, "category_id": 1, **entry} for k, entry in enumerate(entries, 1)]
    content = {**CLEAN, "images": IMAGES[:1], "annotations": annotations}
    (tmp_path / "x.json").write_text(json.dumps(content))
    return tmp_path


def test_masks_follow_the_image(shapes):
    """Twice the size, mirrored: masks cover their boxes; what has no mask, or is a crowd, is left out."""
    index = bags.AnnotationIndex.open(shapes / "x.json")
    plain = DetectionDataset(index, shapes, masks=True)[0][1]
    assert plain["masks"].shape == (2, 30, 40) and plain["masks"].sum((1, 2)).tolist() == [60, 48]
    assert plain["masks"][0, 2:8, 2:12].all() and plain["masks"][1, 20:28, 4:10].all()
    assert len(DetectionDataset(index, shapes)[0][1]["boxes"]) == 3
    dataset = DetectionDataset(index, shapes, training_transform(1.0, [60], long_side=100), masks=True)
    image, target = dataset[0]
    assert image.shape == (3, 60, 80) and target["masks"].shape == (2, 60, 80)
    assert target["boxes"].tolist() == [[56, 4, 76, 16], [60, 40, 72, 56]]
    for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
        assert mask[y1:y2, x1:x2].all() and mask.sum() == (x2 - x1) * (y2 - y1)


def test_multi_scale_training(shapes):
    """Shorter sides from the list, or any between its ends; the longer side is capped."""
    index = bags.AnnotationIndex.open(shapes / "x.json")
    some = DetectionDataset(index, shapes, training_transform(0, [15, 45]))
    sizes = {tuple(some[0, seed][0].shape[1:]) for seed in range(20)}
    assert sizes == {(15, 20), (45, 60)}
    many = DetectionDataset(index, shapes, training_transform(0, [15, 60], any_between=True, long_side=50))
    sizes = [tuple(many[0, seed][0].shape[1:]) for seed in range(60)]
    assert len(set(sizes)) > 15 and max(w for _, w in sizes) == 50 and min(h for h, _ in sizes) < 22
    assert [tuple(many[0, seed][0].shape[1:]) for seed in range(60)] == sizes


def test_exif_orientation_is_a_choice(shapes):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    picture = Image.new("RGB", (40, 30), "blue")
    picture.putpixel((0, 0), (255, 0, 0))
    picture.save(shapes / "a.png", exif=exif)
    index = bags.AnnotationIndex.open(shapes / "x.json")
    assert DetectionDataset(index, shapes)[0][0].shape == (3, 30, 40)
    with pytest.raises(bags.UserError, match="30 x 40 pixels"):
        DetectionDataset(index, shapes, exif=True)[0]


def test_lvis_v05_names_of_coco_2014(shapes):
    (shapes / "x.json").write_text((shapes / "x.json").read_text().replace("a.png", "COCO_val2014_000000000123.jpg"))
    Image.new("RGB", (40, 30)).save(shapes / "000000000123.jpg")
    assert DetectionDataset(bags.AnnotationIndex.open(shapes / "x.json"), shapes)[0][0].shape == (3, 30, 40)


# --------------------------------------------------------------------------- LVIS


SHARED = OUTSIDE / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no published counts here")
def test_published_counts_fall_into_the_published_groups():
    lvis = json.loads((SHARED / "lvis_v0.5/lvis_v0.5_train_categories.json").read_text())
    assert bags.assign_groups([c["instance_count"] for c in lvis]).sizes == (294, 453, 302, 181)


class RangeServer(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges; the first answer breaks off in the middle."""

    content, broken = b"", [True]

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        if start >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        end = len(self.content) // 2 if self.broken.pop() else None
        self.broken.append(False)
        self.wfile.write(self.content[start:end])

    def log_message(self, *_):
        """Silent."""


def test_downloads_resume_and_are_checked(tmp_path):
    with zipfile.ZipFile(tmp_path / "source.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lvis.json", json.dumps(list(range(50_000))))
    RangeServer.content = (tmp_path / "source.zip").read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RangeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, path = f"http://127.0.0.1:{server.server_port}/a.zip", tmp_path / "a.zip"
    with pytest.raises(OSError):
        download(url, path)
    part = (tmp_path / "a.zip.part").stat().st_size
    assert 0 < part < len(RangeServer.content) and not path.exists()
    download(url, path)
    assert path.read_bytes() == RangeServer.content and not (tmp_path / "a.zip.part").exists()
    shutil.move(path, tmp_path / "a.zip.part")  # killed just before the last rename
    download(url, path)
    (tmp_path / "b.zip.part").write_bytes(RangeServer.content + b"of something else")
    with pytest.raises(OSError, match="run this again"):
        download(url.replace("a.zip", "b.zip"), tmp_path / "b.zip")
    assert not (tmp_path / "b.zip.part").exists()
    server.shutdown()
    unpack(path, tmp_path, "lvis.json")
    assert json.loads((tmp_path / "lvis.json").read_text())[-1] == 49_999
    (tmp_path / "lvis.json").unlink()
    for place in range(3, 9):
        content = bytearray(RangeServer.content)
        content[len(content) * place // 10] ^= 255
        path.write_bytes(content)
        with pytest.raises(bags.UserError, match="damaged"):
            unpack(path, tmp_path, "lvis.json")
        assert not list(tmp_path.glob("lvis.json*"))
