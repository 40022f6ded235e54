"""Training a classifier from stored features, extraction included, against running the detector in every epoch."""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scripts.benchmarks.measuring import coco_object

if TYPE_CHECKING:
    import torch

    from bags.config.sections import Config
    from bags.engine.train import Run

EPOCHS, CATEGORIES, OBJECTS, SWEEP = 12, 1230, 12, 12
SIZES = {"cpu": ((480, 800), 20), "cuda": ((800, 1333), 200)}  # of the images, and how many


def classifier_stage(arguments: argparse.Namespace) -> list[dict]:
    """Faster R-CNN R50-FPN with 1,230 categories, 12 epochs; a live epoch is measured thrice and counted 12 times."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, number = ((800, 1333), 12) if arguments.full and device.type == "cpu" else SIZES[device.type]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "data", size, number)
        config = stage_config(folder, size, device)
        train_once(config, "warm", live=True, epochs=1, device=device)
        live, stages = [], {}
        cases = {"one view": (False, 1), "both flips": (True, 1), f"sweep of {SWEEP}": (False, SWEEP)}
        for title, (mirrored, classifiers) in cases.items():
            live.append(train_once(config, f"live {title}", live=True, epochs=1, device=device)["s"])
            stages[title] = train_once(config, title, False, EPOCHS, device, mirrored, classifiers)
        peer = EPOCHS * statistics.median(live)
        shape = f"{number} images of {size[0]}x{size[1]}"
        for title, stage in stages.items():
            print(
                f"{title}: extraction {stage['extraction_s']:.1f} s, {EPOCHS} epochs {stage['training_s']:.1f} s, "
                f"{stage['bytes'] / number / 1e6:.2f} MB an image",
                file=sys.stderr,
            )
        results = [
            {
                "case": f"{title}, {shape}",
                "ours_s": stage["s"] / cases[title][1],
                "peer": "live, each classifier",
                "peer_s": peer,
                "ratio": peer / (stage["s"] / cases[title][1]),
                "identical": None,
            }
            for title, stage in stages.items()
        ]
        return [*results, reading(stages["one view"], device)]


def write_dataset(folder: Path, size: tuple[int, int], number: int) -> None:
    """Images of smooth noise with random boxes."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for k in range(1, number + 1):
        pixels = generator.integers(0, 256, (size[0] // 16, size[1] // 16, 3), np.uint8)
        Image.fromarray(pixels).resize(size[::-1]).save(folder / "images" / f"{k}.jpg")
        images.append({"id": k, "file_name": f"{k}.jpg", "height": size[0], "width": size[1]})
        for _ in range(OBJECTS):
            x, y = generator.uniform(0, size[1] * 0.7), generator.uniform(0, size[0] * 0.7)
            box = [x, y, *generator.uniform(16, 0.3 * min(size), 2)]
            category = int(generator.integers(1, CATEGORIES + 1))
            annotations.append(coco_object(len(annotations) + 1, k, category, box))
    categories = [{"id": c, "name": str(c)} for c in range(1, CATEGORIES + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))


def stage_config(folder: Path, size: tuple[int, int], device: "torch.device") -> "Config":
    """BAGS on a detector whose weights are random: they cost as much as trained ones."""
    import torch

    from bags.assembly.loaders import open_index
    from bags.assembly.models import build_detector
    from bags.config.load import config_from_dict, config_to_dict
    from bags.data.statistics import CategoryStats
    from bags.engine.checkpoint import save_checkpoint

    torch.manual_seed(0)
    workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    data = {
        "name": "data",
        "root": str(folder / "data"),
        "train": "train.json",
        "val": "train.json",
        "train_images": "images",
        "val_images": "images",
        "workers": workers,
    }
    config = config_from_dict(
        {
            "name": "softmax",
            "data": data,
            "output": str(folder / "runs"),
            "detector": {"min_size": size[0], "max_size": size[1], "backbone_weights": None},
        }
    )
    stats = CategoryStats.from_index(open_index(config, "train"))
    detector = build_detector(config, stats)
    config.run_folder.mkdir(parents=True)
    about = {"config": config_to_dict(config), "stats": stats.to_dict(), "init": None}
    save_checkpoint(config.run_folder / "last.pth", {**about, "model": detector.state_dict(), "iteration": 0})
    tree = config_to_dict(config)
    tree["detector"] |= {"init_from": "row:softmax"}
    tree["classifier"] = {"name": "group_softmax"}
    tree["train"] |= {"part": "cls", "epochs": EPOCHS, "batch_size": 4, "lr": 0.01}
    return config_from_dict(tree)


def train_once(
    config: "Config",
    name: str,
    live: bool,
    epochs: int,
    device: "torch.device",
    mirrored: bool = False,
    classifiers: int = 1,
) -> dict[str, Any]:
    """Trains runs of a name as scripts/train.py does, without prediction: seconds, bytes of the store."""
    import torch

    from bags.assembly import stored as cached
    from bags.assembly.loaders import build_train_loader, open_index
    from bags.data.statistics import CategoryStats
    from bags.engine.train import train
    from bags.jobs.train import begin

    features: Literal["live", "cached"] = "live" if live else "cached"
    folder = str(Path(config.output) / f"{name}.features")
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, epochs=epochs, features=features),
        store=dataclasses.replace(config.store, mirrored=mirrored, folder=folder),
    )
    index = open_index(config, "train")
    stats = CategoryStats.from_index(index)
    named = [dataclasses.replace(config, name=f"{name} {k}", seed=k) for k in range(classifiers)]
    runs = [begin(of_run, index, stats, device) for of_run in named]
    loader = build_train_loader(config, index, stats)
    start = time.perf_counter()
    if not live:
        loader = cached.training_loader(config, runs, loader, device)
    extracted = time.perf_counter()
    train(runs, loader, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    end = time.perf_counter()
    fc = sorted((Path(folder) / "train").glob("*.fc"))
    return {
        "s": end - start,
        "extraction_s": extracted - start,
        "training_s": end - extracted,
        "bytes": sum(path.stat().st_size for path in fc),
        "files": fc,
        "loader": loader,
        "runs": runs,
        "config": config,
    }


def reading(stage: dict, device: "torch.device") -> dict:
    """An epoch from a store that is only on disk, against the slower of reading the store and computing in memory."""
    from bags.assembly.loaders import make_loader
    from bags.assembly.stored_samples import TrainingFeatures, collate_samples
    from bags.engine.metrics import Clock
    from bags.engine.train import train_one_epoch

    runs, config, data = stage["runs"], stage["config"], stage["loader"].dataset
    roi, batches = config.detector.roi, stage["loader"].batch_sampler
    data = TrainingFeatures(data.store, data.flip, roi.batch_size, roi.positive_fraction, resident=False)
    loader = make_loader(config, data, batches, collate_samples)  # on a GPU the other one reads nothing

    def after_step(run: "Run", iteration: int, losses: dict, lr: float) -> None:
        """Waits for the step."""
        float(sum(losses.values()))

    def epoch(source: Any) -> float:
        """Seconds of one epoch."""
        batches.start(0)
        start = time.perf_counter()
        train_one_epoch(runs, source, device, 0, [0, len(kept)], after_step, Clock(device))
        return time.perf_counter() - start

    batches.start(0)
    kept = list(loader)
    runs[0].done, times = 0, []
    for _ in range(5):
        computed = epoch(kept)
        forget(stage["files"])
        read = read_through(stage["files"])
        forget(stage["files"])
        times.append((epoch(loader), read, computed))
    actual, read, computed = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "case": f"an epoch ({stage['bytes'] / 1e6:.0f} MB)",
        "ours_s": actual,
        "peer": f"reading the store ({read:.2f} s) or computing in memory ({computed:.2f} s), the slower",
        "peer_s": max(read, computed),
        "ratio": max(read, computed) / actual,
        "identical": None,
    }


def forget(files: list[Path]) -> None:
    """Takes files out of the system's memory."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(files: list[Path]) -> float:
    """Seconds of reading files from beginning to end."""
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(2**23):
                pass
    return time.perf_counter() - start
