"""The preview shows what enters the detector in training."""

import pytest
import torch
from conftest import run_script, write_configs
from PIL import Image
from steps import train_some

import bags
from bags.assembly.loaders import open_index
from bags.core.errors import UserError
from bags.data.statistics import CategoryStats
from bags.detectors.conventions import CONVENTIONS
from bags.jobs.preview import preview, resized_batches


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.flip=0.5", "detector.min_size=48"],
        ["data.flip=0.5", "detector.conventions=released", "data.short_sides=[40,64]", "data.long_side=64"],
        ["data.jitter=[0.4,1.5]", "data.copy_paste=0.5", "detector.framework=mask_rcnn", "data.jitter_size=72"],
    ],
)
def test_it_is_what_training_sees(tmp_path, glyphs, monkeypatch, overrides):
    """Images and targets of the first two batches, recorded in a real training."""
    row = write_configs(tmp_path / "configs", glyphs) / "softmax.yaml"
    config = bags.load_config(row, [f"output={tmp_path / 'runs'}", "train.epochs=1", "train.milestones=[]", *overrides])
    kind, seen = CONVENTIONS[config.detector.conventions].transform, []
    forward = kind.forward

    def watched(self, images, targets=None):
        """Keeps what the detector's transform returns in training."""
        batch, resized = forward(self, images, targets)
        seen.extend(
            (image[:, :h, :w], target)
            for image, (h, w), target in zip(batch.tensors, batch.image_sizes, resized or (), strict=True)
        )
        return batch, resized

    monkeypatch.setattr(kind, "forward", watched)
    train_some(config)
    monkeypatch.setattr(kind, "forward", forward)
    index = open_index(config, "train")
    shown = list(resized_batches(config, index, CategoryStats.from_index(index), 2))
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.detector.image_mean, config.detector.image_std))
    assert len(shown) == 8
    for (image, target), (expected, expected_target) in zip(shown, seen, strict=False):
        assert torch.allclose(image, expected * std + mean, atol=1e-6)
        for key in ("boxes", "labels", *(["masks"] if "masks" in target else [])):
            assert torch.equal(target[key], expected_target[key])
    assert overrides[0] != "data.jitter=[0.4,1.5]" or {image.shape for image, _ in shown} == {(3, 72, 72)}


def test_the_picture(tmp_path, glyphs, capsys):
    row = write_configs(tmp_path / "configs", glyphs) / "bags.yaml"
    preview(row, ["detector.framework=mask_rcnn"], 2, tmp_path / "new/shown.png")
    printed = capsys.readouterr()
    assert "8 training images" in printed.out and "trained from stored features" in printed.err
    with Image.open(tmp_path / "new/shown.png") as image:
        assert image.format == "PNG" and image.width > 600 and len(image.convert("RGB").getcolors(2**24)) > 500
    for batches, output, words in ((0, "a.png", "--batches 0: expected 1 to 100"), (1, "a.jpg", "with .png")):
        with pytest.raises(UserError, match=words):
            preview(row, [], batches, tmp_path / output)


def test_class_balanced_images_show_the_objects_of_their_category(tmp_path, glyphs, capsys):
    row = write_configs(tmp_path / "configs", glyphs) / "softmax_retrained.yaml"
    preview(row, ["sampler.name=class_balanced"], 3, tmp_path / "a.png")
    printed = capsys.readouterr()
    assert "12 training images" in printed.out and "an image for each category in turn" in printed.err
    config = bags.load_config(row, ["sampler.name=class_balanced"])
    index = open_index(config, "train")
    shown = [target["labels"] for _, target in resized_batches(config, index, CategoryStats.from_index(index), 3)]
    assert all(len(labels) and len(labels.unique()) == 1 for labels in shown)
    first = torch.cat([labels[:1] for labels in shown])
    occurring = len(set(index.labels[index.trained].tolist()))
    assert len(first.unique()) == min(len(first), occurring)  # all once before any comes again


def test_on_the_command_line(tmp_path, glyphs):
    row = write_configs(tmp_path / "configs", glyphs) / "softmax.yaml"
    done = run_script("prepare_data", "preview", row, "--output", tmp_path / "a.png", "data.copy_paste=1")
    assert done.returncode == 0 and (tmp_path / "a.png").exists(), done.stderr
    done = run_script("prepare_data", "preview", row, f"data.root={tmp_path}/none")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such file" in done.stderr, done.stderr
    done = run_script("prepare_data", "preview", row, "--output", "/dev/null/a.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU keeps configs/custom")
def test_without_a_gpu_it_is_what_training_sees_there(tmp_path, glyphs):
    """`train` takes custom_cpu then, with other sizes; so do `preview` and `check`."""
    keys = ["configs/custom", f"data.root={glyphs}", "data.train_images=.", "data.val_images=."]
    keys += ["detector.backbone_weights=null", "detector.frozen_stages=0"]
    for verb, options in (("preview", ["--output", tmp_path / "a.png"]), ("check", [])):
        done = run_script("prepare_data", verb, *keys, *options)
        assert done.returncode == 0 and "so configs/custom_cpu takes its place" in done.stderr, done.stderr
    with Image.open(tmp_path / "a.png") as picture:
        assert max(picture.size) < 1600  # four images of 320 pixels; those of configs/custom are eight of up to 1333
