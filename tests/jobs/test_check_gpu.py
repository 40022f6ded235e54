"""The checks of a GPU, at tiny size on the CPU: they pass, name what fails, and survive crashes and full time."""

import json
import os
import time

import pytest
import torch
from conftest import run_script

from scripts.gpu_checks.pieces import agreeing_draws, relative
from scripts.gpu_checks.running import Check, Place, Result, Runner, figure, run_check, verdict

QUICK = ("environment", "classifiers", "fused", "classifier_stage")


def test_quick_checks_pass_on_the_cpu(tmp_path):
    """The script, its file and its words; the slower checks run in the same way."""
    output = tmp_path / "new" / "result.json"
    chosen = [word for name in QUICK for word in ("--only", name)]
    done = run_script("check_gpu", *chosen, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(output.read_text())
    assert set(content["checks"]) == set(QUICK) and content["counts"]["fail"] == 0 and content["counts"]["pass"] > 20
    assert content["gpu"] is None and "not a GPU result" in content["title"]
    assert done.stdout.count("this is not a GPU result") == 2
    statuses = {line["status"] for check in content["checks"].values() for line in check["lines"]}
    assert statuses == {"pass", "figure", "not run"}


def test_options_of_check_gpu(tmp_path):
    """A list, and one line for what is no check, no number or no file."""
    done = run_script("check_gpu", "--list")
    assert done.returncode == 0 and all(f"{name} " in done.stdout for name in QUICK)
    for options, words in (
        (["--only", "nonsense"], "--only nonsense: expected one of environment, classifiers"),
        (["--minutes", "nan"], "--minutes nan: expected a number above 0"),
        (["--jobs", "0"], "--jobs 0: expected a number above 0"),
        (["--output", tmp_path], "is a folder, expected a file"),
    ):
        done = run_script("check_gpu", *options)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def good(place):
    """A check that passes."""
    yield verdict("good", True, "as it should be")
    yield figure("number", "7", value=7)


def bad(place):
    """A check with a wrong number, that then raises."""
    yield verdict("bad", False, "not as it should be")
    raise RuntimeError("first\nlast line of the error")


def crash(place):
    """A check whose process ends in the middle."""
    yield verdict("before", True, "was written")
    os.write(2, b"a fault of the device\n")
    os._exit(134)


def hang(place):
    """A check that never ends."""
    yield verdict("before", True, "was written")
    time.sleep(1000)


def missing(place):
    """A check of a module that is not installed."""
    import no_such_module_anywhere  # noqa: F401

    yield verdict("never", True, "")


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Run some functions of this file as checks; returns the result file's content."""
    monkeypatch.setattr("scripts.gpu_checks.running.importlib.import_module", lambda name: __import__("test_check_gpu"))

    def run(*names, minutes=1.0, jobs=2, seconds=20):
        checks = [Check("here", name, "", seconds) for name in names]
        result = Result(tmp_path / "result.json", {"title": "test"})
        Runner("cpu", result, jobs, minutes).run(checks)
        return json.loads((tmp_path / "result.json").read_text())

    return run


def test_a_failure_does_not_stop_the_others(runner):
    """Errors, crashes and missing modules become lines; what was written before them stays."""
    content = runner("bad", "crash", "missing", "good")
    lines = {
        name: [(line["status"], line["text"]) for line in check["lines"]] for name, check in content["checks"].items()
    }
    assert lines["bad"] == [("fail", "not as it should be"), ("fail", "RuntimeError: last line of the error")]
    assert lines["crash"] == [("pass", "was written"), ("fail", "ended with exit code 134: a fault of the device")]
    assert lines["missing"] == [("not run", "no_such_module_anywhere is not installed")]
    assert lines["good"] == [("pass", "as it should be"), ("figure", "7")]
    assert content["checks"]["good"]["lines"][1]["numbers"] == {"value": 7}
    assert "last line of the error" in content["checks"]["bad"]["log"] and "log" not in content["checks"]["good"]
    assert content["counts"] == {"pass": 2, "fail": 3, "figure": 1, "not run": 1}


def test_a_check_that_hangs_has_failed_and_full_time_has_not(runner):
    """Beyond its own seconds a check fails; beyond everyone's minutes it is `not run`, and so are those after it."""
    content = runner("hang", "good", jobs=1, seconds=0.5)
    assert [line["status"] for line in content["checks"]["hang"]["lines"]] == ["pass", "fail"]
    assert "did not end within 0.5 s" in content["checks"]["hang"]["lines"][1]["text"]
    assert content["counts"]["pass"] == 2
    content = runner("hang", "good", jobs=1, minutes=0.01)
    assert [line["status"] for line in content["checks"]["hang"]["lines"]] == ["pass", "not run"]
    assert [line["text"] for line in content["checks"]["good"]["lines"]] == ["the time was up"]


def test_draws_agree_and_the_originals_come_back():
    """Draws of a device come from the CPU's generator."""
    functions = torch.rand, torch.randperm, torch.rand_like
    with agreeing_draws(3):
        drawn = torch.rand(4, device="cpu", dtype=torch.float64), torch.randperm(5, device="cpu")
        like = torch.rand_like(torch.zeros(2, 3))
    assert (torch.rand, torch.randperm, torch.rand_like) == functions
    torch.manual_seed(3)
    assert torch.equal(drawn[0], torch.rand(4, dtype=torch.float64)) and torch.equal(drawn[1], torch.randperm(5))
    assert torch.equal(like, torch.rand(2, 3))


def test_relative_difference_by_hand():
    """(3, 4) against (3, 4.5): 0.5 / 5; other shapes and NaN are infinitely far."""
    ours = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert relative(ours, [torch.tensor([3.0]), torch.tensor([4.5])]) == pytest.approx(0.1)
    assert relative(ours, [torch.tensor([3.0]), torch.tensor([float("nan")])]) == float("inf")
    assert relative(ours, [torch.tensor([3.0]), torch.tensor([4.0, 4.0])]) == float("inf")


def test_a_wrong_device_is_noticed(tmp_path, monkeypatch):
    """A classifier whose loss is a hundredth too large on the second call fails its line, and only its own."""
    import bags

    original, calls = bags.Seesaw.loss, []

    def wrong(self, logits, labels):
        """The second device's loss is wrong."""
        calls.append(1)
        return {name: loss * (1.01 if len(calls) == 2 else 1) for name, loss in original(self, logits, labels).items()}

    monkeypatch.setattr(bags.Seesaw, "loss", wrong)
    part = tmp_path / "part"
    run_check(Check("numbers", "classifiers", "", 60), Place("cpu", tmp_path), part)
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    assert lines.pop() == "end" and [line["name"] for line in lines if line["status"] == "fail"] == ["seesaw"]
