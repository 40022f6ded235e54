"""The section `classifier` of a configuration: one frozen dataclass per method, chosen by `name`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SoftmaxConfig:
    """Plain softmax cross entropy (Eq. 1-2)."""

    name: Literal["softmax"] = "softmax"


@dataclass(frozen=True)
class GroupSoftmaxConfig:
    """Balanced Group Softmax (Eq. 3-5)."""

    name: Literal["group_softmax"] = "group_softmax"
    boundaries: tuple[int, ...] = (10, 100, 1000)  # training instances
    others_ratio: float | Literal["n", "all"] = 8.0  # beta
    background_group: bool = True  # b in Table 4
    others: bool = True  # o in Table 4
    group_weights: tuple[float, ...] | None = None  # factors of the groups' losses, the background group's first
    reweight: bool = False  # samples of a group weighted by 1/n within it
    equal_groups: int = 0  # not in the paper: so many groups of equal total instances, in place of boundaries
    groups: tuple[tuple[int, ...], ...] | None = None  # not in the paper: category ids of each, in place of boundaries
    scale: float = 0.0  # not in the paper: of a cosine layer; 0: a linear layer
    temperatures: tuple[float, ...] | Literal["learned"] | None = None  # not in the paper: of the groups' softmaxes


@dataclass(frozen=True)
class ReweightedSoftmaxConfig:
    """Softmax cross entropy weighted by training counts."""

    name: Literal["reweighted_softmax"] = "reweighted_softmax"
    weighting: Literal["inverse", "effective_number", "effective_number_clipped"] = "inverse"
    beta: float = 0.999  # of the effective number


@dataclass(frozen=True)
class SigmoidFocalConfig:
    """Sigmoid focal loss at proposal level."""

    name: Literal["sigmoid_focal"] = "sigmoid_focal"
    gamma: float = 2.0
    alpha: float = 0.25


@dataclass(frozen=True)
class NCMConfig:
    """Nearest class mean; takes a trained softmax, trains nothing."""

    name: Literal["ncm"] = "ncm"
    features: Literal["fc", "conv"] = "fc"
    scale: float = 1.0  # of the cosine similarities


@dataclass(frozen=True)
class TauNormConfig:
    """tau-normalisation; takes a trained softmax, trains nothing."""

    name: Literal["tau_norm"] = "tau_norm"
    tau: float = 1.0
    select: Literal["none", "foreground", "foreground_tail"] = "none"  # which proposals take the new scores
    background: bool = True  # normalise the background's vector too
    tail_below: int = 100  # training instances, for foreground_tail


@dataclass(frozen=True)
class NorCalConfig:
    """Normalised calibration; takes a trained softmax, trains nothing."""

    name: Literal["norcal"] = "norcal"
    gamma: float = 0.6
    counts: Literal["images", "instances"] = "images"  # what a category's exp(logit) is divided by, to the gamma


@dataclass(frozen=True)
class SigmoidConfig:
    """A sigmoid for each category, none for the background."""

    name: Literal["sigmoid"] = "sigmoid"
    prior: float = 0.001  # every category's score before training


@dataclass(frozen=True)
class EQLConfig:
    """Equalization loss (Tan et al. 2020)."""

    name: Literal["eql"] = "eql"
    tail_images: int = 100  # categories in at most so many training images are rare
    prior: float = 0.001


@dataclass(frozen=True)
class EQLv2Config:
    """Equalization loss v2 (Tan et al. 2021)."""

    name: Literal["eql_v2"] = "eql_v2"
    gamma: float = 12.0
    mu: float = 0.8
    alpha: float = 4.0
    prior: float = 0.001


@dataclass(frozen=True)
class SeesawConfig:
    """Seesaw loss (Wang et al. 2021)."""

    name: Literal["seesaw"] = "seesaw"
    p: float = 0.8  # mitigation
    q: float = 2.0  # compensation
    scale: float = 20.0  # of the cosine layer; 0: a linear layer


@dataclass(frozen=True)
class FederatedConfig:
    """Federated loss (Zhou et al. 2021)."""

    name: Literal["federated"] = "federated"
    number: int = 50  # categories in the loss of a batch
    power: float = 0.5  # of the training images, for drawing them
    prior: float = 0.01


@dataclass(frozen=True)
class LogitAdjustmentConfig:
    """Logit adjustment (Menon et al. 2021); with tau 1 and adjust loss, Balanced Softmax (Ren et al. 2020)."""

    name: Literal["logit_adjustment"] = "logit_adjustment"
    tau: float = 1.0
    adjust: Literal["loss", "scores"] = "loss"


@dataclass(frozen=True)
class BalancedSigmoidConfig:
    """Balanced Softmax in its sigmoid form, which Ren et al. use on LVIS."""

    name: Literal["balanced_sigmoid"] = "balanced_sigmoid"
    prior: float = 0.001


@dataclass(frozen=True)
class DropLossConfig:
    """DropLoss (Hsieh et al. 2021)."""

    name: Literal["drop_loss"] = "drop_loss"
    tail_images: int = 100
    prior: float = 0.001


@dataclass(frozen=True)
class ACSLConfig:
    """Adaptive class suppression loss (Wang et al. 2021)."""

    name: Literal["acsl"] = "acsl"
    threshold: float = 0.7  # score from which a wrong category is pushed down


@dataclass(frozen=True)
class ClassBalancedSigmoidConfig:
    """Class-balanced sigmoid cross entropy (Cui et al. 2019)."""

    name: Literal["class_balanced_sigmoid"] = "class_balanced_sigmoid"
    beta: float = 0.999
    prior: float = 0.001


@dataclass(frozen=True)
class SimCalConfig:
    """Dual-head calibration (Wang et al. 2020); takes a trained softmax, trains a second one."""

    name: Literal["simcal"] = "simcal"
    below: int = 300  # training instances of the categories that take the second one's scores


ClassifierConfig = (
    SoftmaxConfig
    | GroupSoftmaxConfig
    | ReweightedSoftmaxConfig
    | SigmoidFocalConfig
    | NCMConfig
    | TauNormConfig
    | NorCalConfig
    | SigmoidConfig
    | EQLConfig
    | EQLv2Config
    | SeesawConfig
    | FederatedConfig
    | LogitAdjustmentConfig
    | BalancedSigmoidConfig
    | DropLossConfig
    | ACSLConfig
    | ClassBalancedSigmoidConfig
    | SimCalConfig
)
