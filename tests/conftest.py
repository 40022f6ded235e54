"""Shared helpers: tiny data made in the test, scripts run as a user runs them."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

# Two workers share the cores, and tiny networks gain nothing from a second thread.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch  # noqa: F401  (so that forks have it)
import torchvision  # noqa: F401
import yaml
from forks import Script, start_server

from bags.data.glyphs import Preset, make_glyphs

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = Path(os.environ.get("BAGS_TEST_DATA", ROOT.parent / "shared"))  # data of others, which some tests need
SERVER = start_server()  # before any test has computed anything
ROWS = ("softmax", "softmax_retrained", "bags")
TINY = Preset(8, 64, 30, 2, 2, (2, 4), (16, 30), 2, 0.7, 3, 3)


def start_script(name: str | Path, *arguments, cwd: Path = ROOT, **environment: str) -> Script:
    """Start scripts/NAME.py, or the file of a path, in a process of its own (see forks.py)."""
    path = name if isinstance(name, Path) else ROOT / "scripts" / f"{name}.py"
    return Script(SERVER, [str(path), *map(str, arguments)], cwd, os.environ | environment)


def run_script(name: str | Path, *arguments, timeout: float = 240, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script in a process of its own, to its end."""
    return start_script(name, *arguments, cwd=cwd).wait(timeout)


def run_ranks(number: int, name: str | Path, *arguments, timeout: float = 240) -> list[subprocess.CompletedProcess]:
    """Run a script on some ranks, as torchrun does; where one fails, the others are ended after five seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start_script(name, *arguments, RANK=str(k), LOCAL_RANK=str(k), **shared) for k in range(number)]
    deadline = time.monotonic() + timeout
    while any(rank.poll(0.05) is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.poll() for rank in ranks):
            deadline = min(deadline, time.monotonic() + 5)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    return [rank.wait() for rank in ranks]


def killed_and_repeated(name: str | Path, *arguments, after: Path, unfinished: Path) -> subprocess.CompletedProcess:
    """SIGKILL when the file `after` appears, before the file `unfinished` does; then the same command to its end."""
    process, deadline = start_script(name, *arguments), time.monotonic() + 120
    while not after.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not unfinished.exists(), "killed too late to test anything"
    done = run_script(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def made_once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of a name that `make` fills for all workers: the first that needs it does."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with open(f"{folder}.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        state = lock.read()
        assert state in ("", "begun made"), f"another worker could not make {name}"
        if not state:
            lock.write("begun")
            lock.flush()
            make(folder)
            lock.write(" made")
    return folder


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory) -> Path:
    """A dataset of 8 categories in 64 x 64 pixels, of all workers: tests change a copy."""
    return made_once(tmp_path_factory, "tiny", lambda folder: make_glyphs(folder, TINY, workers=1))


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
            "test": {"batch_size": 4, "max_detections": 30, "figures": False},
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
    """The three rows, trained once: (configs folder, output folder, what was printed)."""

    def train(folder: Path) -> None:
        configs = write_configs(folder / "configs", glyphs)
        done = run_script("train", configs, f"output={folder / 'runs'}", "test.figures=true")
        assert done.returncode == 0, done.stderr
        (folder / "printed").write_text(done.stdout)

    made = made_once(tmp_path_factory, "job", train)
    folder = shutil.copytree(made, tmp_path_factory.mktemp("job") / "job")  # commands lock what they look at
    return folder / "configs", folder / "runs", (folder / "printed").read_text()


def metrics(runs, row):
    return json.loads((runs / "tiny" / row / "metrics.json").read_text())
