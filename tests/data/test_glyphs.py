"""The embedded dataset: deterministic, well formed, long-tailed."""

import dataclasses
import hashlib
import json
import multiprocessing
import typing

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from pycocotools import mask as coco_mask

import bags
from bags.config.sections import Glyphs
from bags.data.glyph_images import TEXTURES, coverage, load_outlines, thickened
from bags.data.glyphs import PRESETS, choose_categories, instance_counts, make_glyphs


def annotations(root, split):
    return json.loads((root / f"{split}.json").read_text())


def test_coverage_by_hand():
    """A 2 x 3 rectangle with a hole where the contour runs the other way; half-covered columns."""
    square = np.array([[1, 1], [5, 1], [5, 5], [1, 5]], float)
    hole = np.array([[2, 2], [2, 4], [4, 4], [4, 2]], float)
    ink = coverage([square, hole], 6, 6)
    expected = np.zeros((6, 6), int)
    expected[1:5, 1:5], expected[2:4, 2:4] = 9, 0
    assert np.array_equal(ink, expected)
    assert np.array_equal(coverage([square + (1 / 3, 0)], 6, 6)[2], [0, 6, 9, 9, 9, 3])


def test_annotations_do_not_depend_on_the_machine(glyphs):
    """A fingerprint of the annotations, equal wherever this test runs."""
    content = [(a["bbox"], a["area"], a["category_id"]) for a in annotations(glyphs, "train")["annotations"]]
    names = [c["name"] for c in annotations(glyphs, "train")["categories"]]
    assert hashlib.sha256(json.dumps([content, names]).encode()).hexdigest()[:16] == "efec565fa60c17b3"


