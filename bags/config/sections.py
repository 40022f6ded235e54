"""The sections of a configuration: one frozen dataclass each, every key with its default and its range.

NO_RESULT marks the keys that do not change a result, so that a finished run is complete whatever they are.
"""

import functools
import itertools
import operator
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from bags.classifiers import classifier_settings
from bags.classifiers.base import ClassifierSettings
from bags.core.settings import NO_RESULT, Range, Settings, need

Size = Annotated[int, Range(ge=1, le=2**15 - 1)]
Count = Annotated[int, Range(ge=1, le=999_999)]
Fraction = Annotated[float, Range(ge=0, le=1)]
Positive = Annotated[int, Range(ge=1)]
Backbone = Literal[
    "small",
    "resnet18",
    "resnet50",
    "resnet101",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "mobilenet_v2",
    "mobilenet_v3_large",
]
Glyphs = Literal[
    "glyphs-100",
    "glyphs-100-balanced",
    "glyphs-100-even",
    "glyphs-100-steep",
    "glyphs-100-half",
    "glyphs-100-double",
    "glyphs-100-distinct",
    "glyphs-100-alike",
    "glyphs-100-bold",
    "glyphs-1230",
]


@dataclass(frozen=True)
class DataConfig(Settings):
    """The files of a dataset. Relative paths are relative to `root`; `root` to the working directory."""

    name: str = "dataset"  # the dataset's folder below `output`
    root: str = "."
    train: str = "train.json"
    val: str = "val.json"
    train_images: str = "."  # folder that the file names of `train` are relative to
    val_images: str = "."
    train_semantic: str | None = None  # htc: folder of PNG label maps of `train`; none: painted from the masks
    semantic_classes: Annotated[int, Range(ge=1, le=255)] = 183  # labels in those maps; 255 marks pixels without one
    glyphs: Glyphs | None = None  # an embedded dataset, made in `root` if absent
    aspect_batches: bool = True  # training batches of wide or of other images only
    empty_images: bool = False  # also train on images without annotations
    # Shorter sides of training images in pixels, one of which is drawn each time; none: detector.min_size.
    short_sides: Annotated[tuple[int, ...], Range(gt=0)] = ()
    any_short_side: bool = False  # draw any side from the first to the last
    long_side: Positive = 1333  # the shorter side is less than drawn where the longer one would exceed this
    exif: bool = False  # turn images as their EXIF orientation says (COCO: no)
    flip: Fraction = 0.5  # probability of a horizontal flip; 0 where mirrored objects change their class
    # Large-scale jitter: the lowest and the highest scale. Images become squares of jitter_size pixels a side, in which
    # the longer side of an image at scale 1 just fits.
    jitter: Annotated[tuple[float, ...], Range(gt=0, le=100)] = ()
    jitter_size: Annotated[int | None, Range(ge=1, le=2**15 - 1)] = None  # null: detector.max_size
    copy_paste: Fraction = 0.0  # probability that an image gets objects of another one; their masks are needed
    # Loader processes per rank; 0 loads in the training process.
    workers: Annotated[int, Range(ge=0, le=64), NO_RESULT] = 2
    # Training images, per rank, that may be unreadable: the next one takes the place of each; 0: stop at the first.
    max_bad_images: Annotated[int, Range(ge=0), NO_RESULT] = 0
    # Pixels of an image; a larger one is refused before its pixels are decoded.
    max_pixels: Annotated[int, Range(ge=1, le=2**40 - 1), NO_RESULT] = 100_000_000

    def __post_init__(self) -> None:
        """Check also what is no range. Raises ValueError, naming the key."""
        super().__post_init__()
        _need_folder_name("name", self.name)
        _need_path("root", self.root)
        pair = not self.jitter or (len(self.jitter) == 2 and self.jitter[0] <= self.jitter[1])
        need(pair, "jitter", "the lowest and the highest scale, such as [0.1, 2.0], or []", list(self.jitter))
        need(self.jitter_size is None or bool(self.jitter), "jitter_size", "null without data.jitter", self.jitter_size)
        need(not (self.jitter and self.short_sides), "short_sides", "[]: data.jitter draws sizes, too")
        rising = all(low <= high for low, high in itertools.pairwise(self.short_sides))
        need(rising, "short_sides", "rising numbers above 0", list(self.short_sides))
        need(self.long_side >= max(self.short_sides, default=1), "long_side", "short_sides or more", self.long_side)

    @property
    def redrawn(self) -> str | None:
        """The first key that makes training images anew each time, beyond mirroring; None where none does."""
        keys = ("short_sides", "jitter", "copy_paste")
        return next((f"data.{key}" for key in keys if getattr(self, key)), None)


