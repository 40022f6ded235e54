"""Translation of tensor names from and to torchvision's detectors, and from the paper's released models.

Nothing is guessed: every tensor of a file either gets a name here or is listed with the reason why it has none, and the
caller refuses tensors that do not fit exactly.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor

from bags.core.errors import UserError
from bags.core.tensor_files import Damaged, check_finite, check_state, load_tensors

# The paper's code (mmdet 1.0). Only in cascades does a stage's number follow bbox_head and mask_head.
RELEASED = [
    (r"backbone\.(layer\d\.\d+)\.conv2_offset\.", r"backbone.body.\1.conv2.offsets."),
    (r"backbone\.((?:conv|bn|layer)\d\..*)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.(\d)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"bbox_head\.STAGEshared_fcs\.0\.", "roi_heads.STAGEbox_head.fc6."),
    (r"bbox_head\.STAGEshared_fcs\.1\.", "roi_heads.STAGEbox_head.fc7."),
    (r"bbox_head\.STAGEfc_cls\.", "roi_heads.STAGEclassifier.linear."),
    (r"bbox_head\.STAGEfc_reg\.", "roi_heads.STAGEbox_regressor."),
    (r"mask_head\.STAGEconvs\.(\d)\.conv\.", r"roi_heads.STAGEmask_head.\g<1>.0."),
    (r"mask_head\.STAGEupsample\.", "roi_heads.STAGEmask_predictor.conv5_mask."),
    (r"mask_head\.STAGEconv_logits\.", "roi_heads.STAGEmask_predictor.mask_fcn_logits."),
    (r"mask_head\.1\.conv_res\.conv\.", "roi_heads.mask_flow.0.0."),
    (r"mask_head\.2\.conv_res\.conv\.", "roi_heads.mask_flow.1.0."),
    (r"semantic_head\.lateral_convs\.(\d)\.conv\.", r"roi_heads.semantic.lateral.\1.0."),
    (r"semantic_head\.convs\.(\d)\.conv\.", r"roi_heads.semantic.convs.\1.0."),
    (r"semantic_head\.conv_embedding\.conv\.", "roi_heads.semantic.embedding.0."),
    (r"semantic_head\.conv_logits\.", "roi_heads.semantic.logits."),
]
# torchvision, including the names in its older files.
TORCHVISION = [
    (r"roi_heads\.box_predictor\.cls_score\.", "roi_heads.classifier.linear."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "roi_heads.box_regressor."),
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(weight|bias)", r"backbone.fpn.\1_blocks.\2.0.\3"),
    (r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
    *((rf"roi_heads\.mask_head\.mask_fcn{i + 1}\.", f"roi_heads.mask_head.{i}.0.") for i in range(4)),
    (r"(backbone\.(?:body|fpn)\..*)", r"\1"),
    (r"(rpn\.head\..*)", r"\1"),
    (r"(roi_heads\.(?:box_head|mask_head|mask_predictor)\..*)", r"\1"),
]
TRACKED = "num_batches_tracked"


class Translated(NamedTuple):
    """Weights under this project's names."""

    state: dict[str, Tensor]
    skipped: dict[str, str]  # name in the file -> the reason why it is left out
    origin: str  # "released" or "torchvision"


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a file, which may be inside a checkpoint. Only tensors and plain values are read.

    Raises UserError for any other file, and for weights that are not finite.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file of weights")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; expected a file of weights")
    try:
        content = load_tensors(path, "file of weights")
    except Damaged as error:
        raise UserError(f"{error}; fetch it again") from None
    state = next((content[k] for k in ("state_dict", "model") if isinstance(content, dict) and k in content), content)
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: no state dict in there (a mapping of names to tensors)")
    check_state(state, path, "file of weights")
    check_finite(state, path)
    renamed = {key.removeprefix("module."): value for key, value in state.items()}
    if len(renamed) < len(state):
        raise UserError(f"{path}: some tensors are there twice, with and without `module.` before their names")
    return renamed


