"""The classifiers. Each is one file: its settings with their ranges, its class, and how one is made of the other."""

import functools
import importlib
import typing
from collections.abc import Sequence

if typing.TYPE_CHECKING:
    from bags.classifiers.base import ClassifierSettings, ProposalClassifier

CLASSIFIERS = {  # name of the class, as in `bags.ACSL`: its file in this folder
    "ACSL": "acsl",
    "Average": "average",
    "BACL": "bacl",
    "BalancedSigmoid": "balanced_sigmoid",
    "ClassBalancedSigmoid": "class_balanced",
    "DisAlign": "disalign",
    "DropLoss": "drop_loss",
    "EffectiveClassMargin": "ecm",
    "EqualizationLoss": "equalization",
    "EqualizationLossV2": "equalization_v2",
    "Federated": "federated",
    "Fractal": "fracal",
    "FractalSigmoid": "fracal",
    "GroupSoftmax": "group_softmax",
    "Gumbel": "gumbel",
    "InverseFrequency": "iif",
    "LDAM": "ldam",
    "LOCE": "loce",
    "LogitAdjusted": "logit_adjustment",
    "LogitNormalisation": "logit_normalisation",
    "NearestClassMean": "ncm",
    "NearestNeighbours": "knn",
    "NorCal": "norcal",
    "ReweightedSoftmax": "reweighted_softmax",
    "Seesaw": "seesaw",
    "Sigmoid": "sigmoid",
    "SigmoidFocal": "focal",
    "SimCal": "simcal",
    "Softmax": "softmax",
    "TauNorm": "tau_norm",
}


@functools.cache
def classifier_settings() -> dict[str, type["ClassifierSettings"]]:
    """Return the settings by their name in a configuration. Imports every classifier, and so torch."""
    from bags.classifiers.base import ClassifierSettings

    settings: dict[str, type[ClassifierSettings]] = {}
    for file in CLASSIFIERS.values():
        module = importlib.import_module(f"bags.classifiers.{file}")
        for value in vars(module).values():
            defined_here = isinstance(value, type) and value.__module__ == module.__name__
            if defined_here and issubclass(value, ClassifierSettings) and value.name:
                settings[value.name] = value
    return settings


def average_of(members: Sequence["ProposalClassifier"], weights: Sequence[float]) -> "ProposalClassifier":
    """Make `Average(members, weights)`; of a single member, make nothing and return it."""
    from bags.classifiers.average import Average

    return members[0] if len(members) == 1 else Average(members, weights)
