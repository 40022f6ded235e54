"""What a run shows while it is trained, and that showing it changes nothing."""

import importlib.util
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from conftest import read_lines, write_configs
from PIL import Image
from steps import train_some

import bags
from bags.assembly.loaders import build_val_dataset, open_index
from bags.assembly.models import build_detector
from bags.config.sections import TrainConfig
from bags.core.errors import Stopped, UserError
from bags.data.statistics import CategoryStats
from bags.engine import board
from bags.engine.board import Board, training_tags
from bags.engine.metrics import Monitor
from bags.engine.optim import set_trained_part, train_mode
from bags.jobs.preflight import check_data
from bags.jobs.watching import draw_validation, validation_tags

CPU = torch.device("cpu")
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="the optional package tensorboard is missing"
)


def events(folder):
    """(tag -> [(step, number)], tags of pictures) as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    numbers = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    return numbers, {tag: [e.step for e in read.Images(tag)] for tag in read.Tags()["images"]}


def tiny(tmp_path, glyphs, *overrides):
    """The configuration `softmax` of tiny glyphs."""
    configs = write_configs(tmp_path / "configs", glyphs)
    return bags.load_config(configs / "softmax.yaml", [f"output={tmp_path / 'runs'}", *overrides])


def test_a_line_for_each_epoch_by_hand(tmp_path, capsys, monkeypatch):
    """Losses 1+3, 2+3, 6+3: means 3 and 3, sum 6. 3 steps of 4 images in 6 s; 3 of 6 steps are left: 6 s."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with Monitor(tmp_path, "bags", TrainConfig(epochs=2, batch_size=4), 0, 6) as monitor:
        for number in (1, 2):
            with monitor.epoch(number, others=0 if number == 1 else 2):
                for step, loss in enumerate((1.0, 2.0, 6.0)):
                    now[0] += 2
                    losses = {"loss_classifier": torch.tensor(loss), "loss_box_reg": torch.tensor(3.0)}
                    monitor.step(3 * (number - 1) + step, number, losses, lr=0.02)
    lines = [line for line in capsys.readouterr().err.splitlines() if ": epoch " in line]
    assert lines == [
        "bags: epoch 1 of 2: loss 6 (classifier 3, box_reg 3), lr 0.02, 2 images/s, 6 s left",
        "bags and 2 more: epoch 2 of 2: loss 6 (classifier 3, box_reg 3), lr 0.02, 2 images/s, 0 s left",
    ]


