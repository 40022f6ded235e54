"""Whole jobs: commands on a GPU, a killed run that is resumed, stored features, and the library's calls."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from scripts.gpu_checks.pieces import full_fp32, relative, small_config
from scripts.gpu_checks.running import Line, Place, end, figure, last_line, start, verdict

WORDS = 120.0  # seconds that a command may take; with --deterministic a GPU compiles RoIAlign first


def call(verb: str, *arguments: str) -> None:
    """Run a verb of the command line in this process, to its exit."""
    from bags import cli

    sys.argv = [f"bags {verb}", *arguments]
    cli.run(verb)


def command(place: Place, log: Path, verb: str, *arguments: str) -> tuple[int | None, str]:
    """Run a verb in a process of its own: its exit code, None where it takes too long, and the end of its output."""
    process = start(place, log, call, verb, *arguments)
    process.join(WORDS)
    end(process)
    return process.exitcode, last_line(log.read_text(errors="replace"))


def write_rows(place: Place, *overrides: str) -> Path:
    """The rows softmax, bags and softmax_retrained of the small detector, in a folder of configurations."""
    from bags.config.load import config_to_dict

    folder = place.folder / "configs"
    folder.mkdir(exist_ok=True)
    tree = config_to_dict(small_config(place, f"data.workers={2 if place.is_gpu else 0}", *overrides))
    del tree["name"]
    source, groups = {"init_from": "row:softmax"}, {"name": "group_softmax", "boundaries": [5, 10]}
    rows: dict[str, dict] = {
        "_base": tree,
        "softmax": {"base": "_base.yaml"},
        "bags": {"base": "_base.yaml", "detector": source, "classifier": groups, "train": {"part": "cls"}},
        "softmax_retrained": {
            "base": "_base.yaml",
            "detector": {**source, "reset_classifier": True},
            "train": {"part": "cls"},
        },
    }
    for name, content in rows.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def resume(place: Place) -> Iterator[Line]:
    """`bags train --deterministic`: killed after a checkpoint and repeated, against undisturbed; equal bits."""
    from bags.engine.checkpoint import load_checkpoint

    steps = [f"train.epochs={30 if place.is_gpu else 3}", "train.milestones=[2]", "train.checkpoint_every=3"]
    row = str(write_rows(place, *steps) / "softmax.yaml")
    outputs = [place.folder / name for name in ("calm", "killed")]
    calm, killed = ([row, f"output={output}", "--deterministic"] for output in outputs)
    code, said = command(place, place.folder / "calm.log", "train", *calm)
    yield verdict("undisturbed", code == 0, f"exit code {code}: {said}")
    folder = outputs[1] / "small/softmax"
    process = start(place, place.folder / "killed.log", call, "train", *killed)
    deadline = time.perf_counter() + WORDS
    while not (folder / "last.pth").exists() and process.is_alive() and time.perf_counter() < deadline:
        time.sleep(0.002)
    end(process)
    unfinished = process.exitcode == -9 and not (folder / "metrics.json").exists()
    yield verdict("killed", unfinished, f"exit code {process.exitcode}, after its first checkpoint")
    before = load_checkpoint(folder / "last.pth")["iteration"]
    code, said = command(place, place.folder / "resumed.log", "train", *killed)
    yield verdict("resumed", code == 0, f"from iteration {before}, exit code {code}: {said}")
    both = [load_checkpoint(output / "small/softmax/last.pth") for output in outputs]
    weights = [state["model"] for state in both]
    momenta = [state["optimizer"]["state"] for state in both]
    other = [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])]
    same = all(torch.equal(momenta[0][k]["momentum_buffer"], momenta[1][k]["momentum_buffer"]) for k in momenta[0])
    apart = relative(*([w for w in state.values() if w.is_floating_point()] for state in weights))
    text = f"{len(other)} of {len(weights[0])} tensors differ (relatively {apart:.1e}), momenta equal: {same}"
    yield verdict("bits", not other and same and before < both[0]["iteration"] == both[1]["iteration"], text)
    texts = [(output / "small/softmax/metrics.json").read_text() for output in outputs]
    yield verdict("metrics", texts[0] == texts[1], "are equal" if texts[0] == texts[1] else "differ")


def job(place: Place) -> Iterator[Line]:
    """`bags train` of three rows on images that can be learned by heart, then `evaluate`, `predict` and `report`."""
    epochs = ["train.epochs=100", "train.milestones=[80]"] if place.is_gpu else ["train.epochs=1"]
    schedule = ["train.optimizer=adamw", "train.lr=0.002", "train.warmup_iterations=20", *epochs]
    folder = write_rows(place, *schedule, "train.checkpoint_every=1000")
    output, log = place.folder / "runs", place.folder / "command.log"
    learning = ["train.dead=ignore"] if not place.is_gpu else []
    code, said = command(place, log, "train", str(folder), f"output={output}", *learning)
    yield verdict("train", code == 0, f"exit code {code}: {said}")
    metrics = {
        row: json.loads((output / "small" / row / "metrics.json").read_text())
        for row in ("softmax", "softmax_retrained", "bags")
    }
    numbers = ", ".join(f"{row} {values['AP50']:.3f}" for row, values in metrics.items())
    learned = metrics["softmax"]["AP50"] > 0.5 or not place.is_gpu
    yield verdict("AP50", learned, numbers, **{row: values["AP50"] for row, values in metrics.items()})
    checkpoint = str(output / "small/bags/last.pth")
    code, said = command(place, log, "evaluate", checkpoint, "--output", str(place.folder / "evaluated"))
    yield verdict("evaluate", code == 0, f"exit code {code}: {said}")
    images = str(place.folder / "data/images")
    code, said = command(place, log, "predict", checkpoint, images, "--output", str(place.folder / "drawn"))
    yield verdict("predict", code == 0, f"exit code {code}: {said}")
    code, said = command(place, log, "report", str(output / "small/bags"))
    yield verdict("report", code == 0, f"exit code {code}: {said}")


def stored(place: Place) -> Iterator[Line]:
    """A classifier from features that were stored on the GPU: whole store on the GPU, and batches from disk."""
    from bags.detectors.from_features import FromFeatures

    full_fp32()
    runs = {}
    for name, keys in (("softmax", ()), ("bags", ("classifier.name=group_softmax", "classifier.boundaries=[5, 10]"))):
        for number, where in enumerate((place.device, "cpu")):
            run, seconds = _train_stored(place, f"{name}_{number}", torch.device(where), *keys)
            module = run.loss_module
            assert isinstance(module, FromFeatures)
            resident = module.resident is not None and module.resident.data.device.type
            wanted = where == "cuda" and "cuda"
            text = f"store on {resident or 'disk'}, trained in {seconds:.1f} s"
            yield verdict(f"{name}, trained on {where}", (resident or False) == wanted, text)
            runs[name, number] = [p.detach() for p in module.stages.parameters() if p.requires_grad]
    apart = relative(runs["softmax", 0], runs["softmax", 1])
    yield verdict("softmax on both", apart < 1e-4, f"relative difference of the weights {apart:.1e}", difference=apart)
    finite = all(bool(p.isfinite().all()) for p in runs["bags", 0])  # it draws others on each device
    apart = relative(runs["bags", 0], runs["bags", 1])
    yield verdict("bags on both", finite and apart < 0.5, f"draws differ; relative difference {apart:.1e}")


def _train_stored(place: Place, name: str, device: torch.device, *keys: str) -> tuple[Any, float]:
    """Train a classifier on stored features, which the first call makes; (run, seconds of the training)."""
    from bags.assembly.loaders import build_train_loader, open_index
    from bags.assembly.stored import training_loader
    from bags.config.load import config_to_dict
    from bags.data.statistics import CategoryStats
    from bags.engine.checkpoint import save_checkpoint
    from bags.engine.train import train
    from bags.jobs.train import begin

    source = small_config(place, "train.warmup_iterations=0")
    index = open_index(source, "train")
    stats = CategoryStats.from_index(index)
    if not (source.run_folder / "last.pth").exists():
        from bags.assembly.models import build_detector

        torch.manual_seed(0)
        source.run_folder.mkdir(parents=True)
        about = {"config": config_to_dict(source), "stats": stats.to_dict(), "init": None}
        state = build_detector(source, stats).state_dict()
        save_checkpoint(source.run_folder / "last.pth", {**about, "model": state, "iteration": 0})
    named = [f"name={name}", "detector.init_from=row:softmax", "train.part=cls", f"device={device.type}"]
    config = small_config(place, *named, *keys)
    run = begin(config, index, stats, device)
    loader = training_loader(config, [run], build_train_loader(config, index, stats), device)
    began = time.perf_counter()
    train([run], loader, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return run, time.perf_counter() - began


def library(place: Place) -> Iterator[Line]:
    """`bags.balance` and `bags.choose_classifier` on a torchvision detector that is on the GPU."""
    import torchvision

    import bags
    from scripts.gpu_checks.pieces import batch_of, pieces

    torch.manual_seed(0)
    config = small_config(place)
    _, loader, stats = pieces(config)
    sizes = {"min_size": 64, "max_size": 64, "rpn_post_nms_top_n_train": 60, "rpn_post_nms_top_n_test": 30}
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=stats.num_categories + 1, **sizes
    ).to(place.device)
    batches = [batch_of(config, loader, "cpu", torch.float32) for _ in range(2)]
    batches = [(images, [{k: t[k] for k in ("boxes", "labels")} for t in targets]) for images, targets in batches]
    rows = {"control": ("softmax",), "bags": ("group_softmax",), "seesaw": ("seesaw",)}
    counts = list(stats.instance_counts)
    choice = bags.choose_classifier(
        detector, batches, batches, counts, rows=rows, epochs=2, folds=2, draws=20, lr=0.001
    )
    devices = {p.device.type for classifier in choice.classifiers.values() for p in classifier.parameters()}
    text = f"chose {', '.join(choice.shares)}; weights on {', '.join(sorted(devices))}"
    yield verdict("choose_classifier", devices <= {place.device}, text)
    bags.balance(detector, counts)
    images, targets = batch_of(config, loader, place.device, torch.float32)
    losses = detector.train()(images, targets)
    torch.stack(list(losses.values())).sum().backward()
    learned = [name for name, p in detector.named_parameters() if p.grad is not None]
    finite = all(bool(loss.isfinite()) for loss in losses.values())
    good = finite and bool(learned) and all("classifier" in name for name in learned)
    yield verdict("balance", good, f"losses {', '.join(losses)}; gradients of {', '.join(learned)}")
    with torch.inference_mode():
        number = sum(len(image["labels"]) for image in detector.eval()(images))
    yield figure("detections", f"{number} in {len(images)} images")
