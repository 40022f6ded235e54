"""CONTRIBUTING's examples, applied to a copy of the project and run.

As a script, run in that copy: trains, loads and tests what the examples added, and prints what it saw.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, write_configs

pytestmark = pytest.mark.slow

FILE = r"`(?P<path>[\w./-]+)`\n\n(?P<blocks>(?:```\w+\n(?:.*\n)*?```\n\n?)+)"
OURS = (
    "tests/test_house.py",
    "tests/test_pages.py",
    "tests/config/test_settings.py",
    "tests/config/test_rows.py",
)  # the rules
NEW = {
    "bags/classifiers/label_smoothing.py",
    "bags/detectors/convnext.py",
    "configs/datasets/birds.yaml",
    "configs/methods/label_smoothing.yaml",
    "tests/classifiers/test_label_smoothing.py",
}


def examples() -> dict[str, list[tuple[str, str]]]:
    """Path -> its blocks, as (language, text)."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.finditer(FILE, text)
    blocks: dict[str, list[tuple[str, str]]] = {}
    for match in found:
        blocks.setdefault(match["path"], []).extend(re.findall(r"```(\w+)\n((?:.*\n)*?)```", match["blocks"]))
    assert sum(map(len, blocks.values())) == len(re.findall(r"```(?:python|diff|yaml)\n", text))
    return blocks


def patch(text: str, diff: str) -> str:
    """The text with a change whose unchanged and removed lines stand in exactly one place."""
    lines = [(line[:1], line[1:]) for line in diff.splitlines(keepends=True)]
    assert {sign for sign, _ in lines} <= {" ", "+", "-"}, diff
    before, after = ("".join(line for sign, line in lines if sign in kept) for kept in (" -", " +"))
    assert text.count(before) == 1, f"CONTRIBUTING changes what is not there, or is there twice:\n{before}"
    return text.replace(before, after)


