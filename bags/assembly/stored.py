"""Configuration -> stores of proposal features, and what is trained and scored from them.

Everything but the classifier is frozen in part `cls`, so it is run once per image. What the store depends
on is in its header: weights, annotations, settings.
"""

import contextlib
import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bags.assembly.loaders import make_loader
from bags.assembly.stored_samples import SeenFeatures, TrainingFeatures, collate_samples
from bags.config.sections import Config, DetectorConfig, TailOnlyConfig
from bags.core.few_bits import BITS
from bags.core.progress import Progress
from bags.data.dataset import DetectionDataset
from bags.data.samplers import ShardSampler, TrainSampler
from bags.detectors.faster_rcnn import FasterRCNN
from bags.detectors.from_features import FromFeatures, Pool, StoredProposals, proposals_to_store, training_pool
from bags.engine.checkpoint import weights_digest
from bags.engine.features import (
    FeatureStore,
    SeenRow,
    SeenView,
    View,
    find_store,
    open_store,
    pool_row,
)
from bags.engine.shards import SHOWN_FROM, Layout, Record
from bags.engine.train import Run

NOT_OF_THE_FEATURES = ("init_from", "other_categories", "reset_classifier", "backbone_weights")
# Of the RoI section: how training draws from the store, and what only masks depend on.
NO_BOXES = ("batch_size", "positive_fraction", "class_agnostic_masks", "normed_masks")


def training_store(
    config: Config, detector: FasterRCNN, dataset: DetectionDataset, device: torch.device
) -> FeatureStore:
    """The store of a training set's proposals, made where it is not complete. The detector holds its final weights."""
    views = _views(config)
    plain = _plain(dataset)

    def records(images: list[Tensor], targets: list[dict], positions: list[int]) -> list[Record]:
        """All views of some images."""
        stored = []
        for mirrored in views:
            by_transform = mirrored and hasattr(detector.transform, "flip")  # the transform mirrors what it has resized
            shown = [_view(*pair, mirrored and not by_transform, device) for pair in zip(images, targets, strict=True)]
            seeds = [2 * position + mirrored for position in positions]
            with _mirroring(detector.transform) if by_transform else contextlib.nullcontext():
                moved = [image for image, _ in shown], [target for _, target in shown]
                pools = training_pool(detector, *moved, config.store.negatives, seeds, config.store.hard_negatives)
            stored += [_pool_record(*pair, mirrored) for pair in zip(pools, positions, strict=True)]
        return sorted(stored, key=lambda record: record.view)

    about = _about(config, detector, plain, _pool_settings(config))
    return _open(config, "train", detector, plain, about, _pool_layout(config, detector), records)


def stored_objects(
    config: Config, detector: FasterRCNN, dataset: DetectionDataset, folder: Path
) -> tuple[Tensor, Tensor, np.ndarray] | None:
    """Features of the training objects themselves, read from the stores in a folder; None without a complete store.

    Gives features [N, D], float16 or float32, of the first stage, in each object's own box; labels int64 [N] in 1..C;
    and the objects' positions in `dataset.index`, int64 [N]. Raises UserError if the store was made of something else.
    """
    plain = _plain(dataset)
    about = _about(config, detector, plain, _pool_settings(config))
    layout = _pool_layout(config, detector)
    store = find_store(folder / "train", about, layout, len(plain), config.name)
    if store is None:
        return None
    annotations = np.concatenate([plain.objects(position) for position in range(len(plain))])
    labels = plain.index.labels[annotations].astype(np.int64)
    features = np.empty((len(annotations), layout.width), "float32" if layout.fc in BITS else layout.fc)
    done = 0
    short = store.nbytes() < SHOWN_FROM
    for position in Progress(range(len(plain)), desc=f"{config.name}: objects", unit="image", disable=short):
        rows = store.rows((position, False))
        chosen = np.flatnonzero(rows["is_object"])
        end = done + len(chosen)  # the row's own label is that of another object, if both have the same box
        features[done:end] = store.features((position, False), chosen)[:, 0]
        done = end
    assert done == len(annotations)  # the store's header is of these annotations
    return torch.from_numpy(features), torch.from_numpy(labels), annotations


def _views(config: Config) -> list[bool]:
    """Whether each view of an image in a training store is mirrored."""
    return [False, True] if config.data.flip > 0 and config.store.mirrored else [False]


