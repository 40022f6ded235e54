"""AP against hand-worked numbers and pycocotools."""

import json
import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from reference import REFERENCE, VECTORS, needs_reference

import bags
from bags.analysis.paper import PAPER
from bags.analysis.tables import render_paper_table, render_table, spread
from bags.analysis.weight_norms import rank_correlation
from bags.evaluation.proposal_accuracy import ProposalAccuracy, assign_labels


def write_truth(folder, lvis=False, **extra):
    images = [{"id": i, "width": 100, "height": 100} for i in (1, 2, 3)]
    if lvis:
        for image in images:
            image |= {"neg_category_ids": [1] if image["id"] == 3 else [], "not_exhaustive_category_ids": []}
    boxes = [(1, 1), (1, 2), (2, 1)]  # (image, category)
    annotations = [
        {"id": k, "image_id": i, "category_id": c, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
        for k, (i, c) in enumerate(boxes, start=1)
    ]
    categories = [{"id": 1, "name": "a", **extra.get("a", {})}, {"id": 2, "name": "b", **extra.get("b", {})}]
    path = folder / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def write_results(folder, *detections):
    entries = [
        {"image_id": i, "category_id": c, "bbox": [10 + shift, 10, 20, 20], "score": score}
        for i, c, score, shift in detections
    ]
    path = folder / "results.json"
    path.write_text(json.dumps(entries))
    return path


def test_ap_by_hand(tmp_path):
    """Category 1: both found, behind one false alarm: precision 2/3 everywhere. Category 2: missed."""
    truth = write_truth(tmp_path)
    results = write_results(tmp_path, (3, 1, 0.9, 0), (1, 1, 0.8, 0), (2, 1, 0.7, 0))
    found = bags.evaluate(truth, results, instance_counts=[1000, 3], image_counts=[50, 3])
    assert found["AP"] == pytest.approx(1 / 3) and found["AP50"] == pytest.approx(1 / 3)
    assert found["AP4"] == pytest.approx(2 / 3) and found["AP1"] == 0
    assert math.isnan(found["AP2"]) and math.isnan(found["APf"])
    assert found["APc"] == pytest.approx(2 / 3) and found["APr"] == 0
    assert found["AP_head"] == pytest.approx(2 / 3) and found["AP_tail"] == 0
    assert found["AR"] == pytest.approx(0.5)


def test_federated_false_alarms(tmp_path):
    """LVIS: an image that does not vouch for a category's absence does not punish its detection."""
    truth = write_truth(tmp_path, lvis=True)
    lenient = write_results(tmp_path, (3, 2, 0.9, 0), (1, 2, 0.8, 0), (1, 1, 0.9, 0), (2, 1, 0.9, 0))
    assert bags.evaluate(truth, lenient)["AP"] == pytest.approx(1)
    strict = write_results(tmp_path, (3, 1, 0.95, 0), (1, 2, 0.8, 0), (1, 1, 0.9, 0), (2, 1, 0.9, 0))
    assert bags.evaluate(truth, strict)["AP"] == pytest.approx((1 + 2 / 3) / 2)


def test_counts_in_the_file_make_bins(tmp_path):
    extra = {"a": {"instance_count": 12, "frequency": "c"}, "b": {"instance_count": 9, "frequency": "r"}}
    found = bags.evaluate(write_truth(tmp_path, **extra), write_results(tmp_path, (1, 2, 0.9, 0)))
    assert (found["AP1"], found["AP2"], found["APr"], found["APc"]) == pytest.approx((1, 0, 1, 0))


def test_equal_to_pycocotools_on_random_boxes(tmp_path):
    rng = np.random.default_rng(0)
    images = [{"id": i, "width": 200, "height": 200} for i in range(1, 21)]
    boxes = rng.uniform([0, 0, 5, 5], [90, 90, 110, 110], (150, 4)).round(1).tolist()
    annotations = [
        {
            "id": k,
            "image_id": int(rng.integers(1, 21)),
            "category_id": int(rng.integers(1, 6)),
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(rng.random() < 0.05),
        }
        for k, box in enumerate(boxes, start=1)
    ]
    truth = tmp_path / "t.json"
    categories = [{"id": i, "name": str(i)} for i in range(1, 6)]
    truth.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    jitter = [(a, rng.normal(0, 4, 4)) for a in annotations for _ in range(4)]
    entries = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"] if rng.random() < 0.8 else 1,
            "bbox": np.maximum(np.array(a["bbox"]) + j, 1).tolist(),
            "score": float(rng.random().__round__(2)),
        }
        for a, j in jitter
    ]
    entries.sort(key=lambda e: (-e["score"], e["image_id"], e["category_id"], e["bbox"]))  # ties: our order
    results = tmp_path / "r.json"
    results.write_text(json.dumps(entries))
    peer = COCOeval(COCO(str(truth)), COCO(str(truth)).loadRes(str(results)), "bbox")
    peer.evaluate()
    peer.accumulate()
    peer.summarize()
    ours = bags.evaluate(truth, results)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert [ours[n] for n in names] == pytest.approx([v if v > -1 else math.nan for v in peer.stats[:6]], nan_ok=True)
    assert ours["AR"] == pytest.approx(peer.stats[8])


