"""The parts of the benchmarks that need no clock."""

from collections import Counter

import pytest
from conftest import ROOT

from scripts.benchmarks import scale_categories, scale_images
from scripts.benchmarks.data import write_lvis_like
from scripts.benchmarks.measuring import growth


def test_growth():
    """From 10 to 1,000, cost rises 10-fold where it grows as the square root, and 10,000-fold as the square."""
    assert growth("x", (1, 10, 1000), [7.0, 2.0, 20.0]) == {"what": "x", "1": 7, "10": 2, "1,000": 20, "exponent": 0.5}
    assert growth("x", (1, 10, 1000), [0.0, 1.0, 10000.0])["exponent"] == 2
    assert growth("x", (1, 10, 1000), [0.0, 0.0, 0.0])["exponent"] == 0


def test_every_category_has_an_object():
    content = scale_categories.annotations(50, 10, 64)
    counts = Counter(one["category_id"] for one in content["annotations"])
    assert set(counts) == set(range(1, 51)) and counts[1] == max(counts.values())
    assert Counter(one["image_id"] for one in content["annotations"]) == dict.fromkeys(range(1, 11), 20)
    assert all(min(one["bbox"]) >= 0 and one["bbox"][0] + one["bbox"][2] <= 64 for one in content["annotations"])


@pytest.mark.parametrize("part", ["loss", "stage_step", "detections", "scoring"])
def test_parts_of_a_job(part, monkeypatch):
    """Each is a time and a size in memory."""
    monkeypatch.setattr(scale_categories, "OBJECTS", 2)
    measured = getattr(scale_categories, part)(30, 1)
    assert set(measured) == {"s", "mb"} and measured["s"] > 0 and measured["mb"] >= 0


def test_parts_by_images(tmp_path):
    """Annotations, samplers, a store and scoring of 20 images."""
    write_lvis_like(tmp_path / "train.json", 254)
    for part, number in (("index", 2), ("sampling", 2), ("store", 3), ("scoring", 1)):
        measured = getattr(scale_images, part)(tmp_path / "train.json")
        assert len(measured) == number and all(one["s"] > 0 for one in measured.values())


def test_every_benchmark_has_a_file():
    from scripts.benchmark import NAMES

    files = {path.stem for path in (ROOT / "scripts/benchmarks").glob("*.py")} - {"__init__", "measuring"}
    assert files == set(NAMES)
