"""`predict` on a test set that a JSON describes: a results file that an evaluation server takes."""

import json

import pytest
import torch
from conftest import run_script, write_configs

import bags
from bags.assembly.loaders import open_index
from bags.assembly.models import build_detector
from bags.config.load import config_to_dict, load_config
from bags.core.errors import UserError
from bags.data.statistics import CategoryStats
from bags.engine.checkpoint import write_checkpoint
from bags.jobs.submission import listed_images, submitted_ids

STATS = CategoryStats((2, 5), ("ox", "elk"), (9, 9), (9, 9))


def written(folder, content):
    """A JSON file."""
    (folder / "test.json").write_text(json.dumps(content))
    return folder / "test.json"


def test_a_test_set_becomes_a_results_file(tmp_path, glyphs):
    """Two images without annotations, with other category ids: entries for both, which our own scorer reads."""
    config = load_config(write_configs(tmp_path, glyphs) / "softmax.yaml", ["test.score_threshold=0"])
    stats = CategoryStats.from_index(open_index(config, "train"))
    torch.manual_seed(0)
    model = build_detector(config, stats).state_dict()
    write_checkpoint(
        tmp_path / "last.pth", {"config": config_to_dict(config), "stats": stats.to_dict(), "model": model}
    )
    truth = json.loads((glyphs / "val.json").read_text())
    images = truth["images"][:2]
    categories = [{**category, "id": category["id"] + 100} for category in truth["categories"]]
    file = written(tmp_path, {"images": images, "categories": categories})
    output = tmp_path / "out"
    arguments = (tmp_path / "last.pth", file, "--output", output, "--device", "cpu")
    done = run_script("predict", *arguments, "--image-folder", glyphs)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in output.iterdir() if not path.name.startswith(".")] == ["results.json"]
    results = json.loads((output / "results.json").read_text())
    assert {entry["image_id"] for entry in results} == {image["id"] for image in images}
    assert {entry["category_id"] for entry in results} <= {category["id"] for category in categories}
    assert all(set(entry) == {"image_id", "category_id", "bbox", "score"} for entry in results)
    boxes = [a | {"category_id": a["category_id"] + 100} for a in truth["annotations"]]
    kept = [a for a in boxes if a["image_id"] in {image["id"] for image in images}]
    plain = [{key: image[key] for key in ("id", "file_name", "width", "height")} for image in images]
    scored = written(tmp_path, {"images": plain, "categories": categories, "annotations": kept})
    assert 0 <= bags.evaluate(scored, output / "results.json")["AP"] <= 1
    done = run_script("predict", *arguments)  # beside the file there are no images
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--image-folder says where" in done.stderr


def test_categories_are_found_by_name(tmp_path):
    def ids(*categories):
        """Of STATS in a file with these (id, name)."""
        listed = [{"id": key, "name": name} for key, name in categories]
        return submitted_ids(written(tmp_path, {"images": [], "categories": listed}), STATS)

    assert ids((5, "ox"), (2, "elk"), (1, "cow")) == (5, 2)
    assert ids((2, "ox"), (5, "elk")) == ids() == (2, 5)
    assert ids((2, "ox"), (3, "ox"), (5, "elk")) == (2, 5), "of two equal names the one with our id"
    with pytest.raises(UserError, match=r"2 categories are named 'ox' \(ids 7, 8\)"):
        ids((7, "ox"), (8, "ox"), (5, "elk"))
    with pytest.raises(UserError, match="the detector's category 'elk' is not in it; nearest: 'elks'"):
        ids((2, "ox"), (5, "elks"), (6, "cow"))


@pytest.mark.parametrize("content", [[], {}, {"images": []}, {"images": 3}, {"images": ["a"]}, {"annotations": []}])
def test_other_files_are_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"test.json: expected an object with a list `images`"):
        listed_images(written(tmp_path, content), tmp_path)
