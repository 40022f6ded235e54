"""One annotation file divided into train and val: by hand, properties of random files, refusals, the command."""

import json
import shlex

import numpy as np
import pytest
from conftest import run_script

import bags
from bags.config.load import load_config
from bags.data.checks import check_annotations
from bags.data.json_files import read_json
from bags.data.split import Units, divide, split_annotations
from bags.data.statistics import CategoryStats, disagreement
from bags.jobs.preflight import check_data, validated_on_training


def write(path, images, **of_image):
    """A file of images, each a list of categories (1, 2, ...) with an object each; of_image: key -> values."""
    content = {
        "info": {"mine": 1},
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9}
            | {key: of[i - 1] for key, of in of_image.items()}
            for i in range(1, len(images) + 1)
        ],
        "annotations": [],
        "categories": [
            {"id": c, "name": f"c{c}"} for c in range(1, max(map(max, filter(None, images)), default=1) + 1)
        ],
    }
    for i, categories in enumerate(images, 1):
        for c in categories:
            key = len(content["annotations"]) + 1
            content["annotations"].append(
                {"id": key, "image_id": i, "category_id": c, "bbox": [0, 0, 5, 5], "mine": key}
            )
    path.write_text(json.dumps(content))
    return path


def halves(source, share=0.2, **settings):
    """Divide a file; the contents of train and val, which are then removed."""
    outputs = source.with_name("t.json"), source.with_name("v.json")
    split_annotations(source, outputs, share, **settings)
    contents = [read_json(path) for path in outputs]
    for path in outputs:
        path.unlink()
    return contents


def ids(content):
    return [image["id"] for image in content["images"]]


def present(content):
    """The categories that a content has."""
    return {annotation["category_id"] for annotation in content["annotations"]}


def test_by_hand(tmp_path):
    """Ten images at 0.2, so two in val. Category 2 has only images 1 and 2, of which train gets one and val the other.

    Image 3 alone has category 3, and stays in train. Of the nine with category 1, val wants 1.8: one more of 4 to 10.
    """
    train, val = halves(write(tmp_path / "x.json", [[1, 2], [1, 2], [3], *[[1]] * 7]))
    assert len(ids(val)) == 2 and len({1, 2} & set(ids(val))) == 1 and 3 in ids(train)
    assert present(train) == {1, 2, 3} and present(val) == {1, 2}


def test_an_image_is_moved_for_a_category_that_a_file_misses():
    """Category 1 is in units 0 and 1, which also have the only other units of 2 and 3: 0 and 2, and 1 and 3.

    Whatever the seed, one of 0 and 1 is in val, and with it, units 2 and 3 are on the other sides of theirs.
    """
    units = Units(np.ones(4, int), np.array([0, 2, 4, 5, 6]), np.array([1, 2, 1, 3, 2, 3]), np.ones(6, int))
    for seed in range(20):
        a, b, c, d = divide(units, 0.2, seed).tolist()
        assert a != b and a != c and b != d


def feasible(images):
    """Slowly, whether all categories of two images or more can be on both sides."""
    of = {c: {k for k, cs in enumerate(images) if c in cs} for c in set().union(*images)}
    wanted = [members for members in of.values() if len(members) > 1]
    pinned = set().union(*[members for members in of.values() if len(members) == 1])
    for number in range(2 ** len(images)):
        val = {k for k in range(len(images)) if number >> k & 1}
        if not val & pinned and all(members & val and members - val for members in wanted):
            return True
    return False


def test_small_random_files(tmp_path):
    """Nothing is lost, and a division that has every category on both sides is found where one exists."""
    rng, possible = np.random.default_rng(0), 0
    for case in range(150):
        images = [sorted({int(c) for c in 1 + rng.integers(0, 7, rng.integers(0, 4))}) for _ in range(9)]
        if not any(images):
            continue
        source = write(tmp_path / "x.json", images)
        if not feasible(images):
            continue
        counts = {c: sum(c in cs for cs in images) for c in set().union(*images)}
        if not any(all(counts[c] > 1 for c in cs) for cs in images if cs):
            continue  # all images with objects have to stay in train
        train, val = halves(source, seed=case)
        both = {c for c, n in counts.items() if n > 1}
        assert present(val) == both and present(train) == set(counts), images
        assert sorted(ids(train) + ids(val)) == list(range(1, 10))
        possible += 1
    assert possible > 50


