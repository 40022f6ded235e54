"""Differences of two results files against a dataset whose images are really repeated."""

import copy
import json
import math

import numpy as np
import pytest
from conftest import run_script
from test_engines import detections_of as object_detections
from test_engines import federated

import bags
from bags.data.statistics import training_of
from bags.evaluation import comparison
from bags.evaluation.comparison import ap_of, compare, interval, matched, means
from bags.evaluation.detection_ap import match
from bags.evaluation.results_file import read_results
from bags.evaluation.truth import read_truth

IMAGES, CATEGORIES = 12, 5


def write_case(folder, lvis: bool):
    """Random truth and two results files, the second better; no two scores are equal. Returns the contents."""
    rng = np.random.default_rng(3)
    images = [{"id": 10 * i, "width": 200, "height": 200} for i in range(IMAGES, 0, -1)]
    annotations = []
    for image in images:
        for _ in range(int(rng.integers(0, 6))):
            box = rng.uniform([0, 0, 10, 10], [140, 140, 60, 60]).round(1).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "bbox": box,
                    "category_id": int(rng.integers(1, CATEGORIES)),
                    "area": box[2] * box[3],
                    "iscrowd": 0 if lvis else int(rng.random() < 0.1),
                }
            )
        if lvis:
            image |= {"neg_category_ids": [1, 2], "not_exhaustive_category_ids": [3]}
    categories = [
        {"id": c, "name": f"c{c}", "instance_count": 4**c, "image_count": 3**c, "frequency": "rccff"[c - 1]}
        for c in range(1, CATEGORIES + 1)
    ]
    results = []
    for noise in (9, 3):
        entries = []
        for a in annotations * 3:
            box = (np.array(a["bbox"]) + rng.normal(0, noise, 4)).clip(1).round(2).tolist()
            label = a["category_id"] if rng.random() < 0.8 else int(rng.integers(1, CATEGORIES + 1))
            entries.append({"image_id": a["image_id"], "category_id": label, "bbox": box, "score": float(rng.random())})
        results.append(entries)
    content = {"images": images, "annotations": annotations, "categories": categories}
    for name, values in (("truth", content), ("a", results[0]), ("b", results[1])):
        (folder / f"{name}.json").write_text(json.dumps(values))
    return content, results


def repeated(folder, content, entries, times):
    """The numbers of a dataset that holds each image as often as `times` says."""
    truth, found = {**content, "images": [], "annotations": []}, []
    for image, number in zip(content["images"], times, strict=True):
        for copy_number in range(number):
            new = 1000 * copy_number + image["id"]
            truth["images"].append({**image, "id": new})
            for own, target in ((content["annotations"], truth["annotations"]), (entries, found)):
                target += [{**copy.deepcopy(e), "image_id": new} for e in own if e["image_id"] == image["id"]]
    for k, annotation in enumerate(truth["annotations"], start=1):
        annotation["id"] = k
    (folder / "rt.json").write_text(json.dumps(truth))
    (folder / "rf.json").write_text(json.dumps(found))
    return bags.evaluate(folder / "rt.json", folder / "rf.json", max_detections=100)


def test_few_images_and_no_detections(tmp_path):
    """Nothing found, and found against nothing: AP 0 as the engine says; one image makes every draw the same."""
    content, results = write_case(tmp_path, True)
    (tmp_path / "none.json").write_text("[]")
    files = tmp_path / "truth.json", tmp_path / "none.json", tmp_path / "b.json"
    found = compare(*files, draws=20)
    assert found.first["AP"] == 0 and found.second["AP"] == pytest.approx(bags.evaluate(files[0], files[2])["AP"])
    assert found.intervals["AP"][0] > 0 and len(found.rows) == 4
    nothing = compare(*files[:2], files[1], draws=20)
    assert nothing.second["AP"] == 0 and nothing.intervals["AP"] == (0, 0)
    image = next(i for i in content["images"] if any(a["image_id"] == i["id"] for a in content["annotations"]))
    one = {
        **content,
        "images": [image],
        "annotations": [a for a in content["annotations"] if a["image_id"] == image["id"]],
    }
    files[0].write_text(json.dumps(one))
    for name, entries in zip("ab", results, strict=True):
        own = [e for e in entries if e["image_id"] == image["id"]]
        (tmp_path / f"{name}.json").write_text(json.dumps([{**e, "score": round(e["score"], 1)} for e in own]))  # ties
    single = compare(files[0], tmp_path / "a.json", files[2], draws=20)
    for numbers, file in ((single.first, tmp_path / "a.json"), (single.second, files[2])):
        assert numbers["AP"] == pytest.approx(bags.evaluate(files[0], file)["AP"])
    difference = single.second["AP"] - single.first["AP"]
    assert single.intervals["AP"] == pytest.approx((difference, difference))


