"""scripts/predict.py on odd images, as a user runs it. The detector has random weights."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import run_script, write_configs
from PIL import Image

from bags.analysis.plots import LONGEST_SIDE, save_drawing
from bags.assembly.loaders import build_val_dataset, open_index
from bags.assembly.models import build_detector
from bags.config.load import config_to_dict, load_config
from bags.core.files import JsonList
from bags.data.statistics import CategoryStats
from bags.data.transforms import to_input
from bags.engine.checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def make_checkpoint(glyphs, tmp_path_factory):
    """(overrides) -> a checkpoint whose detector finds something everywhere."""

    def make(*overrides):
        folder = tmp_path_factory.mktemp("checkpoint")
        config = load_config(write_configs(folder, glyphs) / "softmax.yaml", ["test.score_threshold=0", *overrides])
        stats = CategoryStats.from_index(open_index(config, "train"))
        torch.manual_seed(0)
        model = build_detector(config, stats).state_dict()
        content = {"config": config_to_dict(config), "stats": stats.to_dict(), "model": model}
        write_checkpoint(folder / "last.pth", content)
        return folder / "last.pth"

    return make


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


def predict(checkpoint, *arguments, output):
    return run_script("predict", checkpoint, *arguments, "--output", output, "--score", 0, "--device", "cpu")


def entries_of(output):
    return json.loads((output / "predictions.json").read_text())


@pytest.fixture
def photo(tmp_path):
    """A folder for images: `photo(name, width, height)` makes one of noise."""
    (tmp_path / "photos").mkdir()

    def make(name, width=90, height=70, **settings):
        pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name, **settings)
        return tmp_path / "photos" / name

    return make


def test_oblong_images_are_drawn_in_bounded_size(checkpoint, photo, tmp_path):
    sizes = {"a.png": (1, 5000), "b.png": (5000, 1), "c.png": (100, 3000), "d.png": (90, 70), "e.png": (1, 1)}
    files = [photo(name, *size) for name, size in sizes.items()]
    done = predict(checkpoint, *files, output=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    drawn = [Image.open(path).size for path in sorted((tmp_path / "out").glob("*.png"))]
    assert len(drawn) == 5 and max(max(size) for size in drawn) <= LONGEST_SIDE
    assert drawn[2] == (int(100 * LONGEST_SIDE / 3000), LONGEST_SIDE) and drawn[3][0] == 640 and drawn[4] == (640, 640)


def test_large_images_are_reduced_with_their_boxes(tmp_path):
    """A box around the right half of a white image: its left line is in the middle of the drawing, too."""
    image = Image.new("RGB", (2 * LONGEST_SIDE, 8), "white")
    save_drawing(tmp_path / "x.png", image, [[LONGEST_SIDE, -9, 3 * LONGEST_SIDE, 20]], [""], ["#000000"])
    drawn = np.asarray(Image.open(tmp_path / "x.png").convert("L"))
    assert drawn.shape == (4, LONGEST_SIDE)
    assert abs(np.flatnonzero(drawn.min(0) < 100).mean() - LONGEST_SIDE / 2) < 2


@pytest.mark.parametrize("exif", [False, True])
def test_images_are_turned_as_the_checkpoint_says(make_checkpoint, photo, tmp_path, exif):
    """With data.exif the results and the drawing are those of the image that was turned by hand."""
    checkpoint = make_checkpoint(f"data.exif={str(exif).lower()}")
    tag = Image.Exif()
    tag[0x0112] = 6
    turned = photo("turned.png", 96, 48, exif=tag)
    plain = Image.open(turned)
    plain = plain.transpose(Image.Transpose.ROTATE_270) if exif else plain
    Image.fromarray(np.asarray(plain)).save(tmp_path / "photos/plain.png")
    done = predict(checkpoint, turned, tmp_path / "photos/plain.png", output=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = {name: [] for name in ("turned.png", "plain.png")}
    for entry in entries_of(tmp_path / "out"):
        found[os.path.basename(entry.pop("file_name"))].append(entry)
    assert found["turned.png"] and found["turned.png"] == found["plain.png"]
    drawings = [Image.open(path).size for path in sorted((tmp_path / "out").glob("*.png"))]
    assert drawings == [(640, 1280) if exif else (640, 320)] * 2


def test_prediction_sees_the_numbers_of_validation(glyphs, tmp_path):
    config = load_config(write_configs(tmp_path, glyphs) / "softmax.yaml")
    dataset = build_val_dataset(config)
    assert torch.equal(to_input(dataset.read(1)[0]), dataset[1][0])


def test_long_names_and_undrawable_images_lose_nothing(checkpoint, photo, tmp_path):
    """A name of 255 bytes is cut, between letters; where a folder is in the way, the drawing is named and left out."""
    long = photo("€" * 83 + "ab.png")  # 255 bytes
    files = [photo("a.png"), photo("b.png"), long]
    (tmp_path / "out/000001_b.png").mkdir(parents=True)
    done = predict(checkpoint, *files, output=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"warning: drawing of {files[1]}: cannot be written" in done.stderr
    assert "3 images (1 of them without a drawing)" in done.stdout
    assert {entry["file_name"] for entry in entries_of(tmp_path / "out")} == set(map(str, files))
    assert sorted(p.name[:8] for p in (tmp_path / "out").glob("*.png")) == ["000000_a", "000001_b", "000002_€"]


def test_drawings_of_an_earlier_prediction_are_counted(checkpoint, photo, tmp_path):
    """Those of equal names are replaced, and images that were given are no drawings."""
    out, files = tmp_path / "out", [photo("a.png"), photo("000001_given.png")]
    assert "note" not in predict(checkpoint, *files, output=out).stderr
    shutil.copy(files[1], out / files[1].name)
    (out / "000007_old.png").touch()
    done = predict(checkpoint, files[0], out / files[1].name, output=out)
    assert f"note: {out}: drawings that this prediction has not made: 1 (first: 000007_old.png); " in done.stderr


FAILS_AT_90 = """
from bags.cli import run
from bags.detectors.faster_rcnn import FasterRCNN

