"""What a configuration holds: one frozen dataclass per section, every key with its default."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bags.classifier_sections import ClassifierConfig, SoftmaxConfig


@dataclass(frozen=True)
class DataConfig:
    """Which files. Relative paths are relative to `root`; `root` to the working directory."""

    name: str = "dataset"  # the dataset's folder below `output`
    root: str = "."
    train: str = "train.json"
    val: str = "val.json"
    train_images: str = "."  # folder that the file names of `train` are relative to
    val_images: str = "."
    train_semantic: str | None = None  # htc: folder of PNG label maps of `train`; none: painted from the masks
    semantic_classes: int = 183  # labels in those maps; 255 marks pixels without one
    glyphs: Literal["glyphs-100", "glyphs-1230"] | None = None  # embedded preset, made in `root` if absent
    aspect_batches: bool = True  # training batches of wide or of other images only
    empty_images: bool = False  # also train on images without annotations
    short_sides: tuple[int, ...] = ()  # training: one of these shorter sides (pixels); none: detector.min_size
    any_short_side: bool = False  # ... or any from the first to the last
    long_side: int = 1333  # ... unless that makes the longer side exceed this
    exif: bool = False  # turn images as their EXIF orientation says (COCO: no)
    flip: float = 0.5  # probability of a horizontal flip; 0 where mirrored objects change their class
    workers: int = 2  # loader processes per rank; 0 loads in the training process
    max_bad_images: int = 0  # training images, per rank, that may be unreadable: the next one stands in; 0: stop
    max_pixels: int = 100_000_000  # of an image; a larger one is refused before its pixels are decoded


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network. Sizes in pixels of the resized image, one tuple per FPN level."""

    anchor_sizes: tuple[tuple[int, ...], ...] = ((32,), (64,), (128,), (256,), (512,))
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    batch_size: int = 256  # anchors per image in the loss
    train_proposals: int = 2000
    test_proposals: int = 1000


@dataclass(frozen=True)
class RoIConfig:
    """Second stage."""

    batch_size: int = 512  # proposals per image in the loss
    positive_fraction: float = 0.25
    sampling_ratio: int = 2  # RoIAlign samples per bin side
    fc: int = 1024  # width of the two box-head layers
    class_agnostic: bool = False  # one box regression for all categories; cascades need it


