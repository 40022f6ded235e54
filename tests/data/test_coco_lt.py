"""COCO-LT: the published targets, and the cut that meets them."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import OUTSIDE, run_script

import bags
from bags.data.coco_lt import BOUNDARIES, make_coco_lt, published_targets, read_image_lists, read_targets, scaled
from bags.data.json_files import read_json
from bags.data.statistics import CategoryStats, instance_bin

PUBLISHED = OUTSIDE / "data/coco_lt/coco_lt_category_counts.json"
COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


def test_the_published_targets():
    """Facts of the authors' list: 666,493 instances, most of persons (1), fewest of fire hydrants (11)."""
    targets = published_targets()
    assert list(targets) == COCO_IDS and sum(targets.values()) == 666_493
    assert targets[1] == max(targets.values()) == 262_465 and targets[11] == min(targets.values()) == 11
    assert np.bincount(instance_bin(list(targets.values()), BOUNDARIES)).tolist() == [4, 24, 32, 20]


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no published counts here")
def test_the_published_targets_are_those_of_the_authors_list():
    assert published_targets() == read_targets(PUBLISHED)


def test_scaled_targets():
    """Rounded up: 0.1 * 30 is 3, 0.1 * 31 is 4. One that is not 0 stays at least 1."""
    assert scaled({1: 30, 2: 31, 3: 1, 4: 0}, 0.1) == {1: 3, 2: 4, 3: 1, 4: 0}
    assert scaled({1: 7}, 1) == {1: 7} and scaled({1: 7}, 1e-9) == {1: 1}


def write_source(path, counts, crowds=0, images=4000):
    """An annotation file with COCO's ids in another order and extra keys.

    counts: category id -> its annotations; crowds: crowd regions that each category has beside them.
    """
    lines, key = [], 0
    for category, count in counts.items():
        for k in range(count + crowds):
            key += 1
            image = key * 7919 % images + 1  # the crowd regions come first
            lines.append(
                f'{{"id": {key}, "image_id": {image}, "category_id": {category}, "bbox": [0, 0, 5, 5], '
                f'"area": 25, "iscrowd": {int(k < crowds)}, "segmentation": [], "mine": {k}}}'
            )
    content = {
        "info": {"year": 2017},
        "licenses": [],
        "categories": [{"id": c, "name": f"c{c}", "supercategory": "x"} for c in reversed(list(counts))],
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(1, images + 1)],
    }
    path.write_text(json.dumps(content)[:-1] + ', "annotations": [' + ",".join(lines) + "]}")
    return path


@pytest.mark.slow
def test_all_published_targets_are_hit(tmp_path):
    """The command, as in the documentation. Of each category of fewer than 8,000, COCO has more than is kept."""
    targets = published_targets()
    source = write_source(tmp_path / "instances_train2017.json", {c: n + 5 * (n < 8000) for c, n in targets.items()})
    done = run_script("prepare_data", "coco_lt", "--source", source, "--output", tmp_path / "coco_lt.json")
    assert done.returncode == 0, done.stderr
    assert "666493 annotations; categories per bin (1-20-400-8000): 4/24/32/20" in done.stdout
    content = read_json(tmp_path / "coco_lt.json")
    assert Counter(a["category_id"] for a in content["annotations"]) == targets
    assert {a["image_id"] for a in content["annotations"]} == {i["id"] for i in content["images"]}
    assert {c["id"]: c["instance_count"] for c in content["categories"]} == targets
    assert content["annotations"][0].keys() >= {"mine", "area", "segmentation"}


def test_crowd_regions_are_taken_last(tmp_path):
    """They do not train: with three of them, a target of all but two keeps one; a small target keeps none."""
    source = write_source(tmp_path / "coco.json", {3: 40, 1: 40}, crowds=3, images=10)
    targets = {1: 41, 3: 15}
    assert make_coco_lt(source, tmp_path / "lt.json", targets) == targets
    index = bags.AnnotationIndex.open(tmp_path / "lt.json")
    assert CategoryStats.from_index(index).instance_counts == (40, 15) and int(index.crowd.sum()) == 1


