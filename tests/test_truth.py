"""Ground truth of any kind: what scoring does not need changes nothing, and everything else is named."""

import copy
import json
import math

import pytest
from conftest import fork_script

import bags
from bags.evaluation import detection_ap

ODD = (None, -3, 2.5, 10**400, "x", "\ud800", [], [1], {}, {"a": 1}, True)
BOXES = {1: [(1, 10), (2, 40)], 2: [(1, 20)], 3: [(2, 5), (3, 50)]}  # image -> (category, x), 20 x 20 pixels


def truth_content(lvis=False):
    """Five objects of three categories, with all metadata of COCO's and LVIS's files."""
    images = [
        {"id": i, "width": 100, "height": 100, "file_name": f"{i}.jpg", "license": 1, "date_captured": "2020-01-01",
         "coco_url": f"http://x/{i}.jpg", "flickr_url": "u"} for i in BOXES
    ]  # fmt: skip
    if lvis:
        images = [{**image, "neg_category_ids": [3], "not_exhaustive_category_ids": []} for image in images]
    annotations = [
        {"image_id": i, "category_id": c, "bbox": [x, 10, 20, 20], "area": 400, "iscrowd": 0, "score": 0.5,
         "keypoints": [], "num_keypoints": 0, "attributes": {}, "segmentation": [[x, 10, x + 20, 10, x + 20, 30, x, 30]]}
        for i, objects in BOXES.items() for c, x in objects
    ]  # fmt: skip
    categories = [
        {"id": c, "name": f"c{c}", "supercategory": "s", "instance_count": 9 * c, "image_count": 8 * c, "skeleton": [],
         "frequency": "rcf"[c - 1], "synset": "c.n.01", "synonyms": ["c"], "def": "d", "keypoints": ["k"]}
        for c in (1, 2, 3)
    ]  # fmt: skip
    return {
        "info": {"year": 2020, "version": "1", "description": "d", "contributor": "c", "url": "u", "date_created": "d"},
        "licenses": [{"id": 1, "name": "l", "url": "u"}],
        "type": "instances",
        "images": images,
        "annotations": [{"id": k, **annotation} for k, annotation in enumerate(annotations, 1)],
        "categories": categories,
    }


def write(folder, content, *detections):
    """(truth.json, results.json) with detections (image, category, score, x), by default five."""
    detections = detections or ((1, 1, 0.9, 10), (1, 2, 0.8, 41), (2, 1, 0.7, 60), (3, 2, 0.6, 5), (3, 3, 0.5, 52))
    entries = [{"image_id": i, "category_id": c, "score": s, "bbox": [x, 10, 20, 20]} for i, c, s, x in detections]
    files = folder / "truth.json", folder / "results.json"
    files[0].write_text(json.dumps(content))
    files[1].write_text(json.dumps(entries))
    return files


NEEDED = {"id", "image_id", "category_id", "bbox", "iscrowd"}
COUNTS = {"instance_count": ("AP1", "AP2", "AP3", "AP4", "AP_tail", "AP_head"), "frequency": ("APr", "APc", "APf")}
LISTS = {"neg_category_ids", "not_exhaustive_category_ids"}


@pytest.mark.parametrize("lvis", [False, True])
def test_any_key_set_to_anything(tmp_path, lvis):
    """Keys that scoring needs are refused in one line; others leave every number as it is."""
    clean = truth_content(lvis)
    files = write(tmp_path, clean)
    expected = bags.evaluate(*files)
    assert 0.3 < expected["AP"] < 1
    counter = 0
    for part in ("info", "licenses", "images", "annotations", "categories"):
        entries = clean[part] if isinstance(clean[part], list) else [clean[part]]
        for key in [*entries[0], "unknown"]:
            for value in ODD:
                content, counter = copy.deepcopy(clean), counter + 1
                changed = content[part] if isinstance(content[part], list) else [content[part]]
                for entry in changed if counter % 2 else changed[-1:]:
                    entry[key] = value
                files[0].write_text(json.dumps(content))
                try:
                    found = bags.evaluate(*files)
                except bags.UserError as error:
                    assert key in NEEDED and part not in ("info", "licenses"), (part, key, value, error)
                    assert (
                        "truth.json: " in str(error) and "\n" not in str(error) and "cannot be eval" not in str(error)
                    )
                    continue
                free = LISTS | NEEDED if part in ("images", "annotations") else ()
                if key in free or (part == "categories" and key == "id"):
                    assert not math.isnan(found["AP"]), (part, key, value)
                    continue
                same = {name: number for name, number in expected.items() if name not in COUNTS.get(key, ())}
                assert {name: found.get(name) for name in same} == pytest.approx(same, nan_ok=True, abs=0), (part, key)
    for part in clean:
        for value in ODD:
            files[0].write_text(json.dumps({**clean, part: value}))
            if part in ("images", "annotations", "categories"):
                with pytest.raises(bags.UserError, match="truth.json: "):
                    bags.evaluate(*files)
            else:
                assert bags.evaluate(*files) == pytest.approx(expected, nan_ok=True, abs=0)


