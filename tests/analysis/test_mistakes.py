"""What the tail is taken for, kinds of errors, and figures in which every curve and label can be seen."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from bags.analysis.mistakes import Confusion, confusions
from bags.analysis.plots import LINES, METHODS, baseline_first, draw_boxes, method_colour, plot_ap_by_instances, styles
from bags.evaluation.detection_ap import error_kinds, evaluate

BOX = [10, 10, 40, 40]


def test_confusions_by_hand():
    """Objects of the tail category 5: right, taken for the head, for the tail, twice not found, and a crowd region."""
    corners = np.array([[10, 10, 50, 50]] * 7, np.float32)
    index = SimpleNamespace(
        category_ids=np.array([3, 5, 8]),
        image_ids=np.array([11, 12, 13, 14, 15, 16]),
        owners=np.array([0, 1, 2, 3, 4, 5, 0]),
        labels=np.array([2, 2, 2, 2, 2, 2, 1]),  # the last one is of the head
        boxes=corners,
        crowd=np.array([False] * 5 + [True, False]),
    )
    found = {
        11: [(5, 0.2, BOX), (3, 0.1, BOX), (3, 0.9, [60, 60, 20, 20])],  # right: the best one is elsewhere
        12: [(5, 0.2, BOX), (3, 0.3, BOX)],
        13: [(8, 0.01, [10, 10, 40, 20])],  # an IoU of exactly 0.5
        14: [(5, 0.9, [10, 10, 40, 19])],
        16: [(5, 0.9, BOX)],
    }
    detections = {
        image: [{"category_id": c, "score": s, "bbox": b} for c, s, b in entries] for image, entries in found.items()
    }
    rows = [
        {"id": k, "name": n, "training_instances": t} for k, n, t in ((3, "car", 100), (5, "ox", 99), (8, "elk", 1))
    ]
    expected = Confusion(objects=5, right=1, head=1, tail=1, missed=2, names=[("car", 1), ("elk", 1)])
    assert confusions(index, detections, rows, tail_below=100) == {5: expected}


def scene(tmp_path, lvis: bool = False) -> tuple:
    """Five images with an object of category 1 each, and detections that are wrong in one way each."""
    images = [{"id": k, "width": 100, "height": 100, "file_name": f"{k}.jpg"} for k in range(1, 6)]
    if lvis:
        images = [image | {"neg_category_ids": [], "not_exhaustive_category_ids": []} for image in images]
    annotations = [
        {"id": k, "image_id": k, "category_id": 1, "bbox": BOX, "area": 1600, "iscrowd": 0} for k in range(1, 6)
    ]
    annotations.append({"id": 6, "image_id": 1, "category_id": 2, "bbox": [60, 60, 30, 30], "area": 900, "iscrowd": 0})
    categories = [{"id": 1, "name": "ox"}, {"id": 2, "name": "elk"}]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    detections = [
        (1, 1, BOX, 0.9),
        (1, 2, [60, 60, 30, 30], 0.8),
        (2, 2, BOX, 0.85),  # Cls
        (3, 1, [10, 10, 40, 15], 0.7),  # Loc: an IoU of 0.375
        (4, 1, BOX, 0.6),
        (4, 1, [70, 70, 20, 20], 0.95),  # Bkg
        # image 5: Miss
    ]
    results = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in detections]
    for name, content in (("truth", truth), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path / "truth.json", tmp_path / "results.json", results


def test_kinds_of_errors_are_what_mending_gains(tmp_path):
    """The gain of Cls, Loc and Bkg is that of AP50 with the one wrong detection mended, or left out (TIDE, 2.3)."""
    truth, file, results = scene(tmp_path)
    kinds = error_kinds(truth, file)
    before = evaluate(truth, file)["AP50"]
    assert kinds["AP50"] == pytest.approx(before)

    def mended(number: int, **changes) -> float:
        """What AP50 gains with other fields in one detection; without any it is left out."""
        changed = [dict(entry) for entry in results]
        changed[number] |= changes
        if not changes:
            del changed[number]
        (tmp_path / "mended.json").write_text(json.dumps(changed))
        return evaluate(truth, tmp_path / "mended.json")["AP50"] - before

    assert kinds["Cls"] == pytest.approx(mended(2, category_id=1)) and kinds["Cls"] > 0.05
    assert kinds["Loc"] == pytest.approx(mended(3, bbox=BOX)) and kinds["Loc"] > 0.05
    assert kinds["Bkg"] == pytest.approx(mended(5)) and kinds["Bkg"] > 0.02
    assert kinds["Dupe"] == kinds["Both"] == 0 and kinds["Miss"] > 0


def test_kinds_of_errors_say_nothing_of_lvis(tmp_path):
    truth, file, _ = scene(tmp_path, lvis=True)
    assert error_kinds(truth, file) == {}


def test_a_method_has_one_colour():
    """Whatever else is shown, under its name, as a folder, and with a remark."""
    for name in ("softmax", "bags", "seesaw", "bags,lr=0.1", "ångström"):
        labels = (name, f"runs/seed0/{name}", f"runs/{name}/", f"{name}: chosen")
        assert len({method_colour(label) for label in labels}) == 1
    assert METHODS["baseline"] == METHODS["softmax"]  # the same classifier
    assert len(set(METHODS.values())) == len(METHODS) - 1
    assert {label: colour for label, colour, _ in styles(["x", "bags"])}["bags"] == method_colour("bags")


def test_the_baseline_comes_first_and_no_two_lines_are_alike():
    assert baseline_first(["bags", "softmax_retrained", "a", "runs/softmax"]) == [
        "runs/softmax",
        "softmax_retrained",
        "bags",
        "a",
    ]
    drawn = [line for _, _, line in styles("abcd")]
    assert drawn == list(LINES) and len({style for style, _ in drawn}) == 4


def test_equal_curves_are_both_seen():
    """Pixels of both colours are there where two methods have the same AP."""
    rows = [{"training_instances": 2**k, "AP": 0.05 * k} for k in range(1, 11)]
    file = io.BytesIO()
    plot_ap_by_instances(file, {"bags": rows, "softmax": rows}, [10, 100])
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)[:, 200:]  # without the legend
    for name in ("bags", "softmax"):
        colour = np.array([int(method_colour(name)[k : k + 2], 16) for k in (1, 3, 5)])
        assert (abs(pixels - colour).sum(2) < 12).sum() > 150, name


def test_labels_do_not_overlap():
    """Six boxes at the same place, and others at the edges: labels lie in the image, and on no other label."""
    figure, axes = plt.subplots(figsize=(6, 6))
    boxes = [[100, 100, 200, 200]] * 5 + [[0, 0, 30, 30], [370, 370, 399, 399], [350, 2, 399, 40]]
    names = [f"category {k}" for k in range(8)]
    draw_boxes(axes, Image.new("RGB", (400, 400)), boxes, names, ["red"] * 8, [0.5] * 8)
    figure.canvas.draw()
    extents = [text.get_window_extent() for text in axes.texts]
    inside = axes.get_window_extent()
    for k, extent in enumerate(extents):
        assert inside.x0 <= extent.x0 and extent.x1 <= inside.x1 and inside.y0 <= extent.y0 and extent.y1 <= inside.y1
        assert not any(extent.overlaps(other) for other in extents[:k])
    plt.close(figure)
