"""What goes wrong while nobody looks: damaged files, full disks, dead processes, odd data, malice."""

import datetime
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, start_script, write_configs
from PIL import Image
from pycocotools import mask as coco_mask
from steps import pieces, train_some
from torch.utils.data import DataLoader, Dataset

import bags
from bags.analysis.examples import read_detections
from bags.analysis.plots import plot_training
from bags.analysis.run_files import read_metrics, read_seconds
from bags.assembly.loaders import open_index
from bags.cli import run as run_verb
from bags.config.rows import rows_of
from bags.core.distributed import distributed
from bags.core.errors import UserError
from bags.core.errors import run_script as run_script_here
from bags.core.files import read_bytes, write_text
from bags.data.dataset import DetectionDataset, Loader, collate, obey_parent_only
from bags.data.images import read_image
from bags.data.statistics import CategoryStats
from bags.engine.checkpoint import load_checkpoint, load_latest, save_checkpoint, write_file
from bags.engine.faults import StopSignals
from bags.engine.metrics import JsonLog
from bags.engine.train import Run, train
from bags.jobs.evaluate import boundaries


class Malice:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("code ran",)


# --------------------------------------------------------------------------- checkpoints


def content(number):
    weights = torch.arange(40.0).reshape(5, 8) + number
    return {"config": {"a": 1}, "stats": {"ids": [1, 2]}, "model": {"w": weights}, "iteration": number}


@pytest.fixture
def run_folder(tmp_path):
    """A run's folder after two savings, and the bytes of the last one."""
    for number in (1, 2):
        save_checkpoint(tmp_path / "last.pth", content(number))
    return tmp_path, (tmp_path / "last.pth").read_bytes()


def assert_previous_is_used(folder, capsys):
    with pytest.raises(UserError, match="last.pth: "):
        load_checkpoint(folder / "last.pth")
    assert load_latest(folder)["iteration"] == 1
    assert "going on from previous.pth" in capsys.readouterr().err


def test_a_checkpoint_cut_anywhere_is_not_used(run_folder, capsys):
    """200 random lengths, and every one of the last 100."""
    folder, whole = run_folder
    assert load_latest(folder)["iteration"] == 2
    for length in [*np.random.default_rng(0).integers(0, len(whole), 200), *range(len(whole) - 100, len(whole))]:
        (folder / "last.pth").write_bytes(whole[:length])
        assert_previous_is_used(folder, capsys)


def test_a_checkpoint_with_any_bit_flipped_is_not_used(run_folder, capsys):
    """200 random bits, and one of each of the last 100 bytes, where the digest itself is; and bytes too many."""
    folder, whole = run_folder
    random = np.random.default_rng(1)
    places = [*random.integers(0, len(whole), 200), *range(len(whole) - 100, len(whole))]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        (folder / "last.pth").write_bytes(flipped)
        assert_previous_is_used(folder, capsys)
    (folder / "last.pth").write_bytes(whole + b"\0")
    assert_previous_is_used(folder, capsys)
    (folder / "last.pth").write_bytes(whole)
    assert load_latest(folder)["iteration"] == 2 and torch.load(folder / "last.pth", weights_only=True)


def test_checkpoints_without_a_seal_are_read_still(tmp_path):
    """Those of before: zip's own checksums are looked at."""
    torch.save({"format": 1, **content(7)}, tmp_path / "old.pth")
    assert load_checkpoint(tmp_path / "old.pth")["iteration"] == 7
    whole = bytearray((tmp_path / "old.pth").read_bytes())
    whole[whole.index(np.float32(41).tobytes())] ^= 1
    (tmp_path / "old.pth").write_bytes(whole)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path / "old.pth")


