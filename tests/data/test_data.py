"""Annotations, images, samplers."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from reference import VECTORS

import bags
from bags.data.dataset import DetectionDataset
from bags.data.images import inside, read_image
from bags.data.samplers import RepeatFactorSampler, ShardSampler, TrainSampler, repeat_factors, stochastic_round
from bags.data.statistics import CategoryStats, disagreement, frequency, instance_bin
from bags.data.transforms import training_transform

COCO = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "b.png", "width": 20, "height": 20},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2, 10, 5], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [30, 20, 20, 20]},
        {"id": 3, "image_id": 7, "category_id": 90, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        {"id": 4, "image_id": 7, "category_id": 5, "bbox": [3, 3, 0, 4]},
    ],
    "categories": [{"id": 90, "name": "cup"}, {"id": 5, "name": "cat"}, {"id": 17, "name": "never"}],
}


@pytest.fixture
def coco(tmp_path):
    for image in COCO["images"]:
        Image.new("RGB", (image["width"], image["height"]), "red").save(tmp_path / image["file_name"])
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    return tmp_path


def edited(folder, **changes):
    path = folder / "edited.json"
    path.write_text(json.dumps({**COCO, **changes}))
    return path


def test_index_by_hand(coco):
    index = bags.AnnotationIndex.open(coco / "coco.json")
    assert index.category_ids.tolist() == [5, 17, 90] and index.category_names == ["cat", "never", "cup"]
    assert index.image_ids.tolist() == [7, 3] and index.starts.tolist() == [0, 3, 4]
    assert index.labels.tolist() == [1, 3, 1, 3]
    assert index.boxes[0].tolist() == [30, 20, 50, 40]
    assert index.crowd.tolist() == [False, True, False, False]


def test_statistics_count_what_trains(coco):
    """Neither the crowd region nor the box without area in the image is counted."""
    stats = CategoryStats.from_index(bags.AnnotationIndex.open(coco / "coco.json"))
    assert stats.instance_counts == (1, 0, 1) and stats.image_counts == (1, 0, 1)
    assert CategoryStats.from_dict(json.loads(json.dumps(stats.to_dict()))) == stats


def test_counts_of_the_file_that_disagree_are_named(coco):
    categories = [{**COCO["categories"][0], "instance_count": 9}, {**COCO["categories"][1], "image_count": 1}]
    index = bags.AnnotationIndex.open(edited(coco, categories=[*categories, COCO["categories"][2]]))
    line = disagreement(index)
    assert disagreement(dataclasses.replace(index, for_masks=True)) == line  # objects without a mask are in the file
    assert "1 of its own counts" in line and "category 90: instance_count 9, counted 1" in line
    index = bags.AnnotationIndex.open(coco / "coco.json")
    assert disagreement(index) is None


def test_frequency_and_bins_by_hand():
    assert frequency([0, 10, 11, 100, 101]).tolist() == ["r", "r", "c", "c", "f"]
    assert instance_bin([0, 9, 10, 999, 1000], (10, 100, 1000)).tolist() == [0, 0, 1, 2, 3]


def test_dataset_drops_crowd_and_empty_boxes_and_clips(coco):
    dataset = DetectionDataset(bags.AnnotationIndex.open(coco / "coco.json"), coco)
    image, target = dataset[0]
    assert image.shape == (3, 30, 40) and image.dtype == torch.float32
    assert image[:, 0, 0].tolist() == [1, 0, 0]
    assert target["boxes"].tolist() == [[30, 20, 40, 30]] and target["labels"].tolist() == [1]
    assert target["image_id"] == 7


def test_flip_moves_boxes_and_depends_on_the_seed_alone(coco):
    dataset = DetectionDataset(bags.AnnotationIndex.open(coco / "coco.json"), coco, training_transform(flip=0.5))
    boxes = [tuple(dataset[0, seed][1]["boxes"][0].tolist()) for seed in range(20)]
    assert set(boxes) == {(30, 20, 40, 30), (0, 20, 10, 30)}
    assert boxes == [tuple(dataset[0, seed][1]["boxes"][0].tolist()) for seed in range(20)]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"annotations": [{**COCO["annotations"][0], "category_id": 6}]}, ["annotation 1", "category_id 6"]),
        ({"annotations": [{**COCO["annotations"][0], "image_id": 6}]}, ["annotation 1", "image_id 6"]),
        ({"annotations": [{**COCO["annotations"][0], "bbox": [1, 2, 3]}]}, ["annotation 1", "x, y, width, height"]),
        ({"annotations": [{**COCO["annotations"][0], "bbox": [1, 2, float("nan"), 1]}]}, ["not finite"]),
        ({"annotations": [{**COCO["annotations"][0], "bbox": 5}]}, ["annotation 1", "x, y, width, height"]),
        ({"annotations": [{**COCO["annotations"][0], "bbox": [1, 2, True, 1]}]}, ["x, y, width, height"]),
        ({"annotations": [{**COCO["annotations"][0], "iscrowd": None}]}, ["annotation 1", "iscrowd"]),
        ({"annotations": [{**COCO["annotations"][0], "category_id": [5]}]}, ["annotation 1", "category_id", "[5]"]),
        ({"images": [{**COCO["images"][0], "file_name": None}, COCO["images"][1]]}, ["image 7", "file_name", "None"]),
        ({"images": [{**COCO["images"][0], "width": float("nan")}, COCO["images"][1]]}, ["image 7", "pixels", "nan"]),
        ({"categories": [{"id": True, "name": "cup"}]}, ["whole-number id", "True"]),
        ({"annotations": [COCO["annotations"][0]] * 2}, ["annotations", "id 1", "unique"]),
        ({"categories": []}, ["`categories` is empty"]),
        ({"images": []}, ["`images` is empty"]),
        ({"images": None}, ["no list `images`"]),
        ({"categories": [{"name": "cup"}]}, ["`categories`", "whole-number id", "None"]),
        ({"categories": [{"id": "x", "name": "cup"}]}, ["whole-number id", "'x'"]),
    ],
)
def test_bad_annotations_are_named(coco, changes, words):
    path = edited(coco, **changes)
    with pytest.raises(bags.UserError) as error:
        bags.AnnotationIndex.open(path)
    assert str(path) in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [("", "the file is empty"), ("{", "not valid JSON"), ("[]", "found a list"), ("[" * 100_000, "not valid JSON")],
)
def test_files_that_are_not_annotations(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(bags.UserError, match=words):
        bags.AnnotationIndex.open(tmp_path / "x.json")
    with pytest.raises(bags.UserError, match="no such file"):
        bags.AnnotationIndex.open(tmp_path / "absent.json")


def test_bad_images_are_named(coco):
    (coco / "broken.png").write_bytes((coco / "a.png").read_bytes()[:60])
    (coco / "text.png").write_text("not an image")
    for name in ("broken.png", "text.png"):
        with pytest.raises(bags.UserError, match=f"{name}: not a readable image"):
            read_image(coco / name)
    with pytest.raises(bags.UserError, match="no such image"):
        read_image(coco / "absent.png")
    Image.new("RGB", (41, 30)).save(coco / "a.png")
    with pytest.raises(bags.UserError, match="41 x 30 pixels, but coco.json says 40 x 30 for image 7"):
        DetectionDataset(bags.AnnotationIndex.open(coco / "coco.json"), coco)[0]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png"])
def test_file_names_stay_in_the_folder(tmp_path, name):
    with pytest.raises(bags.UserError, match="leads out of the image folder"):
        inside(tmp_path, name)


def test_lvis_v1_file_names(coco):
    images = [{"id": 1, "coco_url": "http://images.org/train2017/0001.jpg", "width": 4, "height": 4}]
    index = bags.AnnotationIndex.open(edited(coco, images=images, annotations=[]))
    assert index.file_name(0) == "train2017/0001.jpg"


def test_sampler_covers_every_image_and_resumes_anywhere():
    sampler = TrainSampler(10, 4, seed=1)
    first = list(sampler)
    positions = [p for batch in first for p, _ in batch]
    assert len(first) == len(sampler) == 3 and sorted(positions[:10]) == list(range(10))
    assert positions[10:] == positions[:2]  # the last batch is filled up
    assert list(sampler) == first
    sampler.start(0, first_batch=2)
    assert list(sampler) == first[2:] and len(sampler) == 1
    sampler.start(1)
    assert list(sampler) != first


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_split_the_same_batches(monkeypatch, world):
    whole = list(TrainSampler(10, 4, seed=1))
    shares, shards = [], []
    monkeypatch.setattr("bags.core.distributed.world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr("bags.core.distributed.rank", lambda rank=rank: rank)
        shares.append(list(TrainSampler(10, 4, seed=1)))
        shards += [p for batch in ShardSampler(11, 2) for p in batch]
    merged = [sorted(sum(batches, [])) for batches in zip(*shares, strict=True)]
    assert merged == [sorted(batch) for batch in whole]
    assert sorted(shards) == list(range(11))


def test_more_images_in_a_batch_than_in_the_dataset():
    batches = list(TrainSampler(3, 8, seed=0))
    assert len(batches) == 1 and len(batches[0]) == 8
    assert np.bincount([p for p, _ in batches[0]]).min() >= 2


def test_batches_hold_one_shape_and_every_image_once():
    wide = [True, False, True, True, False, True, True, False, True, True]
    sampler = TrainSampler(10, 2, seed=3, wide=wide)
    for epoch in range(5):
        sampler.start(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == sampler.batches_in(epoch) == 4 + 2
        assert all(wide[a] == wide[b] for (a, _), (b, _) in batches)
        seen = np.bincount([p for batch in batches for p, _ in batch], minlength=10)
        assert seen.min() == 1 and seen.sum() == 12  # 7 wide and 3 other images: one filler each
        sampler.start(epoch, first_batch=4)
        assert list(sampler) == batches[4:]


RFS = VECTORS["rfs"]


@pytest.fixture
def rfs_index(tmp_path):
    """The annotations that the reference numbers were made from."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(RFS["images"])],
        "categories": [{"id": c, "name": str(c)} for c in range(1, RFS["categories"] + 1)],
    }
    shift = 1 - min(RFS["category"])
    pairs = enumerate(zip(RFS["image"], RFS["category"], strict=True), start=1)
    content["annotations"] = [
        {"id": k, "image_id": image, "category_id": category + shift, "bbox": [0, 0, 5, 5]}
        for k, (image, category) in pairs
    ]
    (tmp_path / "rfs.json").write_text(json.dumps(content))
    return bags.AnnotationIndex.open(tmp_path / "rfs.json")


