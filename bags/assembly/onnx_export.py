"""A detector as an ONNX file that has been compared with it in ONNX Runtime."""

import contextlib
import copy
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from bags.assembly.onnx_check import Detections, Difference, compare, run
from bags.core.errors import UserError, one_line
from bags.core.files import replacing
from bags.detectors.faster_rcnn import FasterRCNN
from bags.detectors.traceable import OUTPUTS, Traceable

OPSET, DEFORMABLE_OPSET = 17, 19
INPUT = "float32 RGB [3, height, width] in 0..1, of any size; resized and normalised inside"
GENERATED = ((96, 128), (131, 70), (64, 64), (7, 150))  # height and width of images that are always tried


class Exported(NamedTuple):
    """An exported file and the images that it was compared on."""

    path: Path
    images: int
    sizes: int  # different ones among the images
    detections: int
    scores: float  # largest difference
    boxes: float  # ... in pixels
    masks: float  # ... of probabilities; 0 without masks
    undecided: int  # see `onnx_check.compare`


def export_onnx(
    detector: nn.Module,
    path: str | Path,
    images: Sequence[Tensor] = (),
    categories: Sequence[dict] | None = None,
    metadata: dict[str, str] | None = None,
) -> Exported:
    """Write a detector as ONNX, after its detections have been compared in ONNX Runtime.

    detector    of `load_detector`, or one that `balance` has changed; it stays as it is
    path        the file to write, which ends in .onnx; an existing one is replaced
    images      [3, H, W] float RGB in 0..1, to compare detections on; besides, a few are generated
    categories  C entries with id and name, in label order, such as `meta["categories"]`; by default the labels
    metadata    more texts to write beside those below

    The file takes `image` [3, H, W], float32 RGB in 0..1 and of any size. It gives boxes [K, 4] float32 (x1, y1, x2, y2
    in pixels of that image), scores [K] float32, labels [K] int64 in 1..C, category_ids [K] int64 and, with a mask
    branch, masks [K, 1, H, W] float32 in 0..1. Its metadata_props tell categories, input and thresholds.
    Raises UserError, and writes nothing, if a part of the detector cannot be exported, or if labels differ, scores by
    more than 1e-4, boxes by more than 1e-2 pixels or masks by more than 1e-2. See `onnx_check.compare`.
    """
    path = Path(path)
    check_output(path)
    onnx, runtime = _packages()
    detector = copy.deepcopy(detector).cpu().float().eval()
    if isinstance(detector, FasterRCNN):
        detector.precision = "fp32"
    named = _categories(detector, categories)
    generator = torch.Generator().manual_seed(0)
    generated = [torch.rand(3, *size, generator=generator) for size in GENERATED]
    with torch.no_grad():
        detector(generated[:1])  # torchvision's pooling learns the strides of its maps
        traceable = Traceable(detector, tuple(entry["id"] for entry in named)).eval()
        model = onnx.load_from_string(_traced(traceable, generated[0], path))
    texts = {**_texts(traceable, named), **(metadata or {})}
    onnx.helper.set_model_props(model, texts)
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    samples = [*(image.cpu() for image in images), *generated]
    result = _checked(detector, _session(runtime, content), traceable, samples, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        file.write(content)
    return result


def check_output(path: Path) -> None:
    """Raise UserError unless a file can be written to `path`, which ends in .onnx."""
    if path.suffix != ".onnx":
        raise UserError(f"{path}: expected a file name that ends in .onnx")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file: choose another name")


def _packages() -> tuple[Any, Any]:
    """The modules onnx and onnxruntime. Raises UserError where they are not installed."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"export: {error.name} is not installed: pip install -r requirements-export.txt (or bags[export])"
        ) from None
    return onnx, onnxruntime


def _categories(detector: Any, categories: Sequence[dict] | None) -> list[dict]:
    """One {id, name} for each label 1..C."""
    heads = getattr(detector, "roi_heads", None)
    stages = getattr(heads, "box_stages", None)
    if not stages:
        raise UserError(
            f"export: expected a detector of bags.load_detector or bags.balance, got {type(detector).__name__}"
        )
    number = stages[0].classifier.num_categories
    if categories is None:
        return [{"id": label, "name": str(label)} for label in range(1, number + 1)]
    if len(categories) != number:
        raise UserError(f"categories: expected {number}, one for each label 1 to {number}, got {len(categories)}")
    return [{"id": int(entry["id"]), "name": str(entry["name"])} for entry in categories]


def _traced(traceable: Traceable, image: Tensor, path: Path) -> bytes:
    """The ONNX file of a detector, traced with an image [3, H, W]."""
    deformable = any(isinstance(module, DeformConv2d) for module in traceable.modules())
    if deformable:
        torch.onnx.register_custom_op_symbolic("torchvision::deform_conv2d", _deform_conv, DEFORMABLE_OPSET)
    names = list(OUTPUTS if traceable.has_masks else OUTPUTS[:-1])
    axes = {name: {0: "detections"} for name in names} | {"image": {1: "height", 2: "width"}}
    if traceable.has_masks:
        axes["masks"] |= {2: "height", 3: "width"}
    content = io.BytesIO()
    try:
        with warnings.catch_warnings(), _without_output():
            warnings.simplefilter("ignore")  # about constants, which the comparison finds
            torch.onnx.export(
                traceable,
                (image,),
                cast(Any, content),
                dynamo=False,
                opset_version=DEFORMABLE_OPSET if deformable else OPSET,
                input_names=["image"],
                output_names=names,
                dynamic_axes=axes,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: not exported: {type(error).__name__}: {one_line(error)[:300]}") from None
    return content.getvalue()


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """Leave out what is written to the standard output: after an error, the exporter prints its whole graph there."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _deform_conv(g: Any, features: Any, weight: Any, offset: Any, mask: Any, bias: Any, *numbers: Any) -> Any:
    """torchvision's deformable convolution as ONNX's DeformConv."""
    values = [torch.onnx.symbolic_helper._maybe_get_const(number, "i") for number in numbers]
    *geometry, groups, offset_groups, use_mask = values
    stride, padding, dilation = geometry[:2], geometry[2:4], geometry[4:6]
    inputs = [features, weight, offset, bias, *([mask] if use_mask else [])]
    return g.op(
        "DeformConv",
        *inputs,
        strides_i=stride,
        pads_i=padding * 2,
        dilations_i=dilation,
        group_i=groups,
        offset_group_i=offset_groups,
    )


def _texts(traceable: Traceable, categories: list[dict]) -> dict[str, str]:
    """The metadata of a file, as texts; numbers and lists as JSON."""
    last, transform = traceable.stages[-1], traceable.detector.transform
    return {
        "producer": "bags",
        "input": INPUT,
        "categories": json.dumps(categories),
        "classifier": type(last.classifier).__name__,
        "score_threshold": json.dumps(last.score_thresh),
        "nms_threshold": json.dumps(last.nms_thresh),
        "max_detections": json.dumps(last.detections_per_img),
        "min_size": json.dumps(transform.min_size[-1]),
        "max_size": json.dumps(transform.max_size),
    }


def _session(runtime: Any, content: bytes) -> Any:
    """A session of ONNX Runtime on the CPU, with as many threads as torch uses."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # without warnings
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def other_sizes(images: Sequence[Tensor]) -> list[Tensor]:
    """Parts of the first images, and these in another size: the upper half, a third of the width, larger or smaller."""
    changed = []
    for image in images[:2]:
        height, width = image.shape[-2:]
        changed += [image[:, : max(1, height // 2)], image[:, :, : max(1, width // 3)]]
        if min(height, width) > 1:
            factor = 1.5 if max(height, width) <= 600 else 0.5  # of the sides
            changed.append(F.interpolate(image[None], scale_factor=factor, mode="bilinear")[0].clamp(0, 1))
    return [image.contiguous() for image in changed]


def _checked(detector: Any, session: Any, traceable: Traceable, images: list[Tensor], path: Path) -> Exported:
    """Compare detections in all images, then in some at other sizes. Raises UserError at the first real difference."""
    last = traceable.stages[-1]
    images = [*images, *other_sizes(images)]
    differences: list[Difference] = []

    def detect(image: Tensor) -> Detections:
        """The detector's own detections."""
        with torch.no_grad():
            return detector([image])[0]

    for number, image in enumerate(images, start=1):
        size = f"{image.shape[2]} x {image.shape[1]} pixels"
        try:
            found = run(session, image)
        except Exception as error:  # ONNX Runtime has classes of its own
            raise UserError(
                f"{path}: not exported: ONNX Runtime cannot run it on image {number} ({size}): {one_line(error)[:300]}"
            ) from None
        difference = compare(detect, found, image, last.score_thresh, last.detections_per_img)
        if difference.problem:
            raise UserError(
                f"{path}: not exported: in ONNX Runtime, image {number} of {len(images)} ({size}) differs: "
                f"{difference.problem}"
            )
        differences.append(difference)
    run(session, torch.zeros(3, 48, 64))  # mostly without detections
    detections, scores, boxes, masks, undecided, _ = zip(*differences, strict=True)
    sizes = len({image.shape for image in images})
    return Exported(path, len(images), sizes, sum(detections), max(scores), max(boxes), max(masks), sum(undecided))
