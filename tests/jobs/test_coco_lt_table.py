"""`make table TABLE=coco_lt`, as a user runs it, on tiny data; how its columns are computed."""

import json
import math
import statistics

import pytest
from conftest import ROOT, run_script, write_dataset

import bags
from bags.analysis.paper import PAPER
from bags.analysis.tables import with_means_of_bins
from bags.config.rows import find_dataset

TABLE = PAPER["coco_lt"]


def test_the_mean_of_the_bins():
    """(10 + 20 + 60) / 3 = 30: the third bin has no category in validation; AP50 is no bin."""
    numbers = {"AP": 0.5, "AP50": 0.9, "AP1": 0.1, "AP2": 0.2, "AP3": math.nan, "AP4": 0.6, "mask_AP1": math.nan}
    means = with_means_of_bins(numbers)
    assert means["eAP"] == pytest.approx(0.3) and math.isnan(means["mask_eAP"])
    assert "eAP" not in with_means_of_bins({"AP": 0.5})


def test_what_the_paper_says():
    """Section 5.5: +2.2 for Faster R-CNN, +2.4 for boxes and +2.3 for masks of Mask R-CNN."""
    gains = {row.config: TABLE.published(row) for row in TABLE.rows if row.published}
    assert gains == {"bags": {"gain": 2.2 / 100}, "mask_bags": {"gain": 2.4 / 100, "mask_gain": 2.3 / 100}}


def test_the_dataset_has_the_rows_of_the_table():
    """Groups and bins are those of the cut, in every row of BAGS."""
    dataset = find_dataset(ROOT / "configs/coco_lt")
    assert dataset.rows == [row.config for row in TABLE.rows]
    for row in ("bags", "mask_bags", "bags_cosine", "large_bags", "cascade_bags", "htc_bags"):
        config = bags.load_config(f"coco_lt/{row}")
        assert config.classifier.boundaries == config.test.bins == (20, 400, 8000)
        assert config.data.train == "coco_lt.json" and config.data.val == "annotations/instances_val2017.json"
    controls = ("softmax", "mask", "cascade", "cascade_mask", "htc")
    for framework in controls:
        config = bags.load_config(f"coco_lt/{framework}_retrained")
        assert (config.init_row, config.train.part, config.classifier.name) == (framework, "cls", "softmax")
        assert config.detector.reset_classifier


@pytest.mark.slow
def test_the_table(glyphs, tmp_path):
    """Gains and means are those of each seed's runs; the paper's gains stand below our rows of such data only."""
    dataset = write_dataset(tmp_path, glyphs)
    command = ["tables", "--paper", "coco_lt", dataset, f"output={tmp_path}/runs", "data.name=coco_lt_tiny"]
    done = run_script(*command, "--seeds", "0,1", "--save", tmp_path / "kept.json")
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    shown = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    published = {title.removeprefix("published, COCO-LT "): row for title, row in shown.items() if "published" in title}
    assert {title: (row["gain"], row["mask gain"]) for title, row in published.items()} == {
        "Faster R50, BAGS": ("+2.20", "-"),
        "Mask R50, BAGS": ("+2.40", "+2.30"),
    }
    runs = {
        row.config: [
            json.loads((tmp_path / f"runs/seed{seed}/coco_lt_tiny/{row.config}/metrics.json").read_text())
            for seed in (0, 1)
        ]
        for row in TABLE.rows
    }
    for row in TABLE.rows:
        start = None if row.config in ("softmax", "mask") else row.config.split("_")[0].replace("bags", "softmax")
        gains = [100 * (a["AP"] - b["AP"]) for a, b in zip(runs[row.config], runs[start or row.config], strict=True)]
        expected = f"{statistics.mean(gains):+z.2f} ±{statistics.stdev(gains):.2f}" if start else "-"
        assert shown[row.title]["gain"] == expected
        bins = [[run[key] for key in ("AP1", "AP2", "AP3", "AP4") if run[key] is not None] for run in runs[row.config]]
        means = [100 * statistics.mean(of_run) for of_run in bins]
        assert shown[row.title]["eAP"] == f"{statistics.mean(means):.2f} ±{statistics.stdev(means):.2f}"
        assert (shown[row.title]["mask mAP"] == "-") != row.config.startswith("mask")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["published"]["Mask R50, BAGS"] == {"gain": pytest.approx(0.024), "mask_gain": pytest.approx(0.023)}
    assert {"eAP", "gain", "mask_gain"} <= kept["rows"]["Mask R50, BAGS"][0].keys()