@dataclass(frozen=True)
class DetectorConfig:
    """Which network, and the weights it starts from."""

    framework: Literal["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "htc"] = "faster_rcnn"
    conventions: Literal["standard", "torchvision", "released"] = "standard"  # released: those of the paper's models
    backbone: Literal[
        "small", "resnet18", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d",
        "mobilenet_v2", "mobilenet_v3_large",
    ] = "resnet50"  # fmt: skip
    backbone_weights: str | None = None  # IMAGENET1K_V1, or a file; where nothing comes from init_from
    deformable_stages: tuple[int, ...] = ()  # ResNet stages, of 1 to 4, with deformable 3x3 convolutions
    frozen_batch_norm: bool | Literal["statistics"] = False  # true: affine parameters, too, stay as loaded
    frozen_stages: int = 0  # stem and that many stages are not trained; 0: all are
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of RGB in 0..1, as backbone_weights expect
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    fpn_channels: int = 256
    min_size: int = 800  # shorter side after resizing, unless that makes the longer exceed max_size
    max_size: int = 1333
    init_from: str | None = None  # a checkpoint, or `row:NAME`, the run NAME beside this one
    other_categories: bool = False  # init_from knows others: what depends on categories starts new
    reset_classifier: bool = False  # do not take the classifier from init_from even where it fits
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi: RoIConfig = field(default_factory=RoIConfig)

    @property
    def has_masks(self) -> bool:
        """Whether the framework learns and predicts masks."""
        return self.framework in ("mask_rcnn", "cascade_mask_rcnn", "htc")

    @property
    def is_cascade(self) -> bool:
        """Whether the framework has several second stages."""
        return self.framework in ("cascade_rcnn", "cascade_mask_rcnn", "htc")


@dataclass(frozen=True)
class UniformConfig:
    """Every image once per epoch."""

    name: Literal["uniform"] = "uniform"


@dataclass(frozen=True)
class RepeatFactorConfig:
    """Images repeated by their rarest category."""

    name: Literal["repeat_factor"] = "repeat_factor"
    threshold: float = 0.001  # fraction of images below which a category is repeated
    released: bool = False  # the paper's code: 1 + ceil(factor) copies


@dataclass(frozen=True)
class TailOnlyConfig:
    """Images and annotations of rare categories alone."""

    name: Literal["tail_only"] = "tail_only"
    below: int = 100  # training instances


@dataclass(frozen=True)
class ClassBalancedConfig:
    """Categories in turn, an image of each, its proposals of that category and as many of background."""

    name: Literal["class_balanced"] = "class_balanced"


@dataclass(frozen=True)
class TrainConfig:
    """Trained part and schedule."""

    part: Literal["all", "head", "cls", "none"] = "all"  # head: the box branch after RoIAlign
    features: Literal["cached", "live"] | None = None  # cached: part cls from a store; null: so wherever that can be
    epochs: int = 12
    batch_size: int = 16  # images of a step, over all ranks
    accumulate: int = 1  # parts that a rank's share of a step goes through the detector in, to save memory
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    scale_lr: bool = False  # lr is that of 16 images: times batch_size / 16
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[float, ...] = (8, 11)  # epochs after which lr is multiplied by gamma
    gamma: float = 0.1
    warmup_iterations: int = 500
    warmup_factor: float = 1 / 3
    clip_norm: float = 35.0  # gradient norm; 0 does not clip
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of training, by autocast; the losses are in fp32
    compile: bool = False  # the backbone by torch.compile
    nonfinite: Literal["stop", "skip"] = "stop"  # what a loss that is not finite does to the run, or to its step
    log_every: int = 20  # iterations
    checkpoint_every: int | None = None  # iterations; and at the end; null: 200, and 2000 of stored features
    evaluate_every: int = 0  # epochs between validations, the best of which keeps its weights in best.pth; 0: none


@dataclass(frozen=True)
class StoreConfig:
    """Proposal features on disk, which part `cls` is trained from (train.features=cached)."""

    folder: str | None = None  # default: beside the checkpoint of init_from, as `last.features`
    mirrored: bool = True  # also of mirrored images, where data.flip asks for them; false: training sees none
    negatives: int = 1024  # background proposals of each image that training may draw from


@dataclass(frozen=True)
class TestConfig:
    """Inference and evaluation."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    batch_size: int = 1  # images per rank
    score_threshold: float = 0.0
    nms_threshold: float = 0.5
    max_detections: int = 300
    max_per_category: int = 0  # detections of one category in an image; 0: any number
    agnostic_nms: bool = False  # boxes suppress those of every category, not of their own alone
    bins: tuple[int, ...] = (10, 100, 1000)  # training instances, for AP1, AP2, ...


SamplerConfig = UniformConfig | RepeatFactorConfig | TailOnlyConfig | ClassBalancedConfig


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    name: str = "config"  # the run's folder below the dataset's; the file's stem
    data: DataConfig = field(default_factory=DataConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    classifier: ClassifierConfig = field(default_factory=SoftmaxConfig)
    sampler: SamplerConfig = field(default_factory=UniformConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    test: TestConfig = field(default_factory=TestConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    output: str = "runs"

    @property
    def run_folder(self) -> Path:
        """`<output>/<dataset>/<config>`: where this run keeps its files."""
        return Path(self.output, self.data.name, self.name)

    @property
    def is_cached(self) -> bool:
        """Whether the classifier is trained from stored features: sizes drawn anew each time cannot be stored."""
        one_size = not self.data.short_sides
        return self.train.features == "cached" or (
            self.train.features is None and self.train.part == "cls" and one_size
        )

    @property
    def shares_features(self) -> bool:
        """Whether all but the classifier is as in `init_from`: rows that agree in that can share its features.

        NCM may look at what was pooled, which is not kept.
        """
        untrained = self.train.part == "none" and self.classifier.name != "ncm"
        return self.is_cached or (untrained and self.init_file is not None)

    @property
    def init_row(self) -> str | None:
        """The NAME of `init_from: row:NAME`, else None."""
        source = self.detector.init_from or ""
        return source.removeprefix("row:") if source.startswith("row:") else None

    @property
    def init_file(self) -> Path | None:
        """The checkpoint that the weights come from, else None."""
        if self.init_row is not None:
            return self.run_folder.with_name(self.init_row) / "last.pth"
        return Path(self.detector.init_from) if self.detector.init_from else None
