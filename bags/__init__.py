"""Long-tail object detection on torchvision, around Balanced Group Softmax (Li et al., CVPR 2020)."""

import importlib

_PUBLIC = {
    "ACSL": "bags.classifiers.acsl",
    "AnnotationIndex": "bags.data.index",
    "BalancedSigmoid": "bags.classifiers.logit_adjustment",
    "BoxFeatures": "bags.classifiers.base",
    "CategoryGroups": "bags.classifiers.groups",
    "CategoryStats": "bags.data.statistics",
    "ClassBalancedSigmoid": "bags.classifiers.class_balanced",
    "DropLoss": "bags.classifiers.drop_loss",
    "EqualizationLoss": "bags.classifiers.equalization",
    "EqualizationLossV2": "bags.classifiers.equalization_v2",
    "Federated": "bags.classifiers.federated",
    "GroupSoftmax": "bags.classifiers.group_softmax",
    "LogitAdjusted": "bags.classifiers.logit_adjustment",
    "NearestClassMean": "bags.classifiers.ncm",
    "NorCal": "bags.classifiers.norcal",
    "ProposalAccuracy": "bags.evaluation.proposal_accuracy",
    "ProposalClassifier": "bags.classifiers.base",
    "ReweightedSoftmax": "bags.classifiers.softmax",
    "Seesaw": "bags.classifiers.seesaw",
    "Sigmoid": "bags.classifiers.sigmoid",
    "SigmoidFocal": "bags.classifiers.focal",
    "SimCal": "bags.classifiers.simcal",
    "Softmax": "bags.classifiers.softmax",
    "TauNorm": "bags.classifiers.tau_norm",
    "UserError": "bags.errors",
    "assign_groups": "bags.classifiers.groups",
    "balance": "bags.balancing",
    "build_detector": "bags.build",
    "class_weights": "bags.classifiers.softmax",
    "compare": "bags.evaluation.comparison",
    "equal_boundaries": "bags.classifiers.groups",
    "evaluate": "bags.evaluation.detection_ap",
    "given_groups": "bags.classifiers.groups",
    "load_config": "bags.config",
    "load_detector": "bags.build",
    "repeat_factors": "bags.data.samplers",
    "unbalance": "bags.balancing",
    "within_group_weights": "bags.classifiers.groups",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    """Loads a public call when it is first used, so that scoring a results file needs no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bags' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