def _pool_settings(config: Config) -> dict[str, object]:
    store = config.store
    return {"negatives": store.negatives, "mirrored": len(_views(config)) > 1, "hard_negatives": store.hard_negatives}


def _pool_layout(config: Config, detector: FasterRCNN) -> Layout:
    stages, width = _shape(detector)
    return Layout(config.store.features, pool_row(stages), View, stages, width)


def _plain(dataset: DetectionDataset) -> DetectionDataset:
    """The images and objects that a dataset trains on, as they are."""
    index = dataset.index
    if dataset.masks and not index.has_segmentation.all():  # objects without one are not trained on
        index = index.take(np.arange(len(index)), index.has_segmentation)
    return DetectionDataset(index, dataset.folder, exif=dataset.exif)


def validation_store(
    config: Config, detector: FasterRCNN, dataset: DetectionDataset, device: torch.device
) -> FeatureStore:
    """The store of what the classifiers need of each validation image, in float32, made where it is not complete."""
    stages, width = _shape(detector)

    def records(images: list[Tensor], _: list[dict], positions: list[int]) -> list[Record]:
        """Some images."""
        proposals = proposals_to_store(detector, [image.to(device) for image in images])
        return [_seen_record(*pair) for pair in zip(proposals, positions, strict=True)]

    layout = Layout("float32", SeenRow, SeenView, stages, width)
    return _open(config, "val", detector, dataset, _about(config, detector, dataset, {}), layout, records)


def training_loader(config: Config, runs: list[Run], live: DataLoader, device: torch.device) -> DataLoader:
    """Batches of stored features, of the images and seeds that the live loader's would be of.

    The runs, whose detectors differ only in their classifiers, are made to take them. On a GPU with twice
    as much free memory, the whole store is copied to it first.
    """
    batches = cast(TrainSampler, live.batch_sampler)
    assert isinstance(runs[0].model, FasterRCNN) and isinstance(live.dataset, DetectionDataset)
    store = training_store(config, runs[0].model, live.dataset, device)
    resident = device.type == "cuda" and 2 * store.nbytes() < _free_memory(device)
    whole = store.whole(device) if resident else None
    for run in runs:
        assert isinstance(run.model, FasterRCNN)
        run.loss_module = FromFeatures(run.model, whole)
    flip = config.data.flip if config.store.mirrored else 0.0
    roi = config.detector.roi
    features = TrainingFeatures(store, flip, roi.batch_size, roi.positive_fraction, resident)
    return make_loader(config, features, batches, collate_samples)


def validation_loader(
    config: Config, detector: FasterRCNN, dataset: DetectionDataset, device: torch.device
) -> DataLoader:
    """This rank's share of the validation images, as `FromFeatures` takes them."""
    store = validation_store(config, detector, dataset, device)
    sampler = ShardSampler(len(dataset), config.test.batch_size)
    return make_loader(config, SeenFeatures(store, StoredProposals, dataset.target), sampler)


def _free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses; what torch holds back of earlier runs is given up first."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def store_folder(config: Config) -> Path:
    """Where a configuration's stores are."""
    if config.store.folder:
        return Path(config.store.folder)
    assert config.init_file is not None  # without it `cls` and `none` are refused
    return config.init_file.with_suffix(".features")


def store_settings(config: Config) -> tuple:
    """Equal for rows that can be trained from the same store."""
    data, tail = config.data, isinstance(config.sampler, TailOnlyConfig) and config.sampler
    return (
        str(config.init_file),
        data.root,
        data.train,
        data.train_images,
        data.empty_images,
        data.exif,
        tail,
        data.flip > 0 and config.store.mirrored,
        config.store.negatives,
        config.store.hard_negatives,
        config.store.features,
        repr(_detector_settings(config.detector)),
    )


def shared_settings(config: Config) -> tuple:
    """Equal for rows whose classifiers can be trained in one pass over one store."""
    train = config.train
    return (
        str(config.init_file),
        repr(config.data),
        repr(_detector_settings(config.detector)),
        repr(config.store),
        config.detector.roi.batch_size,
        config.detector.roi.positive_fraction,
        repr(config.sampler),
        train.part,
        train.epochs,
        train.batch_size,
        config.seed,
        config.device,
    )


