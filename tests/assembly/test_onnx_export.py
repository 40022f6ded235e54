"""ONNX files of tiny detectors in ONNX Runtime, against the detectors themselves; random weights, noise as images."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, nms

import bags
from bags.assembly import onnx_export
from bags.assembly.onnx_check import compare
from bags.cli import export as command
from bags.config.load import config_to_dict
from bags.core.errors import UserError
from bags.data.statistics import CategoryStats
from bags.detectors.masks import crops
from bags.detectors.masks import paste as paste_eagerly
from bags.detectors.released_pixels import resize_image
from bags.detectors.traceable import Traceable, _expanded
from bags.detectors.traceable_ops import paste, resize, resize_levels, sigmoid, suppress
from bags.engine.checkpoint import write_checkpoint

STATS = CategoryStats((3, 5, 9, 11), ("a", "b", "c", "d"), (5, 500, 50, 2000), (4, 300, 40, 900))
CATEGORIES = [{"id": i, "name": n} for i, n in zip(STATS.category_ids, STATS.names, strict=True)]
SIZES = ((60, 90), (64, 64), (33, 20), (5, 70))


def settings(*overrides):
    """A tiny configuration."""
    keys = ["detector.min_size=64", "detector.max_size=96", "detector.rpn.test_proposals=20", "detector.roi.fc=8"]
    keys += ["detector.fpn_channels=8", "test.max_detections=9", "test.score_threshold=0.05", "data.root=/nowhere"]
    method, *others = overrides
    return bags.load_config(f"glyphs-100/{method}", [*keys, *others])


def make(*overrides):
    """A detector whose scores and boxes differ from proposal to proposal."""
    torch.manual_seed(0)
    detector = bags.build_detector(settings(*overrides), STATS).eval()
    with torch.no_grad():
        for stage in detector.roi_heads.box_stages:
            stage.box_regressor.weight.mul_(3)
            for parameter in stage.classifier.parameters():
                parameter.mul_(40)
    return detector


def noise(*sizes):
    """Images of 8-bit noise."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, *size), generator=generator) / 255 for size in sizes]


@pytest.mark.parametrize(
    "overrides",
    [
        ("bags", "detector.roi.class_agnostic=false"),
        ("cascade_mask_bags",),
        ("htc", "detector.conventions=released"),
        ("mask_bags", "test.max_per_category=2"),
        ("bags", "test.agnostic_nms=true", "test.max_per_category=2"),
        ("seesaw", "test.agnostic_nms=true"),
    ],
    ids="-".join,
)
def test_what_is_traced_detects_the_same(overrides):
    """Without ONNX: the rewritten evaluation equals the detector's own, at each size, in the same order."""
    detector = make(*overrides)
    with torch.no_grad():
        detector(noise((60, 90)))
        traceable, total = Traceable(detector, STATS.category_ids), 0
        for image in noise(*SIZES):
            [expected] = detector([image])
            boxes, scores, labels, ids, *masks = traceable(image)
            assert torch.equal(labels, expected["labels"])
            assert ids.tolist() == [STATS.category_ids[label - 1] for label in labels.tolist()]
            torch.testing.assert_close(scores, expected["scores"], atol=1e-5, rtol=0)
            torch.testing.assert_close(boxes, expected["boxes"], atol=1e-3, rtol=0)
            assert bool(masks) == ("masks" in expected)
            for found in masks:
                torch.testing.assert_close(found, expected["masks"], atol=1e-3, rtol=0)
            total += len(labels)
    assert total > 4


def test_a_detector_in_onnx_runtime(tmp_path):
    """Sizes other than the traced one, categories and thresholds as metadata, and the script that runs the file."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    detector, file = make("mask_bags"), tmp_path / "new" / "model.onnx"
    exported = bags.export_onnx(detector, file, noise(*SIZES), CATEGORIES, {"name": "tiny"})
    assert exported.images >= 8 and exported.detections > 20 and exported.scores < 1e-4 and exported.boxes < 1e-2
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(file)
    texts = session.get_modelmeta().custom_metadata_map
    assert json.loads(texts["categories"]) == CATEGORIES and texts["name"] == "tiny"
    assert json.loads(texts["max_detections"]) == 9 and json.loads(texts["score_threshold"]) == 0.05
    assert [tuple(output.name for output in session.get_outputs())] == [
        ("boxes", "scores", "labels", "category_ids", "masks")
    ]
    image = noise((41, 77))[0]
    with torch.no_grad():
        [expected] = detector([image])
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/run_onnx.py", file, tmp_path / "photo.png"], capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected["labels"]) > 0 and done.returncode == 0, done.stderr
    grey = (image[0] * 255).round().byte().numpy()
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")  # the same grey values
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:200])
    command = [sys.executable, ROOT / "scripts/run_onnx.py", file, *(tmp_path / f"{n}.png" for n in ("8", "cut", "16"))]
    both = subprocess.run(command, capture_output=True, text=True)
    found = [
        [line.partition(": ")[2] for line in both.stdout.splitlines() if f"/{name}.png" in line] for name in (8, 16)
    ]
    assert found[0] == found[1] != [] and both.returncode == 2 and "cut.png: left out" in both.stderr
    assert subprocess.run(command[:3], capture_output=True, text=True).stderr.startswith("usage: ")
    names = [STATS.names[label - 1] for label in expected["labels"].tolist()]
    assert [line.split()[1] for line in lines] == names


def test_images_without_detections(tmp_path):
    """No score reaches 0.999: empty outputs of the right shapes, masks too."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    bags.export_onnx(make("cascade_mask_bags", "test.score_threshold=0.999"), tmp_path / "m.onnx")
    found = runtime.InferenceSession(tmp_path / "m.onnx").run(None, {"image": np.zeros((3, 50, 31), np.float32)})
    assert [values.shape for values in found] == [(0, 4), (0,), (0,), (0,), (0, 1, 50, 31)]