@dataclass(frozen=True)
class RPNConfig(Settings):
    """Region proposal network. Sizes in pixels of the resized image, one tuple per FPN level."""

    anchor_sizes: Annotated[tuple[tuple[int, ...], ...], Range(gt=0)] = ((32,), (64,), (128,), (256,), (512,))
    aspect_ratios: Annotated[tuple[float, ...], Range(gt=0, empty=False)] = (0.5, 1.0, 2.0)
    batch_size: Positive = 256  # anchors per image in the loss
    train_proposals: Positive = 2000
    test_proposals: Positive = 1000

    def __post_init__(self) -> None:
        """Check also that all levels have equally many anchors. Raises ValueError."""
        super().__post_init__()
        numbers = {len(level) for level in self.anchor_sizes}
        words = "a list per pyramid level, each of equally many sizes above 0"
        need(len(numbers) == 1 and 0 not in numbers, "anchor_sizes", words, list(map(list, self.anchor_sizes)))


@dataclass(frozen=True)
class RoIConfig(Settings):
    """Second stage."""

    batch_size: Positive = 512  # proposals per image in the loss
    positive_fraction: Annotated[float, Range(gt=0, le=1)] = 0.25
    sampling_ratio: Annotated[int, Range(ge=0, le=64)] = 2  # RoIAlign samples per bin side; 0: adaptive
    fc: Annotated[int, Range(ge=1, le=2**17 - 1)] = 1024  # width of the two box-head layers
    class_agnostic: bool = False  # one box regression for all categories; cascades need it
    class_agnostic_masks: bool = False  # one mask for all categories, which few objects of each can teach
    normed_masks: bool = False  # mask logits are 20 times the cosine of feature and weight, as in Seesaw's paper


