"""Equal scores: the order of a results file changes nothing."""

import json
import math

import numpy as np
import pytest
from test_engines import detections_of, federated, official_lvis

from bags.evaluation import detection_ap
from bags.evaluation.comparison import compare
from bags.evaluation.results_file import canonical_order, read_results
from bags.evaluation.truth import read_truth


def write_case(folder, lvis):
    """Ground truth and detections with five levels of scores, some of them twice with different masks."""
    truth, rng = federated(folder, 1)
    if not lvis:
        for image in truth["images"]:
            del image["neg_category_ids"]
        (folder / "truth.json").write_text(json.dumps(truth))
    entries = detections_of(truth, rng, 5, False)
    for entry in entries:
        entry["score"] = round(entry["score"] * 5) / 5
    twins = [
        {**entry, "segmentation": other["segmentation"]}
        for entry, other in zip(entries[::9], entries[1::9], strict=False)
    ]
    return folder / "truth.json", entries + [e for e in twins if e["segmentation"]["size"] == [90, 120]], rng


def shuffled(folder, entries, rng):
    """Two files with the same detections in two orders."""
    for name in "ab":
        (folder / f"{name}.json").write_text(json.dumps([entries[k] for k in rng.permutation(len(entries))]))
    return folder / "a.json", folder / "b.json"


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("engine", ["hotcoco", "lvis", "pycocotools"])
def test_a_shuffled_file_has_the_same_numbers(tmp_path, monkeypatch, iou_type, engine):
    """Also where the cap of an image (7 detections) and that of a category (20) cut through equal scores."""
    if engine == "lvis" and not official_lvis():
        pytest.skip("lvis is not installed")
    monkeypatch.setattr(detection_ap, "FIXED", 20)
    for lvis in (True, False):
        if engine in ("lvis", "pycocotools") and lvis != (engine == "lvis"):
            continue
        truth, entries, rng = write_case(tmp_path, lvis)
        files = shuffled(tmp_path, entries, rng)
        for limit in (7, 300):
            a, b = (
                detection_ap.score(truth, f, iou_type, max_detections=limit, engine=engine, fixed=True) for f in files
            )
            assert repr(a.numbers) == repr(b.numbers) and repr(a.rows) == repr(b.rows)
            assert 0.05 < a.numbers["AP"] < 1


def test_a_file_and_its_shuffle_do_not_differ(tmp_path):
    truth, entries, rng = write_case(tmp_path, True)
    found = compare(truth, *shuffled(tmp_path, entries, rng), draws=40, max_detections=7)
    assert repr(found.first) == repr(found.second) and set(found.intervals["AP"]) == {0.0}
    assert not any(row["difference"] for row in found.rows)


def test_the_canonical_order_is_that_of_tuples():
    rng = np.random.default_rng(0)
    ids, boxes = rng.integers(1, 4, (500, 2)), rng.integers(0, 3, (500, 4)).astype(float)
    scores = rng.integers(0, 40, 500) / 8
    scores[:20] = rng.random(20)
    rows = [(-s, *i, *b) for s, i, b in zip(scores.tolist(), ids.tolist(), boxes.tolist(), strict=True)]
    order, duplicates = canonical_order(ids, boxes, scores)
    assert [rows[k] for k in order] == sorted(rows) and duplicates == len(rows) - len(set(rows)) > 0
    masks = [[[float(k % 3)]] for k in range(500)]
    order, duplicates = canonical_order(ids, boxes, scores, masks)
    full = [(row, repr(mask)) for row, mask in zip(rows, masks, strict=True)]
    assert [full[k] for k in order] == sorted(full) and duplicates == len(full) - len(set(full))
    assert len(canonical_order(ids[:0], boxes[:0], scores[:0])[0]) == 0


def test_ties_and_duplicates_are_mentioned(tmp_path):
    """Of 8 detections, two of category 1 and two of category 2 share a score; equal scores of both are no tie."""
    truth, _ = federated(tmp_path, 1)
    scores = [(1, 0.5), (1, 0.5), (2, 0.7), (2, 0.7), (3, 0.5), (1, 0.9), (1, 0.8), (2, 0.9)]
    entries = [{"image_id": 1, "category_id": c, "bbox": [k, 1, 9, 9], "score": s} for k, (c, s) in enumerate(scores)]
    (tmp_path / "r.json").write_text(json.dumps(entries))
    ground_truth = read_truth(tmp_path / "truth.json")
    results = read_results(tmp_path / "r.json", ground_truth)
    assert results.tied == 0.5 and not results.notes
    assert any("50% of the detections share" in note for note in detection_ap.notes_of(ground_truth, results))
    (tmp_path / "r.json").write_text(json.dumps(entries + entries[:3]))
    [note] = read_results(tmp_path / "r.json", ground_truth).notes
    assert note.endswith("r.json: 3 of 11 detections are exact duplicates of others")
    for entry, score in zip(entries, np.random.default_rng(0).random(8).tolist(), strict=True):
        entry["score"] = score
    (tmp_path / "r.json").write_text(json.dumps(entries))
    quiet = read_results(tmp_path / "r.json", ground_truth)
    assert quiet.tied == 0 and not detection_ap.notes_of(ground_truth, quiet)
    (tmp_path / "r.json").write_text("[]")
    empty = read_results(tmp_path / "r.json", ground_truth)
    assert len(empty) == 0 and empty.tied == 0 and not math.isnan(detection_ap.score(ground_truth, empty).numbers["AP"])