def test_a_balanced_detector_of_torchvision(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, 8, 5, 4, 2))
    backbone.out_channels = 8
    detector = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 1),
        box_head=TwoMLPHead(8 * 9, 12),
        box_predictor=FastRCNNPredictor(12, 5),
        min_size=64,
        max_size=96,
        rpn_post_nms_top_n_test=20,
        box_nms_thresh=0.3,
    )
    with pytest.raises(UserError, match=r"expected a detector of bags.load_detector or bags.balance, got FasterRCNN"):
        bags.export_onnx(detector, tmp_path / "m.onnx")
    bags.balance(detector, STATS.instance_counts)
    with torch.no_grad():
        detector.roi_heads.classifier.linear.weight.mul_(40)
    detector.train()
    assert bags.export_onnx(detector, tmp_path / "m.onnx", noise(*SIZES)).detections > 0
    assert detector.training  # as it was
    with pytest.raises(UserError, match="bags.export_onnx"):
        torch.jit.trace(detector.eval(), [noise((60, 90))], strict=False)


NAMES = ["bags_cosine", "simcal", "tau_norm_select", "eql_v2", "groups", "norcal", "sigmoid", "ecm", "gumbel", "iif"]
NAMES += ["ldam", "fracal", "fracal_sigmoid", "logit_normalisation", "disalign", "bacl", "loce", "knn"]
NAMES += ["bags_euclidean"]


@pytest.mark.parametrize("name", NAMES)
def test_classifiers_in_onnx_runtime(name, tmp_path):
    """Logits and scores of classifiers of each kind, alone and in an average, for another image than the traced one."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    pair = [settings(method).classifier.build(6, 6, STATS) for method in (name, "bags")]
    if name == "knn":
        with torch.no_grad():
            fc = torch.randn(40, 6)
            pair[0].fit([(bags.BoxFeatures(fc[:, :, None, None], fc), torch.arange(40) % (STATS.num_categories + 1))])
    average = bags.Average(pair, (1, 3))

    class Scores(torch.nn.Module):
        """Features [R, 6] -> scores of the classifier and of the average."""

        def __init__(self):
            super().__init__()
            self.one, self.average = pair[0], average

        def forward(self, fc):
            """See the class."""
            features = bags.BoxFeatures(fc[:, :, None, None], fc)
            return self.one.probs(self.one(features)), self.average.probs(self.average(features))

    module, file = Scores().eval(), tmp_path / "scores.onnx"
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        about = {"opset_version": 17, "input_names": ["fc"], "dynamic_axes": {"fc": {0: "proposals"}}}
        torch.onnx.export(module, (torch.randn(4, 6),), file, dynamo=False, **about)
        fc = torch.randn(7, 6)
        found = runtime.InferenceSession(file).run(None, {"fc": fc.numpy()})
        for ours, expected in zip(found, module(fc), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), expected, atol=1e-5, rtol=1e-5)


def test_sigmoids_keep_the_order_of_very_low_logits(tmp_path):
    """Proposals that are certainly background are ordered, too; the runtime's own operator makes them equal."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")

    class Sigmoids(torch.nn.Module):
        """Both kinds."""

        def forward(self, logits):
            """See the class."""
            return sigmoid(logits), logits.sigmoid()

    logits = torch.linspace(-40, 0, 200)
    torch.onnx.export(Sigmoids(), (logits,), tmp_path / "s.onnx", dynamo=False, opset_version=17, input_names=["z"])
    ours, theirs = runtime.InferenceSession(tmp_path / "s.onnx").run(None, {"z": logits.numpy()})
    torch.testing.assert_close(torch.from_numpy(ours), torch.sigmoid(logits), rtol=1e-6, atol=0)
    assert (ours[1:] > ours[:-1]).all() and not (theirs[1:] > theirs[:-1]).all()