@pytest.mark.parametrize("lvis", [True, False])
def test_a_weighted_image_is_a_repeated_one(tmp_path, lvis):
    content, results = write_case(tmp_path, lvis)
    truth = read_truth(tmp_path / "truth.json")
    file, objects = matched(truth, read_results(tmp_path / "a.json", truth), max_detections=100)
    weights = np.random.default_rng(0).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), 6)
    weights = np.concatenate([weights, np.ones((1, IMAGES), int)])
    ap = ap_of(file, objects, weights)
    found = means(ap, {"AP": np.ones(CATEGORIES, bool), **training_of(content).sets()})
    for draw, times in enumerate(weights.tolist()):
        expected = repeated(tmp_path, content, results[0], times)
        for name, values in found.items():
            assert values[draw] == pytest.approx(expected[name], abs=1e-12, nan_ok=True), (name, times)
    assert np.isnan(ap[:, :, CATEGORIES - 1]).all()  # no object of it anywhere


def slow_matches(truth, results, iou_type, limit):
    """Of each category: sorted (-score, image, hits, counted) of all detections that the engine has, and objects."""
    ranks = {key: k for k, key in enumerate(truth.category_ids.tolist())}
    positions = {truth.image_ids[image["id"] - 1]: k for k, image in enumerate(truth.content["images"])}
    detections, objects = [[] for _ in ranks], [[] for _ in ranks]
    for entry in match(truth, results, iou_type, limit):
        place, label = positions[entry["image_id"]], ranks[entry["category_id"]]
        number = sum(not ignored for ignored in entry["gtIgnore"])
        objects[label] += [(place, number)] if number else []
        columns = zip(
            entry["dtScores"], *(zip(*entry[key], strict=True) for key in ("dtMatched", "dtIgnore")), strict=True
        )
        for score, hits, ignored in columns:
            hits = [bool(hit) and not drop for hit, drop in zip(hits, ignored, strict=True)]
            detections[label].append((-score, place, hits, [not drop for drop in ignored]))
    return [sorted(rows) for rows in detections], [sorted(pairs) for pairs in objects]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("lvis", [True, False])
@pytest.mark.parametrize("limit", [300, 5, 1])
def test_matches_are_those_of_the_engine(tmp_path, iou_type, lvis, limit):
    """Also where the engine is not asked: categories that an image does not hold, huge boxes, crowds."""
    content, rng = federated(tmp_path, limit)
    if not lvis:
        for image in content["images"]:
            del image["neg_category_ids"], image["not_exhaustive_category_ids"]
        for annotation in content["annotations"][::4]:
            annotation["iscrowd"] = 1
    entries = object_detections(content, rng, 6, limit == 5)
    if iou_type == "bbox":
        entries += [{**entry, "bbox": [0, 0, 2e5, 2e5], "score": entry["score"] / 2} for entry in entries[::5]]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps(entries))
    truth = read_truth(tmp_path / "truth.json")
    results = read_results(tmp_path / "found.json", truth)
    file, objects = matched(truth, results, iou_type, limit)
    slow, slow_objects = slow_matches(truth, results, iou_type, limit)
    assert [sorted(map(tuple, pairs.tolist())) for pairs in objects] == slow_objects
    for found, expected in zip(file, slow, strict=True):
        columns = found and [-found.score, found.image, found.hit.T, found.counted.T]
        rows = [list(row) for row in zip(*(column.tolist() for column in columns or ()), strict=True)]
        assert sorted(rows) == [list(row) for row in expected]
        assert found is None or (np.diff(found.score) <= 0).all()
    assert any(found is not None and found.hit.any() for found in file)


