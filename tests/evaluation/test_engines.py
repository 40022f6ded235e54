"""The default engine against the official tools; what hangs on files that are long, odd or crowded."""

import json
import math

import hotcoco
import numpy as np
import pytest
from conftest import OUTSIDE, run_script
from pycocotools import mask as coco_mask

import bags
from bags.evaluation import detection_ap, official, results_file
from bags.evaluation.truth import read_truth

PARITY = OUTSIDE / "data/eval_parity"
needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason="no published results here")


def rle(box, size):
    x, y, w, h = (int(v) for v in box)
    mask = np.zeros(size, np.uint8, order="F")
    mask[max(y, 0) : y + h + 1, max(x, 0) : x + w + 1] = 1
    encoded = coco_mask.encode(mask)
    return {"size": list(size), "counts": encoded["counts"].decode()}


def detections_of(truth, rng, per_object, ties):
    """Shifted objects, some of wrong categories and many of equal scores."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    categories = [category["id"] for category in truth["categories"]]
    entries = []
    for annotation in truth["annotations"]:
        for _ in range(per_object):
            box = np.array(annotation["bbox"]) + rng.normal(0, 3, 4)
            box[2:] = np.maximum(box[2:], 1)
            category = annotation["category_id"] if rng.random() < 0.7 else int(rng.choice(categories))
            score = float(rng.integers(1, 9) / 8 if ties else rng.random())
            box = box.round(2).tolist()
            entry = {"image_id": annotation["image_id"], "category_id": category, "bbox": box, "score": score}
            entries.append({**entry, "segmentation": rle(box, sizes[annotation["image_id"]])})
    return entries


def federated(folder, seed):
    """Random LVIS-like truth: negative and not exhaustive categories, crowded images."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for i in range(1, 21):
        shown = rng.choice(np.arange(1, 13), 4, replace=False).tolist()
        images.append(
            {
                "id": i,
                "width": 120,
                "height": 90,
                "neg_category_ids": shown[2:3],
                "not_exhaustive_category_ids": shown[:1],
            }
        )
        for category in rng.choice(shown[:2], int(rng.integers(1, 6))):
            box = [float(v) for v in (*rng.uniform(0, 50, 2).round(1), *rng.uniform(4, 60, 2).round(1))]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": int(category),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "segmentation": rle(box, (90, 120)),
                }
            )
    categories = [
        {"id": c, "name": f"c{c}", "frequency": "rcf"[c % 3], "image_count": c, "instance_count": 7 * c}
        for c in range(1, 13)
    ]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth))
    return truth, rng


def assert_agree(truth, results, iou_type, engine, limit, monkeypatch):
    """Precision and recall arrays equal bit for bit, and so every number."""
    arrays = {}
    plain, other = detection_ap._match, official.match
    monkeypatch.setattr(detection_ap, "_match", lambda *a: arrays.setdefault("hotcoco", plain(*a)))
    monkeypatch.setattr(official, "match", lambda *a: arrays.setdefault(engine, other(*a)))
    ours = bags.evaluate(truth, results, iou_type, max_detections=limit)
    theirs = bags.evaluate(truth, results, iou_type, max_detections=limit, engine=engine)
    monkeypatch.undo()
    for a, b in zip(arrays["hotcoco"], arrays[engine], strict=True):
        assert a.shape == b.shape and np.array_equal(a, b)
    assert ours.keys() == theirs.keys() and all(ours[k] == theirs[k] or math.isnan(ours[k]) for k in ours)
    assert 0.05 < ours["AP"] < 1


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("ties, limit", [(False, 300), (True, 300), (True, 5)])
def test_equal_to_lvis(tmp_path, monkeypatch, iou_type, ties, limit):
    if not official_lvis():
        pytest.skip("lvis is not installed")
    truth, rng = federated(tmp_path, limit + ties)
    (tmp_path / "r.json").write_text(json.dumps(detections_of(truth, rng, 6, ties)))
    assert_agree(tmp_path / "truth.json", tmp_path / "r.json", iou_type, "lvis", limit, monkeypatch)


def official_lvis():
    from importlib.util import find_spec

    return find_spec("lvis") is not None


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("ties, limit", [(False, 100), (True, 100), (False, 4)])
def test_equal_to_pycocotools(tmp_path, monkeypatch, iou_type, ties, limit):
    truth, rng = federated(tmp_path, ties)
    for image in truth["images"]:
        del image["neg_category_ids"]
    for annotation in truth["annotations"][::9]:
        annotation["iscrowd"] = 1
    for annotation in truth["annotations"]:
        annotation.setdefault("iscrowd", 0)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "r.json").write_text(json.dumps(detections_of(truth, rng, 6, ties)))
    assert_agree(tmp_path / "truth.json", tmp_path / "r.json", iou_type, "pycocotools", limit, monkeypatch)