@pytest.mark.slow
@needs_tensorboard
def test_watching_changes_no_number(tmp_path, glyphs, capsys):
    """A run with picture and TensorBoard ends with the weights of one without; both show what they should."""
    keys = ["train.log_every=1"]
    config = tiny(tmp_path, glyphs, *keys)
    for name, watched in (("plain", []), ("watched", ["test.figures=true", "train.tensorboard=true"])):
        bags.train(tmp_path / "configs/softmax.yaml", [f"output={tmp_path / 'runs'}", *keys, f"name={name}", *watched])
    plain, watched = (config.run_folder.with_name(name) for name in ("plain", "watched"))
    states = [torch.load(folder / "last.pth", weights_only=True)["model"] for folder in (plain, watched)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert (plain / "predictions.json").read_bytes() == (watched / "predictions.json").read_bytes()
    assert not list(plain.glob("figures/after*")) and not (plain / "tensorboard").exists()
    assert {path.name for path in watched.glob("figures/after*")} == {"after_epoch_1.png", "after_epoch_2.png"}
    numbers, _ = events(watched / "tensorboard/training")
    for entry in read_lines(watched / "log.jsonl"):
        assert dict(numbers["loss/sum"])[entry["iteration"]] == pytest.approx(entry["loss"], rel=1e-5)
        assert dict(numbers["training/lr"])[entry["iteration"]] == pytest.approx(entry["lr"], rel=1e-5)
    scores, pictures = events(watched / "tensorboard/validation")
    assert [step for step, _ in scores["validation/AP"]] == [2] and "validation/AP1" in scores
    assert pictures == {"validation/examples": [2]}
    assert f"first detections: {watched / 'figures/after_epoch_1.png'}" in capsys.readouterr().out


@needs_tensorboard
def test_a_resumed_run_repeats_no_step(tmp_path, glyphs):
    """Killed after 7 steps, of which the checkpoint has 4: steps 4, 5 and 6 are there once."""
    config = tiny(tmp_path, glyphs, "train.log_every=1", "train.tensorboard=true")

    def kill():
        """End the run as a kill would: nothing is saved."""
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train_some(config, at_batch={7: kill})
    train_some(config)
    numbers, _ = events(config.run_folder / "tensorboard/training")
    logged = read_lines(config.run_folder / "log.jsonl")
    assert [step for step, _ in numbers["loss/sum"]] == [entry["iteration"] for entry in logged] == list(range(12))


@needs_tensorboard
def test_a_stopped_run_has_written_its_numbers(tmp_path, glyphs):
    config = tiny(tmp_path, glyphs, "train.log_every=1", "train.tensorboard=true")
    with pytest.raises(Stopped):
        train_some(config, at_batch={4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert len(events(config.run_folder / "tensorboard/training")[0]["loss/sum"]) == 5


def test_without_tensorboard_nothing_is_trained(tmp_path, glyphs, monkeypatch):
    monkeypatch.setattr(board.importlib.util, "find_spec", lambda name: None)
    words = "train.tensorboard=true: the package tensorboard is missing: pip install tensorboard"
    with pytest.raises(UserError, match=re.escape(words)):
        check_data([tiny(tmp_path, glyphs, "train.tensorboard=true")])
    check_data([tiny(tmp_path, glyphs)])


@needs_tensorboard
def test_numbers_that_are_none_are_left_out(tmp_path):
    with Board(tmp_path / "board", 0) as written:
        written.numbers(3, {"loss/sum": None, "loss/mask": float("nan"), "loss/box": 1.5})
    assert events(tmp_path / "board")[0] == {"loss/box": [(3, 1.5)]}


def test_tags():
    line = {"iteration": 3, "epoch": 0.5, "lr": 0.02, "loss": 2.0, "loss_box_reg": None, "data_s": 0.1}
    assert training_tags(line) == {"loss/sum": 2.0, "loss/box_reg": None, "training/lr": 0.02}
    names = ("AP", "AP1", "AP12", "APr", "AP50", "AP_tail", "ACCbg", "mask_AP2", "AR", "seconds", "images")
    expected = {f"validation/{name}" for name in names[:-2]}
    assert validation_tags(dict.fromkeys(names, 0.5)).keys() == expected


@pytest.mark.parametrize("damaged", [False, True])
def test_a_picture_leaves_the_detector_as_it_was(tmp_path, glyphs, capsys, damaged):
    """Modes, random numbers and weights; an image that cannot be read ends the picture, not the run."""
    config = tiny(tmp_path, glyphs)
    stats = CategoryStats.from_index(open_index(config, "train"))
    detector = build_detector(config, stats)
    set_trained_part(detector, "cls")
    train_mode(detector)
    modes = [module.training for module in detector.modules()]
    state = {key: value.clone() for key, value in detector.state_dict().items()}
    assert len(set(modes)) == 2, "frozen batch normalisation is not in training mode"
    dataset = build_val_dataset(config)
    if damaged:
        dataset.folder = tmp_path
    before = torch.get_rng_state()
    assert draw_validation(detector, dataset, stats, tmp_path / "out/picture.png", 1, CPU) is not damaged
    assert torch.equal(before, torch.get_rng_state())
    assert [module.training for module in detector.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in detector.state_dict().items())
    assert ("no picture after epoch 1" in capsys.readouterr().err) is damaged
    if not damaged:
        assert np.asarray(Image.open(tmp_path / "out/picture.png").convert("L")).std() > 10