def test_large_random_file(tmp_path):
    """A long tail in 400 images: the share within one image, of each category and of those without objects near it."""
    rng = np.random.default_rng(1)
    p = 1 / np.arange(1, 41) ** 1.5
    images = [sorted(set((1 + rng.choice(40, rng.integers(0, 5), p=p / p.sum())).tolist())) for _ in range(400)]
    source = write(tmp_path / "x.json", images)
    content = read_json(source)
    for share in (0.1, 0.25, 0.6):
        train, val = halves(source, share)
        assert abs(len(ids(val)) - 400 * share) <= 1
        for half in (train, val):
            assert half["annotations"] == [a for a in content["annotations"] if a["image_id"] in set(ids(half))]
            assert half["categories"] == content["categories"] and half["info"] == {"mine": 1}
            assert half["images"] == [image for image in content["images"] if image["id"] in set(ids(half))]
        assert sorted(ids(train) + ids(val)) == list(range(1, 401))
        counts = {c: sum(c in cs for cs in images) for c in present(content)}
        for c, n in counts.items():
            in_val = sum(c in images[i - 1] for i in ids(val))
            assert n == 1 or (0 < in_val < n and abs(in_val - share * n) <= max(1, 0.1 * n)), (c, n, in_val)
        empty = {i for i in range(1, 401) if not images[i - 1]}
        assert abs(len(empty & set(ids(val))) - share * len(empty)) <= 2