@pytest.mark.parametrize("area", [None, -400, 0, math.inf, "400", True, 1e17])
def test_impossible_areas_are_computed(tmp_path, area):
    """Absent, negative, zero or odd: the mask's or the box's area (400, small) is taken, and named if it was wrong."""
    content = truth_content()
    expected = bags.evaluate(*write(tmp_path, content))
    for k, annotation in enumerate(content["annotations"]):
        annotation["area"] = area
        if k % 2:
            del annotation["segmentation"]
        if area is None and k > 2:
            del annotation["area"]
    for engine in ("hotcoco", "pycocotools"):
        scores = detection_ap.score(*write(tmp_path, content), engine=engine)
        assert scores.numbers == pytest.approx(expected, nan_ok=True, abs=0)
    notes = [note for note in scores.notes if "impossible areas" in note]
    assert len(notes) == (area is not None)
    assert area is None or "mask or box: 5 (first: annotation 1: " in notes[0]


def test_the_masks_area_comes_first(tmp_path):
    """A box of 40 x 40 pixels is medium; its mask, a triangle of half that, is small."""
    content = truth_content()
    for annotation in content["annotations"]:
        x = annotation["bbox"][0] = min(annotation["bbox"][0], 50)
        annotation["bbox"][2:] = [40, 40]
        annotation["segmentation"] = [[x, 10, x + 40, 10, x, 50]]
        del annotation["area"]
    found = bags.evaluate(*write(tmp_path, content))
    assert not math.isnan(found["APs"]) and math.isnan(found["APm"])
    for annotation in content["annotations"]:
        annotation["segmentation"] = {"size": [1, 1], "counts": "nonsense"}
    found = bags.evaluate(*write(tmp_path, content))
    assert math.isnan(found["APs"]) and not math.isnan(found["APm"])


@pytest.mark.parametrize("lvis", [False, True])
def test_empty_boxes_count_as_missed(tmp_path, lvis):
    """As pycocotools does; without an area it would divide by nothing, with area 0 lvis would leave them out."""
    content = truth_content(lvis)
    full = bags.evaluate(*write(tmp_path, content))
    for area in (0, 400, None, -1):
        content["annotations"][0] |= {"bbox": [10, 10, 0, 20], "area": area}
        scores = detection_ap.score(*write(tmp_path, content))
        assert scores.numbers["AP"] < full["AP"]
        assert any("empty boxes" in note and "1 (first: annotation 1)" in note for note in scores.notes)
        if not lvis:
            assert detection_ap.score(*write(tmp_path, content), engine="pycocotools").numbers == pytest.approx(
                scores.numbers, nan_ok=True, abs=0
            )


def test_missing_numbers_have_a_reason(tmp_path):
    content = truth_content()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    scores = detection_ap.score(*write(tmp_path, content))
    assert math.isnan(scores.numbers["AP"])
    assert any("all 5 objects are crowd regions" in note for note in scores.notes)
    content = truth_content(lvis=True)
    del content["images"][1]["neg_category_ids"]
    scores = detection_ap.score(*write(tmp_path, content))
    assert "images without a list of ids as neg_category_ids, taken as empty: 1 (first: image 2)" in scores.notes[0]
    del content["images"][0]["neg_category_ids"]
    scores = detection_ap.score(*write(tmp_path, content))
    assert "only 1 of 3 images have neg_category_ids: COCO's protocol applies" in scores.notes[0]
    content = truth_content()
    content["categories"][1]["frequency"] = "rare"
    scores = detection_ap.score(*write(tmp_path, content))
    assert any("frequency is not r, c or f" in note and "category 2: 'rare'" in note for note in scores.notes)
    assert scores.numbers["APr"] == scores.numbers["APr"]  # by image_count
    counts = {"instance_counts": [1, 2, 3], "image_counts": [1, 2, 3]}
    assert not detection_ap.score(*write(tmp_path, content), **counts).notes


def test_masks_that_are_not_scored_have_a_reason(tmp_path):
    """Of the ground truth and of the results; an empty segmentation is none."""
    content = truth_content()
    files = write(tmp_path, content)
    entries = json.loads(files[1].read_text())
    for entry in entries:
        entry["segmentation"] = []
    files[1].write_text(json.dumps(entries))
    plain = fork_script("evaluate", files[1], "--annotations", files[0], "--json")
    assert plain.returncode == 0 and "mask_AP" not in plain.stdout and "segmentation" not in plain.stderr
    for entry in entries:
        x = entry["bbox"][0]
        entry["segmentation"] = [[x, 10, x + 20, 10, x + 20, 30, x, 30]]
    files[1].write_text(json.dumps(entries))
    masks = fork_script("evaluate", files[1], "--annotations", files[0], "--json")
    numbers = json.loads(masks.stdout)
    assert numbers["mask_AP"] == numbers["AP"] == json.loads(plain.stdout)["AP"]
    content["annotations"][1]["segmentation"] = []
    files[0].write_text(json.dumps(content))
    done = fork_script("evaluate", files[1], "--annotations", files[0], "--json")
    assert "1 of 5 objects have no segmentation (first: annotation 2): boxes alone are scored" in done.stderr
    assert done.returncode == 0 and json.loads(done.stdout)["AP"] == numbers["AP"] and "mask_AP" not in done.stdout