forward = FasterRCNN.forward

def fails_at_90(self, images, targets=None):
    if images[0].shape[-1] == 90:
        raise MemoryError
    return forward(self, images, targets)

FasterRCNN.forward = fails_at_90
run("predict")
"""


def test_results_are_kept_as_they_come(checkpoint, photo, tmp_path):
    """A detector that fails at the third image leaves the results of the first two."""
    script = tmp_path / "predict.py"
    script.write_text(FAILS_AT_90)
    files = [photo("a.png", 60), photo("b.png", 61), photo("c.png", 90)]
    done = run_script(script, checkpoint, *files, "--output", tmp_path / "out", "--score", 0, "--device", "cpu")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")
    assert {entry["file_name"] for entry in entries_of(tmp_path / "out")} == {str(file) for file in files[:2]}


def test_what_is_skipped_is_named(checkpoint, photo, tmp_path):
    photo("a.png")
    photo("b.jfif", format="JPEG")
    photo("c.gif")
    (tmp_path / "photos/deeper").mkdir()
    (tmp_path / "photos/folder.png").mkdir()
    done = predict(checkpoint, tmp_path / "photos", output=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"note: {tmp_path}/photos: skipped, by their suffix no images: c.gif, deeper/, folder.png/\n" in done.stderr
    assert "2 images, " in done.stdout


def test_large_images_are_refused_by_a_limit_that_can_be_raised(make_checkpoint, photo, tmp_path):
    checkpoint = make_checkpoint("data.max_pixels=5000")
    files = [photo("small.png", 70, 70), photo("large.png", 90, 70)]
    done = predict(checkpoint, *files, output=tmp_path / "out")
    assert done.returncode == 0 and "1 images (1 more left out)" in done.stdout
    assert "large.png: 90 x 70 pixels are more than data.max_pixels=5000" in done.stderr
    done = predict(checkpoint, *files, "--max-pixels", 6300, output=tmp_path / "out")
    assert "2 images, " in done.stdout


def test_two_commands_do_not_write_one_file(checkpoint, photo, tmp_path):
    (tmp_path / "out").mkdir()
    with JsonList(tmp_path / "out/predictions.json") as results:
        results.extend([{"a": 1}])
        done = predict(checkpoint, photo("a.png"), output=tmp_path / "out")
        assert done.returncode == 2 and "another process writes it" in done.stderr
    assert entries_of(tmp_path / "out") == [{"a": 1}]


def test_a_list_is_whole_after_every_entry(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"old": 1}] * 9))
    with JsonList(path) as results:
        assert len(json.loads(path.read_text())) == 9  # until there is something new
        expected = []
        for entries in ([], [{"a": "é"}], [], [{"b": 1}, {"c": None}]):
            results.extend(entries)
            expected += entries
            assert json.loads(path.read_text()) == expected
    with JsonList(tmp_path / "none.json"):
        pass
    assert not (tmp_path / "none.json").exists()


def test_a_full_disk_leaves_the_entries_before(tmp_path, monkeypatch):
    """The file can grow to 60 bytes: what does not fit is cut off again."""
    pwrite = os.pwrite

    def full(descriptor, text, at):
        if at >= 60:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, text[: 60 - at], at)

    monkeypatch.setattr(os, "pwrite", full)
    with JsonList(tmp_path / "list.json") as results:
        results.extend([{"a": 1}])
        with pytest.raises(OSError, match="No space"):
            results.extend([{"b": 2}] * 10)
        assert json.loads((tmp_path / "list.json").read_text()) == [{"a": 1}]
        results.extend([{"c": 3}])
    assert json.loads((tmp_path / "list.json").read_text()) == [{"a": 1}, {"c": 3}]
