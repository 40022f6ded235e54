"""What a user gets wrong: one line on stderr that names it, exit code 2, never a traceback."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import torch
from conftest import run_script


def test_a_row_whose_baseline_was_trained_anew_is_refused(job, tmp_path):
    configs, runs, _ = job
    shutil.copytree(runs / "tiny", tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny/softmax")
    for args, code in ((["softmax.yaml", "seed=0"], 0), (["bags.yaml"], 0)):  # the same weights again
        done = run_script("train", configs / args[0], f"output={tmp_path}", *args[1:])
        assert done.returncode == code, done.stderr
    assert "complete, not run again" in done.stdout
    shutil.rmtree(tmp_path / "tiny/softmax")
    assert run_script("train", configs / "softmax.yaml", f"output={tmp_path}", "seed=1").returncode == 0
    done = run_script("train", configs / "bags.yaml", f"output={tmp_path}")
    assert done.returncode == 2 and "started from other weights than" in done.stderr


def test_other_settings_in_the_same_run_folder_are_refused(job):
    configs, runs, _ = job
    done = run_script("train", configs, f"output={runs}", "train.lr=0.5")
    assert done.returncode == 2 and "trained with train.lr=0.01, now it is 0.5" in done.stderr


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_bad_input_is_one_line_and_exit_code_2(job, glyphs, tmp_path):
    """What a user gets wrong: a line on stderr that names it, never a traceback."""
    configs, runs, _ = job
    corrupt, empty, other, partial = (
        shutil.copytree(glyphs, tmp_path / n) for n in ("corrupt", "empty", "other", "partial")
    )
    for image in (corrupt / "train").iterdir():
        image.write_bytes(image.read_bytes()[:200])
    (empty / "train.json").write_text("")
    for split in ("train", "val"):
        edit(other / f"{split}.json", lambda c: c["categories"][0].update(name="renamed"))
    edit(partial / "train.json", lambda c: c.update(annotations=[]))
    last = runs / "tiny/softmax/last.pth"
    out = f"output={tmp_path / 'out'}"
    softmax, bags_row = configs / "softmax.yaml", configs / "bags.yaml"
    cases = [
        (["train", softmax, "train.epoch=3"], "train.epoch: unknown key; did you mean train.epochs?"),
        (["train", tmp_path / "nothing"], "no such configuration file"),
        (["train", softmax, out, "data.root=/nowhere"], "/nowhere/train.json: no such file"),
        (["train", softmax, out, f"data.root={corrupt}"], "not a readable image"),
        (["train", softmax, out, f"data.root={corrupt}", "data.workers=1"], "not a readable image"),
        (["train", softmax, out, f"data.root={empty}"], "train.json: the file is empty"),
        (["train", softmax, out, f"data.root={partial}"], "`annotations` is empty"),
        (["train", bags_row, out, f"data.root={other}", f"detector.init_from={last}"], "'renamed'"),
        (["train", bags_row, out], "softmax/last.pth: no such checkpoint"),
        (["train", softmax, "--seeds", "a"], "--seeds a"),
        (["evaluate", last, f"data.root={other}"], "'renamed'"),
        (["evaluate", tmp_path / "x.pth"], "no such checkpoint"),
        (["evaluate", last, "train.lr=1"], "data.*, test.* and device only"),
        (["evaluate", glyphs / "val.json"], "needs --annotations"),
        (["predict", last, tmp_path / "none.png"], "none.png: no such image"),
        (["predict", last, configs], "no image in there"),
        (["predict", last, glyphs / "val", "--score", "nan"], "--score nan"),
        (["evaluate", tmp_path / "r.json", "--annotations", glyphs / "val.json", "test.bins=[5]"], "for a checkpoint"),
        (["predict", glyphs / "val.json", glyphs / "val"], "not a checkpoint"),
        (["tables", tmp_path], "no finished run"),
        (["tables", "--paper", "2", configs], "--paper 2: expected one of 1, 4, fig4"),
        (["tables", "--paper", "4", configs], "no groups.yaml there"),
        (["prepare_data", "glyphs-100", "--root", glyphs], "not of this preset"),
    ]
    if not torch.cuda.is_available():
        cases.append((["train", softmax, out, "device=cuda"], "torch sees no GPU"))
    with ThreadPoolExecutor(2) as pool:
        processes = list(pool.map(lambda case: run_script(*case[0]), cases))
    for (arguments, words), done in zip(cases, processes, strict=True):
        assert done.returncode == 2, (arguments, done.stderr)
        last_line = done.stderr.strip().splitlines()[-1]
        assert last_line.startswith("error: ") and words in last_line, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