def test_empty_predictions_score_zero(tmp_path):
    assert bags.evaluate(write_truth(tmp_path), write_results(tmp_path))["AP"] == 0
    assert bags.evaluate(write_truth(tmp_path, lvis=True), write_results(tmp_path))["AP"] == 0


@pytest.mark.parametrize(
    "entry, words",
    [
        ((9, 1, 0.5, 0), "detection 1: image_id 9 is not in the ground truth"),
        ((1, 9, 0.5, 0), "detection 1: category_id 9 is not in the ground truth"),
        ((1, 1, math.nan, 0), "detection 1: score: expected a finite number, got nan"),
        ((1, 1, 0.5, math.inf), "detection 1: bbox: expected finite numbers"),
        ((1, 1, "0.9", 0), r"detection 1: score: expected a finite number, got '0.9' \(text\)"),
        ((1, 1, True, 0), "detection 1: score: expected a finite number, got True"),
        ((1, 1, 10**400, 0), "detection 1: score: expected a finite number, got 100000"),
        ((1, 1, 0.5, 1e12), "detection 1: bbox: expected finite numbers below 1e"),
        (("1", 1, 0.5, 0), r"detection 1: image_id: expected a whole number, got '1' \(text\)"),
        ((1.0, 1, 0.5, 0), "detection 1: image_id: expected a whole number, got 1.0"),
        ((1, True, 0.5, 0), "detection 1: category_id: expected a whole number, got True"),
    ],
)
def test_bad_predictions_are_named(tmp_path, entry, words):
    with pytest.raises(bags.UserError, match=words):
        bags.evaluate(write_truth(tmp_path), write_results(tmp_path, (1, 1, 0.5, 0), entry))


@pytest.mark.parametrize("key, value", [("bbox", [1, 2, 3]), ("bbox", None), ("image_id", [1]), ("category_id", {})])
def test_odd_types_are_named(tmp_path, key, value):
    truth, results = write_truth(tmp_path), write_results(tmp_path, (1, 1, 0.5, 0))
    results.write_text(json.dumps([json.loads(results.read_text())[0] | {key: value}]))
    with pytest.raises(bags.UserError, match="results.json: detection 0: "):
        bags.evaluate(truth, results)


def test_other_bad_files(tmp_path):
    truth = write_truth(tmp_path)
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(bags.UserError, match="expected a list of detections"):
        bags.evaluate(truth, tmp_path / "object.json")
    with pytest.raises(bags.UserError, match="no list `images`"):
        bags.evaluate(tmp_path / "object.json", write_results(tmp_path))
    results = write_results(tmp_path, (1, 1, 0.5, 0))
    for change, words in (
        (lambda c: c["annotations"][0].update(bbox="x"), "annotation 1: bbox"),
        (lambda c: c["annotations"][0].update(id=2), "id 2 occurs 2 times"),
        (lambda c: c["annotations"].clear(), "nothing to evaluate against"),
        (lambda c: c["annotations"][1].update(image_id=9), "annotation 2: image_id 9 is not among `images`"),
        (lambda c: c["annotations"][1].update(image_id="1"), r"annotation 2: image_id: .* got '1' \(text\)"),
        (lambda c: c["annotations"][1].update(category_id=-9), "annotation 2: category_id -9 is not among"),
        (lambda c: c["annotations"][1].update(iscrowd=2), "annotation 2: iscrowd: expected 0 or 1, got 2"),
        (lambda c: c["annotations"][1]["bbox"].insert(0, 1e10), "annotation 2: bbox"),
        (lambda c: c["images"][0].pop("id"), "whole-number id"),
    ):
        content = json.loads(write_truth(tmp_path, lvis=True).read_text())
        change(content)
        truth.write_text(json.dumps(content))
        with pytest.raises(bags.UserError, match=words):
            bags.evaluate(truth, results)
    truth = write_truth(tmp_path)
    with pytest.raises(bags.UserError, match="3 numbers for 2 categories"):
        bags.evaluate(truth, write_results(tmp_path), instance_counts=[1, 2, 3])


