"""Notebooks run from the command line, cell by cell in one process, without Jupyter."""

import json
import os
import subprocess
import sys

from conftest import ROOT

SETTINGS = [
    "data.train_images=.", "data.val_images=.", "data.workers=0", "data.flip=0", "device=cpu",
    "detector.backbone=small", "detector.backbone_weights=null", "detector.frozen_stages=0", "detector.fpn_channels=16",
    "detector.frozen_batch_norm=false", "detector.min_size=64", "detector.max_size=64",
    "detector.rpn.anchor_sizes=[[16],[32]]", "detector.rpn.train_proposals=40", "detector.rpn.test_proposals=30",
    "detector.roi.fc=32", "detector.roi.batch_size=16", "detector.roi.sampling_ratio=1",
    "train.epochs=1", "train.batch_size=4", "train.milestones=[]", "train.warmup_iterations=2", "test.batch_size=4",
]  # fmt: skip


def test_custom_dataset(glyphs, tmp_path):
    """With another folder in its parameters: the check, three rows in its table, detections by name."""
    notebook = json.loads((ROOT / "notebooks/custom_dataset.ipynb").read_text())
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)
    [parameters] = [cell for cell in code if "parameters" in cell["metadata"].get("tags", ())]
    sources = ["".join(cell["source"]) for cell in code]
    values: dict = {}
    exec("".join(parameters["source"]), values)
    own = {"ROOT": str(glyphs), "SETTINGS": [*SETTINGS, f"output={tmp_path / 'runs'}"]}
    assert own.keys() <= values.keys()
    sources[code.index(parameters)] = "\n".join(f"{name} = {value!r}" for name, value in own.items())
    (tmp_path / "cells.py").write_text("\n\n".join(sources))
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, tmp_path / "cells.py"], capture_output=True, text=True, timeout=240,
                          cwd=ROOT / "notebooks", env=environment)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert set(rows) == {"method", "softmax", "softmax_retrained", "bags"}
    runs = tmp_path / "runs" / glyphs.name
    assert all(0 <= json.loads((runs / row / "metrics.json").read_text())["AP"] <= 1 for row in set(rows) - {"method"})
    assert "categories with 0 to 10 boxes" in done.stdout
    names = {category["name"] for category in json.loads((glyphs / "train.json").read_text())["categories"]}
    last = done.stdout.splitlines()[-1].split()
    assert last[0] in names and 0 <= float(last[1]) <= 1
