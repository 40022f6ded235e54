"""Two commands at once, and several ranks of one: one process group in a folder, and never another number."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import orjson
import pytest
import torch
from conftest import metrics, run_script
from torch.utils.data import DataLoader

from bags.core import distributed, locks
from bags.core.errors import UserError
from bags.core.errors import run_script as run_script_here
from bags.data.samplers import ShardSampler
from bags.engine.predict import predict
from scripts.soak import results

FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def held_by_another(folder):
    """Another process holds the folder's lock inside the block; it is killed at the end."""
    ready = FORK.Event()

    def hold():
        assert locks.take(folder) is None
        ready.set()
        time.sleep(300)

    holder = FORK.Process(target=hold)
    holder.start()
    assert ready.wait(60)
    try:
        yield holder.pid
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()


def on_ranks(number, action, capture=None):
    """Exit codes of `action`, run as a script on some ranks (gloo) in forks of this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def rank(local):
        os.environ |= {"RANK": str(local), "LOCAL_RANK": str(local), "WORLD_SIZE": str(number)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if capture:
            os.dup2(os.open(f"{capture}.{local}", os.O_WRONLY | os.O_CREAT), 2)
            sys.stderr = open(2, "w", closefd=False)

        def main():
            with distributed.distributed("cpu"):
                action()

        run_script_here(main)

    ranks = [FORK.Process(target=rank, args=(local,)) for local in range(number)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    return [process.exitcode for process in ranks]


# --------------------------------------------------------------------------- the lock


def test_a_lock_names_its_holder_and_is_free_after_a_kill(tmp_path):
    """The file stays behind, with the dead process's name in it, and blocks nobody."""
    folder = tmp_path / "new" / "run"
    with held_by_another(folder) as pid:
        holder = locks.take(folder)
        assert f"(pid {pid} on host {socket.gethostname()}, since 2" in holder
        with pytest.raises(UserError, match=rf"run: .*\(pid {pid} .*\) works in it; wait for it, or set output="):
            with locks.alone(folder, "set output="):
                raise AssertionError
    assert (folder / ".lock").exists()
    with locks.alone(folder, ""):
        assert locks.take(folder) == f"this process ({os.getpid()}) itself"  # a record lock would not say so
    assert locks.take(folder) is None
    locks.release(folder)


@pytest.mark.parametrize("text", [b"", b"\xff\x00\x1b[31m\n", b"x" * 10_000])
def test_any_text_in_the_file_is_read(tmp_path, text):
    with held_by_another(tmp_path):
        (tmp_path / ".lock").write_bytes(text)  # closed by this process, which has no lock to lose
        holder = locks.take(tmp_path)
        assert holder and holder.isprintable() and len(holder) <= 500


def test_only_one_process_at_a_time(tmp_path):
    """Six processes add to a number in a file, 20 times each: no addition is lost."""
    count = tmp_path / "count"
    count.write_text("0")

    def add():
        locks.INTERVAL = 0.001
        for _ in range(20):
            with locks.waiting(tmp_path):
                value = int(count.read_text())
                time.sleep(0.0005)
                count.write_text(str(value + 1))

    adders = [FORK.Process(target=add) for _ in range(6)]
    for process in adders:
        process.start()
    for process in adders:
        process.join(60)
    assert [process.exitcode for process in adders] == [0] * 6 and count.read_text() == "120"


def test_a_folder_that_was_renamed_or_removed_is_locked_under_its_name(tmp_path, monkeypatch):
    """A lock on a file that has lost its name protects nothing."""
    folder, real, moves = tmp_path / "run", locks.fcntl.lockf, []

    def moved(file, how):
        real(file, how)
        if not moves:
            moves.append(folder.rename(tmp_path / "elsewhere"))

    monkeypatch.setattr(locks.fcntl, "lockf", moved)
    with locks.alone(folder, ""):
        assert (folder / ".lock").exists() and moves
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(UserError, match="file.*: cannot be written .*choose another folder"):
            locks.take(path)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", none)
    with locks.alone(tmp_path, ""):
        pass
    assert "this file system has no locks (No locks available)" in capsys.readouterr().err


# --------------------------------------------------------------------------- ranks


def test_all_ranks_end_where_the_main_one_is_refused(tmp_path):
    """Exit code 2 on both, one line each, and no rank waits."""
    run = tmp_path / "run"
    with held_by_another(run):
        codes = on_ranks(2, lambda: distributed.locked(run, "set output=").__enter__(), tmp_path / "said")
    assert codes == [2, 2]
    for local in range(2):
        [line] = [line for line in (tmp_path / f"said.{local}").read_text().splitlines() if "error" in line]
        assert "works in it; wait for it, or set output=" in line