def test_the_seed_decides_and_the_order_does_not(tmp_path):
    images = [[1 + k % 3] for k in range(30)]
    source = write(tmp_path / "x.json", images, scene=[k // 2 for k in range(30)])
    content = read_json(source)
    (tmp_path / "y.json").write_text(
        json.dumps({key: value[::-1] if key == "images" else value for key, value in content.items()})
    )
    for group in (None, "scene"):
        val = [sorted(ids(halves(tmp_path / name, group=group)[1])) for name in ("x.json", "x.json", "y.json")]
        assert val[0] == val[1] == val[2]
        assert len({tuple(sorted(ids(halves(source, group=group, seed=seed)[1]))) for seed in range(5)}) > 1


def test_groups_stay_together(tmp_path):
    """Ten videos of one to four images, each category in several of them; the share is as near as videos allow."""
    rng = np.random.default_rng(2)
    videos = [f"v{k}" for k in range(10) for _ in range(1 + k % 4)]
    images = [sorted({1, 2 + int(video[1:]) % 3, *(5 + rng.integers(0, 2, 1)).tolist()}) for video in videos]
    train, val = halves(write(tmp_path / "x.json", images, video=videos), 0.3, group="video")
    sides = [{image["video"] for image in half["images"]} for half in (train, val)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10
    assert abs(len(ids(val)) - 0.3 * len(images)) <= 4 and present(train) == present(val)


def test_counts_of_lvis(tmp_path):
    """Both files have the training counts; crowd regions and empty boxes train nothing and are not counted."""
    rng = np.random.default_rng(3)
    images = [sorted(set((1 + rng.integers(0, 4, 2)).tolist())) for _ in range(60)]
    source = write(tmp_path / "x.json", images, neg_category_ids=[[1 + k % 4] for k in range(60)])
    content = read_json(source)
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][7]["bbox"] = [1, 1, 0, 0]
    content["categories"].reverse()
    for category in content["categories"]:
        category |= {"instance_count": 99, "image_count": 99, "frequency": "f", "synset": "s"}
    source.write_text(json.dumps(content))
    train, val = halves(source)
    assert train["categories"] == val["categories"] and [c["id"] for c in val["categories"]] == [4, 3, 2, 1]
    assert all("neg_category_ids" in image for half in (train, val) for image in half["images"])
    (tmp_path / "t2.json").write_text(json.dumps(train))
    index = bags.AnnotationIndex.open(tmp_path / "t2.json")
    stats = CategoryStats.from_index(index)
    assert disagreement(index) is None
    assert [c["instance_count"] for c in reversed(val["categories"])] == list(stats.instance_counts)
    assert [c["frequency"] for c in reversed(val["categories"])] == [
        "r" if n <= 10 else "c" for n in stats.image_counts
    ]
    assert "counts disagree" not in {finding.kind for finding in check_annotations(tmp_path / "t2.json")}


def test_groups_that_allow_no_share_are_told(tmp_path):
    """Two groups of five images: val has half of them, not a fifth."""
    write(tmp_path / "x.json", [[1]] * 10, video=[1] * 5 + [2] * 5)
    done = run_script("prepare_data", "split", "x.json", "--group", "video", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: x_val.json: val has 50.0% of the images, not 20.0%: groups stay whole" in done.stderr


REFUSED = {  # options -> words
    "--val 0": "--val 0.0: expected a share",
    "--val 1": "--val 1.0: expected a share",
    "--val nan": "--val nan: expected a share",
    "--seed -1": "--seed -1: expected 0 <= seed",
    "--output-train x.json": "--output-train x.json: is the source",
    "--output-val ./x.json": "--output-val x.json: is the source",
    "--output-val there.json": "--output-val there.json: exists already",
    "--output-val x_train.json": "is the file of --output-train, too",
    "--output-val there.json/v.json": "there.json",
    "--group video": "x.json: image 3: expected a text or number as 'video' (--group), has none",
    "--group same": "x.json: has one group by 'same' only",
}


def test_refusals(tmp_path):
    """One line, code 2, and nothing is written."""
    source = write(tmp_path / "x.json", [[1]] * 6, same=[1] * 6, video=["a", "b", None, None, "a", "b"])
    (tmp_path / "there.json").write_text("{}")
    for options, words in REFUSED.items():
        done = run_script("prepare_data", "split", "x.json", *options.split(), cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, (options, done.stderr)
    for images, words in (
        ([[1]], "has one image only"),
        ([[1], [2], [3], []], "holds the only ones of a category"),
        ([[], [], []], "has no object that can be trained on"),
    ):
        write(source, images)
        with pytest.raises(bags.UserError, match=words):
            halves(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.json", "x.json"]


def test_both_files_or_none(tmp_path, monkeypatch):
    """A disk that is full when the second one is written."""
    from bags.data import split

    source, write_text = write(tmp_path / "x.json", [[1]] * 6), split.write_text

    def fail(path, text):
        """Write the first file only."""
        if path.name == "v.json":
            raise bags.UserError("full")
        write_text(path, text)

    monkeypatch.setattr(split, "write_text", fail)
    with pytest.raises(bags.UserError, match="full"):
        halves(source)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_command_and_the_one_that_it_names(glyphs, tmp_path):
    """As a user: divide, then give the printed command, which says that one can train."""
    (tmp_path / "photos").symlink_to(glyphs)
    (tmp_path / "mine.json").write_text((glyphs / "train.json").read_text())
    done = run_script("prepare_data", "split", tmp_path / "mine.json", "--val", "0.3")
    assert done.returncode == 0, done.stderr
    assert "mine_val.json: 7 images (30.4%)" in done.stdout and "categories: 8 in both files" in done.stdout
    *_, following = done.stdout.splitlines()
    assert following.startswith("next: python scripts/prepare_data.py check configs/custom data.root=")
    small = ["detector.backbone=small", "detector.backbone_weights=null", "detector.frozen_stages=0"]
    done = run_script(
        "prepare_data", *shlex.split(following)[3:], *small, "detector.rpn.anchor_sizes=[[32],[64],[128]]"
    )
    assert done.returncode == 0 and done.stdout.endswith("\nready to train\n"), done.stdout + done.stderr
    assert "categories by training objects (test.bins), of 8:" in done.stdout


def test_a_missing_validation_file_and_one_of_training(glyphs, tmp_path, capsys):
    """Both messages name the command; equal content under another name is found, too."""
    (tmp_path / "copy.json").write_text((glyphs / "train.json").read_text())
    (tmp_path / "c.yaml").write_text(f"data: {{root: {glyphs}, val: none.json}}")
    with pytest.raises(bags.UserError, match="none.json: no such file.*`prepare_data.py split`"):
        check_data([load_config(tmp_path / "c.yaml")])
    done = run_script("prepare_data", "check", tmp_path / "c.yaml")
    assert done.returncode == 1 and "`prepare_data.py split`" in done.stdout
    assert done.stdout.endswith("\nnot ready: 1 problem\n")
    for val in ("train.json", str(tmp_path / "copy.json")):
        config = load_config(tmp_path / "c.yaml", [f"data.val={val}"])
        check_data([config])
        assert "warning: " in (words := capsys.readouterr().err) and "validation has the images of training" in words
    assert validated_on_training(load_config(tmp_path / "c.yaml", ["data.val=val.json"])) is None
    assert validated_on_training(load_config(tmp_path / "c.yaml")) is None