@dataclass(frozen=True)
class DetectorConfig(Settings):
    """Which network, and the weights it starts from."""

    framework: Literal["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "htc"] = "faster_rcnn"
    conventions: Literal["standard", "torchvision", "released"] = "standard"  # released: those of the paper's models
    backbone: Backbone = "resnet50"
    backbone_weights: str | None = None  # IMAGENET1K_V1, or a file; where nothing comes from init_from
    # ResNet stages with deformable 3x3 convolutions.
    deformable_stages: Annotated[tuple[int, ...], Range(ge=1, le=4, rising=True)] = ()
    # true: statistics and affine parameters stay as loaded; statistics: only those do. `small` always trains its own.
    frozen_batch_norm: bool | Literal["statistics"] = False
    frozen_stages: Annotated[int, Range(ge=0, le=3)] = 0  # stem and that many stages are not trained; 0: all are
    # Of RGB in 0..1, as backbone_weights expect them.
    image_mean: Annotated[tuple[float, ...], Range(ge=0, le=255, items=3)] = (0.485, 0.456, 0.406)
    image_std: Annotated[tuple[float, ...], Range(gt=0, le=255, items=3)] = (0.229, 0.224, 0.225)
    fpn_channels: Size = 256
    min_size: Size = 800  # shorter side after resizing, unless that makes the longer exceed max_size
    max_size: Size = 1333
    init_from: str | None = None  # a checkpoint, or `row:NAME`, the run NAME beside this one
    other_categories: bool = False  # init_from knows others: what depends on categories starts new
    reset_classifier: bool = False  # do not take the classifier from init_from even where it fits
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi: RoIConfig = field(default_factory=RoIConfig)

    def __post_init__(self) -> None:
        """Check also that the keys go together. Raises ValueError, naming a key."""
        super().__post_init__()
        backbone, framework = self.backbone, self.framework
        need(self.max_size >= self.min_size, "max_size", "min_size or more", self.max_size)
        stages = self.frozen_stages
        need(stages == 0 or backbone != "small", "frozen_stages", "0 with backbone small", stages)
        pretrained = self.backbone_weights is None or backbone != "small"
        need(pretrained, "backbone_weights", "a backbone of torchvision's: there are none for small")
        deformable = not self.deformable_stages or backbone.startswith("resne")
        need(deformable, "deformable_stages", f"a ResNet: {backbone} cannot have them")
        words = f"true: the stages of {framework} have one box regression for all categories"
        need(self.roi.class_agnostic or not self.is_cascade, "roi.class_agnostic", words)
        need(self.init_from != "", "init_from", "a checkpoint, row:NAME or null, got ''")
        words = "a checkpoint: detector.other_categories says what to take from it"
        need(self.init_from is not None or not self.other_categories, "init_from", words)

    @property
    def has_masks(self) -> bool:
        """Whether the framework learns and predicts masks."""
        return self.framework in ("mask_rcnn", "cascade_mask_rcnn", "htc")

    @property
    def is_cascade(self) -> bool:
        """Whether the framework has several second stages."""
        return self.framework in ("cascade_rcnn", "cascade_mask_rcnn", "htc")


@dataclass(frozen=True)
class UniformConfig(Settings):
    """Every image once per epoch."""

    name: Literal["uniform"] = "uniform"


@dataclass(frozen=True)
class RepeatFactorConfig(Settings):
    """Images repeated by their rarest category."""

    name: Literal["repeat_factor"] = "repeat_factor"
    threshold: Annotated[float, Range(gt=0, le=1)] = 0.001  # fraction of images below which a category is repeated
    released: bool = False  # the paper's code: 1 + ceil(factor) copies


@dataclass(frozen=True)
class TailOnlyConfig(Settings):
    """Only images and annotations of rare categories."""

    name: Literal["tail_only"] = "tail_only"
    below: Positive = 100  # training instances


@dataclass(frozen=True)
class ClassBalancedConfig(Settings):
    """Categories in turn, an image of each, its proposals of that category and as many of background."""

    name: Literal["class_balanced"] = "class_balanced"


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Trained part and schedule."""

    part: Literal["all", "head", "cls", "none"] = "all"  # head: the box branch after RoIAlign
    features: Literal["cached", "live"] | None = None  # cached: part cls from a store; null: so wherever that can be
    epochs: Count = 12
    batch_size: Count = 16  # images of a step, over all ranks
    accumulate: Count = 1  # parts that a rank's share of a step goes through the detector in, to save memory
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Range(gt=0)] = 0.02
    scale_lr: bool = False  # lr is that of 16 images: times batch_size / 16
    momentum: Fraction = 0.9
    weight_decay: Fraction = 1e-4
    schedule: Literal["step", "cosine"] = "step"  # cosine: lr falls to 0 along half a period; no milestones, no gamma
    # Epochs after which lr is multiplied by gamma.
    milestones: Annotated[tuple[float, ...], Range(gt=0, rising=True)] = (8, 11)
    gamma: Fraction = 0.1
    warmup_iterations: Annotated[int, Range(ge=0)] = 500
    warmup_factor: Fraction = 1 / 3
    clip_norm: Annotated[float, Range(ge=0)] = 35.0  # gradient norm; 0 does not clip
    ema: Annotated[float, Range(ge=0, lt=1)] = 0.0  # decay of the moving average of the weights, the result; 0: none
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of training, by autocast; the losses are in fp32
    compile: bool = False  # the backbone by torch.compile
    # A loss that is not finite ends the run, or its step is left out.
    nonfinite: Annotated[Literal["stop", "skip"], NO_RESULT] = "stop"
    # A detector that sees no difference between proposals is neither scored nor trained on.
    dead: Annotated[Literal["stop", "ignore"], NO_RESULT] = "stop"
    log_every: Annotated[Count, NO_RESULT] = 20  # iterations
    # Iterations between checkpoints; the last step makes one, too. null: 200, and 2000 with stored features.
    checkpoint_every: Annotated[int | None, Range(ge=1, le=999_999), NO_RESULT] = None
    # Epochs between validations, the best of which keeps its weights in best.pth; 0: none.
    evaluate_every: Annotated[int, Range(ge=0), NO_RESULT] = 0
    tensorboard: Annotated[bool, NO_RESULT] = False  # numbers and pictures also for TensorBoard, a package of its own

    def __post_init__(self) -> None:
        """Check also that the keys go together. Raises ValueError, naming a key."""
        super().__post_init__()
        words = f"a divisor of train.batch_size={self.batch_size}"
        need(self.batch_size % self.accumulate == 0, "accumulate", words, self.accumulate)
        words = "cls: with train.features=cached no other can be trained"
        need(self.features != "cached" or self.part == "cls", "part", words, self.part)


@dataclass(frozen=True)
class StoreConfig(Settings):
    """Proposal features on disk, from which part `cls` is trained (train.features=cached)."""

    folder: Annotated[str | None, NO_RESULT] = None  # default: beside the checkpoint of init_from, as `last.features`
    mirrored: bool = True  # also of mirrored images, where data.flip asks for them; false: training sees none
    # uint8 and uint4: a half and a quarter as large, rounded to 256 and to 16 steps of each row's range
    features: Literal["float16", "uint8", "uint4"] = "float16"
    negatives: Annotated[int, Range(ge=0)] = 1024  # background proposals of each image that training may draw from
    hard_negatives: bool = False  # those with the highest objectness, instead of random ones


@dataclass(frozen=True)
class TestConfig(Settings):
    """Inference and evaluation."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    batch_size: Annotated[Positive, NO_RESULT] = 1  # images per rank
    score_threshold: Annotated[float, Range(ge=0, lt=1)] = 0.0
    nms_threshold: Annotated[float, Range(gt=0, le=1)] = 0.5
    max_detections: Annotated[int, Range(ge=1, le=10**6)] = 300
    max_per_category: Annotated[int, Range(ge=0)] = 0  # detections of one category in an image; 0: any number
    agnostic_nms: bool = False  # boxes suppress those of every category, not only of their own
    # Of a detector that reads images; stored features are scored in fp32.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    figures: Annotated[bool, NO_RESULT] = True  # draw those of each run, which takes a fifth of a second
    # Training instances that divide the categories for AP1, AP2, ...
    bins: Annotated[tuple[int, ...], Range(gt=0, empty=False, rising=True)] = (10, 100, 1000)


SamplerConfig = UniformConfig | RepeatFactorConfig | TailOnlyConfig | ClassBalancedConfig
if typing.TYPE_CHECKING:
    ClassifierConfig = ClassifierSettings
else:
    ClassifierConfig = functools.reduce(operator.or_, classifier_settings().values())


@dataclass(frozen=True)
class Config(Settings):
    """All settings of a run."""

    name: str = "config"  # the run's folder below the dataset's; the file's stem
    data: DataConfig = field(default_factory=DataConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    classifier: ClassifierConfig = field(default_factory=classifier_settings()["softmax"])
    sampler: SamplerConfig = field(default_factory=UniformConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    test: TestConfig = field(default_factory=TestConfig)
    device: Annotated[Literal["auto", "cpu", "cuda"], NO_RESULT] = "auto"
    seed: Annotated[int, Range(ge=0, le=2**31 - 1)] = 0
    output: Annotated[str, NO_RESULT] = "runs"

    def __post_init__(self) -> None:
        """Check also what is no range. Raises ValueError, naming the key."""
        super().__post_init__()
        _need_folder_name("name", self.name)
        need(self.name != "figures", "name", "another name: the dataset's figures are in that folder", self.name)
        _need_path("output", self.output)

    @property
    def run_folder(self) -> Path:
        """`<output>/<dataset>/<config>`: where this run keeps its files."""
        return Path(self.output, self.data.name, self.name)

    @property
    def is_cached(self) -> bool:
        """Whether the classifier is trained or fitted from stored features: images drawn anew cannot be stored."""
        fitted = self.train.part == "none" and self.classifier.fitted and not self.classifier.fits_pooled
        return self.train.features == "cached" or (
            self.train.features is None and (self.train.part == "cls" or fitted) and not self.data.redrawn
        )

    @property
    def shares_features(self) -> bool:
        """Whether only the classifier may differ from `init_from`: such rows can share the detector's features."""
        untrained = self.train.part == "none" and not self.classifier.fitted
        return self.is_cached or (untrained and self.init_file is not None)

    @property
    def init_row(self) -> str | None:
        """The NAME of `init_from: row:NAME`, else None."""
        source = self.detector.init_from or ""
        return source.removeprefix("row:") if source.startswith("row:") else None

    @property
    def init_file(self) -> Path | None:
        """The checkpoint that the weights come from, else None."""
        return self.source_file(self.detector.init_from) if self.detector.init_from else None

    @property
    def source_rows(self) -> tuple[str, ...]:
        """The rows that must be trained before this one: that of `init_from`, and those of an average."""
        rows = [source.removeprefix("row:") for source in self._sources if source.startswith("row:")]
        return tuple(dict.fromkeys(rows))

    @property
    def source_files(self) -> tuple[Path, ...]:
        """The checkpoints that the weights come from: that of `init_from`, and those of an average."""
        return tuple(map(self.source_file, self._sources))

    @property
    def _sources(self) -> tuple[str, ...]:
        return (*([self.detector.init_from] if self.detector.init_from else []), *self.classifier.sources)

    def source_file(self, source: str) -> Path:
        """The checkpoint of `row:NAME`, which is a run beside this one, or of a path."""
        if source.startswith("row:"):
            return self.run_folder.with_name(source.removeprefix("row:")) / "last.pth"
        return Path(source)


def _need_folder_name(key: str, name: str) -> None:
    need(name not in ("", ".", "..") and not set(name) & set("/\\\0"), key, "a folder name", name)


def _need_path(key: str, path: str) -> None:
    need(bool(path) and "\0" not in path, key, "a path", path)
    need(path.split("/")[0] != "~", key, "a path without ~, which only a shell expands", path)