@contextlib.contextmanager
def _mirroring(transform: Any) -> Iterator[None]:
    """A transform that mirrors training images by chance mirrors all."""
    chance, transform.flip, transform.training = transform.flip, 1.0, True
    try:
        yield
    finally:
        transform.flip, transform.training = chance, False


def share_frozen(detector: nn.Module, other: nn.Module) -> None:
    """Share all tensors outside the classifiers with `other`, whose values are equal."""
    state = other.state_dict()
    for name, value in (*detector.named_parameters(), *detector.named_buffers()):
        if "classifier." not in name:
            value.data = state[name]


def _about(
    config: Config, detector: nn.Module, dataset: DetectionDataset, settings: Mapping[str, object]
) -> dict[str, str]:
    """What a store's content depends on, by name."""
    compared = {k: value for k, value in settings.items() if k != "hard_negatives" or value}  # older stores have none
    frozen = {name: value for name, value in detector.state_dict().items() if "classifier." not in name}
    return {
        "weights": weights_digest({"model": frozen}),
        "annotations": dataset.index.content_digest(),
        "images": images_digest(dataset),
        "settings": _digest({**compared, "detector": _detector_settings(config.detector)}),
        "shown": json.dumps({**{f"store.{key}": value for key, value in settings.items()}, **_shown(config.detector)}),
    }


def _open(
    config: Config,
    split: str,
    detector: nn.Module,
    dataset: DetectionDataset,
    about: dict[str, str],
    layout: Layout,
    records: Callable[[list[Tensor], list[dict], list[int]], list[Record]],
) -> FeatureStore:
    """`open_store` with the header of a configuration; the detector is in evaluation mode meanwhile."""
    detector.eval()
    return open_store(
        store_folder(config) / split,
        about,
        layout,
        len(dataset),
        lambda batches: make_loader(config, dataset, batches),
        records,
        config.test.batch_size,
        config.name,
    )


def _shape(detector: FasterRCNN) -> tuple[int, int]:
    """(stages, numbers in a feature)."""
    stages = detector.roi_heads.box_stages
    return len(stages), stages[0].box_regressor.in_features


def _detector_settings(detector: DetectorConfig) -> dict:
    """The settings that proposals and features depend on, beside the weights."""
    settings = {f.name: getattr(detector, f.name) for f in fields(detector) if f.name not in NOT_OF_THE_FEATURES}
    settings["roi"] = {key: value for key, value in asdict(detector.roi).items() if key not in NO_BOXES}
    return settings


def _shown(detector: DetectorConfig) -> dict[str, str]:
    """The same settings, key by key, for the message that one of them has changed."""
    shown: dict[str, str] = {}
    for key, value in _detector_settings(detector).items():
        section = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, leaf in section.items() if isinstance(section, dict) else [("", section)]:
            shown[f"detector.{key}.{name}".rstrip(".")] = f"{leaf!r:.100}"
    return shown


def _digest(values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def images_digest(dataset: DetectionDataset) -> str:
    """SHA-256 of the sizes of a dataset's files (a missing one counts as empty) and of how they are read."""
    paths = (dataset.index.image_path(dataset.folder, k) for k in range(len(dataset)))
    return _digest([dataset.exif, *(path.stat().st_size if path.exists() else 0 for path in paths)])


def _view(image: Tensor, target: dict, mirrored: bool, device: torch.device) -> tuple[Tensor, dict]:
    """One image and its objects on the device, mirrored or not."""
    boxes = target["boxes"]
    if mirrored:
        image, width = image.flip(-1), image.shape[-1]
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    return image.to(device), {"boxes": boxes.to(device), "labels": target["labels"].to(device)}


def _pool_record(pool: Pool, position: int, mirrored: bool) -> Record:
    rows = np.empty(len(pool.fc), pool_row(pool.fc.shape[1]))
    columns = {"label": pool.labels, "overlap": pool.overlaps, "score": pool.scores, "is_object": pool.is_object}
    for name, values in columns.items():
        rows[name] = values.cpu().numpy()
    return Record(pool.fc, rows, (position, mirrored))


def _seen_record(proposals: StoredProposals, position: int) -> Record:
    rows = np.empty(len(proposals.boxes), SeenRow)
    rows["box"] = proposals.boxes.cpu().numpy()
    return Record(proposals.fc, rows, (position, False, proposals.size, proposals.scale, proposals.original))
