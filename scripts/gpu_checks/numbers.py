"""Does the GPU compute the CPU's numbers? In float64, where nothing but a fault differs, and in float32 without TF32.

In float32 two proposals of nearly equal scores may change places. This changes which are drawn, so that losses
differ for a reason that is no fault. Each float32 case has three seeds, of which two must agree.
"""

import copy
import importlib.util
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from scripts.gpu_checks.pieces import (
    FEW_FRAMEWORKS,
    FRAMEWORKS,
    agreeing_draws,
    batch_of,
    full_fp32,
    pieces,
    relative,
    small_config,
    synchronise,
    timed,
)
from scripts.gpu_checks.running import Line, Place, figure, not_run, verdict

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pycocotools", "hotcoco", "orjson", "triton", "lvis")
CLOSE = {torch.float64: 1e-5, torch.float32: 1e-3}  # relative differences of losses and gradients


def environment(place: Place) -> Iterator[Line]:
    """Versions, GPU, driver, cores."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "copied in" if importlib.util.find_spec(name) else "missing"
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    yield figure("packages", f"Python {platform.python_version()}, {text}", **found)
    yield figure("machine", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.platform()}")
    if not place.is_gpu:
        yield not_run("GPU", "torch sees none: tiny sizes on the CPU")
        return
    about = torch.cuda.get_device_properties(0)
    memory = about.total_memory / 1e9
    versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    text = f"{about.name}, {memory:.0f} GB, {about.multi_processor_count} multiprocessors, {versions}"
    yield figure("GPU", text, gpu=about.name, gb=round(memory, 1), cuda=torch.version.cuda)
    values = torch.rand(1000, 1000, device="cuda")
    yield verdict("a product", bool((values @ values).isfinite().all()), "of two matrices is finite")
    yield verdict("bf16", torch.cuda.is_bf16_supported(), "is supported by this GPU")


class _Counts:
    """Training counts of 60 categories, as `ClassifierSettings.build` takes them."""

    category_ids = tuple(range(1, 61))
    instance_counts = tuple(int(5000 / rank**1.7) + 1 for rank in range(1, 61))
    image_counts = tuple(int(4000 / rank**1.7) + 1 for rank in range(1, 61))
    num_categories = 60


def classifiers(place: Place) -> Iterator[Line]:
    """Loss, gradients and scores of every classifier that is trained or fitted."""
    from bags.classifiers import classifier_settings
    from bags.classifiers.base import BoxFeatures

    full_fp32()
    for name, settings in classifier_settings().items():
        if settings.combines:
            continue
        torch.manual_seed(0)
        classifier = settings().build(64, 8 * 49, _Counts())
        pooled, labels = torch.randn(128, 8, 7, 7), torch.randint(0, 61, (128,))
        results = []
        for device in ("cpu", place.device):
            features = BoxFeatures(pooled.to(device), pooled.flatten(1)[:, :64].to(device))
            module, results_here = copy.deepcopy(classifier).to(device), []
            with agreeing_draws(1):
                if settings.fitted:
                    module.fit([(features, labels.to(device))])
                logits = module(features)
                results_here.append(module.probs(logits))
                if settings.trained:
                    losses = module.loss(logits, labels.to(device))
                    torch.stack(list(losses.values())).sum().backward()
                    results_here += [*losses.values(), *(p.grad for p in module.parameters() if p.grad is not None)]
            results.append(results_here)
        apart = relative(*results)
        yield verdict(name, apart < 1e-4, f"fp32, relative difference {apart:.1e}", difference=apart)


def steps(place: Place) -> Iterator[Line]:
    """Losses and gradients of a training step of every framework, with softmax and Balanced Group Softmax."""
    full_fp32()
    for framework in FRAMEWORKS if place.is_gpu else FEW_FRAMEWORKS:
        for classifier in ("softmax", "group_softmax"):
            yield _compared_steps(place, f"{framework}, {classifier}", torch.float64, _keys(framework, classifier), 1)
        seeds = 3 if place.is_gpu else 1
        keys = _keys(framework, "group_softmax")
        yield _compared_steps(place, f"{framework}, group_softmax", torch.float32, keys, seeds)
    if place.is_gpu:
        deep = ["detector.backbone=resnet18", "detector.rpn.anchor_sizes=[[8], [16], [32], [64], [128]]"]
        keys = [*_keys("htc", "group_softmax"), *deep, "detector.deformable_stages=[3, 4]"]
        yield _compared_steps(place, "htc, ResNet-18 with deformable stages", torch.float64, keys, 1)
        large = ["detector.backbone=resnet50", *deep[1:], "detector.min_size=320", "detector.max_size=320"]
        keys = [*_keys("mask_rcnn", "softmax"), *large, "train.batch_size=2"]
        yield _compared_steps(place, "mask_rcnn, ResNet-50 with 320 pixels", torch.float32, keys)


def _keys(framework: str, classifier: str) -> list[str]:
    """The overrides of a framework and a classifier."""
    return [f"detector.framework={framework}", f"classifier.name={classifier}"] + (
        ["classifier.boundaries=[5, 10]"] if classifier == "group_softmax" else []
    )


def _compared_steps(place: Place, title: str, dtype: torch.dtype, keys: list[str], seeds: int = 3) -> Line:
    """A step on both devices for each seed; most must agree."""
    apart = []
    for seed in range(seeds):
        config = small_config(place, *keys, f"seed={seed}")
        detector, loader, _ = pieces(config)
        results = [step_numbers(detector, config, loader, device, dtype, seed) for device in ("cpu", place.device)]
        names = results[0][0].keys()
        if names != results[1][0].keys():
            return verdict(title, False, f"other losses: {sorted(names ^ results[1][0].keys())}")
        losses = relative(*([loss[name] for name in names] for loss, _ in results))
        apart.append((losses, relative(*(gradients for _, gradients in results))))
    close = sum(max(losses, gradients / 10) < CLOSE[dtype] for losses, gradients in apart)
    text = "; ".join(f"losses {losses:.1e}, gradients {gradients:.1e}" for losses, gradients in apart)
    return verdict(
        f"{title}, {str(dtype).removeprefix('torch.')}",
        2 * close > seeds,
        f"relative differences for each seed: {text}",
        differences=apart,
    )


def step_numbers(
    detector: Any, config: Any, loader: Any, device: str, dtype: torch.dtype, seed: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Losses by name, and the gradients, of one step of a copy of the detector."""
    from bags.engine.optim import set_trained_part, train_mode

    model = copy.deepcopy(detector).to(device, dtype)
    set_trained_part(model, "all")
    train_mode(model)
    images, targets = batch_of(config, loader, device, dtype)
    with agreeing_draws(seed):
        losses = model(images, targets)
        torch.stack([loss.to(dtype) for loss in losses.values()]).sum().backward()
    # Parameters without a gradient on one device only would be a difference: they count as zeros.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def detections(place: Place) -> Iterator[Line]:
    """Boxes, scores, labels and masks that every framework detects."""
    full_fp32()
    for framework in FRAMEWORKS if place.is_gpu else FEW_FRAMEWORKS:
        for dtype, share, tolerance in ((torch.float64, 1.0, 1e-4), (torch.float32, 0.95, 1e-2)):
            config = small_config(place, *_keys(framework, "group_softmax"))
            detector, loader, _ = pieces(config)
            results = []
            for device in ("cpu", place.device):
                model = copy.deepcopy(detector).to(device, dtype).eval()
                images, _ = batch_of(config, loader, device, dtype)
                with torch.inference_mode():
                    results.append([{k: v.cpu().double() for k, v in image.items()} for image in model(images)])
            number = sum(len(image["labels"]) for image in results[0])
            equal = sum(_same(ours, theirs, tolerance) for ours, theirs in zip(*results, strict=True))
            yield verdict(
                f"{framework}, {str(dtype).removeprefix('torch.')}",
                number > 0 and equal >= share * number,
                f"{equal} of {number} detections are the same to {tolerance:g} pixels and {tolerance / 10:g} in score",
                same=equal,
                number=number,
            )


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> int:
    """How many of our detections of an image are among theirs: label, box and score, and the mask's mean."""
    if not len(ours["labels"]) or not len(theirs["labels"]):
        return 0
    same = ours["labels"][:, None] == theirs["labels"]
    same &= (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(2) <= tolerance
    same &= (ours["scores"][:, None] - theirs["scores"]).abs() <= tolerance / 10
    if "masks" in ours:
        means = [image["masks"].flatten(1).mean(1) for image in (ours, theirs)]
        same &= (means[0][:, None] - means[1]).abs() <= tolerance
    return int(same.any(1).sum())


def postprocess(place: Place) -> Iterator[Line]:
    """Detections from the same scores, and run-length encoded masks, at LVIS's size."""
    proposals, categories = (1000, 1203) if place.is_gpu else (60, 40)
    for name, dtype, moved in (
        ("shifted boxes, float32", torch.float32, False),  # without exp, whose last bit may differ
        ("any boxes, float32", torch.float32, True),
        ("any boxes, float64", torch.float64, True),
    ):
        case = _case(proposals, categories, moved)
        both = [_select([value.to(device, dtype) for value in case]) for device in ("cpu", place.device)]
        boxes, scores, labels = zip(*([value.cpu() for value in result] for result in both), strict=True)
        bits = all(torch.equal(*pair) for pair in (boxes, scores, labels))
        whole = len(labels[0]) == len(labels[1]) > 0
        equal = int(((labels[0] == labels[1]) & (scores[0] == scores[1])).sum()) if whole else 0
        apart = float((boxes[0] - boxes[1]).abs().max()) if whole else float("nan")
        good = equal >= (0.99 if dtype == torch.float32 else 1) * len(labels[0]) and whole
        text = f"{equal} of {len(labels[0])} labels and scores are equal, boxes differ by at most {apart:.1e} pixels"
        yield verdict(name, good, f"{text}; bit for bit: {'yes' if bits else 'no'}", bits=bits, equal=equal)
    on_device = [value.to(place.device) for value in _case(proposals, categories, True)]
    synchronise(place)
    seconds = min(timed(place, lambda: _select(on_device), 5))
    yield figure("seconds of an image", f"{1e3 * seconds:.1f} ms, {proposals} x {categories}", seconds=seconds)
    yield from _masks(place)


def _case(proposals: int, categories: int, moved: bool) -> list[Tensor]:
    """(scores, deltas, proposals) of an image. moved: sizes change, too."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(proposals, categories + 1, generator=generator).mul(2).softmax(1)
    deltas = torch.randn(proposals, categories + 1, 4, generator=generator) / 2
    if not moved:
        deltas[..., 2:] = 0
    corners = torch.rand(proposals, 2, generator=generator) * torch.tensor([1000.0, 600.0])
    sides = 10 + torch.rand(proposals, 2, generator=generator) * 200
    return [scores, deltas.flatten(1), torch.cat([corners, corners + sides], 1)]


def _select(case: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Our 300 detections."""
    from bags.detectors.postprocess import select_detections
    from bags.detectors.torchvision_private import BoxCoder

    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    first, second, third = case
    return select_detections(first, second, third, (800, 1333), coder, 0.0, 0.5, 300)


def _masks(place: Place) -> Iterator[Line]:
    """Masks pasted into an image and encoded, from the same probabilities."""
    from pycocotools import mask as coco_mask

    from bags.detectors.masks import crops, encode

    number, size = (300 if place.is_gpu else 10), (800, 1333)
    generator = torch.Generator().manual_seed(0)
    masks = torch.nn.functional.interpolate(torch.rand(number, 1, 4, 4, generator=generator), size=28, mode="bilinear")
    corners = torch.rand(number, 2, generator=generator) * torch.tensor([1000.0, 500.0])
    boxes = torch.cat([corners, corners + 16 + torch.rand(number, 2, generator=generator) * 300], 1)
    codes = [encode(crops(masks.to(device), boxes.to(device), size), size) for device in ("cpu", place.device)]
    equal = sum(own == other for own, other in zip(*codes, strict=True))
    shares = [coco_mask.iou([own], [other], [0])[0][0] for own, other in zip(*codes, strict=True) if own != other]
    least = min(shares, default=1.0)
    text = f"{equal} of {number} encoded masks are equal, least IoU of the others {least:.4f}"
    yield verdict("masks", least > 0.98, text, equal=equal, least_iou=least)