@needs_parity
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_lvis_own_images(tmp_path, monkeypatch, iou_type):
    if not official_lvis():
        pytest.skip("lvis is not installed")
    truth = json.loads((PARITY / "lvis_val_100.json").read_text())
    entries = detections_of(truth, np.random.default_rng(0), 4, False)
    (tmp_path / "r.json").write_text(json.dumps(entries))
    assert_agree(PARITY / "lvis_val_100.json", tmp_path / "r.json", iou_type, "lvis", 300, monkeypatch)


@needs_parity
@pytest.mark.parametrize("iou_type, file", [("bbox", "fakebbox100"), ("segm", "fakesegm100")])
def test_published_numbers_of_cocos_fake_results(iou_type, file, monkeypatch):
    """With ties in the order of the file, as published; our order of ties (6 % of the scores) changes little."""
    text = (PARITY / "val2014_fake_eval_res.txt").read_text()
    part = text[text.index(f"type={iou_type}") :]
    published = [float(line.rsplit("=", 1)[1]) for line in part.splitlines() if " @[" in line][:12]
    truth, results = PARITY / "instances_val2014_100.json", PARITY / f"instances_val2014_{file}_results.json"
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    scores = detection_ap.score(truth, results, iou_type)
    assert [scores.numbers[name] for name in names] == pytest.approx(published[:6], abs=0.0011)
    assert any("6% of the detections share their score" in note for note in scores.notes)
    by_score = lambda ids, boxes, scores, masks: (np.argsort(-scores, kind="stable"), 0)  # noqa: E731
    monkeypatch.setattr(results_file, "canonical_order", by_score)
    found = bags.evaluate(truth, results, iou_type)
    assert [round(found[name], 3) for name in names] == published[:6]
    assert round(found["AR"], 3) == published[8]


# --------------------------------------------------------------------------- AP_fixed