def test_a_part_of_coco(tmp_path):
    """With --scale, a category with less than its target keeps all, even none; the command says so."""
    counts = {c: min(n, 300) for c, n in published_targets().items()} | {90: 0}
    source = write_source(tmp_path / "part.json", counts)
    command = ["coco_lt", "--source", source, "--output", tmp_path / "lt.json"]
    done = run_script("prepare_data", *command)
    assert done.returncode == 2 and not (tmp_path / "lt.json").exists()
    words = "category 90 has 0 annotations, its target is 15 ("  # the first of the file
    assert (
        words in done.stderr
        and "other categories have too few, too); for a part of COCO, --scale takes a share of each target"
        in done.stderr
    )
    done = run_script("prepare_data", *command, "--scale", "0.05")
    assert done.returncode == 0 and "less than the target of " in done.stderr, done.stderr
    expected = {c: min(counts[c], -(-n // 20)) for c, n in published_targets().items()}
    kept = Counter(a["category_id"] for a in read_json(tmp_path / "lt.json")["annotations"])
    assert {c: kept[c] for c in expected} == expected


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"categories": [{"id": 1, "name": "a"}, {"name": "b"}]}, "`categories`: expected a whole-number id"),
        ({"categories": [{"id": 1, "name": "a"}]}, "category 3 is missing from `categories`"),
        ({"categories": [{"id": c, "name": "a"} for c in (1, 3, 7)]}, "category 7 is not among the targets"),
        ({"annotations": None}, "no list `annotations`"),
    ],
)
def test_sources_with_other_categories(tmp_path, changes, words):
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 9, "height": 9}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}],
        "categories": [{"id": 1, "name": "a"}, {"id": 3, "name": "b"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content | changes))
    with pytest.raises(bags.UserError, match=f"coco.json: .*{words}"):
        make_coco_lt(tmp_path / "coco.json", tmp_path / "lt.json", {1: 1, 3: 0})


