"""Annotation files as other tools write them: what nobody needs stops nobody, and `check` foresees every refusal."""

import codecs
import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from conftest import run_script
from PIL import Image

import bags
from bags.assembly.loaders import open_index
from bags.data.checks import what_does_not_train, why_nothing_trains
from bags.data.dataset import DetectionDataset
from bags.data.samplers import ClassBalancedSampler, RepeatFactorSampler
from bags.data.statistics import CategoryStats
from bags.jobs.preflight import check_data

POLYGON = [[1, 1, 11, 1, 11, 9, 1, 9]]
FULL = {
    "info": {"year": 2024, "version": "1.0", "description": "d", "contributor": "c", "url": "u", "date_created": "x"},
    "licenses": [{"id": 1, "name": "n", "url": "u"}],
    "images": [
        {
            "id": number,
            "file_name": f"{number}.png",
            "width": 40,
            "height": 30,
            "license": 1,
            "coco_url": "a/b.png",
            "flickr_url": "f",
            "date_captured": "2024-01-01",
        }
        for number in (1, 2)
    ],
    "annotations": [
        {
            "id": number,
            "image_id": 1 + number % 2,
            "category_id": 3 + 4 * (number % 2),
            "bbox": [1, 1, 10, 8],
            "area": 80,
            "iscrowd": 0,
            "segmentation": POLYGON,
            "score": 0.9,
            "keypoints": [1, 2, 2],
            "num_keypoints": 1,
        }
        for number in range(1, 7)
    ],
    "categories": [
        {
            "id": key,
            "name": f"n{key}",
            "supercategory": "s",
            "synset": "a.n.01",
            "synonyms": ["a"],
            "def": "d",
            "frequency": "r",
            "instance_count": 3,
            "image_count": 1,
            "keypoints": ["k"],
            "skeleton": [[1, 2]],
        }
        for key in (3, 7)
    ],
}
ODD = {
    "null": None,
    "number": 5,
    "text": "x",
    "empty": "",
    "list": [],
    "object": {},
    "true": True,
    "fraction": 0.5,
    "surrogate": "\ud800",
    "nested": [[{"a": None}]],
}
NEEDED = {  # keys whose value matters to training or scoring
    "images": {"id", "file_name", "width", "height"},
    "annotations": {"id", "image_id", "category_id", "bbox", "iscrowd", "segmentation", "area"},
    "categories": {"id"},
}


def places():
    """(list or object, key) of every key in the file, and keys that only some tools write."""
    for section in ("info", "licenses", "images", "annotations", "categories"):
        entry = FULL[section] if section == "info" else FULL[section][0]
        extra = {"images": ["neg_category_ids", "not_exhaustive_category_ids"], "annotations": ["attributes"]}
        yield from ((section, key) for key in [*entry, *extra.get(section, [])])
        yield section, None


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """A configuration whose train and val are one file, and the function that writes it."""
    folder = tmp_path_factory.mktemp("metadata")
    for number in (1, 2):
        Image.new("RGB", (40, 30), (90, number, 60)).save(folder / f"{number}.png")
    (folder / "b.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "a").mkdir()
    (folder / "a/b.png").write_bytes((folder / "1.png").read_bytes())
    data = {"name": "odd", "root": str(folder), "train": "all.json", "val": "all.json"}
    (folder / "row.yaml").write_text(yaml.safe_dump({"data": data, "detector": {"backbone": "small"}}))

    def write(content, encoding="utf-8"):
        (folder / "all.json").write_text(json.dumps(content), encoding=encoding)
        return bags.load_config(folder / "row.yaml", ["detector.rpn.anchor_sizes=[[16],[32]]"])

    return folder, write


def start(config):
    """What the start of a training says of the data: None, or its refusal."""
    try:
        check_data([config])
    except bags.UserError as error:
        assert "\n" not in str(error) and str(config.data.root) in str(error)
        return str(error)
    return None


def perfect(folder):
    """A results file that finds every object of the clean file."""
    entries = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5 + 0.01 * a["id"]}
        for a in FULL["annotations"]
    ]
    (folder / "results.json").write_text(json.dumps(entries))
    return folder / "results.json"


@pytest.mark.parametrize("kind", ODD)
def test_any_key_may_be_anything_that_scoring_can_do_with(row, kind):
    """Whatever `check` and the start accept is scored; a key that nobody needs changes no number."""
    folder, write = row
    expected = None
    for section, key in [("info", "nothing"), *places()]:
        content = json.loads(json.dumps(FULL))
        entry = content[section] if section == "info" else content[section][0]
        if (section, key) != ("info", "nothing"):
            if key is None:
                content[section] = ODD[kind]
            else:
                entry[key] = ODD[kind]
        config = write(content)
        refusal = start(config)
        needed = section in NEEDED and (key is None or key in NEEDED[section])
        if refusal:
            assert needed or key is None, (section, key, refusal)
            continue
        results = bags.evaluate(folder / "all.json", perfect(folder))
        assert results["AP"] == results["AP"], (section, key)
        if not needed:
            plain = {name: results[name] for name in ("AP", "AP50", "AR")}
            expected = expected or plain
            assert plain == expected, (section, key)


