"""Ground truth of any kind: what scoring does not need changes nothing, and everything else is named."""

import copy
import json
import math

import pytest
from conftest import run_script

import bags
from bags.analysis.run_files import from_cell, read_categories, to_cell
from bags.cli import evaluate
from bags.core.terminal import printable
from bags.evaluation import detection_ap

ODD = (None, -3, 2.5, 10**400, "x", "\ud800", [], {"a": 1}, True)
BOXES = {1: [(1, 10), (2, 40)], 2: [(1, 20)], 3: [(2, 5), (3, 50)]}  # image -> (category, x), 20 x 20 pixels


def truth_content(lvis=False):
    """Five objects of three categories, with all metadata of COCO's and LVIS's files."""
    images = [
        {
            "id": i,
            "width": 100,
            "height": 100,
            "file_name": f"{i}.jpg",
            "license": 1,
            "date_captured": "2020-01-01",
            "coco_url": f"http://x/{i}.jpg",
            "flickr_url": "u",
        }
        for i in BOXES
    ]
    if lvis:
        images = [{**image, "neg_category_ids": [3], "not_exhaustive_category_ids": []} for image in images]
    annotations = [
        {
            "image_id": i,
            "category_id": c,
            "bbox": [x, 10, 20, 20],
            "area": 400,
            "iscrowd": 0,
            "score": 0.5,
            "keypoints": [],
            "num_keypoints": 0,
            "attributes": {},
            "segmentation": [[x, 10, x + 20, 10, x + 20, 30, x, 30]],
        }
        for i, objects in BOXES.items()
        for c, x in objects
    ]
    categories = [
        {
            "id": c,
            "name": f"c{c}",
            "supercategory": "s",
            "instance_count": 9 * c,
            "image_count": 8 * c,
            "skeleton": [],
            "frequency": "rcf"[c - 1],
            "synset": "c.n.01",
            "synonyms": ["c"],
            "def": "d",
            "keypoints": ["k"],
        }
        for c in (1, 2, 3)
    ]
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


def evaluate_script(monkeypatch, capsys, *arguments):
    """(stdout, stderr) of scripts/evaluate.py, run in this process: a fork of it must not use the engine's threads."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    capsys.readouterr()
    evaluate.main()
    return capsys.readouterr()


def test_masks_that_are_not_scored_have_a_reason(tmp_path, monkeypatch, capsys):
    """Of the ground truth and of the results; an empty segmentation is none."""
    content = truth_content()
    files = write(tmp_path, content)
    command = (files[1], "--annotations", files[0], "--json")
    entries = json.loads(files[1].read_text())
    for entry in entries:
        entry["segmentation"] = []
    files[1].write_text(json.dumps(entries))
    plain = evaluate_script(monkeypatch, capsys, *command)
    assert "mask_AP" not in plain.out and "segmentation" not in plain.err
    for entry in entries:
        x = entry["bbox"][0]
        entry["segmentation"] = [[x, 10, x + 20, 10, x + 20, 30, x, 30]]
    files[1].write_text(json.dumps(entries))
    numbers = json.loads(evaluate_script(monkeypatch, capsys, *command).out)
    assert numbers["mask_AP"] == numbers["AP"] == json.loads(plain.out)["AP"]
    content["annotations"][1]["segmentation"] = []
    files[0].write_text(json.dumps(content))
    done = evaluate_script(monkeypatch, capsys, *command)
    assert "1 of 5 objects have no segmentation (first: annotation 2): only boxes are scored" in done.err
    assert json.loads(done.out)["AP"] == numbers["AP"] and "mask_AP" not in done.out


def test_training_counts_of_results_files(tmp_path, monkeypatch, capsys):
    """Bins come from --train first, then from the file's own counts; without any, a line says how to get them."""
    content = truth_content()
    files = write(tmp_path, content)
    command = (files[1], "--annotations", files[0], "--json", "--bins", "2,3")
    done = evaluate_script(monkeypatch, capsys, *command)
    assert "AP_tail" in json.loads(done.out) and "its own instance_count makes the bins; --train" in done.err
    own = copy.deepcopy(content)
    for category in own["categories"]:
        category["instance_count"] = sum(a["category_id"] == category["id"] for a in own["annotations"])
    files[0].write_text(json.dumps(own))
    done = evaluate_script(monkeypatch, capsys, *command)
    assert "the numbers of its own objects, hardly those of training" in done.err
    for category in content["categories"]:
        del category["instance_count"], category["image_count"], category["frequency"]
    files[0].write_text(json.dumps(content))
    done = evaluate_script(monkeypatch, capsys, *command)
    assert "AP_tail" not in json.loads(done.out) and "no instance_count, so there are no bins" in done.err
    compared = evaluate_script(monkeypatch, capsys, "--compare", files[1], files[1], *command[1:], "--draws", 5)
    assert "AP_tail" not in json.loads(compared.out)["bbox"] and "no bins and no AP_tail; --train" in compared.err

    train = copy.deepcopy(content)
    train["categories"].insert(0, {"id": 9, "name": "only in training"})
    (tmp_path / "train.json").write_text(json.dumps(train))  # 2 objects of categories 1 and 2, one of 3
    done = evaluate_script(monkeypatch, capsys, *command, "--train", tmp_path / "train.json")
    numbers = json.loads(done.out)
    assert numbers["AP_tail"] == numbers["AP1"] > 0 and numbers["AP2"] > 0 and "bins" not in done.err
    again = evaluate_script(monkeypatch, capsys, *command, "--train", tmp_path / "results_evaluation")  # its CSV
    assert json.loads(again.out) == numbers
    options = (*command[1:], "--draws", 5, "--train", tmp_path / "train.json")
    compared = evaluate_script(monkeypatch, capsys, "--compare", files[1], files[1], *options)
    assert json.loads(compared.out)["bbox"]["AP_tail"]["first"] == pytest.approx(numbers["AP_tail"])
    train["categories"][1]["name"] = "other"
    (tmp_path / "train.json").write_text(json.dumps(train))
    with pytest.raises(bags.UserError, match="train.json: category 1 .'c1' in .*truth.json. is 'other' there"):
        evaluate_script(monkeypatch, capsys, *command, "--train", tmp_path / "train.json")


