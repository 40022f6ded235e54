"""Long-tail object detection on torchvision, around Balanced Group Softmax (Li et al., CVPR 2020)."""

import importlib
from typing import Any

from bags.classifiers import CLASSIFIERS

_PUBLIC = {name: f"bags.classifiers.{file}" for name, file in CLASSIFIERS.items()} | {
    "AnnotationIndex": "bags.data.index",
    "BoxFeatures": "bags.classifiers.base",
    "CategoryGroups": "bags.classifiers.groups",
    "CategoryStats": "bags.data.statistics",
    "ProposalAccuracy": "bags.evaluation.proposal_accuracy",
    "ProposalClassifier": "bags.classifiers.base",
    "UserError": "bags.core.errors",
    "assign_groups": "bags.classifiers.groups",
    "balance": "bags.assembly.balance",
    "build_detector": "bags.assembly.models",
    "choose": "bags.jobs.choose",
    "choose_classifier": "bags.assembly.choose_classifier",
    "class_weights": "bags.classifiers.reweighted_softmax",
    "compare": "bags.evaluation.comparison",
    "equal_boundaries": "bags.classifiers.groups",
    "evaluate": "bags.evaluation.detection_ap",
    "export_onnx": "bags.assembly.onnx_export",
    "given_groups": "bags.classifiers.groups",
    "instance_counts_by_id": "bags.data.statistics",
    "load_config": "bags.config.load",
    "load_detector": "bags.assembly.models",
    "repeat_factors": "bags.data.samplers",
    "train": "bags.jobs.train",
    "unbalance": "bags.assembly.balance",
    "within_group_weights": "bags.classifiers.groups",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Load a public call when it is first used, so that scoring a results file needs no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bags' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
