"""Images per second and peak memory: training, prediction, and the classifiers' stage at the size of LVIS."""

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scripts.gpu_checks.pieces import full_fp32, peak_gb, relative, reset_peak, small_config, synchronise, timed
from scripts.gpu_checks.running import Line, Place, figure, last_line, not_run, verdict

if TYPE_CHECKING:
    from bags.data.statistics import CategoryStats
    from bags.engine.features import FeatureStore

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 3
LVIS = 100_000  # images, rounded
EPOCHS = 12  # of a classifier's stage


def throughput(place: Place) -> Iterator[Line]:
    """Our training loop in fp32 and bf16 against torchvision's reference loop in fp32, loading included."""
    from scripts.benchmarks.classifier_stage import write_dataset
    from scripts.benchmarks.throughput import Sizes, idle_share, our_epoch, reference_epoch

    sizes = Sizes(96, (800, 1333), 8, 8, "fasterrcnn_resnet50_fpn")
    if not place.is_gpu:
        sizes = Sizes(2, (64, 96), 2, 0, "fasterrcnn_mobilenet_v3_large_320_fpn")
    device = torch.device(place.device)
    write_dataset(place.folder / "data", sizes.size, sizes.images)
    epochs: dict[str, Callable[[], None]] = {"reference, fp32": reference_epoch(place.folder, device, sizes)}
    for precision in ("fp32", "bf16"):
        epochs[f"ours, {precision}"] = our_epoch(place.folder, device, precision, sizes)
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for repeat in range(REPEATS + 1 if place.is_gpu else 1):  # in turn; the first round is not counted
        for name, epoch in epochs.items():
            synchronise(place)
            began = time.perf_counter()
            epoch()
            synchronise(place)
            if repeat or not place.is_gpu:
                seconds[name].append(time.perf_counter() - began)
    rates = {name: sizes.images / statistics.median(values) for name, values in seconds.items()}
    shape = f"{sizes.model}, {sizes.batch} images of {sizes.size[0]} x {sizes.size[1]} a step"
    for name, rate in rates.items():
        yield figure(name, f"{rate:.2f} images/s, {shape}", images_per_s=rate, seconds=seconds[name])
    for name, rate in list(rates.items())[1:]:
        ratio = rate / rates["reference, fp32"]
        aim = " (aim 1.5)" if name.endswith("bf16") else ""
        yield figure(f"{name} against the reference", f"{ratio:.2f} times as fast{aim}", ratio=ratio)
    for name in ("ours, bf16", "reference, fp32") if place.is_gpu else ():
        try:
            share = idle_share(epochs[name])
        except RuntimeError as error:  # a machine may forbid the profiler
            yield not_run(f"{name}: GPU idle", last_line(str(error)))
            continue
        yield figure(f"{name}: GPU idle", f"{share:.0%} of the time", share=share)


def lvis_stats(number: int) -> "CategoryStats":
    """Counts of categories that fall as LVIS's do."""
    from bags.data.statistics import CategoryStats

    counts = tuple(int(20000 / rank**1.2) + 1 for rank in range(1, number + 1))
    return CategoryStats(tuple(range(1, number + 1)), tuple(map(str, range(number))), counts, counts)


def inference(place: Place) -> Iterator[Line]:
    """Prediction of Faster R-CNN R50-FPN at LVIS's settings against torchvision's own model of equal weights."""
    from scripts.benchmarks.whole import models

    number, size = (1203, (800, 1333)) if place.is_gpu else (20, (64, 96))
    peer, ours = models(size, False, number)
    images = [torch.rand(3, *size, device=place.device) for _ in range(8 if place.is_gpu else 1)]
    ours.to(place.device, memory_format=torch.channels_last).eval()
    peer.to(place.device).eval()
    with torch.inference_mode():
        rates = {}
        for batch in (1, 8) if place.is_gpu else (1,):
            reset_peak(place)
            step = functools.partial(ours, images[:batch])
            seconds = statistics.median(timed(place, step, 5 if place.is_gpu else 1))
            rates[batch] = batch / seconds
            memory = peak_gb(place)
            held = f", peak {memory:.1f} GB" if memory else ""
            text = f"{rates[batch]:.2f} images/s, {size[0]} x {size[1]}, {number} categories{held}"
            yield figure(f"ours, {batch} at a time", text, images_per_s=rates[batch], peak_gb=memory)
        seconds = statistics.median(timed(place, lambda: peer(images[:1]), 3 if place.is_gpu else 1))
        text = f"{1 / seconds:.2f} images/s; ours is {rates[1] * seconds:.1f} times as fast"
        yield figure("torchvision, 1 at a time", text, images_per_s=1 / seconds, ratio=rates[1] * seconds)
        full_fp32()
        pair = [model(images[:1])[0] for model in (ours, peer)]
    scores = [result["scores"].double().cpu() for result in pair]
    same = len(scores[0]) == len(scores[1]) > 0
    apart = relative(*([values] for values in scores)) if same else float("inf")
    text = f"relative difference to torchvision's {apart:.1e}"
    yield verdict("scores", apart < 1e-2, text, difference=apart)


