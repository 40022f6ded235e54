"""Loader processes that cannot go on end the run in one line; so does memory that runs out. Nothing waits for ever."""

import multiprocessing
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_configs
from torch import Tensor

from bags.core.errors import run_script
from bags.data import dataset as loading
from bags.data.dataset import Loader

PATIENCE = 60  # seconds until a test takes a process for one that waits for ever


class Images(torch.utils.data.Dataset):
    """Items of (image of a megabyte, target)."""

    def __len__(self):
        return 16

    def __getitem__(self, position):
        return torch.full((2**18,), float(position)), {"boxes": torch.zeros(0, 4), "image_id": position}


def in_child(work):
    """Runs `work` in a fork, as a script: its exit code. The test fails where it does not end."""
    process = multiprocessing.get_context("fork").Process(target=run_script, args=(work,))
    process.start()
    process.join(PATIENCE)
    waits = process.exitcode is None
    if waits:
        process.kill()
    assert not waits, "waits for ever"
    return process.exitcode


def load_all():
    for images, targets in Loader(Images(), num_workers=2, batch_size=4):
        assert [int(image[0]) for image in images] == [target["image_id"] for target in targets]


def test_batches_come_whole(monkeypatch, capfd):
    """Little shared memory is said once, though two loaders are made."""
    monkeypatch.setattr(loading, "LITTLE", 2**60)
    loading._note_little_shared_memory.cache_clear()
    load_all()
    load_all()
    notes = capfd.readouterr().err.splitlines()
    assert len(notes) == 1 and "docker run --shm-size=2g" in notes[0] and "data.workers=0" in notes[0]


def test_full_shared_memory_is_one_line(monkeypatch, capfd):
    """torch's own error, raised where a loader process moves a tensor to shared memory."""

    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    assert in_child(load_all) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("note")]
    assert line.startswith("error: the shared memory") and "--shm-size" in line and "data.workers=0" in line


@pytest.mark.slow
def test_a_really_full_shared_memory(glyphs, tmp_path):
    """A training whose /dev/shm has 100 kB, where this process may mount one."""
    can = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=100k none /dev/shm"]
    if shutil.which("unshare") is None or subprocess.run(can, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    config = write_configs(tmp_path / "configs", glyphs) / "softmax.yaml"
    train = f"exec {sys.executable} scripts/train.py {config} output={tmp_path}/runs data.workers=2"
    command = [*can[:-1], f"{can[-1]} && {train}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert done.returncode == 2 and "--shm-size" in done.stderr.splitlines()[-1], done.stderr
    assert done.stderr.startswith("note: /dev/shm has only 0 MB") and "Traceback" not in done.stderr


@pytest.mark.parametrize("more", [8, 14, 20, 26, 32, 44])
def test_few_file_descriptors_are_one_line(capfd, more):
    """However many files may be opened, the run is done or says so; it does not wait."""

    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + more,) * 2)
        load_all()

    code, lines = in_child(work), capfd.readouterr().err.splitlines()
    if code:
        errors = [line for line in lines if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and "ulimit -n" in errors[0], lines
    assert code or more > 14


class Once:
    """Can be pickled only once: then torch's thread cannot hand over the batch that holds it."""

    count = 0

    def __reduce__(self):
        Once.count += 1
        if Once.count > 1:
            raise RuntimeError("not again")
        return str, ()


def test_a_process_that_cannot_hand_over_a_batch_ends(capfd):
    def work():
        list(Loader([0], num_workers=1, collate_fn=lambda _: ([Once()], [])))

    assert in_child(work) == 2
    lines = capfd.readouterr().err.splitlines()
    assert "loader process 0: RuntimeError: not again" in lines and "a loader process has ended" in lines[-1]


def test_a_bug_in_a_loader_process_keeps_its_traceback():
    with pytest.raises(KeyError, match="Original Traceback"):
        list(Loader([0], num_workers=1, collate_fn=lambda _: {}["missing"]))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: np.empty(2**50), lambda: bytearray(2**50)])
def test_full_memory_is_one_line(capfd, allocate, workers):
    """As torch, NumPy and Python really raise it, here and in a loader process."""

    def work():
        list(Loader([0], num_workers=workers, collate_fn=lambda _: allocate()))

    assert in_child(work) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("note")]
    assert line.startswith("error: the memory is full: ") and "batch_size" in line and "data.workers" in line


@pytest.mark.slow
def test_full_memory_in_training_is_one_line(glyphs, tmp_path):
    """Images that are enlarged to 32767 pixels for the network, in 16 GB."""
    config = write_configs(tmp_path / "configs", glyphs) / "softmax.yaml"
    sizes = "detector.min_size=32767 detector.max_size=32767"
    train = f"ulimit -v 16000000; exec {sys.executable} scripts/train.py {config} output={tmp_path}/runs {sizes}"
    done = subprocess.run(["sh", "-c", train], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "error: the memory is full" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