def test_a_full_disk_leaves_the_old_checkpoints_whole(run_folder):
    folder, whole = run_folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="last.pth: cannot be written .*older checkpoints are whole"):
            save_checkpoint(folder / "last.pth", content(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_killed_between_the_two_renames(run_folder):
    folder, _ = run_folder
    (folder / "last.pth").unlink()
    assert load_latest(folder)["iteration"] == 1


# --------------------------------------------------------------------------- loading


def config_of(tmp_path, data, *overrides):
    configs = write_configs(tmp_path / "configs", data)
    return bags.load_config(configs / "softmax.yaml", [f"output={tmp_path / 'runs'}", "train.epochs=1", *overrides])


def own_glyphs(tmp_path, glyphs, broken=()):
    """A copy of the data whose first images are missing, cut off, or no images, as told."""
    data = shutil.copytree(glyphs, tmp_path / "data")
    names = [image["file_name"] for image in json.loads((data / "train.json").read_text())["images"]]
    for name, how in zip(names, broken, strict=False):
        path = data / name
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:200] if how == "cut" else b"no image")
    return data, names


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_counted_and_bounded(tmp_path, glyphs, capsys, workers):
    data, names = own_glyphs(tmp_path, glyphs, ("missing", "cut", "text"))
    keys = [f"data.workers={workers}", "train.epochs=2"]
    with pytest.raises(UserError) as error:
        train_some(config_of(tmp_path, data, *keys))
    text = str(error.value)
    assert any(name in text for name in names[:3]) and "\n" not in text
    assert text.endswith("no such image") or "not a readable image" in text
    assert "Caught" not in text and "Traceback" not in text
    with pytest.raises(UserError, match="more than data.max_bad_images=2 unreadable"):
        train_some(config_of(tmp_path, data, *keys, "data.max_bad_images=2"))
    capsys.readouterr()
    end = train_some(config_of(tmp_path, data, *keys, "data.max_bad_images=3", "name=enough"))["end"]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "another image stands in" in line]
    assert len(warnings) == 3 and all(any(name in line for line in warnings) for name in names[:3])
    assert "(3 of at most 3)" in warnings[-1]
    assert all(value.isfinite().all() for value in end.values())


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError])
def test_a_loader_process_that_ends_while_it_hands_over_a_batch(monkeypatch, error):
    """torch passes on what the socket says; without processes it is nobody's end."""

    def iterate(_):
        raise error
        yield

    monkeypatch.setattr(DataLoader, "__iter__", iterate)
    with pytest.raises(RuntimeError, match="DataLoader worker exited unexpectedly"):
        list(Loader([0], num_workers=1))
    with pytest.raises(error):
        list(Loader([0], num_workers=0))


ONE_LINE = {
    "memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 2 GiB"), "GPU's memory is full: .*2 GiB"),
    "kernel": (
        RuntimeError("histc does not have a deterministic implementation, but"),
        "--deterministic: histc is not deterministic here: leave it out",
    ),
}


@pytest.mark.parametrize("case", ONE_LINE)
def test_what_a_gpu_says_is_one_line(case, capsys, monkeypatch):
    error, words = ONE_LINE[case]
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process goes on
    with pytest.raises(SystemExit) as end:
        run_script_here(raising(error))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and re.search(f"error: .*{words}", lines[0])
    with pytest.raises(RuntimeError, match="shapes"):
        run_script_here(raising(RuntimeError("shapes")))


@pytest.mark.parametrize("verb, words", [("predict", "starts over"), ("train", "goes on from the last checkpoint")])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_what_the_same_command_does_after_a_stop(monkeypatch, capsys, verb, words, error):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(f"bags.cli.{verb}.main", raising(error))
    with pytest.raises(SystemExit):
        run_verb(verb)
    assert f"; the same command {words}" in capsys.readouterr().err


SYSTEM = {  # what raises -> words of the line
    "a pipe": (lambda p: (os.mkfifo(p / "x"), read_bytes(p / "x")), "x: not a regular file; choose"),
    "a folder": (lambda p: ((p / "x").mkdir(), read_bytes(p / "x")), "x: is a folder, expected a file; choose"),
    "a target": (lambda p: ((p / "x").mkdir(), write_text(p / "x", "")), "x: is a folder, expected a file; choose"),
    "nothing": (lambda p: read_bytes(p / "x"), "x: no such file or folder; check the path"),
    "a long name": (lambda p: rows_of(Path("x" * 5000)), ".yaml: the name is too long; choose a shorter one"),
    "below a file": (
        lambda p: ((p / "x").touch(), (p / "x/y").mkdir()),
        "x/y: leads through a file, expected a folder",
    ),
}