def test_tables():
    text = render_table(
        {"softmax": [{"AP": 0.2, "AP1": math.nan}, {"AP": 0.3, "AP1": math.nan}], "bags": [{"AP": 0.5}]}
    )
    assert text.splitlines() == [
        "| method  |       mAP | AP1 |",
        "|---------|----------:|----:|",
        "| softmax | 25.0 ±7.1 |   - |",
        "| bags    |      50.0 |   - |",
    ]
    assert spread([0.5, math.nan], ".2f") == "0.50"


def test_published_numbers_stand_below_ours():
    table = PAPER["1"]
    runs = {row.config: [dict.fromkeys(table.columns, 0.5)] for row in table.rows}
    lines = render_paper_table(table, runs, published=True).splitlines()
    assert lines[0] == table.title and len(lines) == 2 + 2 + 15 + 14  # the control is not in the paper
    softmax, published = lines[4:6]
    assert softmax.startswith("| (1) softmax") and "published, LVIS v0.5 (1) softmax" in published
    numbers = [float(cell) for cell in published.strip("| ").split("|")[1:]]
    assert numbers == list(table.rows[0].published)
    assert "published" not in render_paper_table(table, runs, published=False)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([3, 2, 1], [10, 100, 1000]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


def test_proposal_accuracy_by_hand():
    """Two objects, four proposals: one of each, one on neither, one on both but more on the second."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 6, 10, 16]])
    proposals = torch.tensor([[0.0, 0, 10, 9], [0, 6, 10, 15], [50, 50, 60, 60], [0, 5, 10, 14]])
    labels = assign_labels(proposals, boxes, torch.tensor([2, 1]))
    assert labels.tolist() == [2, 1, 0, 1]
    accuracy = ProposalAccuracy(2)
    accuracy.add(accuracy.judge(proposals, torch.tensor([2, 2, 0, 1]), boxes, torch.tensor([2, 1])))
    accuracy.add(accuracy.judge(proposals[:2], torch.tensor([0, 1]), boxes[:0], torch.tensor([], dtype=torch.long)))
    found = accuracy.summary([5, 50])
    expected = {"ACC": 4 / 6, "ACC1": 1 / 2, "ACC2": 1, "ACC3": math.nan, "ACC4": math.nan, "ACCbg": 2 / 3}
    assert found == pytest.approx(expected, nan_ok=True)


def test_an_object_claims_its_best_proposal():
    """The proposal overlaps the large object more, but is the small one's best."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6]])
    proposals = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 9.5]])
    assert assign_labels(proposals, boxes, torch.tensor([1, 2])).tolist() == [2, 1]


def inclusive(boxes):
    """The authors' boxes include their last pixel."""
    return torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4) + torch.tensor([0.0, 0, 1, 1])


@pytest.mark.parametrize("image", [0, 1])
def test_assigned_labels_equal_the_released_code_compact(image):
    data = VECTORS["proposal_acc"][image]
    labels = torch.tensor(data["gt_labels"], dtype=torch.long)
    found = assign_labels(inclusive(data["proposals"]), inclusive(data["gt_boxes"]), labels)
    assert found.tolist() == data["assigned_label"]


@needs_reference
def test_proposal_accuracy_equals_the_released_code():
    data = np.load(REFERENCE / "proposal_acc.npz")
    accuracy = ProposalAccuracy(len(data["counts"]))
    for i in range(6):
        proposals, boxes = inclusive(data[f"proposals_{i}"][:, :4]), inclusive(data[f"gt_boxes_{i}"])
        labels = torch.from_numpy(data[f"gt_labels_{i}"])
        assert assign_labels(proposals, boxes, labels).tolist() == data[f"assigned_label_{i}"].tolist()
        accuracy.add(accuracy.judge(proposals, torch.from_numpy(data[f"pred_label_{i}"]), boxes, labels))
    assert accuracy.counts[0].tolist() == data["num_ins"].astype(int).tolist()
    assert accuracy.counts[1].tolist() == data["num_get"].astype(int).tolist()
    found = accuracy.summary(data["counts"].tolist())
    names = {"ACC": "all", "ACCbg": "background", **{f"ACC{n}": f"bin{n}" for n in range(1, 5)}}
    assert found == pytest.approx({ours: float(data[f"acc_{theirs}"]) for ours, theirs in names.items()})