def test_same_seed_same_files_whatever_the_workers(glyphs, tmp_path):
    again = make_glyphs(tmp_path / "again", TINY, workers=2)
    for name in ("train.json", "val.json"):
        assert (again / name).read_text() == (glyphs / name).read_text()
    assert (again / "train/00000001.jpg").read_bytes() == (glyphs / "train/00000001.jpg").read_bytes()
    other = make_glyphs(tmp_path / "other", TINY, seed=1, workers=1)
    assert (other / "train.json").read_text() != (glyphs / "train.json").read_text()


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_areas_and_masks_agree(glyphs, split):
    content = annotations(glyphs, split)
    taken = {}
    for annotation in content["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
        assert annotation["area"] == mask.sum()
        seen = taken.setdefault(annotation["image_id"], np.zeros_like(mask))
        assert not (seen & mask).any(), "two masks share a pixel"
        seen |= mask
    image = content["images"][0]
    assert Image.open(glyphs / image["file_name"]).size == (image["width"], image["height"])
    semantic = np.asarray(Image.open(glyphs / f"semantic_{split}" / "00000001.png"))
    assert semantic.shape == (64, 64) and semantic.min() >= 1 and semantic.max() <= len(TEXTURES)


def test_lvis_fields(glyphs):
    train, val = annotations(glyphs, "train"), annotations(glyphs, "val")
    assert train["categories"] == val["categories"]
    assert [a["id"] for a in train["annotations"]][:3] == [1, 2, 3]
    stats = bags.CategoryStats.from_index(bags.AnnotationIndex.open(glyphs / "train.json"))
    assert [c["instance_count"] for c in train["categories"]] == list(stats.instance_counts)
    assert [c["image_count"] for c in train["categories"]] == list(stats.image_counts)
    for content in (train, val):
        present = {(a["image_id"], a["category_id"]) for a in content["annotations"]}
        for image in content["images"]:
            assert not {(image["id"], c) for c in image["neg_category_ids"]} & present
            assert {(image["id"], c) for c in image["not_exhaustive_category_ids"]} <= present


def test_validation_is_even_and_training_is_not(glyphs):
    val = np.bincount([a["category_id"] for a in annotations(glyphs, "val")["annotations"]])[1:]
    train = np.bincount([a["category_id"] for a in annotations(glyphs, "train")["annotations"]])[1:]
    assert val.min() >= TINY.val_instances - 1
    assert train.max() >= 10 * train.min()


def test_a_killed_run_goes_on(glyphs, tmp_path, monkeypatch):
    """Half of the parts are there: they are kept, the rest is made, the result is the same."""
    monkeypatch.setattr("bags.data.glyphs.CHUNK", 5)
    stopped = []

    def stop_half_way(jobs, workers, title):
        from bags.data import glyphs as module

        for job in jobs[: len(jobs) // 2]:
            module._make_chunk(job)
        stopped.append(len(jobs))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bags.data.glyphs._run", stop_half_way)
        make_glyphs(tmp_path / "d", TINY)
    assert not (tmp_path / "d").exists() and stopped[0] >= 4
    kept = sorted((tmp_path / "d.partial" / "parts").iterdir())
    times = [part.stat().st_mtime_ns for part in kept]
    made = make_glyphs(tmp_path / "d", TINY, workers=1)
    assert (made / "train.json").read_text() == (glyphs / "train.json").read_text()
    assert len(times) == stopped[0] // 2 and not (tmp_path / "d.partial").exists()


def test_other_settings_are_refused(glyphs):
    with pytest.raises(bags.UserError, match="not of this preset"):
        make_glyphs(glyphs, dataclasses.replace(TINY, val_instances=4))


def similarities(ranked: list[str]) -> np.ndarray:
    outlines = load_outlines(ranked)
    drawings = [coverage([c * 24 + 12 for c in outlines[ch]], 24, 24).ravel().astype(float) for ch in ranked]
    unit = np.stack([d / np.linalg.norm(d) for d in drawings])
    return unit @ unit.T - 2 * np.eye(len(unit))


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets(name):
    """Counts fall, every group of boundaries is populated, look-alikes share the font but not the drawing."""
    preset = PRESETS[name]
    counts, ranked = instance_counts(preset), choose_categories(preset, 0)
    assert name in typing.get_args(Glyphs) and len(PRESETS) == len(typing.get_args(Glyphs))
    assert len(set(ranked)) == len(ranked) == preset.categories
    assert (np.diff(counts) <= 0).all() and (counts[0], counts[-1]) == (preset.most_instances, preset.fewest_instances)
    if name in ("glyphs-100", "glyphs-1230"):
        groups = bags.assign_groups(counts.tolist())
        assert min(groups.sizes) >= (50 if name == "glyphs-1230" else 3)
        similarity = similarities(ranked)
        assert similarity.max() < 0.985
        half = preset.categories // 2  # most of the tail has a look-alike in the head
        assert (similarity[half:, :half].max(1) >= preset.family_similarity).mean() > 0.9
        return
    base = PRESETS["glyphs-100"]  # one thing differs from it
    share = {"glyphs-100-half": 0.5, "glyphs-100-double": 2}.get(name, 1)
    assert counts.sum() == pytest.approx(share * instance_counts(base).sum(), rel=0.01)
    if name not in ("glyphs-100-distinct", "glyphs-100-alike"):
        assert ranked == choose_categories(base, 0)


def test_letters_are_as_alike_as_the_preset_says():
    alike = [
        similarities(choose_categories(PRESETS[f"glyphs-100{name}"], 0)).max(1).mean()
        for name in ("-distinct", "", "-alike")
    ]
    assert alike[0] < 0.7 and 0.84 < alike[1] < 0.88 and 0.92 < alike[2] < 0.985


def test_heavier_letters(tmp_path):
    """A pixel more on each side, and only there: each count is the largest around it."""
    ink = np.zeros((5, 6), int)
    ink[1, 2], ink[3, 5] = 9, 4
    expected = [[0, 9, 9, 9, 0, 0]] * 2 + [[0, 9, 9, 9, 4, 4]] + [[0, 0, 0, 0, 4, 4]] * 2
    assert thickened(ink, 1).tolist() == expected and thickened(ink, 0).tolist() == ink.tolist()
    areas, preset = [], dataclasses.replace(TINY, most_instances=6, objects=(2, 2))
    for bold in (0, 1):
        folder = make_glyphs(tmp_path / str(bold), dataclasses.replace(preset, bold=bold), workers=1)
        content = json.loads((folder / "train.json").read_text())
        areas.append(sum(a["area"] for a in content["annotations"]) / len(content["annotations"]))
        assert ("bold" in json.loads((folder / "settings.json").read_text())["preset"]) == bool(bold)
    assert areas[1] > 1.2 * areas[0]


def test_two_processes_make_one_dataset(glyphs, tmp_path):
    """The second waits for the first and takes what it made."""
    context = multiprocessing.get_context("spawn")
    makers = [context.Process(target=make_glyphs, args=(tmp_path / "d", TINY, 0, 1)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert [maker.exitcode for maker in makers] == [0, 0]
    assert (tmp_path / "d" / "train.json").read_text() == (glyphs / "train.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