def test_repeat_factors_equal_detectron2_and_the_released_code(rfs_index):
    factors = repeat_factors(rfs_index, RFS["threshold"])
    assert factors.tolist() == pytest.approx(RFS["factors"], rel=1e-6)
    assert (repeat_factors(rfs_index, RFS["threshold"], released=True) - 1).tolist() == RFS["extra"]
    counts = stochastic_round(factors, torch.Generator().manual_seed(0))
    assert torch.repeat_interleave(torch.arange(len(factors)), counts).tolist() == RFS["epoch"]


def test_repeat_factor_sampler():
    """Factors 1, 1.5, 2, 3.25: whole parts always, fractions in that share of the epochs; resumable; ranks agree."""
    sampler = RepeatFactorSampler(torch.tensor([1, 1.5, 2, 3.25]), 1, seed=0)
    counts = []
    for epoch in range(400):
        sampler.start(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        counts.append(np.bincount([p for batch in batches for p, _ in batch], minlength=4))
    assert set(map(tuple, counts)) == {(1, a, 2, b) for a in (1, 2) for b in (3, 4)}
    assert np.mean(counts, 0) == pytest.approx([1, 1.5, 2, 3.25], abs=0.12)  # five standard deviations
    sampler.start(7)
    whole = list(sampler)
    sampler.start(7, first_batch=3)
    assert list(sampler) == whole[3:] and len(sampler) == sampler.batches_in(7) - 3


def test_ranks_split_the_repeated_batches(monkeypatch):
    factors = torch.tensor([1, 1.5, 2, 3.25, 1])
    whole = list(RepeatFactorSampler(factors, 2, seed=1))
    monkeypatch.setattr("bags.core.distributed.world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr("bags.core.distributed.rank", lambda rank=rank: rank)
        shares.append(list(RepeatFactorSampler(factors, 2, seed=1)))
    assert [[a, b] for [a], [b] in zip(*shares, strict=True)] == whole


def test_crowd_regions_do_not_make_an_image_rare(coco):
    """Categories 5 (image 7 alone) and 90 (image 3; on image 7 as a crowd region): both in half of the images."""
    index = bags.AnnotationIndex.open(coco / "coco.json")
    assert repeat_factors(index, 1.0).tolist() == pytest.approx([2**0.5, 2**0.5])


def test_tail_only_keeps_images_and_annotations_of_the_tail(coco):
    index = bags.AnnotationIndex.open(coco / "coco.json")
    tail = index.only(np.array([False, False, False, True]))  # category 90; its box on image 7 is a crowd region
    assert tail.image_ids.tolist() == [3] and tail.file_name(0) == "b.png" and tail.starts.tolist() == [0, 1]
    assert tail.labels.tolist() == [3] and tail.boxes.tolist() == [[1, 2, 11, 7]] and len(tail.image_sizes) == 1
    cats = index.only(np.array([False, True, False, False]))
    assert cats.image_ids.tolist() == [7] and cats.labels.tolist() == [1] and cats.category_ids.tolist() == [5, 17, 90]