NAMES = ("=1+1", "'-x", "\x1b[31mred\x1b[0m\n|tail", "'tis", "\ud800", "@\u202eevil", 'a,"b"')


def test_names_are_harmless_and_come_back(tmp_path, monkeypatch, capsys):
    """On terminals, in spreadsheets and in our own files; numbers stay numbers."""
    content = truth_content()
    for category, name in zip(content["categories"], NAMES, strict=False):
        category["name"] = name
    for key, name in enumerate(NAMES[3:], start=4):
        content["categories"].append({"id": key, "name": name, "instance_count": 1, "image_count": 1, "frequency": "r"})
    files = write(tmp_path, content)
    evaluate_script(monkeypatch, capsys, files[1], "--annotations", files[0])
    folder = tmp_path / "results_evaluation"
    assert [row["name"] for row in read_categories(folder)] == [name.replace("\ud800", "\\ud800") for name in NAMES]
    text = (folder / "categories.csv").read_text(errors="surrogatepass")
    assert "\n1,'=1+1,9," in text and "\n2,''-x," in text and "\n4,'tis," in text and ",-" not in text
    (tmp_path / "other.json").write_text("[]")
    command = ("--compare", files[1], tmp_path / "other.json", "--annotations", files[0], "--draws", 5)
    done = evaluate_script(monkeypatch, capsys, *command)
    assert "\x1b" not in done.out and r"\x1b[31mred\x1b[0m\n|tail" in done.out
    for category in content["categories"]:
        category["name"] = f"é\u4e2d{category['id']}"
    files[0].write_text(json.dumps(content))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    printed = run_script("evaluate", *command)
    assert printed.returncode == 0, printed.stderr
    assert r"\xe9\u4e2d1" in printed.stdout
    assert printable("tab\tand\x9b31m") == r"tab\tand\x9b31m" and printable("naïve 中 😀") == "naïve 中 😀"


@pytest.mark.parametrize("name", ["", "'", "''", "=", "'=", "''=", "-1", "'-1", "\t", "\r=", "a=b", "+", "'a", "@"])
def test_cells_are_escaped_and_back(name):
    cell = to_cell(name)
    assert from_cell(cell) == name and cell[:1] not in ("=", "+", "-", "@", "\t", "\r", "\n")