def test_large_categories_are_taken_in_parts(tmp_path, monkeypatch):
    write_case(tmp_path, True)
    files = tmp_path / "truth.json", tmp_path / "a.json", tmp_path / "b.json"
    whole = repr(compare(*files, draws=50))
    monkeypatch.setattr(comparison, "AT_ONCE", 40)
    assert repr(compare(*files, draws=50)) == whole


def test_differences(tmp_path):
    write_case(tmp_path, True)
    files = tmp_path / "truth.json", tmp_path / "a.json", tmp_path / "b.json"
    found = compare(*files, draws=200)
    for numbers, file in ((found.first, files[1]), (found.second, files[2])):
        expected = bags.evaluate(files[0], file)
        assert {name: expected[name] for name in numbers} == pytest.approx(numbers, nan_ok=True)
    low, high = found.intervals["AP"]
    assert 0 < low < found.second["AP"] - found.first["AP"] < high  # much less noise
    assert repr(compare(*files, draws=200)) == repr(found)
    assert compare(*files, draws=200, seed=1).intervals != found.intervals
    same = compare(files[0], files[1], files[1], draws=50)
    assert set(same.intervals["AP"]) == {0.0} and not any(row["difference"] for row in same.rows)
    back = compare(files[0], files[2], files[1], draws=200)  # the same images are drawn
    assert back.intervals["AP"] == pytest.approx((-high, -low))
    assert [row["id"] for row in found.rows] == [1, 2, 3, 4] and found.rows[1]["training_instances"] == 16
    with pytest.raises(bags.UserError, match="draws=-1: expected 0 or more"):
        compare(*files, draws=-1)


def test_the_interval_is_that_of_a_mean():
    """Where AP is 0 or 1 by image, the bootstrap is that of a mean, whose spread is known."""
    number = 400
    hits = np.arange(number) < number // 4
    values = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), 4000) @ hits / number
    low, high = interval(values)
    half = 1.96 * math.sqrt(0.25 * 0.75 / number)
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.006)
    assert all(map(math.isnan, interval(np.array([math.nan]))))


def test_compare_on_the_command_line(tmp_path):
    write_case(tmp_path, True)
    files = ["--compare", tmp_path / "a.json", tmp_path / "b.json", "--draws", "20"]
    truth = ["--annotations", tmp_path / "truth.json"]
    done = run_script("evaluate", *files, *truth, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    ap = next(line.split() for line in lines if line.startswith("AP "))
    result = compare(tmp_path / "truth.json", tmp_path / "a.json", tmp_path / "b.json", draws=20)
    difference = 100 * (result.second["AP"] - result.first["AP"])
    assert ap[1:4] == [f"{100 * result.first['AP']:.2f}", f"{100 * result.second['AP']:.2f}", f"{difference:+.2f}"]
    assert ap[4:] == [f"{100 * result.intervals['AP'][0]:+.2f}", "to", f"{100 * result.intervals['AP'][1]:+.2f}"]
    assert "categories that gained most" in lines and "categories that lost most: none" in lines
    saved = json.loads((tmp_path / "out/comparison.json").read_text())
    assert saved["AP"]["interval"] == list(result.intervals["AP"])
    assert (tmp_path / "out/comparison.csv").read_text().count("\n") == 5
    done = run_script("evaluate", *files, *truth, "--json")
    assert json.loads(done.stdout)["bbox"]["AP"]["second"] == result.second["AP"]
    for arguments, message in (
        (files, "--compare needs --annotations"),
        ([*files, *truth, "--engine", "lvis"], "--compare takes --annotations, --train"),
        ([], "expected a checkpoint or a results file"),
        ([tmp_path / "a.json", *files, *truth], "a.json: --compare takes two results files and options"),
    ):
        done = run_script("evaluate", *arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