def fetch_state(model: str, name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Fetch torchvision's weights `name` (COCO_V1) of its detector `model`: (state dict, category names by label).

    Their hash is checked. Raises UserError for an unknown name, or if the weights cannot be fetched.
    """
    weights = torchvision.models.get_model_weights(model)
    if name not in weights.__members__:
        known = ", ".join(weights.__members__)
        raise UserError(f"{name}: expected a .pth file, or one of torchvision's weights for {model}: {known}")
    need_cache(weights[name].url)
    try:
        state = weights[name].get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{weights[name].url}: cannot be fetched ({error}); name a local file instead") from None
    return state, weights[name].meta["categories"]


def need_cache(url: str) -> None:
    """Raise UserError for an unknown home folder, where torch would keep fetched files in a folder called ~."""
    if Path(torch.hub.get_dir()).parts[0].startswith("~"):
        raise UserError(f"{url}: cannot be fetched: the home folder is unknown; set TORCH_HOME, or name a local file")


def translate(state: dict[str, Tensor], source: str) -> Translated:
    """Rename the tensors of a torchvision detector or a released model. Raises UserError for other files.

    source: the file's name, for errors. Unknown names stay unchanged, so that loading them fails.
    """
    released = any(key.startswith("neck.") for key in state) and any(key.startswith("bbox_head.") for key in state)
    if any(".classifier.linear." in key for key in state):
        raise UserError(f"{source}: a checkpoint of this project already: nothing is to be imported")
    if not released and not any(key.startswith("roi_heads.box_predictor.") for key in state):
        raise UserError(
            f"{source}: neither a detector of the paper's code (neck.*, bbox_head.*) nor one of torchvision's "
            f"(roi_heads.box_predictor.*); its first tensor is {next(iter(state))}"
        )
    rules, translated, skipped = (RELEASED if released else TORCHVISION), {}, {}
    for key, value in state.items():
        if key.endswith(TRACKED):
            skipped[key] = "a counter that frozen batch normalisation does not have"
        elif released and re.match(r"mask_head\.0\.conv_res\.", key):
            skipped[key] = "never used: no mask head precedes the first one"
        else:
            translated[_renamed(key, rules)] = value
    return Translated(translated, skipped, "released" if released else "torchvision")


def _renamed(key: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, name in rules:
        stage = re.match(r"(?:bbox|mask)_head\.(\d)\.", key)
        pattern = pattern.replace("STAGE", rf"{stage[1]}\." if stage else "")
        name = name.replace("STAGE", f"stages.{stage[1]}." if stage else "")
        new, replaced = re.subn(f"^{pattern}", name, key)
        if replaced:
            return new
    return key


def describe(state: dict[str, Tensor]) -> dict[str, object]:
    """Recognise the detector of a translated state dict: keys of the section `detector`, and its number of `logits`."""
    stages = any(key.startswith("roi_heads.stages.") for key in state)
    masks = any(".mask_predictor." in key for key in state)
    semantic = any(key.startswith("roi_heads.semantic.") for key in state)
    plain = "mask_rcnn" if masks else "faster_rcnn"
    cascade = "htc" if semantic else "cascade_mask_rcnn" if masks else "cascade_rcnn"
    keys: dict[str, object] = {"framework": cascade if stages else plain}
    width = state.get("backbone.body.layer1.0.conv2.weight")
    if width is not None and "backbone.body.layer1.0.conv3.weight" in state:
        depth = 101 if "backbone.body.layer3.22.conv1.weight" in state else 50
        kind = {64: f"resnet{depth}", 4: f"resnext{depth}_64x4d", 8: f"resnext{depth}_32x8d"}
        keys["backbone"] = kind.get(width.shape[1], "an unknown ResNet")
    keys["deformable_stages"] = tuple(
        i for i in (1, 2, 3, 4) if f"backbone.body.layer{i}.0.conv2.offsets.weight" in state
    )
    layers = [v for k, v in state.items() if k.endswith("classifier.linear.weight")]
    keys["logits"] = layers[0].shape[0] if layers else None
    return keys


def select_labels(state: dict[str, Tensor], labels: Sequence[int]) -> dict[str, Tensor]:
    """Keep some labels, including the background 0, of a translated Faster or Mask R-CNN with plain softmax.

    torchvision's COCO models have a label for each id up to 90, of which COCO uses 80.
    """
    rows = torch.as_tensor(labels)
    result = dict(state)
    for key, value in state.items():
        if ".classifier.linear." in key or ".mask_fcn_logits." in key:
            result[key] = value[rows]
        elif ".box_regressor." in key:
            result[key] = value.unflatten(0, (-1, 4))[rows].flatten(0, 1)
    return result


def fold_batch_norm_eps(state: dict[str, Tensor], eps: float, ours: float = 1e-5) -> dict[str, Tensor]:
    """Shift variances so that frozen batch normalisation with eps `ours` gives the same outputs as with `eps`.

    torchvision's COCO_V1 detectors are trained and run with an eps of 0.
    """
    shift = eps - ours
    folded = {key: value + shift if key.endswith("running_var") else value for key, value in state.items()}
    low = [key for key, value in folded.items() if key.endswith("running_var") and (value + ours <= 0).any()]
    if low:
        raise UserError(f"{low[0]}: a variance of 0, which eps {eps:g} does not raise: is the eps right?")
    return folded


def to_torchvision(state: dict[str, Tensor], num_categories: int) -> dict[str, Tensor]:
    """Rename the weights of a Faster or Mask R-CNN with plain softmax for torchvision's own model.

    state: a detector's state dict. A box regression or mask shared by all categories is repeated for each label. Raises
    ValueError for other detectors, and for a classifier that is not one linear layer of C + 1 outputs.
    """
    plain_resnet = (
        not any(key.startswith("roi_heads.stages.") for key in state) and "backbone.body.conv1.weight" in state
    )
    if not plain_resnet and not any(key.startswith("backbone.body.0.") for key in state):
        raise ValueError("expected a Faster or Mask R-CNN with a ResNet or MobileNet: torchvision has no other")
    if any(".offsets." in key for key in state):
        raise ValueError("torchvision's own backbones have no deformable stages")
    names = {
        "roi_heads.classifier.linear.": "roi_heads.box_predictor.cls_score.",
        "roi_heads.box_regressor.": "roi_heads.box_predictor.bbox_pred.",
    }
    result = {}
    for key, value in state.items():
        if key.startswith("roi_heads.classifier.") and not key.startswith("roi_heads.classifier.linear."):
            raise ValueError(f"{key}: torchvision's classifier is one linear layer")
        if key.startswith("roi_heads.classifier.linear.") and len(value) != num_categories + 1:
            raise ValueError(f"{key}: {len(value)} outputs; torchvision's softmax has {num_categories + 1}")
        if key.startswith("roi_heads.mask_predictor.mask_fcn_logits.") and len(value) == 1:
            value = value.repeat(num_categories + 1, *[1] * (value.dim() - 1))
        if key.startswith("roi_heads.box_regressor.") and len(value) == 4:
            value = value.repeat(num_categories + 1, *[1] * (value.dim() - 1))
        prefix = next((p for p in names if key.startswith(p)), "")
        result[names.get(prefix, "") + key.removeprefix(prefix)] = value
    return result