@pytest.fixture
def coco_like(tmp_path):
    """50 images, 4 categories of 400, 120, 60 and 30 annotations."""
    rng = np.random.default_rng(0)
    owners = [(int(rng.integers(50)) + 1, c) for c, n in ((1, 400), (3, 120), (4, 60), (9, 30)) for _ in range(n)]
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(1, 51)],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": [0, 0, 5, 5]} for k, (i, c) in enumerate(owners, 1)
        ],
        "categories": [{"id": c, "name": str(c)} for c in (1, 3, 4, 9)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    return tmp_path


def test_coco_lt_hits_every_target(coco_like):
    targets = {1: 400, 3: 37, 4: 11, 9: 1}
    (coco_like / "targets.json").write_text(
        json.dumps({"categories": [{"coco_category_id": c, "instance_count": n} for c, n in targets.items()]})
    )
    assert read_targets(coco_like / "targets.json") == targets
    command = ["coco_lt", "--source", coco_like / "coco.json", "--targets", coco_like / "targets.json"]
    done = run_script("prepare_data", *command, "--output", coco_like / "lt.json")
    assert done.returncode == 0 and "449 annotations" in done.stdout and "2/1/1/0" in done.stdout, done.stderr
    content = json.loads((coco_like / "lt.json").read_text())
    assert Counter(a["category_id"] for a in content["annotations"]) == targets
    assert {a["image_id"] for a in content["annotations"]} == {i["id"] for i in content["images"]}
    assert [c["instance_count"] for c in content["categories"]] == [400, 37, 11, 1]
    make_coco_lt(coco_like / "coco.json", coco_like / "again.json", targets)
    assert (coco_like / "again.json").read_text() == (coco_like / "lt.json").read_text()
    assert len(bags.AnnotationIndex.open(coco_like / "lt.json").labels) == 449
    only_rare = make_coco_lt(coco_like / "coco.json", coco_like / "few.json", {1: 0, 3: 0, 4: 0, 9: 2})
    assert (
        only_rare == {1: 0, 3: 0, 4: 0, 9: 2} and len(json.loads((coco_like / "few.json").read_text())["images"]) <= 2
    )


def test_coco_lt_follows_the_authors_list(coco_like):
    lists = {"1": [1, 2, 3], "3": [], "4": [5], "9": list(range(1, 51))}
    (coco_like / "lists.json").write_text(json.dumps(lists))
    command = ["coco_lt", "--source", coco_like / "coco.json", "--image-lists", coco_like / "lists.json"]
    done = run_script("prepare_data", *command, "--output", coco_like / "lt.json")
    assert done.returncode == 0, done.stderr
    source = json.loads((coco_like / "coco.json").read_text())["annotations"]
    expected = [a for a in source if a["image_id"] in lists[str(a["category_id"])]]
    assert json.loads((coco_like / "lt.json").read_text())["annotations"] == expected


REFUSED = {  # options -> words; the category 2 of the published targets is none of this source
    "": "coco.json: category 2 (and 75 more) is missing from `categories`",
    "--scale 0.5": "coco.json: category 2 (and 75 more) is missing from `categories`",
    "--scale 0": "--scale 0.0: expected a number above 0 and not above 1",
    "--scale 1.5": "--scale 1.5: expected a number above 0 and not above 1",
    "--scale nan": "--scale nan: expected",
    "--targets t.json --image-lists l.json": "either --targets or --image-lists",
    "--scale 0.5 --image-lists l.json": "--scale is of targets",
}


def test_coco_lt_refusals(coco_like):
    with pytest.raises(bags.UserError, match="category 9 has 30 annotations, its target is 31; .*--scale"):
        make_coco_lt(coco_like / "coco.json", coco_like / "x.json", {1: 1, 3: 1, 4: 1, 9: 31})
    odd = {1: 1, 3: 1, 4: 1}
    for targets, words in ((odd, "category 9 is not .* or remove it"), (odd | {9: 1, 10: 1}, "category 10 is missing")):
        with pytest.raises(bags.UserError, match=words):
            make_coco_lt(coco_like / "coco.json", coco_like / "x.json", targets)
    for content in ({"1": 1.9}, {"1": "x"}, {"a": 1}, []):
        (coco_like / "t.json").write_text(json.dumps(content))
        with pytest.raises(bags.UserError, match="t.json"):
            read_targets(coco_like / "t.json")
    (coco_like / "l.json").write_text('{"1": "123"}')
    with pytest.raises(bags.UserError, match="lists of image ids"):
        read_image_lists(coco_like / "l.json")
    for options, words in REFUSED.items():
        command = ["coco_lt", "--source", coco_like / "coco.json", "--output", coco_like / "x.json", *options.split()]
        done = run_script("prepare_data", *command, cwd=coco_like)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (coco_like / "x.json").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"1": 1, "01": 2}', "category 1 is given twice"),
        ('{"1": 1, "1": 2}', "key '1' is given twice"),
        (
            '{"categories": [{"id": 1, "instance_count": 1}, {"id": 1, "instance_count": 2}]}',
            "category 1 is given twice",
        ),
        ('{"1": true}', "expected instance counts"),
        ('{"categories": [{"id": true, "instance_count": 1}]}', "expected instance counts"),
        ('{"categories": [{"id": 1.9, "instance_count": 1}]}', "expected instance counts"),
    ],
)
def test_coco_lt_targets_that_cannot_be(tmp_path, text, words):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(bags.UserError, match=f"t.json: .*{words}"):
        read_targets(tmp_path / "t.json")
    if "twice" in words and "categories" not in text:
        (tmp_path / "t.json").write_text(text.replace(": 1", ": [1]").replace(": 2", ": [2]"))
        with pytest.raises(bags.UserError, match=words):
            read_image_lists(tmp_path / "t.json")


def test_coco_lt_writes_nothing_that_training_refuses(coco_like):
    source, output = coco_like / "coco.json", coco_like / "x.json"
    content = json.loads(source.read_text())
    none = dict.fromkeys((1, 3, 4, 9), 0)
    with pytest.raises(bags.UserError, match="coco.json: .*keep none of its annotations"):
        make_coco_lt(source, output, none)
    with pytest.raises(bags.UserError, match="coco.json: .*keep none of its annotations"):
        make_coco_lt(source, output, {}, {c: set() for c in none})
    with pytest.raises(bags.UserError, match="image 51 of the image lists is not among `images`"):
        make_coco_lt(source, output, {}, {**{c: {1} for c in none}, 9: {51}})
    changes = [
        ("image_id", 51, "image_id 51 is not among"),
        ("bbox", "x", "bbox: expected"),
        ("area", float("nan"), ""),
    ]
    for key, value, words in changes:
        content["annotations"][6][key], before = value, content["annotations"][6].get(key)
        source.write_text(json.dumps(content))
        with pytest.raises(
            bags.UserError, match=f"annotation 7: {words}" if words else "`annotations`: id 7: holds NaN"
        ):
            make_coco_lt(source, output, {**none, 1: 400, 3: 120, 4: 60, 9: 30})
        content["annotations"][6][key] = before
    assert not output.exists()