@pytest.mark.parametrize(
    ("numbers", "noted"), [((50, 50, 7), True), ((50, 49, 7), False), ((50, 50, 49, 49, 48), False), ((9, 9, 9), False)]
)
def test_fixed_ap_of_a_file_that_was_cut_off(tmp_path, numbers, noted):
    """Two images hold most, and no more hold a few less: they were cut off there. Below 20 it may be all there are."""
    truth = {
        "images": [{"id": k, "width": 90, "height": 90} for k in range(1, 6)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "t.json").write_text(json.dumps(truth))
    entries = [
        {"image_id": image, "category_id": 1, "bbox": [0, 0, 9, 9 + k], "score": 1 / (2 + k)}
        for image, number in enumerate(numbers, 1)
        for k in range(number)
    ]
    (tmp_path / "r.json").write_text(json.dumps(entries))
    for fixed in (True, False):
        notes = detection_ap.score(tmp_path / "t.json", tmp_path / "r.json", fixed=fixed).notes
        assert any("cut off" in note for note in notes) == (noted and fixed)


def test_fixed_ap_by_hand(tmp_path, monkeypatch):
    """A limit of 1 per image hides two of three objects; AP_fixed sees them. Then 2 detections a category are kept."""
    boxes = [[0, 0, 10, 10], [20, 0, 10, 10], [40, 0, 10, 10]]
    truth = {
        "images": [{"id": 1, "width": 90, "height": 90}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": 1, "bbox": b, "area": 100, "iscrowd": 0}
            for k, b in enumerate(boxes, 1)
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (tmp_path / "t.json").write_text(json.dumps(truth))
    entries = [
        {"image_id": 1, "category_id": 1, "bbox": b, "score": s} for b, s in zip(boxes, (0.9, 0.8, 0.7), strict=True)
    ]
    (tmp_path / "r.json").write_text(json.dumps(entries[::-1]))
    found = bags.evaluate(tmp_path / "t.json", tmp_path / "r.json", max_detections=1, fixed=True)
    assert found["AP"] == pytest.approx(34 / 101) and found["AP_fixed"] == pytest.approx(1)
    monkeypatch.setattr(detection_ap, "FIXED", 2)
    found = bags.evaluate(tmp_path / "t.json", tmp_path / "r.json", max_detections=1, fixed=True)
    assert found["AP_fixed"] == pytest.approx(67 / 101)
    monkeypatch.undo()
    plain = bags.evaluate(tmp_path / "t.json", tmp_path / "r.json", fixed=True)
    assert plain["AP_fixed"] == plain["AP"] and "AP_fixed" not in bags.evaluate(
        tmp_path / "t.json", tmp_path / "r.json"
    )


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("at_once", [2**20, 200])
def test_files_are_read_in_parts(tmp_path, monkeypatch, capfd, at_once):
    """Odd layouts give the same arrays; in every part the first fault is named with its place in the file."""
    monkeypatch.setattr(results_file, "AT_ONCE", at_once)
    truth, rng = federated(tmp_path, 0)
    good = [{k: v for k, v in e.items() if k != "segmentation"} for e in detections_of(truth, rng, 1, False)]
    files = tmp_path / "truth.json", tmp_path / "r.json"
    files[1].write_text(json.dumps(good))
    expected = bags.evaluate(*files)
    note = {"note": 'a text with "}, {" and [', "more": [{"a": 1}, {"b": {}}, {"c": None}]}
    for text in (
        json.dumps(good, indent=2).replace('"bbox": [', '"bbox" :['),
        json.dumps([{**note, **entry} for entry in good]),
        "\ufeff \n" + json.dumps([{**entry, "segmentation": []} for entry in good]) + "\n",
        json.dumps([{**entry, "segmentation": None} for entry in good]).replace("image_id", "\\u0069mage_id"),
    ):
        files[1].write_text(text)
        assert bags.evaluate(*files) == pytest.approx(expected, nan_ok=True, abs=0)
    for words, change in {
        "image_id 99 is not": {"image_id": 99},
        "category_id 99 is not": {"category_id": 99},
        "score: expected a finite number": {"score": None},
        "bbox: expected": {"bbox": [1, 2, 4]},
        "expected an object": None,
        "no score": {"score": "gone"},
    }.items():
        for k in (0, 5, len(good) - 1):
            entry = change and {**good[k], **change}
            entry = {**good[k], "score": 0} if words == "no score" else entry
            if words == "no score":
                del entry["score"]
            files[1].write_text(json.dumps([*good[:k], entry, *good[k + 1 :]]))
            with pytest.raises(bags.UserError, match=f"r.json: detection {k}: {words}"):
                bags.evaluate(*files)
    for text in (
        json.dumps(good)[:-1],
        json.dumps(good)[:-1] + ",]",
        json.dumps(good) + "[]",
        "[" * 9999 + "]",
        "",
        "[",
    ):
        files[1].write_text(text)
        with pytest.raises(bags.UserError, match="r.json"):
            bags.evaluate(*files)
    files[1].write_text(json.dumps(good).replace(str(good[3]["score"]), "NaN", 1))
    with pytest.raises(bags.UserError, match="r.json: detection 3: score: expected a finite number, got nan"):
        bags.evaluate(*files)
    files[1].write_text(json.dumps(good))
    with pytest.raises(bags.UserError, match=r"r.json: 64 of 64 detections have no segmentation \(first: detection 0"):
        bags.evaluate(*files, "segm")
    assert "hotcoco" not in capfd.readouterr().err


def test_what_is_no_mask_is_refused(tmp_path):
    """Such detections would be scored by their boxes, or as wrong, without a word."""
    truth, rng = federated(tmp_path, 0)
    good = detections_of(truth, rng, 2, True)
    files = tmp_path / "truth.json", tmp_path / "r.json"
    for value in ({"size": [90, 121], "counts": "0"}, {"size": [90, 120]}, 3, "x", [3], [[1, 2, 3, 4, 5, "6"]]):
        files[1].write_text(json.dumps([*good[:4], {**good[4], "segmentation": value}, *good[5:]]))
        with pytest.raises(bags.UserError, match=r"detection 4: segmentation: .* RLE of \[90, 120\]"):
            bags.evaluate(*files, "segm")
    for value in (None, [], [[]], [[1, 2, 3, 4]], {}):
        files[1].write_text(json.dumps([*good[:4], {**good[4], "segmentation": value}, *good[5:]]))
        with pytest.raises(bags.UserError, match=r"1 of \d+ detections have no segmentation \(first: detection 4\)"):
            bags.evaluate(*files, "segm")
        scores = detection_ap.score(*files)
        assert scores.has_masks and any("only boxes are scored" in note for note in scores.notes)
    files[1].write_text(json.dumps(good))
    content = json.loads(files[0].read_text())
    first = content["annotations"][0]
    odd = {**first, "segmentation": {"counts": "0"}}
    files[0].write_text(json.dumps({**content, "annotations": [odd, *content["annotations"][1:]]}))
    with pytest.raises(bags.UserError, match=f"annotation {first['id']}: segmentation: .* RLE of .90, 120"):
        bags.evaluate(*files, "segm")
    del content["annotations"][2]["segmentation"]
    files[0].write_text(json.dumps(content))
    bare = content["annotations"][2]["id"]
    with pytest.raises(bags.UserError, match=rf"1 of 64 objects .*annotation {bare}\): masks cannot be scored"):
        bags.evaluate(*files, "segm")
    assert not detection_ap.score(*files).has_masks
    done = run_script("evaluate", files[1], "--annotations", files[0], "--json")
    assert done.returncode == 0 and "only boxes are scored" in done.stderr and "mask_AP" not in done.stdout


@pytest.mark.parametrize("shift", [-1, -40, 2**53])
def test_any_whole_numbers_are_ids(tmp_path, monkeypatch, shift):
    """Negative ids, 0 (which the official tools take for no object) and large ones give the same numbers."""
    truth, rng = federated(tmp_path, 0)
    entries = detections_of(truth, rng, 2, False)
    files = tmp_path / "truth.json", tmp_path / "r.json"
    files[1].write_text(json.dumps(entries))
    expected = detection_ap.score(*files)
    for image in truth["images"]:
        image["id"] += shift
        for name in ("neg_category_ids", "not_exhaustive_category_ids"):
            image[name] = [key + shift for key in image[name]]
    for category in truth["categories"]:
        category["id"] += shift
    for entry in [*truth["annotations"], *entries]:
        entry["image_id"] += shift
        entry["category_id"] += shift
    for annotation in truth["annotations"]:
        annotation["id"] += shift
    files[0].write_text(json.dumps(truth))
    files[1].write_text(json.dumps(entries))
    found = detection_ap.score(*files)
    assert found.numbers == pytest.approx(expected.numbers, nan_ok=True, abs=0)
    assert [row["id"] - shift for row in found.rows] == [row["id"] for row in expected.rows]
    if official_lvis():
        assert_agree(*files, "bbox", "lvis", 300, monkeypatch)


def test_engines_are_named(tmp_path):
    federated(tmp_path, 0)
    (tmp_path / "r.json").write_text("[]")
    words = {
        "fast": "expected one of hotcoco, lvis, pycocotools",
        "pycocotools": "holds LVIS annotations",
        "lvis": "no detections",
    }
    for engine, text in words.items():
        with pytest.raises(bags.UserError, match=text):
            bags.evaluate(tmp_path / "truth.json", tmp_path / "r.json", engine=engine)
    assert bags.evaluate(tmp_path / "truth.json", tmp_path / "r.json")["AP"] == 0


def test_rows_of_categories(tmp_path):
    truth, rng = federated(tmp_path, 3)
    (tmp_path / "r.json").write_text(json.dumps(detections_of(truth, rng, 2, False)))
    found, rows, *_ = detection_ap.score(tmp_path / "truth.json", tmp_path / "r.json", boundaries=(20, 50))
    assert [row["id"] for row in rows] == list(range(1, 13)) and rows[4]["name"] == "c5"
    assert [row["bin"] for row in rows] == [1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    assert rows[0]["frequency"] == "c" and rows[1]["training_instances"] == 14 and rows[1]["training_images"] == 2
    known = [row for row in rows if not math.isnan(row["AP"])]
    assert found["AP"] == pytest.approx(np.mean([row["AP"] for row in known]))
    assert found["AP3"] == pytest.approx(np.mean([row["AP"] for row in known if row["bin"] == 3]))
    assert found["AP50"] == pytest.approx(np.mean([row["AP50"] for row in known]))


def test_the_engine_has_what_is_used():
    """Names that a newer hotcoco might lose."""
    assert {"load_res", "cap_detections_per_image"} <= set(dir(hotcoco.COCO))


def test_boxes_in_another_format_are_mentioned(tmp_path):
    """Corners and fractions instead of x, y, width, height in pixels; no detection at all."""
    truth, _ = federated(tmp_path, 1)
    width, height = (truth["images"][0][side] for side in ("width", "height"))
    ground_truth = read_truth(tmp_path / "truth.json")
    corners = [[k * width / 20, k * height / 20, (k / 20 + 0.45) * width, (k / 20 + 0.5) * height] for k in range(10)]
    boxes = {
        "boxes of two corners? ": [[x, y, x2, y2] for x, y, x2, y2 in corners],
        "normalised boxes? 10 of 10 boxes are smaller than one pixel; expected x, y, width, height in pixels": [
            [x / width, y / height, 0.45, 0.5] for x, y, *_ in corners
        ],
        "holds no detection, so every AP is 0": [],
        "2 boxes have no area (first: detection 0): as boxes they count as false, where the official lvis leaves": [
            [1, 1, 0, 5],
            [1, 1, 5, 0],
        ],
        "": [[x, y, x2 - x, y2 - y] for x, y, x2, y2 in corners],
    }
    for words, given in boxes.items():
        entries = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.01 * k} for k, box in enumerate(given)]
        (tmp_path / "r.json").write_text(json.dumps(entries))
        notes = results_file.read_results(tmp_path / "r.json", ground_truth).notes
        assert [words in note for note in notes] == ([True] if words else []), notes
