"""The section `classifier` -> a classifier. The only place that maps a name to a class."""

from bags.classifier_sections import (
    ACSLConfig,
    BalancedSigmoidConfig,
    ClassBalancedSigmoidConfig,
    ClassifierConfig,
    DropLossConfig,
    EQLConfig,
    EQLv2Config,
    FederatedConfig,
    GroupSoftmaxConfig,
    LogitAdjustmentConfig,
    NCMConfig,
    NorCalConfig,
    ReweightedSoftmaxConfig,
    SeesawConfig,
    SigmoidConfig,
    SigmoidFocalConfig,
    SimCalConfig,
    SoftmaxConfig,
    TauNormConfig,
)
from bags.classifiers.acsl import ACSL
from bags.classifiers.base import ProposalClassifier
from bags.classifiers.class_balanced import ClassBalancedSigmoid
from bags.classifiers.drop_loss import DropLoss
from bags.classifiers.equalization import EqualizationLoss
from bags.classifiers.equalization_v2 import EqualizationLossV2
from bags.classifiers.federated import Federated
from bags.classifiers.focal import SigmoidFocal
from bags.classifiers.group_softmax import GroupSoftmax
from bags.classifiers.groups import CategoryGroups, assign_groups, equal_boundaries, given_groups, within_group_weights
from bags.classifiers.logit_adjustment import BalancedSigmoid, LogitAdjusted
from bags.classifiers.ncm import NearestClassMean
from bags.classifiers.norcal import NorCal
from bags.classifiers.seesaw import Seesaw
from bags.classifiers.sigmoid import Sigmoid
from bags.classifiers.simcal import SimCal
from bags.classifiers.softmax import ReweightedSoftmax, Softmax, class_weights
from bags.classifiers.tau_norm import TauNorm
from bags.data.statistics import CategoryStats
from bags.errors import UserError


def build_classifier(
    config: ClassifierConfig, in_features: int, pooled_features: int, stats: CategoryStats
) -> ProposalClassifier:
    """The classifier that `config.name` names, untrained. Features: numbers per proposal in BoxFeatures."""
    counts, images, number = stats.instance_counts, stats.image_counts, stats.num_categories
    match config:
        case SoftmaxConfig():
            return Softmax(in_features, number)
        case ReweightedSoftmaxConfig(weighting=weighting, beta=beta):
            return ReweightedSoftmax(in_features, class_weights(counts, weighting, beta))
        case SigmoidFocalConfig(gamma=gamma, alpha=alpha):
            return SigmoidFocal(in_features, number, gamma, alpha)
        case NCMConfig(features=features, scale=scale):
            width = in_features if features == "fc" else pooled_features
            return NearestClassMean(in_features, number, width, features, scale)
        case TauNormConfig(tau=tau, select=select, background=background, tail_below=below):
            tail = [label for label, count in enumerate(counts, start=1) if count < below]
            return TauNorm(in_features, number, tau, select, background, tail)
        case NorCalConfig(gamma=gamma, counts=kind):
            return NorCal(in_features, images if kind == "images" else counts, gamma)
        case GroupSoftmaxConfig():
            return _group_softmax(config, in_features, stats)
        case SigmoidConfig(prior=prior):
            return Sigmoid(in_features, number, prior)
        case EQLConfig(tail_images=tail, prior=prior):
            return EqualizationLoss(in_features, images, tail, prior)
        case EQLv2Config(gamma=gamma, mu=mu, alpha=alpha, prior=prior):
            return EqualizationLossV2(in_features, number, gamma, mu, alpha, prior)
        case SeesawConfig(p=p, q=q, scale=scale):
            return Seesaw(in_features, number, p, q, scale)
        case FederatedConfig(number=sampled, power=power, prior=prior):
            return Federated(in_features, images, sampled, power, prior)
        case LogitAdjustmentConfig(tau=tau, adjust=adjust):
            return LogitAdjusted(in_features, counts, tau, adjust)
        case BalancedSigmoidConfig(prior=prior):
            return BalancedSigmoid(in_features, counts, prior)
        case DropLossConfig(tail_images=tail, prior=prior):
            return DropLoss(in_features, images, tail, prior)
        case ACSLConfig(threshold=threshold):
            return ACSL(in_features, images, threshold)
        case ClassBalancedSigmoidConfig(beta=beta, prior=prior):
            return ClassBalancedSigmoid(in_features, counts, beta, prior)
        case SimCalConfig(below=below):
            return SimCal(in_features, counts, below)
    raise TypeError(f"no classifier for {type(config).__name__}")


def _group_softmax(config: GroupSoftmaxConfig, in_features: int, stats: CategoryStats) -> GroupSoftmax:
    groups = _groups(config, stats)
    weights = within_group_weights(groups, stats.instance_counts) if config.reweight else None
    return GroupSoftmax(
        in_features,
        groups,
        config.others_ratio,
        config.background_group,
        config.others,
        config.group_weights,
        weights,
        config.scale,
        config.temperatures,
    )


def _groups(config: GroupSoftmaxConfig, stats: CategoryStats) -> CategoryGroups:
    counts = stats.instance_counts
    try:
        if config.groups is not None:
            return given_groups(config.groups, stats.category_ids)
        if not config.equal_groups:
            return assign_groups(counts, config.boundaries)
        return assign_groups(counts, equal_boundaries(counts, config.equal_groups))
    except ValueError as error:
        raise UserError(f"classifier.{error}") from None


def columns(config: ClassifierConfig, stats: CategoryStats) -> tuple:
    """What the rows of a classifier's layer stand for; equal for layers whose weights can be exchanged."""
    match config:
        case GroupSoftmaxConfig():
            groups = _groups(config, stats)
            return groups.group_of, config.background_group, config.others, config.scale > 0
        case SeesawConfig():
            return config.name, config.scale > 0
        case EQLv2Config():
            return (config.name,)
        case (
            SigmoidConfig()
            | EQLConfig()
            | FederatedConfig()
            | BalancedSigmoidConfig()
            | DropLossConfig()
            | ClassBalancedSigmoidConfig()
        ):
            return ("sigmoid",)
    return ()  # softmax's: ACSL, too, goes on from them, as its authors do