def memory(place: Place) -> Iterator[Line]:
    """Peak memory and pace of steps of R50-FPN and of the largest model, without loading, fp32 and bf16."""
    from scripts.benchmarks.large_models import NAMES, build, one_image

    size = (800, 1333) if place.is_gpu else (64, 96)
    rows: dict[str, tuple[int, ...]] = {"softmax": (2, 8), "htc_dcn": (1, 2)} if place.is_gpu else {"softmax": (1,)}
    for row, batches in rows.items():
        torch.manual_seed(0)
        detector = build(row, size).to(place.device).to(memory_format=torch.channels_last)
        images, targets = one_image(size)
        images = [image.to(place.device) for image in images]
        targets = [{key: value.to(place.device) for key, value in target.items()} for target in targets]
        for precision in ("fp32", "bf16") if place.is_gpu else ("fp32",):
            peaks: list[float] = []
            for batch in batches:
                reset_peak(place)
                step = _step_of(place, detector, precision, images * batch, targets * batch)
                seconds = statistics.median(timed(place, step, 3 if place.is_gpu else 1))
                peaks.append(peak_gb(place) or 0.0)
                text = f"{seconds:.3f} s a step, {batch / seconds:.2f} images/s, peak {peaks[-1]:.1f} GB"
                numbers = {"seconds": seconds, "images_per_s": batch / seconds, "peak_gb": peaks[-1]}
                yield figure(f"{NAMES[row]}, {precision}, {batch} image(s)", text, **numbers)
            if place.is_gpu:
                each = (peaks[1] - peaks[0]) / (batches[1] - batches[0])
                text = f"{each:.2f} GB, and {peaks[0] - batches[0] * each:.2f} GB beside the images"
                yield figure(f"{NAMES[row]}, {precision}, memory of an image", text, gb=each)
        del detector


def _step_of(place: Place, detector: Any, precision: str, images: list, targets: list) -> Callable[[], Any]:
    """A step of our training loop."""
    from bags.engine.metrics import Clock
    from bags.engine.optim import build_optimizer, train_mode
    from bags.engine.train import Run, optimisation_step

    device, config = torch.device(place.device), small_config(place, f"train.precision={precision}").train
    run = Run(detector, config, place.folder, 0, "step", {}, loss_module=detector)
    run.optimizer = build_optimizer(detector, config)
    run.scaler = torch.amp.GradScaler(place.device, enabled=False)
    train_mode(detector)
    return lambda: optimisation_step(run, images, targets, 0, 1e-6, device, Clock(device))


def classifier_stage(place: Place) -> Iterator[Line]:
    """Balanced Group Softmax from simulated features: seconds of an epoch, extrapolated to LVIS's images."""
    from bags.assembly.models import build_detector
    from bags.detectors.from_features import FromFeatures

    number, images, rows, width = (1203, 512, 1100, 1024) if place.is_gpu else (30, 16, 40, 32)
    store = _simulated_store(place.folder, number, images, rows, width)
    size = f"{store.nbytes() / images / 1e6:.2f} MB an image, {store.nbytes() / images * LVIS / 1e9:.0f} GB for all"
    yield figure("store", f"{images} simulated images of {rows} rows, one view: {size}")
    keys = ["classifier.name=group_softmax", f"detector.roi.fc={width}", "train.part=cls", "train.batch_size=16"]
    keys += [
        "detector.roi.batch_size=512",
        f"data.workers={8 if place.is_gpu else 0}",
        "detector.init_from=row:softmax",
        "name=stage",
    ]
    config = small_config(place, *keys)
    torch.manual_seed(0)
    detectors = [build_detector(config, lvis_stats(number)).to(place.device) for _ in range(12 if place.is_gpu else 2)]
    for where in ("memory of the device", "disk"):
        reset_peak(place)
        whole = store.whole(torch.device(place.device)) if where != "disk" else None
        for several in (1, len(detectors)):
            modules = [FromFeatures(detector, whole) for detector in detectors[:several]]
            seconds = _stored_epoch(place, config, store, modules, whole is not None)
            minutes = seconds / images * LVIS * EPOCHS / 60
            held = f", peak {peak_gb(place):.1f} GB" if place.is_gpu else ""
            text = f"{seconds:.2f} s an epoch of {images} images: {minutes:.1f} minutes for {EPOCHS} epochs of {LVIS:,}"
            aim = " (aim 20)" if several == 1 else ""
            numbers = {"seconds": seconds, "minutes": minutes}
            yield figure(f"{several} classifier(s), store in the {where}", f"{text}{aim}{held}", **numbers)