@pytest.mark.parametrize("case", SYSTEM)
def test_errors_of_the_system_name_the_path_and_the_remedy(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    act, words = SYSTEM[case]
    with pytest.raises(SystemExit) as end:
        run_script_here(lambda: act(tmp_path))
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and len(error) < 400 and "Errno" not in error


@pytest.mark.parametrize(
    "arguments, name",
    [
        (["--bins", ""], "argument 3, after --bins"),
        (["x.json", " "], "argument 3, after x.json"),
        (["--engine="], "--engine"),
        ([""], "argument 2, after data.val="),
    ],
)
def test_empty_arguments_are_refused(arguments, name, capsys, monkeypatch):
    """An override such as `key=` is null, and no empty argument."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "data.val=", *arguments])
    with pytest.raises(SystemExit) as end:
        run_script_here(lambda: pytest.fail("not refused"))
    assert end.value.code == 2 and f"error: {name}: expected a value" in capsys.readouterr().err


DETECTION = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}


def test_odd_numbers_of_a_run_folder(tmp_path):
    """metrics.json is refused, and a log's text is no number of seconds."""
    for value in ("1e999", "9" * 400, "9" * 5000, '"x"', "true"):
        (tmp_path / "metrics.json").write_text(f'{{"AP": {value}}}')
        with pytest.raises(UserError, match="metrics.json: .*; remove it and give the training command again") as error:
            read_metrics(tmp_path)
        assert len(str(error.value)) < len(str(tmp_path)) + 200
    (tmp_path / "log.jsonl").write_text('{"seconds": 3}\n{"seconds": "a"}\n{"seconds": []}\n')
    assert read_seconds(tmp_path) == 3
    steps = [{"epoch": 1, "loss": 2}, {"epoch": 10**400, "loss": 2}, {"epoch": 2, "loss": 10**400}, {"epoch": 3}]
    plot_training(tmp_path / "x.png", {"row": steps})  # draws the first


@pytest.mark.parametrize("digits", [30, 400, 5000])
def test_bins_of_many_digits_are_refused(digits):
    with pytest.raises(UserError, match="--bins 1,999"):
        boundaries(f"1,{'9' * digits}")


ODD = [("image_id", [1]), ("category_id", 7), ("category_id", []), ("bbox", None), ("bbox", ["a"] * 4), ("score", "x")]


@pytest.mark.parametrize("entries", [None, [1], ["a"], {}, [{}], *([DETECTION | {key: value}] for key, value in ODD)])
def test_predictions_that_cannot_be_drawn_are_one_line(entries, tmp_path):
    (tmp_path / "predictions.json").write_text(json.dumps([DETECTION]))
    assert read_detections(tmp_path, {1}) == [DETECTION]
    (tmp_path / "predictions.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="predictions.json: not this run's results: .*train again") as error:
        read_detections(tmp_path, {1})
    assert "Error" not in str(error.value)


def raising(error):
    def main():
        raise error

    return main


def test_ranks_on_gpus(monkeypatch):
    """nccl, each on its own GPU, with patience for what the main rank does alone; no more ranks than GPUs."""
    joined = {}
    for name, value in (("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: joined.update(device=device))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *args, **kwargs: joined.update(kwargs, args=args)
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: joined.update(left=True))
    with distributed("auto") as device:
        assert device == torch.device("cuda", 1) == joined["device"] == joined["device_id"]
    assert joined["args"] == ("nccl",) and joined["timeout"] >= datetime.timedelta(hours=1) and joined["left"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"2 ranks, but torch sees 1 GPU\(s\) here"), distributed("cuda"):
        pass


def test_a_killed_loader_process_is_one_line(tmp_path, glyphs):
    """What the kernel does to a process when the memory is full."""
    configs = write_configs(tmp_path / "configs", glyphs)
    keys = [f"output={tmp_path}", "data.workers=1", "train.epochs=50"]
    process = start_script("train", configs / "softmax.yaml", *keys)
    log = tmp_path / "tiny/softmax/log.jsonl"
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    for child in map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        os.kill(child, signal.SIGKILL)
    done = process.wait(60)
    error = done.stderr
    assert done.returncode == 2 and "Traceback" not in error, error
    how = "(killed by signal: Killed|exited unexpectedly)"  # torch's words depend on the moment
    assert re.search(rf"error: a loader process has ended \(.*{how}.*Fewer data.workers", error), error


def test_without_the_requirements():
    """A script under another Python than that of the environment."""
    code = "import sys; sys.modules['torchvision'] = None; sys.argv = ['train']; from bags.cli import run; run('train')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: the package torchvision is not installed for ")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_ended():
    """As `train.py CONFIG --list | head -1`: nothing on stderr, and the code of a broken pipe."""
    command = [sys.executable, ROOT / "scripts/train.py", "configs/glyphs-100", "--list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141


def test_a_process_that_dies_while_the_error_is_told():
    """torch's handler of dead loader processes raises wherever the main process is; not after an error."""
    code = """
        import os, signal
        from bags.core import errors
        def handler(*_): raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        def main():
            signal.signal(signal.SIGCHLD, handler)
            raise RuntimeError("DataLoader worker exited unexpectedly")
        close = os.close
        def die_first(file):
            if os.fork() == 0: os._exit(0)
            os.wait()
            close(file)
        os.close = die_first
        errors.run_script(main)"""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: a loader process has ended"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_one_rank_with_an_error_ends_the_other(tmp_path, glyphs):
    """An image that only one of two ranks meets: one line, one code, no hanging, nothing lost."""
    data, names = own_glyphs(tmp_path, glyphs, ("text",))
    configs = write_configs(tmp_path / "configs", data)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts/train.py"), str(configs / "softmax.yaml"), f"output={tmp_path / 'runs'}"]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and time.monotonic() - start < 60  # torchrun's own code
    assert done.stderr.count(f"{names[0]}: not a readable image") == 1, done.stderr
    own = [f'File "{ROOT / folder}' in done.stderr for folder in ("bags", "scripts")]  # torchrun's traceback is its own
    assert "(exitcode: 2)" in done.stderr and not any(own), done.stderr


# --------------------------------------------------------------------------- signals


def started(command, log, **settings):
    """A process that has logged its first steps."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **settings)
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_a_signal_to_everyone_below_make_saves(tmp_path, glyphs):
    """SIGTERM to the whole process group, which make passes on a second time: saved, with two loader processes."""
    configs, output = write_configs(tmp_path / "configs", glyphs), tmp_path / "runs"
    environment = tmp_path / "venv"  # as if make had installed it
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (environment / "bin/python").chmod(0o755)
    (environment / ".bags-ready").touch()
    arguments = f"output={output} data.workers=2 train.epochs=50"
    command = ["make", "train", f"VENV={environment}", f"CONFIG={configs / 'softmax.yaml'}", f"ARGS={arguments}"]
    process = started(command, output / "tiny/softmax/log.jsonl", cwd=ROOT, start_new_session=True)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    saved = load_checkpoint(output / "tiny/softmax/last.pth")["iteration"]
    assert 2 <= saved < 300 and f"stopped by SIGTERM after iteration {saved} of 300, which is saved" in error, error


class Endless(Dataset):
    """Numbers."""

    def __len__(self):
        return 2**20

    def __getitem__(self, position):
        return torch.tensor(position), {}


def ended(pid):
    """Whether a process has ended, if only its parent has not noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_loader_processes_obey_their_parent_only():
    """SIGTERM and SIGINT of others have no effect; the parent's own SIGTERM ends them without a fault."""
    loader = Loader(Endless(), batch_size=1, collate_fn=collate, num_workers=1, worker_init_fn=obey_parent_only)
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    next(batches)
    [worker] = set(multiprocessing.active_children()) - others
    for name in ("TERM", "INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        assert [int(next(batches)[0][0]) for _ in range(20)] and worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0
    batches.close()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}  # of this process


@pytest.mark.parametrize("early", [False, True])
def test_loader_processes_end_when_the_main_one_is_killed(early):
    """They outlive SIGKILL of their parent by a second or two, also while they begin."""
    reader, writer = multiprocessing.Pipe(duplex=False)

    def begin(_):
        writer.send(os.getpid())
        time.sleep(0.3 if early else 0)  # torch has not looked for the parent yet

    def main():
        for _ in Loader(Endless(), batch_size=1, collate_fn=collate, num_workers=2, worker_init_fn=begin):
            time.sleep(100)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    workers = [reader.recv(), reader.recv()]
    time.sleep(0 if early else 0.5)
    process.kill()
    deadline = time.monotonic() + 60
    while not all(map(ended, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(ended, workers))


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background of a shell, which ignores it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


WAITS = {
    "python": "threading.Event().wait()",
    "native": "lock = ctypes.create_string_buffer(64); [libc.pthread_mutex_lock(lock) for _ in range(2)]",
}


@pytest.mark.parametrize("waits", WAITS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_what_waits_for_ever(waits, number):
    """A first one is only noted, and so is what follows at once: the launcher's copy of it."""
    code = f"""if True:
        import ctypes, signal, sys, threading
        sys.path.insert(0, {str(ROOT)!r})
        from bags.core import errors
        errors.REPEATED = 0.5
        libc = ctypes.CDLL(None)

        def main():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
            print("waits", flush=True)
            {WAITS[waits]}

        errors.run_script(main)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waits\n"
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and f"ended by a second {number.name}" in error


def test_a_second_signal_in_training_has_its_former_effect(monkeypatch, interruptible):
    """For who trains without the scripts: Ctrl-C while a step never ends."""
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == ["SIGINT", "SIGINT"]
        monkeypatch.setattr("bags.engine.faults.REPEATED", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_a_signal_between_epochs_loses_nothing(tmp_path, glyphs, interruptible):
    """Everything is saved before a validation, which a signal may end; the resumed run validates that epoch."""
    config = config_of(tmp_path, glyphs, "train.epochs=3", "train.evaluate_every=1", "train.checkpoint_every=100")
    index = open_index(config, "train")
    about = {"config": {}, "stats": CategoryStats.from_index(index).to_dict()}
    epochs = []

    def validate(run, epoch):
        """Stops in the second validation."""
        epochs.append((epoch, load_checkpoint(run.folder / "last.pth")["iteration"]))
        if len(epochs) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    def run():
        detector, loader = pieces(config)
        config.run_folder.mkdir(parents=True, exist_ok=True)
        one = Run(detector, config.train, config.run_folder, config.seed, config.name, about)
        train([one], loader, torch.device("cpu"), validate)
        return detector.state_dict()

    with pytest.raises(KeyboardInterrupt):
        run()
    resumed = run()
    steps = epochs[0][1]
    assert epochs == [(1, steps), (2, 2 * steps), (2, 2 * steps)]
    shutil.rmtree(config.run_folder)
    calm = run()
    assert all(torch.equal(value, resumed[key]) for key, value in calm.items())


def test_a_full_disk_loses_no_line_of_the_log(tmp_path):
    """A run that is resumed drops what it runs again, and keeps everything where that cannot be written."""
    path = tmp_path / "log.jsonl"
    log = JsonLog(path)
    for iteration in range(80):
        log.write(iteration=iteration, loss=1.5)
    log.close()
    with path.open("a") as file:
        file.write('{"iteration": 80, "lo')  # when the run was killed
    whole = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="log.jsonl: cannot be written .the file is larger"):
            JsonLog(path, 79)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]
    log = JsonLog(path, 79)
    log.close()
    assert log.last["iteration"] == 78 and path.read_bytes() == whole[: whole.index(b'{"iteration": 79')]


# --------------------------------------------------------------------------- odd data


def odd_data(folder, size=(64, 48), objects=3, categories=3, images=2):
    """Images of one colour with objects of category 1 alone."""
    (folder / "train").mkdir(parents=True)
    random = np.random.default_rng(0)
    entries, annotations = [], []
    for number in range(1, images + 1):
        Image.new("RGB", size, (90, 20 * number % 255, 60)).save(folder / "train" / f"{number}.jpg")
        entries.append({"id": number, "file_name": f"{number}.jpg", "width": size[0], "height": size[1]})
        for _ in range(objects if number == 1 else 0):
            x, y = random.uniform(0, size[0] - 12), random.uniform(0, size[1] - 12)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [x, y, 10, 10],
                    "area": 100,
                    "iscrowd": 0,
                }
            )
    named = [{"id": c, "name": str(c)} for c in range(1, categories + 1)]
    text = json.dumps({"images": entries, "annotations": annotations, "categories": named})
    for split in ("train", "val"):
        (folder / f"{split}.json").write_text(text)
    return folder


CROWD, EMPTY, LARGE = {"objects": 1000}, {}, {"size": (5472, 3648), "images": 1}
ODD = [(c, s) for c in ("softmax", "group_softmax", "reweighted_softmax", "sigmoid_focal") for s in (CROWD, EMPTY)]


@pytest.mark.parametrize("classifier, shape", [*ODD, ("group_softmax", LARGE)])
def test_odd_images_train(tmp_path, classifier, shape):
    """A thousand objects, 20 megapixels; categories 2 and 3 have no object anywhere, the second image has none."""
    data = odd_data(tmp_path / "data", **shape)
    keys = ["data.empty_images=true", "data.train_images=train", f"classifier.name={classifier}", "train.batch_size=2"]
    result = train_some(config_of(tmp_path, data, *keys))
    assert all(value.isfinite().all() for key, value in result["end"].items())
    moved = [key for key in result["end"] if not torch.equal(result["start"][key], result["end"][key])]
    assert any("classifier" in key for key in moved)


# --------------------------------------------------------------------------- malice


def bomb(path, side):
    """A PNG of a few kilobytes that claims, and holds, side x side pixels."""
    Image.new("1", (side, side)).save(path, "PNG", compress_level=9)
    return path


def test_image_bombs_take_no_memory(tmp_path):
    """Small files of many pixels: refused before the pixels are unpacked."""
    data = odd_data(tmp_path / "data")
    huge = bomb(data / "train" / "2.jpg", 12_000)  # PIL alone would only warn
    assert huge.stat().st_size < 100_000
    dataset = DetectionDataset(bags.AnnotationIndex.open(data / "train.json"), data / "train")
    tracemalloc.start()
    start = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="12000 x 12000 pixels, but train.json says 64 x 48"):
        dataset[1]
    header = bytearray(bomb(tmp_path / "claims.png", 16).read_bytes())
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # IHDR; its checksum is wrong then, or the size is refused
    (tmp_path / "claims.png").write_bytes(header)
    with pytest.raises(UserError, match="claims.png: not a readable image"):
        read_image(tmp_path / "claims.png")
    assert time.monotonic() - start < 2 and tracemalloc.get_traced_memory()[1] < 2**24
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15  # KiB
    tracemalloc.stop()


def yaml_bomb(levels):
    """Nine of the line before in every line."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


NESTED = 100_000
MALICIOUS = {
    "nested.yaml": ("[" * NESTED, "cannot be read|not valid YAML"),
    "nested_map.yaml": ("{a: " * NESTED, "cannot be read|not valid YAML"),
    "bomb.yaml": (yaml_bomb(30), "unknown key"),
    "bomb_value.yaml": (yaml_bomb(30) + "\ndata: {short_sides: *a29}", "unknown key"),
    "bomb_name.yaml": ("data:\n  name: &a [" + "1, " * 9 + "1]\n  root: *a", "expected text"),
    "tag.yaml": ("data: !!python/object/apply:os.system ['echo code ran']", "not valid YAML"),
    "name_tag.yaml": ("data: !!python/name:os.system", "not valid YAML"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_configurations(tmp_path, name, capfd):
    text, words = MALICIOUS[name]
    (tmp_path / name).write_text(text)
    start = time.monotonic()
    with pytest.raises(UserError, match=words) as error:
        bags.load_config(tmp_path / name)
    assert time.monotonic() - start < 20 and len(str(error.value)) < 1000
    assert "code ran" not in capfd.readouterr().out


def test_values_that_explode_are_not_printed(tmp_path):
    """Aliases make a list of 9^29 numbers of a kilobyte: the message does not spell it out."""
    lines = yaml_bomb(30).replace("\n", "\n    ")
    (tmp_path / "x.yaml").write_text(f"data:\n  name:\n    {lines}")
    start = time.monotonic()
    with pytest.raises(UserError, match="data.name: expected text") as error:
        bags.load_config(tmp_path / "x.yaml")
    assert time.monotonic() - start < 5 and len(str(error.value)) < 1000


def test_pickles_with_code_are_not_run(tmp_path, glyphs, capfd):
    """Wherever a file is read: checkpoints, weights, packed annotations, results, configurations, the log."""
    config = config_of(tmp_path, glyphs)
    for save in (
        lambda p: torch.save(Malice(), p),
        lambda p: p.write_bytes(pickle.dumps(Malice())),
        lambda p: write_file(p, {"format": 2, **content(1), "more": Malice()}),
    ):
        path = tmp_path / "evil.pth"
        save(path)
        with pytest.raises(UserError, match="evil.pth: not a"):
            load_checkpoint(path)
        with pytest.raises(UserError, match="evil.pth"):
            bags.load_config(path)
        with pytest.raises(UserError, match="evil.pth: not a file of weights"):
            from bags.detectors.backbones import load_backbone_weights

            load_backbone_weights(torch.nn.Identity(), "resnet18", str(path))
        with pytest.raises(UserError, match="evil.pth"):
            bags.AnnotationIndex.open(path)
        with pytest.raises(UserError, match="evil.pth"):
            bags.evaluate(glyphs / "val.json", path)
    data, _ = own_glyphs(tmp_path, glyphs)
    bags.AnnotationIndex.open(data / "train.json")
    [packed] = data.glob("train.json.index")
    expected = len(bags.AnnotationIndex.open(data / "train.json"))
    np.save(packed / "boxes.npy", np.array([Malice()], object), allow_pickle=True)
    assert len(bags.AnnotationIndex.open(data / "train.json")) == expected  # damaged: packed again
    assert config.name == "softmax" and "code ran" not in capfd.readouterr().out


@pytest.mark.parametrize("text", ["[" * NESTED, '{"a":' * NESTED, "[" * NESTED + "]" * NESTED])
def test_deeply_nested_results_and_annotations(tmp_path, glyphs, text):
    (tmp_path / "deep.json").write_text(text)
    start = time.monotonic()
    for action in (lambda p: bags.AnnotationIndex.open(p), lambda p: bags.evaluate(glyphs / "val.json", p)):
        with pytest.raises(UserError, match="deep.json"):
            action(tmp_path / "deep.json")
    assert time.monotonic() - start < 20


def test_rle_that_overflows_in_results_is_refused(tmp_path):
    """Counts beyond the image, beyond 32 bits, and in letters that go on for ever; and in the ground truth."""
    data = odd_data(tmp_path / "data")
    truth = json.loads((data / "train.json").read_text())
    for annotation in truth["annotations"]:
        annotation["segmentation"] = {"size": [48, 64], "counts": [0, 48 * 64]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    start = time.monotonic()
    over = coco_mask.encode(np.ones((48, 65), np.uint8, order="F"))["counts"].decode()
    for counts in (over, [2**31, 2**31], [2**40], [-5, 48 * 64 + 5], "o" * 100_000, ["1"], 5, "\x00\x01", "é"):
        entry = {
            "image_id": 1,
            "category_id": 1,
            "bbox": [1, 1, 9, 9],
            "score": 0.5,
            "segmentation": {"size": [48, 64], "counts": counts},
        }
        (tmp_path / "r.json").write_text(json.dumps([entry]))
        with pytest.raises(UserError, match=r"r.json: detection 0: segmentation: .*pixels"):
            bags.evaluate(tmp_path / "truth.json", tmp_path / "r.json", "segm")
        truth["annotations"][1]["segmentation"]["counts"] = counts
        (tmp_path / "odd.json").write_text(json.dumps(truth))
        with pytest.raises(UserError, match=r"odd.json: annotation \d+: segmentation: .*pixels"):
            bags.evaluate(tmp_path / "odd.json", tmp_path / "r.json", "segm")
    assert time.monotonic() - start < 5


def test_names_that_lead_out_are_refused(tmp_path, glyphs):
    """Image names of the annotations, and the names that folders are made of."""
    data = odd_data(tmp_path / "data")
    truth = json.loads((data / "train.json").read_text())
    for name in ("../../etc/passwd", "/etc/passwd", "a/../../x.jpg"):
        truth["images"][0]["file_name"] = name
        (data / "train.json").write_text(json.dumps(truth))
        with pytest.raises(UserError, match="train.json: image 1: file_name .* leads out of the image folder"):
            train_some(config_of(tmp_path, data, "data.train_images=train", "data.max_bad_images=5"))
    for key in ("name=../x", "data.name=..", "name=a/b"):
        with pytest.raises(UserError, match="expected a folder name"):
            config_of(tmp_path, data, key)
    assert yaml.safe_load((tmp_path / "configs/softmax.yaml").read_text())
