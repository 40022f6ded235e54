"""Data that trains and is not what its author meant; categories matched by name."""

import argparse
import json
import re

import pytest
import torch
import torchvision
from conftest import run_script
from PIL import Image

import bags
from bags.assembly.initialise import check_categories
from bags.data.checks import check_annotations, check_splits
from bags.data.plausibility import implausible_boxes, shared_images, split_images
from bags.jobs import prepare_data


def write(folder, boxes, name="x.json", images=None, categories=(1, 2)):
    """One object for each box, on two images of 200 x 100 pixels."""
    images = images or [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 100} for i in (1, 2)]
    annotations = [
        {"id": k, "image_id": images[k % 2]["id"], "category_id": categories[k % 2], "bbox": box}
        for k, box in enumerate(boxes, 1)
    ]
    named = [{"id": key, "name": f"n{key}"} for key in categories]
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"images": images, "annotations": annotations, "categories": named}))
    return bags.AnnotationIndex.open(folder / name)


PLAIN = [[10 * k, 5 * k, 20 + k, 30] for k in range(12)]
ODD_BOXES = {
    "normalised boxes": [[x / 200, y / 100, w / 200, h / 100] for x, y, w, h in PLAIN],
    "boxes of two corners": [[x, y, x + w, y + h] for x, y, w, h in PLAIN[1:]],
    "corner boxes": [[x / 4, y / 4, w / 4, h / 4] for x, y, w, h in PLAIN * 2],
}


def test_ordinary_boxes_raise_no_suspicion(tmp_path, glyphs):
    assert implausible_boxes(write(tmp_path, PLAIN)) == {}
    assert implausible_boxes(write(tmp_path, [[0, 0, 5, 5]] * 3, "few.json")) == {}
    assert implausible_boxes(bags.AnnotationIndex.open(glyphs / "train.json")) == {}


@pytest.mark.parametrize("kind", ODD_BOXES)
def test_boxes_in_another_form_are_a_finding(tmp_path, kind):
    index = write(tmp_path, ODD_BOXES[kind])
    assert list(implausible_boxes(index)) == [kind]
    assert kind in {finding.kind for finding in check_annotations(index.path)}


def test_images_are_compared_by_content(tmp_path):
    """Frames of one name with other pixels are no leak; one picture under two names is."""
    train = write(tmp_path / "train", PLAIN)
    images = [
        {"id": 1, "file_name": "1.png", "width": 200, "height": 100},
        {"id": 2, "file_name": "other.png", "width": 200, "height": 100},
    ]
    val = write(tmp_path / "val", PLAIN, images=images)
    for folder, name, colour in (
        ("train", "1", "red"),
        ("train", "2", "blue"),
        ("val", "1", "lime"),
        ("val", "other", "blue"),
    ):
        Image.new("RGB", (200, 100), colour).save(tmp_path / folder / f"{name}.png")
    assert shared_images(train, tmp_path / "train", val, tmp_path / "val") == [("2.png", "other.png")]
    [finding] = check_splits(train, val, tmp_path / "train", tmp_path / "val")
    assert finding.kind == "train and val share images" and finding.examples == ["2.png is other.png in val"]


def test_one_image_in_two_entries(tmp_path):
    images = [{"id": i, "file_name": "same.png", "width": 200, "height": 100} for i in (1, 2)]
    index = write(tmp_path, PLAIN, images=images)
    assert split_images(index) == ["same.png"]
    assert "annotations split over entries" in {finding.kind for finding in check_annotations(index.path)}


def test_remap_by_name(tmp_path):
    train = write(tmp_path, PLAIN, "train.json", categories=(5, 9))
    images = [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 100, "neg_category_ids": [3]} for i in (1, 2)]
    named = [{"id": 3, "name": "n9"}]
    annotations = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 5]}]
    val = tmp_path / "val.json"
    val.write_text(json.dumps({"images": images, "annotations": annotations, "categories": named, "info": {"a": 1}}))
    command = ["prepare_data", "remap", val, "--like", train.path, "--output", tmp_path / "new.json"]
    done = run_script(*command)
    assert done.returncode == 0 and "1 annotations, 2 categories" in done.stdout, done.stderr
    new = json.loads((tmp_path / "new.json").read_text())
    assert new["annotations"][0]["category_id"] == 9 and new["images"][0]["neg_category_ids"] == [9]
    assert [c["id"] for c in new["categories"]] == [5, 9] and new["info"] == {"a": 1}
    assert run_script(*command).returncode == 2  # exists already
    named[0]["name"] = "unknown"
    val.write_text(json.dumps({"images": images, "annotations": annotations, "categories": named}))
    done = run_script(*command[:-1], tmp_path / "other.json")
    assert (
        done.returncode == 2
        and "1 of its categories are not in" in done.stderr
        and "'unknown': list them there too" in done.stderr
    )
    assert not (tmp_path / "other.json").exists()


def test_categories_of_one_file_only_are_named(tmp_path):
    first = write(tmp_path, PLAIN, "first.json", categories=(5, 9))
    stats = bags.CategoryStats.from_index(first)
    check_categories(stats, first, tmp_path / "run")
    more, other = {"id": 7, "name": "n7"}, {"id": 9, "name": "new"}
    for listed, words in (
        ([{"id": 5, "name": "n5"}, more, {"id": 9, "name": "n9"}], "not the 3 of {}: only {} has id 7 'n7'. Use"),
        ([{"id": 5, "name": "n5"}, other], "not the 2 of {}: only run has id 9 'n9', only {} has id 9 'new'. Use"),
    ):
        path = tmp_path / f"{len(listed)}.json"
        path.write_text(json.dumps({**json.loads(first.path.read_text()), "categories": listed}))
        with pytest.raises(bags.UserError, match=re.escape(words.format(path, path))):
            check_categories(stats, bags.AnnotationIndex.open(path), "run")


def test_remap_refuses_unknown_images_and_notes_unknown_categories(tmp_path, capsys):
    train = write(tmp_path, PLAIN, "train.json", categories=(5, 9))
    images = [{"id": 1, "file_name": "1.png", "width": 200, "height": 100, "neg_category_ids": [3, 4]}]
    annotations = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 5]}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "n9"}]}
    val, output = tmp_path / "val.json", tmp_path / "new.json"
    arguments = argparse.Namespace(source=val, like=train.path, output=output)
    val.write_text(json.dumps({**content, "annotations": [{**annotations[0], "image_id": 2}]}))
    with pytest.raises(bags.UserError, match="val.json: annotation 1: image_id 2 is not in the file"):
        prepare_data.remap(arguments)
    val.write_text(json.dumps({**content, "info": {"a": float("nan")}}))
    with pytest.raises(bags.UserError, match="val.json: info: holds NaN"):
        prepare_data.remap(arguments)
    assert not output.exists()
    val.write_text(json.dumps(content))
    prepare_data.remap(arguments)
    assert "are left out: 1 images (first: image 1)" in capsys.readouterr().err
    assert json.loads(output.read_text())["images"][0]["neg_category_ids"] == [9]


@pytest.mark.parametrize("label", [0, -1, 4])
def test_balanced_detectors_refuse_labels_that_are_none(label):
    """0 is the background, C the last category."""
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=64
    )
    bags.balance(detector, [5, 50, 500]).train()
    images = [torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([label])}]
    for call in (lambda: detector(images, targets), lambda: detector(images, targets=targets)):
        with pytest.raises(ValueError, match=rf"targets\[0\]\['labels'\]: expected labels of 1 to 3 .*got {label}"):
            call()
    targets[0]["labels"][0] = 3
    assert detector(images, targets)