def _simulated_store(folder: Path, number: int, images: int, rows: int, width: int) -> "FeatureStore":
    """A store on disk whose features are slices of the same random numbers."""
    from bags.engine.features import FeatureStore, View, pool_row, shards_of
    from bags.engine.shards import Layout, Record, ShardWriter, open_shards

    layout, generator = Layout("float16", pool_row(1), View, 1, width), np.random.default_rng(0)
    features = torch.from_numpy(generator.standard_normal((4 * rows, 1, width), np.float32)).half()
    shares = np.array([rank**-1.2 for rank in range(1, number + 1)])
    store = folder / "simulated"
    store.mkdir()
    for shard, positions in enumerate(shards_of(images)):
        writer = ShardWriter(store, shard, layout)
        for position in positions:
            records = np.zeros(rows, layout.row)
            foreground = max(1, rows // 14)
            records["label"][:foreground, 0] = 1 + generator.choice(number, foreground, p=shares / shares.sum())
            first = int(generator.integers(3 * rows))
            writer.add(Record(features[first : first + rows], records, (position, False)))
        writer.close()
    return FeatureStore(store, layout, images, open_shards(store, layout, shards_of(images), "simulated"))


def _stored_epoch(place: Place, config: Any, store: "FeatureStore", modules: list, resident: bool) -> float:
    """Seconds of an epoch for all classifiers, the median of three; one before them is not counted."""
    from bags.assembly.loaders import make_loader
    from bags.assembly.stored_samples import TrainingFeatures, collate_samples
    from bags.data.samplers import TrainSampler
    from bags.engine.metrics import Clock
    from bags.engine.optim import build_optimizer, set_trained_part
    from bags.engine.train import Run, train_one_epoch

    device, roi = torch.device(place.device), config.detector.roi
    runs = []
    for module in modules:
        detector = module.detector[0]
        set_trained_part(detector, "cls")
        run = Run(detector, config.train, place.folder, 0, "stored", {}, loss_module=module)
        run.optimizer = build_optimizer(detector, config.train)
        run.scaler = torch.amp.GradScaler(place.device, enabled=False)
        runs.append(run)
    batches = TrainSampler(store.images, config.train.batch_size, 0, None)
    features = TrainingFeatures(store, 0.0, roi.batch_size, roi.positive_fraction, resident)
    loader = make_loader(config, features, batches, collate_samples)

    def epoch() -> None:
        """One epoch of all runs."""
        batches.start(0)
        total = batches.batches_in(0)
        train_one_epoch(runs, loader, device, 0, [0, total], lambda *_: None, Clock(device))

    return statistics.median(timed(place, epoch, REPEATS if place.is_gpu else 1))


def whole(place: Place) -> Iterator[Line]:
    """`benchmark.py whole`, the validation from images to scores, where this version has it."""
    if not (ROOT / "scripts/benchmarks/whole.py").exists():
        yield not_run("whole", "scripts/benchmark.py has no `whole`: see inference")
        return
    if not place.is_gpu:
        yield not_run("whole", "takes minutes without a GPU")
        return
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "whole", "--json", "--repeats", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=place.folder)
    yield verdict("whole", done.returncode == 0, f"exit code {done.returncode}: {last_line(done.stdout)}")
    for case in json.loads(done.stdout):
        text = ", ".join(f"{key} {value}" for key, value in case.items() if value is not None)
        yield figure(str(case.get("case", "case")), text, **case)