def as_coco(source: Path, folder: Path) -> None:
    """The glyphs with nothing but the fields that CONTRIBUTING shows, and file names within `train` and `val`."""
    shown = json.loads(re.search(r"```json\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1])
    for split in ("train", "val"):
        content = json.loads((source / f"{split}.json").read_text())
        content = {part: [{key: e[key] for key in shown[part][0]} for e in content[part]] for part in shown}
        for image in content["images"]:
            image["file_name"] = Path(image["file_name"]).name
        shutil.copytree(source / split, folder / split)
        (folder / f"{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def seen(glyphs, tmp_path_factory):
    """What the script below saw in a copy with all examples applied."""
    folder = tmp_path_factory.mktemp("project")
    for part in ("bags", "scripts", "configs", "notebooks", "docs", "results"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests/classifiers").mkdir(parents=True)
    (folder / "tests/config").mkdir()
    pages = ("README.md", "CHANGELOG.md", "CITATION.cff")
    helpers = ("tests/conftest.py", "tests/forks.py", "tests/test_contributing.py")
    for name in ("pyproject.toml", *pages, *helpers, *OURS):
        shutil.copy(ROOT / name, folder / name)
    for path, blocks in examples().items():
        target = folder / path
        assert target.exists() == (path not in NEW), path
        for language, block in blocks:
            target.write_text(patch(target.read_text(), block) if language == "diff" else block)
    as_coco(glyphs, folder / "data/birds")
    tiny = yaml.safe_load((write_configs(folder / "tiny", glyphs) / "_base.yaml").read_text())
    row = yaml.safe_load((folder / "configs/methods/label_smoothing.yaml").read_text())
    tiny |= {"base": "configs/birds/softmax", "data": {"workers": 0}, "classifier": row["classifier"]}
    tiny["detector"] |= {"backbone_weights": None, "frozen_stages": 0}
    (folder / "smoothed.yaml").write_text(yaml.safe_dump(tiny))
    command = [sys.executable, "tests/test_contributing.py"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1]), folder


def test_a_new_classifier_is_trained_and_loaded(seen):
    """By its YAML; its value is checked; it goes on from softmax's weights; `balance` knows it."""
    facts, folder = seen
    assert facts["loaded"] == ["LabelSmoothing", 0.1] and facts["detections"] == ["boxes", "labels", "scores"]
    assert "classifier.smoothing: expected 0 <= smoothing < 1, got 1.0" in facts["refused"]
    assert facts["row"] == "label_smoothing" and facts["same_columns"] and facts["for_balance"]
    log = [json.loads(line) for line in (folder / "runs/birds/smoothed/log.jsonl").read_text().splitlines()]
    assert len([line for line in log if "loss_classifier" in line]) >= 2


def test_a_new_dataset_needs_no_more_than_is_shown(seen):
    facts, folder = seen
    assert facts["check"] == 0
    assert facts["rows"] == dict.fromkeys(("softmax", "softmax_retrained", "bags"), "birds")
    assert "AP" in json.loads((folder / "runs/birds/smoothed/metrics.json").read_text())


def test_a_new_backbone_is_a_detectors(seen):
    """ConvNeXt-T on 64 x 64 pixels: maps, RoIs, detections; frozen stages; torchvision's names of weights."""
    facts, _ = seen
    assert facts["maps"] == [[16, 16], [8, 8], [4, 4], [2, 2], [1, 1]]
    assert facts["losses_finite"] and facts["boxes"] == 4
    assert facts["frozen"] == ["0", "1", "2", "3"]  # stem, stage, downsampling, stage
    assert facts["torchvisions_names"]


def test_the_examples_keep_the_rules(seen):
    """Their own tests, the rules of test_house.py with the page on architecture, and ruff."""
    facts, folder = seen
    assert facts["tests"] == 0
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *check, "."], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def script(name: str, *arguments: str) -> int:
    """A script's exit code, in this process."""
    sys.argv = [name, *arguments]
    try:
        runpy.run_path(f"scripts/{name}.py", run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def look() -> dict:
    """Runs what the examples added; the working directory is the copy."""
    import torch
    import torchvision

    import bags
    from bags.classifiers import classifier_settings
    from bags.detectors.backbones import build_backbone

    assert Path(bags.__file__).is_relative_to(Path.cwd())
    facts: dict = {"check": script("prepare_data", "check", "configs/birds")}
    assert script("train", "smoothed.yaml", "train.epochs=1") == 0
    detector, _ = bags.load_detector("runs/birds/smoothed/last.pth")
    classifier = detector.roi_heads.classifier
    facts["loaded"] = [type(classifier).__name__, classifier.smoothing]
    facts["detections"] = sorted(detector([torch.rand(3, 64, 64)])[0])
    try:
        bags.load_config("smoothed.yaml", ["classifier.smoothing=1"])
    except bags.UserError as error:
        facts["refused"] = str(error)
    rows = ("softmax", "softmax_retrained", "bags")
    facts["rows"] = {name: bags.load_config(f"configs/birds/{name}").data.name for name in rows}
    smoothed = bags.load_config("configs/glyphs-100/label_smoothing")
    softmax = bags.load_config("configs/birds/softmax")
    facts["for_balance"] = not classifier_settings()["label_smoothing"].fitted
    facts["row"] = smoothed.classifier.name
    stats = bags.CategoryStats((1, 2), ("a", "b"), (5, 6), (5, 6))
    facts["same_columns"] = smoothed.classifier.columns(stats) == softmax.classifier.columns(stats)

    keys = ["detector.backbone=convnext_tiny", "detector.min_size=64", "detector.max_size=64", "detector.roi.fc=16"]
    config = bags.load_config("configs/birds/softmax", [*keys, "detector.fpn_channels=16"])
    model = bags.build_detector(config, stats)
    image = torch.rand(3, 64, 64)
    target = {"boxes": torch.tensor([[8.0, 8, 40, 48]]), "labels": torch.tensor([1])}
    facts["losses_finite"] = all(loss.isfinite() for loss in model([image], [target]).values())
    boxes = model.eval()([image])[0]["boxes"]
    facts["boxes"] = boxes.shape[1]
    facts["maps"] = [list(m.shape[-2:]) for m in model.backbone(image[None]).values()]
    frozen = build_backbone("convnext_tiny", 16, 3, False, 2).body
    facts["frozen"] = sorted({name.split(".")[0] for name, p in frozen.named_parameters() if not p.requires_grad})
    with torch.device("meta"):
        names = torchvision.models.convnext_tiny().state_dict()
    facts["torchvisions_names"] = {f"features.{name}" for name in frozen.state_dict()} <= set(names)
    plugins = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    tests = ["tests/classifiers/test_label_smoothing.py", *OURS]
    facts["tests"] = int(pytest.main(["-q", "-n0", *plugins, "-k", "not links and not found", *tests]))
    return facts


if __name__ == "__main__":
    print(json.dumps(look()))