def test_ranks_decide_together(tmp_path):
    """What the main process finds is what all go by; its error is everyone's; they hold a lock as one."""

    def decide():
        assert distributed.on_main(lambda: distributed.rank() + 7) == 7
        with pytest.raises(UserError, match="^wrong$"):
            distributed.on_main(lambda: fail(UserError("wrong")))
        with pytest.raises(FileNotFoundError):
            distributed.on_main(lambda: fail(FileNotFoundError(2, "No such file")))
        with distributed.locked(tmp_path, ""):
            distributed.barrier()

    assert on_ranks(2, decide) == [0, 0]


def fail(error):
    raise error


# --------------------------------------------------------------------------- partial predictions

IDS = list(range(100, 111))


class Finds(torch.nn.Module):
    """One detection in each image, with the image's own value as its box."""

    def forward(self, images):
        """Detections of some images."""
        boxes = [torch.tensor([[0, 0, float(image), 5]]) for image in images]
        return [{"boxes": b, "labels": torch.tensor([1]), "scores": torch.tensor([0.5])} for b in boxes]


def run_predict(path, key="key", each=lambda: None):
    """Predicts on 11 images, in batches of 2."""

    def observe(image, target, detection):
        each()
        return [int(image)]

    dataset = [(torch.tensor(float(k)), {"image_id": k}) for k in IDS]
    batches = ShardSampler(len(dataset), 2)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=lambda items: zip(*items, strict=True))
    return predict(Finds(), loader, torch.device("cpu"), (1,), IDS, path, "test", key, observe)


def cut_after(path, images):
    """A prediction that was killed after some images; returns its share."""
    count = iter(range(images))
    with pytest.raises(StopIteration):
        run_predict(path, each=lambda: next(count))
    return path.with_name(f"{path.name}.rank0")