def test_a_difference_is_told_and_no_file_stays(tmp_path, monkeypatch):
    """A file whose boxes are off by 0.1 pixels, and one that lacks a detection; an earlier file stays as it was."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (tmp_path / "m.onnx").write_text("earlier")
    run = onnx_export.run
    monkeypatch.setattr(onnx_export, "run", lambda *pair: {**run(*pair), "boxes": run(*pair)["boxes"] + 0.1})
    with pytest.raises(UserError, match=r"m.onnx: not exported: .*image 1 of \d+ .* is missing") as error:
        bags.export_onnx(make("bags"), tmp_path / "m.onnx")
    assert "\n" not in str(error.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_comparison_ignores_the_order_and_what_rounding_decides():
    """Two equal scores swapped; a last one at the threshold; but no other label and no box elsewhere."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 20, 30, 30], [50, 50, 60, 60]])
    ours = {"boxes": boxes, "scores": torch.tensor([0.9, 0.9, 0.50005]), "labels": torch.tensor([1, 1, 2])}
    order = torch.tensor([1, 0])
    theirs = {key: value[order] for key, value in ours.items()}
    image = torch.zeros(3, 64, 64)
    same = compare(lambda image: ours, theirs, image, 0.5, 100)
    assert (same.problem, same.undecided, same.detections) == ("", 1, 3)
    other = {**theirs, "labels": torch.tensor([1, 2])}
    assert "label 1 with score 0.9000" in compare(lambda image: ours, other, image, 0.5, 100).problem
    without = {key: value[:1] for key, value in ours.items()}
    assert "(20.00, 20.00, 30.00, 30.00) is missing" in compare(lambda image: ours, without, image, 0.5, 100).problem


def test_resizing_pasting_and_suppression():
    """Against torch, the released code's resizing, the eager pasting and `nms`."""
    torch.manual_seed(0)
    image = (torch.rand(3, 13, 21) * 255).round() / 255
    for size in ((13, 21), (40, 9), (1, 1), (26, 42)):
        expected = torch.nn.functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(resize(image, torch.tensor(size)), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(
            resize_levels(image, torch.tensor(size)), resize_image(image, size), atol=1e-6, rtol=0
        )
    masks, boxes = torch.rand(3, 1, 4, 4), torch.tensor([[1.3, 2, 9, 8.6], [-3, -2, 30, 40], [5, 5, 5.2, 5.1]])
    expected = paste_eagerly(crops(masks, boxes, (12, 15)), 3, (12, 15), masks)
    padded = torch.nn.functional.pad(masks[:, 0], (1, 1, 1, 1))
    torch.testing.assert_close(paste(padded, _expanded(boxes, 4), torch.tensor([12, 15])), expected, atol=1e-5, rtol=0)
    corners = torch.rand(2, 30, 2) * 20
    boxes, scores = torch.cat([corners, corners + 8], dim=2), torch.rand(2, 3, 30)
    found = suppress(boxes, scores, 5, 0.5, 0.3)
    assert not (scores[tuple(found[:, k] for k in range(3))] <= 0.3).any()
    for k in range(2):
        for c in range(3):
            rows = (scores[k, c] > 0.3).nonzero()[:, 0]
            kept = rows[nms(boxes[k, rows], scores[k, c, rows], 0.5)[:5]]
            assert set(found[(found[:, 0] == k) & (found[:, 1] == c), 2].tolist()) == set(kept.tolist())


def test_traces_of_a_detector_are_refused():
    with pytest.raises(UserError, match=r"torch.jit.trace .* use bags.export_onnx"):
        torch.jit.trace(make("bags"), [noise((60, 90))], strict=False)


def test_the_command(tmp_path, monkeypatch, capsys):
    """A checkpoint on a folder of photographs, with an override; errors of the command line are one line each."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    config = settings("bags")
    content = {"config": config_to_dict(config), "stats": STATS.to_dict(), "model": make("bags").state_dict()}
    write_checkpoint(tmp_path / "last.pth", content)
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(noise(*SIZES)):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"photos/{number}.png")

    def run(*arguments):
        """The command in this process."""
        monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "last.pth"), *map(str, arguments)])
        command.main()

    output = tmp_path / "model.onnx"
    run("--output", output, "--images", tmp_path / "photos", "test.max_detections=4")
    assert f"exported: {output}" in capsys.readouterr().out and output.is_file()
    for words, arguments in (
        (r"model.pth: expected a file name that ends in .onnx", ["--output", tmp_path / "model.pth"]),
        (r"--number 0: expected 1 or more", ["--output", output, "--number", 0]),
        (r"no such image", ["--output", output, "--images", tmp_path / "none"]),
        (r"expected one checkpoint, got 2", ["--output", output, tmp_path / "last.pth"]),
    ):
        with pytest.raises(UserError, match=words):
            run(*arguments)


def test_counts_of_labels_that_are_ids(tmp_path):
    """Ids 2 and 4 of a file, as labels of a detector of four; an id beyond them is refused."""
    annotations = [(1, 4), (2, 4), (3, 2)]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 50, "height": 50}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": c, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
            for k, c in annotations
        ],
        "categories": [{"id": 2, "name": "b"}, {"id": 4, "name": "d"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert bags.instance_counts_by_id(tmp_path / "train.json", 4) == [0, 1, 0, 2]
    with pytest.raises(UserError, match="category id 4: expected ids of 1 to 3"):
        bags.instance_counts_by_id(tmp_path / "train.json", 3)
