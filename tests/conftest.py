"""Shared helpers: tiny data made in the test, scripts run as a user runs them."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

# Two workers share the cores, and tiny networks gain nothing from a second thread.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch  # noqa: F401  (so that forks have it)
import torchvision  # noqa: F401
import yaml

from bags.data.glyphs import Preset, make_glyphs

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = Path(os.environ.get("BAGS_TEST_DATA", ROOT.parent / "shared"))  # data of others, which some tests need
ROWS = ("softmax", "softmax_retrained", "bags")
TINY = Preset(8, 64, 30, 2, 2, (2, 4), (16, 30), 2, 0.7, 3, 3)


def run_script(name: str, *arguments, timeout: int = 240, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs scripts/NAME.py in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd)


def fork_script(name: str, *arguments) -> subprocess.CompletedProcess:
    """As `run_script`, in a fork of this process: a hundred cases need not import torch a hundred times.

    For scripts that stop before they train: a fork must not use autograd after its parent has.
    """
    path = str(ROOT / "scripts" / f"{name}.py")
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def child() -> None:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            sys.argv = [path, *map(str, arguments)]
            runpy.run_path(path, run_name="__main__")

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(120)
        assert process.exitcode is not None, (name, arguments)
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
    return subprocess.CompletedProcess(sys.argv, process.exitcode, *texts)


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory) -> Path:
    """A dataset of 8 categories in 64 x 64 pixels."""
    return make_glyphs(tmp_path_factory.mktemp("data") / "tiny", TINY, workers=1)


def write_configs(folder: Path, data: Path) -> Path:
    """The three rows of the embedded job, for a dataset of a few images and seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "_base": {
            "data": {"name": "tiny", "root": str(data), "flip": 0, "workers": 0},
            "detector": {
                "backbone": "small",
                "fpn_channels": 16,
                "min_size": 64,
                "max_size": 64,
                "rpn": {"anchor_sizes": [[16], [32]], "batch_size": 32, "train_proposals": 40, "test_proposals": 30},
                "roi": {"batch_size": 16, "sampling_ratio": 1, "fc": 32, "class_agnostic": True},
            },
            "train": {
                "epochs": 2,
                "batch_size": 4,
                "lr": 0.01,
                "warmup_iterations": 3,
                "milestones": [1.5],
                "log_every": 2,
                "checkpoint_every": 4,
            },
            "test": {"batch_size": 4, "max_detections": 30},
            "device": "cpu",
        },
        "softmax": {"base": "_base.yaml"},
        "bags": {
            "base": "_base.yaml",
            "detector": {"init_from": "row:softmax"},
            "classifier": {"name": "group_softmax", "boundaries": [5, 15]},
            "train": {"part": "cls"},
        },
        "softmax_retrained": {
            "base": "bags.yaml",
            "detector": {"reset_classifier": True},
            "classifier": {"name": "softmax"},
        },
    }
    for name, content in rows.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def write_dataset(folder: Path, data: Path, **keys) -> Path:
    """The tiny dataset as a dataset file, whose rows are any packaged methods: `folder / "tiny"` names it.

    Its rows softmax, softmax_retrained and bags are those of `write_configs`. keys: more of a dataset file's keys.
    """
    base = yaml.safe_load((write_configs(folder / "base", data) / "_base.yaml").read_text())
    methods = yaml.safe_load((ROOT / "configs/datasets/glyphs-100.yaml").read_text())["methods"]
    methods["bags"] = {"classifier": {"boundaries": [5, 15]}}
    methods["large"]["detector"]["fpn_channels"] = 24
    methods["htc_dcn"]["data"] = {"short_sides": [48, 64], "long_side": 64}
    content = {**base, "rows": ["softmax", "softmax_retrained", "bags"], "methods": methods, **keys}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "tiny"


def read_lines(path: Path) -> list[dict]:
    """Objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def job(glyphs, tmp_path_factory):
    """The three rows, trained once: (configs folder, output folder, process)."""
    folder = tmp_path_factory.mktemp("job")
    configs = write_configs(folder / "configs", glyphs)
    done = run_script("train", configs, f"output={folder / 'runs'}")
    assert done.returncode == 0, done.stderr
    return configs, folder / "runs", done


def metrics(runs, row):
    return json.loads((runs / "tiny" / row / "metrics.json").read_text())
