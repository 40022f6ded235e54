"""Memory and seconds of a training step of the paper's models, and the images of a step that a GPU holds."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bags.core.errors import UserError
from scripts.benchmarks.measuring import in_process, status_mb

if TYPE_CHECKING:
    import torch

NAMES = {
    "softmax": "Faster R-CNN, R50",
    "large": "Faster R-CNN, X101",
    "cascade": "Cascade R-CNN, X101",
    "cascade_mask": "Cascade Mask R-CNN, X101",
    "htc": "HTC, X101",
    "htc_dcn": "HTC-DCN, X101",
}
CATEGORIES, SEMANTIC_CLASSES = 1230, 183  # those of LVIS v0.5 and of COCO-Stuff
OBJECTS = 128  # in the image: as many as the most foreground proposals that a stage learns from
GPUS = (24, 40, 80)  # GB
MARGIN = 2.0  # GB for the CUDA context and its libraries


def large_models(arguments: argparse.Namespace) -> list[dict]:
    """A step with one image of 800 x 1333 pixels (without --full: 160 x 256) of the rows of lvis_v0.5, 128 objects."""
    rows = arguments.rows.split(",") if arguments.rows else list(NAMES)
    for row in rows:
        if row not in NAMES:
            raise UserError(f"--rows {row}: expected some of {','.join(NAMES)}")
    size = (800, 1333) if arguments.full else (160, 256)
    return [in_process(training_step, row, size, arguments.repeats) for row in rows]


def training_step(row: str, size: tuple[int, int], repeats: int) -> dict:
    """Measure a row in this process, whose peak memory is that of this model.

    Activations in bf16 are those that autocast keeps on a CPU, without its copies of the weights.
    """
    import torch

    torch.manual_seed(0)
    images, targets = one_image(size)
    before = status_mb("VmRSS")
    detector = build(row, size)
    trained = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)

    def step() -> None:
        """One optimisation step."""
        optimizer.zero_grad(set_to_none=True)
        sum(detector(images, targets).values()).backward()
        optimizer.step()

    for parameter in trained:  # the momenta exist before memory is measured, as in every step but the first
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    seconds, activations = [], 0.0
    for _ in range(repeats):
        start = time.process_time()
        activations = activations_gb(detector, step)
        seconds.append(time.process_time() - start)
    peak = (status_mb("VmHWM") - before) * 1024**2 / 1e9
    weights, learnt = (4e-9 * sum(p.numel() for p in some) for some in (detector.parameters(), trained))
    copies = learnt / 2  # of the weights in half precision, which autocast makes and autograd keeps
    with torch.autocast("cpu", torch.bfloat16):
        halves = activations_gb(detector, lambda: detector(images, targets)) - copies
    fixed = weights + 3 * learnt  # gradients, momenta, and the buckets in which ranks exchange gradients
    single = peak - weights - 2 * learnt  # an image: its activations, and what passes
    half = single * halves / activations
    held = {
        f"{gpu} GB": f"{images_held(gpu, fixed, single)} / {images_held(gpu, fixed + copies, half)}" for gpu in GPUS
    }
    return {
        "model": NAMES[row],
        "CPU s": round(statistics.median(seconds), 1),
        "peak GB": round(peak, 1),
        "fixed GB": round(fixed, 1),
        "fp32 GB": round(activations, 1),
        "bf16 GB": round(halves, 1),
        **held,
    }


def build(row: str, size: tuple[int, int]) -> "torch.nn.Module":
    """Make the detector of a row, with random weights, in training mode."""
    import torch

    from bags.assembly.models import build_detector
    from bags.config.load import load_config
    from bags.data.statistics import CategoryStats

    counts = tuple(int(20000 / rank**1.2) + 1 for rank in range(1, CATEGORIES + 1))
    stats = CategoryStats(tuple(range(1, CATEGORIES + 1)), tuple(map(str, range(CATEGORIES))), counts, counts)
    config = load_config(
        f"lvis_v0.5/{row}",
        [
            *([] if row == "softmax" else ["detector.backbone=resnext101_64x4d"]),
            *([f"data.semantic_classes={SEMANTIC_CLASSES}"] if row.startswith("htc") else []),
            "data.short_sides=[]",
            f"detector.min_size={min(size)}",
            f"detector.max_size={max(size)}",
        ],
    )
    detector = build_detector(config, stats).train()
    for name, parameter in detector.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.zeros_(parameter)  # without pretrained weights, features would double from block to block
    return detector


def one_image(size: tuple[int, int]) -> tuple[list["torch.Tensor"], list[dict]]:
    """A batch of one image of noise, whose objects have boxes, masks and a map of labels."""
    import torch

    height, width = size
    sides = height / 25 + torch.rand(OBJECTS, 2) * height / 8
    corners = torch.rand(OBJECTS, 2) * (torch.tensor([width, height]) - sides)
    boxes = torch.cat([corners, corners + sides], 1)
    target = {
        "boxes": boxes,
        "labels": torch.randint(1, CATEGORIES + 1, (OBJECTS,)),
        "masks": torch.stack([painted_box(box, size) for box in boxes]),
        "semantic": torch.randint(0, SEMANTIC_CLASSES, size, dtype=torch.uint8),
    }
    return [torch.rand(3, *size)], [target]


def painted_box(box: "torch.Tensor", size: tuple[int, int]) -> "torch.Tensor":
    """The mask [H, W] of an object that fills its box."""
    import torch

    mask = torch.zeros(size, dtype=torch.uint8)
    left, top, right, bottom = box.int().tolist()
    mask[top:bottom, left:right] = 1
    return mask


def activations_gb(detector: "torch.nn.Module", forward: Callable[[], Any]) -> float:
    """What autograd keeps of the forward pass for the backward pass, each storage once, without the weights."""
    import torch

    weights = {p.untyped_storage().data_ptr() for p in [*detector.parameters(), *detector.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: "torch.Tensor") -> "torch.Tensor":
        """Note a tensor that is kept. Its address stays its own for as long as the graph lives."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values()) / 1e9


def images_held(gpu: int, fixed: float, image: float) -> int:
    """How many images of a step fit into a GPU's memory; all in GB."""
    return max(int((gpu - MARGIN - fixed) / image), 0)
