"""Large-scale jitter by hand-computed boxes, copy-paste against a loop over pixels, and the same batches every time."""

import json

import numpy as np
import pytest
import torch
from conftest import write_configs
from PIL import Image

import bags
from bags.assembly.loaders import annotations_digest, build_train_loader, check_copy_paste, open_index
from bags.core.errors import UserError
from bags.data.copy_paste import CopyPaste, paste
from bags.data.dataset import DetectionDataset
from bags.data.statistics import CategoryStats
from bags.data.transforms import jitter_transform

OBJECTS = [(20, 10, 60, 30), (0, 40, 4, 50)]  # x1, y1, x2, y2 in an image of 100 x 50 pixels


@pytest.fixture
def ramp(tmp_path):
    """An image whose red level is twice the column, and green five times the row, with two rectangles as objects."""
    pixels = np.zeros((50, 100, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = 2 * np.arange(100), 5 * np.arange(50)[:, None], 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    annotations = [
        {
            "id": k + 1,
            "image_id": 7,
            "category_id": 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
            "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
        }
        for k, (x1, y1, x2, y2) in enumerate(OBJECTS)
    ]
    images = [{"id": 7, "file_name": "a.png", "width": 100, "height": 50}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "labels").mkdir()
    Image.fromarray(np.full((50, 100), 3, np.uint8)).save(tmp_path / "labels/a.png")
    return tmp_path


def jittered(folder, scale, flip=0.0, masks=True, **settings):
    """The dataset with one scale, in squares of 80 pixels with black padding."""
    transform = jitter_transform((scale, scale), 80, (0, 0, 0), flip)
    index = bags.AnnotationIndex.open(folder / "a.json")
    return DetectionDataset(index, folder, transform, masks, crops=True, **settings)


def test_a_smaller_image_is_padded_at_a_random_place(ramp):
    """Scale 0.5 makes 100 x 50 pixels 40 x 20: the first object is 8, 4, 24, 12 in it, the second 0, 16, 1.6, 20."""
    dataset, places = jittered(ramp, 0.5, semantic=ramp / "labels"), set()
    for seed in range(6):
        image, target = dataset[0, seed]
        assert image.shape == (3, 80, 80) and image.dtype == torch.float32
        rows, columns = torch.where(image[2] > 0.5)
        left, top = int(columns.min()), int(rows.min())
        assert len(rows) == 40 * 20
        places.add((left, top))
        expected = torch.tensor([[8.0, 4, 24, 12], [0, 16, 1.6, 20]]) + torch.tensor([left, top] * 2)
        assert torch.allclose(target["boxes"], expected, atol=1e-4)
        mask = torch.zeros(80, 80, dtype=torch.uint8)
        mask[top + 4 : top + 12, left + 8 : left + 24] = 1
        assert torch.equal(target["masks"][0], mask)
        inside = image[2] > 0.5
        assert (target["semantic"][inside] == 3).all() and (target["semantic"][~inside] == 255).all()
    assert len(places) > 4


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_larger_image_is_cropped_and_what_vanishes_is_left_out(ramp, flip):
    """Scale 2 makes it 160 x 80: a column c of the square shows column (c + left + 0.5) / 1.6 - 0.5 of the image."""
    dataset, left_out = jittered(ramp, 2, flip), 0
    for seed in range(12):
        image, target = dataset[0, seed]
        straight = image.flip(-1) if flip else image
        shown = straight[0].mean(0)[30:50] * 255 / 2
        left = round(float(((shown + 0.5) * 1.6 - 0.5 - torch.arange(30, 50)).mean()))
        boxes = torch.tensor([[32.0, 16, 96, 48], [0, 64, 6.4, 80]])
        boxes[:, ::2] = (boxes[:, ::2] - left).clamp(0, 80)
        kept = boxes[:, 2] - boxes[:, 0] >= 1
        left_out += int((~kept).sum())
        if flip:
            boxes[:, ::2] = 80 - boxes[:, ::2].flip(1)
        assert torch.allclose(target["boxes"], boxes[kept], atol=1e-4)
        assert len(target["labels"]) == len(target["masks"]) == int(kept.sum())
        assert target["masks"].flatten(1).any(1).all()
    assert left_out > 3


def test_without_masks_the_boxes_are_the_same(ramp):
    for seed in range(3):
        first, second = (jittered(ramp, 2, masks=masks)[0, seed][1] for masks in (True, False))
        assert torch.equal(first["boxes"], second["boxes"]) and "masks" not in second


def item(generator, size, number):
    """A random image, and objects with random masks of which some overlap, some are tiny, and one covers much."""
    image = torch.rand(3, *size, generator=generator)
    masks = torch.zeros(number, *size, dtype=torch.uint8)
    for k in range(number):
        y, x = (int(torch.randint(0, side - 4, (), generator=generator)) for side in size)
        masks[k, y : y + (2, 14)[k % 2], x : x + (2, 12)[k % 2]] = 1
    boxes = torch.rand(number, 4, generator=generator) * 5 + torch.tensor([0.0, 0, 6, 6])
    labels = torch.arange(number) + 1
    semantic = torch.randint(0, 9, size, dtype=torch.uint8, generator=generator)
    return image, {"boxes": boxes, "labels": labels, "masks": masks, "semantic": semantic, "image_id": 5}


def slow_paste(image, target, source, source_target, chosen):
    """Pixel by pixel: the colour, the label map, and the pixels of each object."""
    height, width = image.shape[-2:]
    image, semantic = image.clone(), target["semantic"].clone()
    old = [set() for _ in target["labels"]]
    new = [set() for k in range(len(chosen)) if chosen[k]]
    picked = [k for k in range(len(chosen)) if chosen[k]]
    for y in range(height):
        for x in range(width):
            covering = []
            if y < source.shape[1] and x < source.shape[2]:
                covering = [n for n, k in enumerate(picked) if source_target["masks"][k, y, x]]
            for n in covering:
                new[n].add((y, x))
            if covering:
                image[:, y, x], semantic[y, x] = source[:, y, x], source_target["semantic"][y, x]
            else:
                for k in range(len(old)):
                    if target["masks"][k, y, x]:
                        old[k].add((y, x))
    objects = []
    sources = [(pixels, k, source_target) for pixels, k in zip(new, picked, strict=True)]
    for pixels, k, owner in [*((pixels, k, target) for k, pixels in enumerate(old)), *sources]:
        whole = int(owner["masks"][k].sum())
        if not pixels:
            continue
        ys, xs = zip(*pixels, strict=True)
        tight = [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
        box = owner["boxes"][k].tolist() if len(pixels) == whole else tight
        objects.append((box, int(owner["labels"][k]), pixels))
    return image, semantic, objects


@pytest.mark.parametrize("source_size", [(24, 30), (18, 40), (33, 22)])
def test_pasting_equals_a_loop_over_pixels(source_size):
    generator = torch.Generator().manual_seed(3)
    removed = changed = 0
    for _ in range(8):
        (image, target), (source, source_target) = item(generator, (24, 30), 5), item(generator, source_size, 6)
        chosen = torch.rand(6, generator=generator) < 0.7
        before = {key: value.clone() for key, value in target.items() if key != "image_id"}
        pasted, result = paste(image, target, source, source_target, chosen)
        expected, semantic, objects = slow_paste(image, target, source, source_target, chosen)
        assert torch.equal(pasted, expected) and torch.equal(result["semantic"], semantic)
        assert len(result["labels"]) == len(objects) and result["image_id"] == 5
        for k, (box, label, pixels) in enumerate(objects):
            assert result["boxes"][k].tolist() == pytest.approx(box) and int(result["labels"][k]) == label
            assert {(int(y), int(x)) for y, x in result["masks"][k].nonzero()} == pixels
        removed += 5 + int(chosen.sum()) - len(objects)
        changed += sum(all(type(side) is int for side in box) for box, _, _ in objects)
        assert all(torch.equal(target[key], value) for key, value in before.items()), "the given target stays"
    assert removed and changed


def configured(folder, glyphs, *overrides):
    """Configuration, training annotations and statistics of tiny glyphs."""
    config = bags.load_config(write_configs(folder / "configs", glyphs) / "softmax.yaml", overrides)
    index = open_index(config, "train")
    return config, index, CategoryStats.from_index(index)


def batches(folder, glyphs, first, *overrides):
    """What is left of the first epoch from a batch on."""
    loader = build_train_loader(*configured(folder, glyphs, *overrides))
    loader.batch_sampler.start(0, first)
    return list(loader)


@pytest.mark.parametrize("framework", ["mask_rcnn", "faster_rcnn"])
def test_batches_depend_on_the_seed_alone(tmp_path, glyphs, framework):
    """In loader processes, and in a run that is resumed, they are the same; other seeds draw others."""
    keys = ["data.jitter=[0.5,1.5]", "data.copy_paste=0.7", "data.flip=0.5", f"detector.framework={framework}"]
    whole = batches(tmp_path, glyphs, 0, *keys)
    resumed = batches(tmp_path, glyphs, 2, *keys, "data.workers=1")
    assert len(resumed) == len(whole) - 2
    for (images, targets), (again, targets_again) in zip(whole[2:], resumed, strict=True):
        for image, other, target, other_target in zip(images, again, targets, targets_again, strict=True):
            assert image.shape == (3, 64, 64) and torch.equal(image, other)
            assert ("masks" in target) == (framework == "mask_rcnn")
            assert target.keys() == other_target.keys()
            for key, value in target.items():
                assert torch.equal(value, other_target[key]) if isinstance(value, torch.Tensor) else True
    other = batches(tmp_path, glyphs, 2, *keys, "seed=1")
    assert not torch.equal(other[0][0][0], resumed[0][0][0])


def test_chances_of_pasting(tmp_path, glyphs):
    """An image gets objects with the asked probability, and half of the source's objects in the mean."""
    config, index, _ = configured(tmp_path, glyphs)
    dataset = DetectionDataset(index, glyphs, masks=True)
    never, always, half = (CopyPaste(dataset, probability) for probability in (0.0, 1.0, 0.5))
    keys = [(k % len(dataset), seed) for k, seed in enumerate(range(100, 180))]
    plain = [dataset[key] for key in keys]
    assert all(torch.equal(never[key][0], image) for key, (image, _) in zip(keys, plain, strict=True))
    changed = [not torch.equal(half[key][0], image) for key, (image, _) in zip(keys, plain, strict=True)]
    gained = [
        len(always[key][1]["labels"]) - len(target["labels"]) for key, (_, target) in zip(keys, plain, strict=True)
    ]
    mean = np.mean([len(target["labels"]) for _, target in plain])
    assert 0.25 < np.mean(changed) < 0.6  # some pastings choose nothing
    assert 0.25 * mean < np.mean(gained) < 0.55 * mean  # some objects are hidden


def test_copy_paste_needs_a_mask_of_every_object(tmp_path, glyphs):
    config, index, stats = configured(tmp_path, glyphs, "data.copy_paste=1")
    check_copy_paste(config, index)
    assert annotations_digest(config, index) == index.content_digest(segmentations=True)  # what training sees
    content = json.loads((glyphs / "train.json").read_text())
    for name, words, without in (("some", "mask_rcnn", [3, 4]), ("none", "copy_paste=0$", range(len(index.labels)))):
        for k in without:
            content["annotations"][k].pop("segmentation", None)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        numbers = f"{len(without)} of {len(index.labels)}"
        with pytest.raises(UserError, match=rf"{name}\.json: .*copy_paste needs.*{numbers}.*{words}"):
            build_train_loader(config, bags.AnnotationIndex.open(path), stats)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.jitter=[2]"], r"data.jitter: expected the lowest and the highest scale"),
        (["data.jitter=[2,1]"], r"data.jitter: expected the lowest"),
        (["data.jitter=[0,1]"], r"data.jitter: expected numbers above 0"),
        (["data.jitter=[1,2]", "data.short_sides=[64]"], "data.short_sides: expected \\[\\]"),
        (["data.jitter=[1,2]", "detector.conventions=released"], "data.jitter: expected \\[\\]: .*released"),
        (["data.copy_paste=0.5", "detector.conventions=released"], "data.copy_paste: expected 0: .*released"),
        (["data.copy_paste=2"], "data.copy_paste: expected 0 to 1"),
    ],
)
def test_impossible_augmentation(tmp_path, glyphs, overrides, message):
    with pytest.raises(UserError, match=message):
        configured(tmp_path, glyphs, *overrides)


@pytest.mark.parametrize("key", ["data.jitter=[0.5,1]", "data.copy_paste=1"])
def test_no_store_of_images_that_are_made_anew(tmp_path, glyphs, key):
    """Such a row trains from images; who asks for a store is told why there can be none."""
    row = write_configs(tmp_path / "configs", glyphs) / "bags.yaml"
    assert bags.load_config(row).is_cached and not bags.load_config(row, [key]).is_cached
    with pytest.raises(UserError, match=f"train.features: expected live: {key.partition('=')[0]} makes images anew"):
        bags.load_config(row, [key, "train.features=cached"])
    with pytest.raises(UserError, match=f"class_balanced draws .* which {key.partition('=')[0]} rules out"):
        bags.load_config(row, [key, "sampler.name=class_balanced"])
