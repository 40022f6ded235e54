"""Our training loop against the one that torchvision publishes with its detectors: same model, same data, one run."""

import argparse
import dataclasses
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from scripts.benchmarks.classifier_stage import CATEGORIES, write_dataset
from scripts.benchmarks.measuring import measure

if TYPE_CHECKING:
    import torch


class Sizes(NamedTuple):
    """An epoch, and the detector that it trains."""

    images: int
    size: tuple[int, int]  # of each image: height, width
    batch: int  # images of a step
    workers: int  # loader processes
    model: str  # of torchvision


SIZES = {
    "cpu": Sizes(16, (240, 320), 2, 0, "fasterrcnn_mobilenet_v3_large_320_fpn"),
    "cuda": Sizes(160, (800, 1333), 8, 8, "fasterrcnn_resnet50_fpn"),
}


def throughput(arguments: argparse.Namespace) -> list[dict]:
    """Epochs of a few steps: loading, forward, backward, step, and what each loop logs; without checkpoints."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SIZES[device.type]
    number, size, batch, _, name = sizes
    repeats, results = min(arguments.repeats, 15), []
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "data", size, number)
        peer = reference_epoch(Path(folder), device, sizes)
        for precision in ("fp32", "bf16") if device.type == "cuda" else ("fp32",):
            ours = our_epoch(Path(folder), device, precision, sizes)
            result = measure(precision, ours, f"torchvision's reference loop, fp32, {name}", peer, repeats)
            rates = [f"{number / seconds:.2f}" for seconds in (result["ours_s"], result["peer_s"])]
            result["case"] = (
                f"{precision}: {rates[0]} against {rates[1]} images/s, {batch} of {size[0]}x{size[1]} a step"
            )
            if device.type == "cuda":
                result["case"] += f", GPU idle {idle_share(ours):.0%} against {idle_share(peer):.0%}"
            results.append(result)
    return results


def model_and_loader(folder: Path, device: "torch.device", sizes: Sizes) -> Any:
    """One of torchvision's models with random weights, and our loader (of `folder`/data) with its configuration."""
    import torch
    import torchvision

    from bags.assembly.loaders import build_train_loader, open_index
    from bags.config.load import config_from_dict
    from bags.data.statistics import CategoryStats

    _, size, batch, workers, name = sizes
    config = config_from_dict(
        {
            "name": "throughput",
            "device": device.type,
            "output": str(folder / "runs"),
            "data": {
                "name": "data",
                "root": str(folder / "data"),
                "train": "train.json",
                "train_images": "images",
                "workers": workers,
            },
            "train": {"batch_size": batch, "lr": 1e-4, "clip_norm": 0.0, "epochs": 1},
        }
    )
    index = open_index(config, "train")
    loader = build_train_loader(config, index, CategoryStats.from_index(index))
    torch.manual_seed(0)
    settings = {"min_size": size[0], "max_size": size[1]}
    if device.type == "cpu":  # as many proposals as a CPU can take in a second
        settings |= {"box_batch_size_per_image": 32, "rpn_post_nms_top_n_train": 200, "rpn_pre_nms_top_n_train": 500}
    make = getattr(torchvision.models.detection, name)
    return make(weights=None, weights_backbone=None, num_classes=CATEGORIES + 1, **settings), loader, config


def our_epoch(folder: Path, device: "torch.device", precision: str, sizes: Sizes) -> Callable[[], None]:
    """An epoch of our loop, as scripts/train.py sets it up: channels last, logged every 20 steps."""
    import torch

    from bags.engine.metrics import Clock, Monitor
    from bags.engine.optim import build_optimizer
    from bags.engine.train import Run, train_one_epoch

    model, loader, config = model_and_loader(folder, device, sizes)
    model.to(device, memory_format=torch.channels_last)
    config = dataclasses.replace(config.train, precision=precision)
    run = Run(model, config, folder, 0, "ours", {}, loss_module=model)
    run.optimizer = build_optimizer(model, config)
    run.scaler = torch.amp.GradScaler(device.type, enabled=False)

    def epoch() -> None:
        """One epoch with this project's loop."""
        loader.batch_sampler.start(0)
        clock, total = Clock(device), len(loader)
        with Monitor(folder, "ours", config, 0, total, clock) as monitor:

            def after_step(_: object, iteration: int, losses: dict, lr: float) -> None:
                """Log the step."""
                monitor.step(iteration, 0.0, losses, lr)

            train_one_epoch([run], loader, device, 0, [0, total], after_step, clock)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return epoch


def reference_epoch(folder: Path, device: "torch.device", sizes: Sizes) -> Callable[[], None]:
    """An epoch as in torchvision's references/detection/engine.py (`train_one_epoch`, one process, no AMP)."""
    import torch
    from tqdm import tqdm

    model, ours, config = model_and_loader(folder, device, sizes)
    model.to(device)
    settings = {
        "num_workers": ours.num_workers,
        "collate_fn": ours.collate_fn,
        "persistent_workers": ours.num_workers > 0,
    }  # as ours: an epoch is short here
    sampler = ours.batch_sampler
    loader = torch.utils.data.DataLoader(ours.dataset, batch_sampler=sampler, **settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=config.train.lr, momentum=0.9, weight_decay=1e-4)

    def epoch() -> None:
        """One epoch with the reference's loop."""
        model.train()
        sampler.start(0)
        shown: dict[str, list[float]] = {}
        for images, targets in tqdm(loader, desc="theirs", file=sys.stderr):
            images = [image.to(device) for image in images]
            targets = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in t.items()} for t in targets]
            loss_dict = model(images, targets)
            losses = sum(loss for loss in loss_dict.values())
            if not math.isfinite(losses.item()):
                raise FloatingPointError("the loss is not finite")
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            for name, value in loss_dict.items():
                shown.setdefault(name, []).append(value.item())
        if device.type == "cuda":
            torch.cuda.synchronize()

    return epoch


def idle_share(epoch: Callable[[], None]) -> float:
    """The share of an epoch in which the GPU runs no kernel, from the profiler's kernel times."""
    import time

    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        epoch()
        seconds = time.perf_counter() - start
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    return max(0.0, 1 - busy / seconds)