@pytest.mark.slow
def test_check_foresees_every_refusal(row):
    """For each odd value of each key: training's start refuses only what `check` stops at."""
    folder, write = row
    for section, key in places():
        for kind in ("null", "text", "number", "list"):
            content = json.loads(json.dumps(FULL))
            entry = content[section] if section == "info" else content[section][0]
            if key is None:
                content[section] = ODD[kind]
            else:
                entry[key] = ODD[kind]
            if start(write(content)):
                arguments = ["check", folder / "row.yaml", "detector.rpn.anchor_sizes=[[16],[32]]"]
                assert run_script("prepare_data", *arguments).returncode in (1, 2), (section, key, kind)


# --------------------------------------------------------------------------- one rule for what trains


def mixed():
    """Six objects of two categories: two without a mask, one crowd region, one outside the image, one empty."""
    content = json.loads(json.dumps(FULL))
    changes = [{}, {}, {"segmentation": []}, {"iscrowd": 1}, {"bbox": [50, 1, 5, 5]}, {"bbox": [1, 1, 0, 5]}]
    for annotation, change in zip(content["annotations"], changes, strict=True):
        annotation.update(change)
    return content


def test_statistics_samplers_and_images_count_the_same_objects(row):
    _, write = row
    config = write(mixed())
    masks = dataclasses.replace(config, detector=dataclasses.replace(config.detector, framework="mask_rcnn"))
    for one, kept in ((config, [1, 2, 3]), (masks, [1, 2])):
        index = open_index(one, "train")
        assert index.annotation_ids[index.trained].tolist() == sorted(kept, key=lambda i: (1 + i % 2, i))
        stats = CategoryStats.from_index(index)
        dataset = DetectionDataset(index, config.data.root, masks=one is masks)
        labels = torch.cat([dataset.target(position)["labels"] for position in range(2)])
        assert np.bincount(labels, minlength=3)[1:].tolist() == list(stats.instance_counts)
        assert sum(stats.instance_counts) == len(kept)
        drawn = {key[2] for batch in ClassBalancedSampler(index, 2, 0) for key in batch}
        assert drawn == {label for label, count in enumerate(stats.instance_counts, 1) if count}
        assert len(RepeatFactorSampler(bags.repeat_factors(index, 1.0), 2, 0).factors) == 2
        words = what_does_not_train(index)
        assert f"{6 - len(kept)} of 6 objects are not trained on" in words and "1 are crowd regions" in words
        assert ("1 have no segmentation" in words) == (one is masks)


NOTHING = {
    "crowd": ({"iscrowd": 1}, "all.json: none of 6 objects trains: 6 are crowd regions"),
    "empty": ({"bbox": [1, 1, 0, 0]}, "none of 6 objects trains: 6 have boxes without area in the image"),
    "outside": ({"bbox": [100, 1, 5, 5]}, "none of 6 objects trains: 6 have boxes without area in the image"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_to_train_on_is_said_truly(row, case):
    folder, write = row
    change, words = NOTHING[case]
    content = json.loads(json.dumps(FULL))
    for annotation in content["annotations"]:
        annotation.update(change)
    config = write(content)
    assert words in start(config)
    done = run_script("prepare_data", "check", folder / "row.yaml", "detector.rpn.anchor_sizes=[[16],[32]]")
    assert done.returncode == 1 and words.partition("all.json: ")[2] in done.stdout + words
    assert "[stops]" in done.stdout and "nothing to train on" in done.stdout


def test_masks_without_any_segmentation_are_foreseen(row):
    folder, write = row
    content = json.loads(json.dumps(FULL))
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    config = write(content)
    assert start(config) is None
    masks = dataclasses.replace(config, detector=dataclasses.replace(config.detector, framework="mask_rcnn"))
    assert "6 have no segmentation, which masks need" in start(masks)
    keys = ["detector.rpn.anchor_sizes=[[16],[32]]", "detector.framework=mask_rcnn"]
    done = run_script("prepare_data", "check", folder / "row.yaml", *keys)
    assert done.returncode == 1 and "no segmentation: 6" in done.stdout, done.stdout
    assert why_nothing_trains(open_index(config, "train")) is None


def test_byte_order_marks(row):
    folder, write = row
    assert start(write(FULL, "utf-8-sig")) is None
    assert (folder / "all.json").read_bytes().startswith(codecs.BOM_UTF8)
    (folder / "r.json").write_bytes(codecs.BOM_UTF8 + perfect(folder).read_bytes())
    assert bags.evaluate(folder / "all.json", folder / "r.json")["AP"] > 0.9
    (folder / "bom.yaml").write_text("\ufeff" + (folder / "row.yaml").read_text(), encoding="utf-8")
    assert bags.load_config(folder / "bom.yaml").data.name == "odd"


def test_names_that_are_none(row):
    """Null and missing names are the id; lone surrogates are escaped wherever a name is shown or written."""
    _, write = row
    content = json.loads(json.dumps(FULL))
    content["categories"][0]["name"] = None
    content["categories"][1]["name"] = "a\ud800"
    index = open_index(write(content), "train")
    assert index.category_names == ["3", "a\\ud800"]


@pytest.mark.parametrize("words", ["missing", "not a regular file"])
def test_an_absent_validation_image_is_seen_before_training(row, words):
    folder, write = row
    config, image, kept = write(FULL), folder / "2.png", (folder / "2.png").read_bytes()
    assert start(config) is None
    image.unlink()
    try:
        if words != "missing":
            image.mkdir()
        assert f"{image}: image 2 of {folder / 'all.json'} is {words}" in (start(config) or "")
    finally:
        if image.is_dir():
            image.rmdir()
        image.write_bytes(kept)