HEAD, LINES = slice(0, 1), slice(1, None)
DAMAGE = {
    "twice": lambda lines: lines + lines[LINES],
    "one twice": lambda lines: lines[:3] + lines[2:],
    "order": lambda lines: lines[HEAD] + lines[:0:-1],
    "missing": lambda lines: lines[:2] + lines[3:],
    "text": lambda lines: [*lines[:3], b"{[\n", *lines[3:]],
    "other kinds": lambda lines: [*lines[:2], b"5\n", b"[1]\n", b"null\n", *lines[3:]],
    "of another image": lambda lines: [*lines[:2], lines[2].replace(b'"image_id":101', b'"image_id":102')],
    "other key": lambda lines: [b'"another"\n', *lines[LINES]],
    "empty": lambda _: [],
    "no end": lambda lines: [*lines[:-1], lines[-1][:-1]],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_share_is_continued_only_as_far_as_it_is_right(tmp_path, how):
    """Whatever a partial prediction holds, the result is that of an undisturbed one."""
    expected = run_predict(tmp_path / "calm.json")
    share = cut_after(tmp_path / "p.json", 8)
    lines = share.read_bytes().splitlines(keepends=True)
    assert len(lines) >= 5
    damaged = DAMAGE[how](lines)
    assert damaged != lines
    share.write_bytes(b"".join(damaged))
    assert run_predict(tmp_path / "p.json") == expected
    assert (tmp_path / "p.json").read_bytes() == (tmp_path / "calm.json").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["calm.json", "p.json"]


def test_another_writer_of_a_share_stops_the_run(tmp_path):
    """Lines that appear meanwhile are never scored: the former results stay, and the next run is right."""
    path = tmp_path / "p.json"
    run_predict(path)
    expected, share = path.read_bytes(), tmp_path / "p.json.rank0"

    def intrude():
        with share.open("ab") as file:
            file.write(orjson.dumps([105, [1], []], option=orjson.OPT_APPEND_NEWLINE))

    with pytest.raises(UserError, match=r"p.json: its partial results are damaged, .* repeat the command"):
        run_predict(path, each=intrude)
    assert path.read_bytes() == expected and not share.exists()
    with pytest.raises(UserError, match="partial results"):
        run_predict(path, each=lambda: share.unlink(missing_ok=True))
    run_predict(path)
    assert path.read_bytes() == expected and [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_a_process_that_lives_on_writes_into_the_former_share(tmp_path):
    """A rank that outlives its main process does not disturb the run that continues."""
    path = tmp_path / "p.json"
    run_predict(tmp_path / "calm.json")
    with cut_after(path, 6).open("ab") as late:

        def write():
            late.write(b'[106,[106],[{"image_id":106}]]\n')
            late.flush()

        run_predict(path, each=write)
    assert path.read_bytes() == (tmp_path / "calm.json").read_bytes()


def test_files_of_more_ranks_and_of_killed_processes_go(tmp_path):
    """`p.json.rank1` of two ranks does not stay when one rank goes on; files of other names do."""
    gone = ["p.json.rank1", "p.json.rank12", "p.json.0123abcd.tmp", "p.json.rank0.0123abcd.tmp"]
    kept = ["p.json.rank", "p.json.rank1x", "q.json.rank1", "ap.json.rank1", "notes.tmp", "p.json.old"]
    for name in (*gone, *kept):
        (tmp_path / name).write_text("{}")
    run_predict(tmp_path / "p.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*kept, "p.json"])


def test_ranks_with_other_weights_are_not_merged(tmp_path):
    """A checkpoint that was replaced while the ranks read it."""

    def differ():
        run_predict(tmp_path / "p.json", key=f"weights {distributed.rank()}")

    assert on_ranks(2, differ, tmp_path / "said") == [2, 2]
    assert "the ranks have read different weights" in (tmp_path / "said.0").read_text()
    assert on_ranks(2, lambda: run_predict(tmp_path / "p.json")) == [0, 0]
    assert sorted(entry["image_id"] for entry in json.loads((tmp_path / "p.json").read_text())) == IDS


# --------------------------------------------------------------------------- commands


def test_commands_name_who_works_in_their_folder(job, glyphs, tmp_path):
    """Exit code 2 before anything is written; complete rows and other folders are free."""
    configs, runs, _ = job
    checkpoint, image = runs / "tiny/softmax/last.pth", runs / "tiny/figures/predictions.png"
    found, truth = runs / "tiny/softmax/predictions.json", glyphs / "val.json"
    to_output = {
        "evaluation": ["evaluate", checkpoint],
        "results": ["evaluate", found, "--annotations", truth],
        "comparison": ["evaluate", "--compare", found, found, "--annotations", truth, "--draws", 0],
        "prediction": ["predict", checkpoint, image],
    }
    cases = {tmp_path / name: [*command, "--output", tmp_path / name] for name, command in to_output.items()}
    cases[tmp_path / "t/tiny/softmax"] = ["train", configs / "softmax.yaml", f"output={tmp_path}/t"]
    cases[tmp_path / "t/tiny/bags"] = ["train", configs, f"output={tmp_path}/t"]
    for folder, command in cases.items():
        with held_by_another(folder) as pid:
            # A fork of a process that has scored would wait for the engine's threads for ever.
            done = run_script(*command)
            assert done.returncode == 2, (command, done.stderr)
            [line] = [line for line in done.stderr.splitlines() if line.startswith("error")]
            mend = "set output=" if command[0] == "train" else "choose another --output"
            assert f"{folder}: " in line and f"(pid {pid} on host" in line and line.endswith(f"or {mend}")
            assert [file.name for file in folder.iterdir()] == [".lock"]
    assert not (tmp_path / "t/tiny/softmax/log.jsonl").exists()


def test_a_complete_row_needs_no_lock(job):
    configs, runs, _ = job
    with held_by_another(runs / "tiny/softmax"):
        done = run_script("train", configs / "softmax.yaml", f"output={runs}")
    assert done.returncode == 0 and "complete, not run again" in done.stdout, done.stderr


def at_once(command):
    """Two equal commands, started together: (exit code, stderr) of each."""
    with ThreadPoolExecutor(2) as threads:
        ends = list(threads.map(lambda _: run_script(*command), range(2)))
    return [(end.returncode, end.stderr) for end in ends]


@pytest.mark.parametrize("kind", ["evaluate", "predict"])
def test_two_commands_at_once(job, glyphs, tmp_path, kind):
    """The right numbers or exit code 2, never another number; scripts/soak.py --together does more of it."""
    _, runs, _ = job
    command = [kind, runs / "tiny/bags/last.pth", *([glyphs / "val"] if kind == "predict" else [])]
    assert run_script(*command, "--output", tmp_path / "calm").returncode == 0
    expected = results(tmp_path / "calm")
    assert expected and (kind == "predict" or json.loads(expected["metrics.json"]) == metrics(runs, "bags"))
    ends = at_once([*command, "--output", tmp_path / "both"])
    assert min(ends)[0] == 0 and results(tmp_path / "both") == expected, ends
    assert all(code == 0 or (code == 2 and "works in it; wait" in said) for code, said in ends), ends
