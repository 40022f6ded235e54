"""A classifier of each method after the paper, for eight categories."""

import bags

COUNTS = (3, 2000, 50, 7, 300, 40, 12, 5000)  # training instances of labels 1..8
IMAGES = (3, 900, 45, 7, 101, 100, 10, 4000)


def everyone(width: int = 6) -> dict:
    """Name of a method -> its classifier of features of that width."""
    return {
        "sigmoid": bags.Sigmoid(width, 8),
        "eql": bags.EqualizationLoss(width, IMAGES),
        "eql_v2": bags.EqualizationLossV2(width, 8),
        "seesaw": bags.Seesaw(width, 8),
        "federated": bags.Federated(width, IMAGES, 5),
        "logit_adjustment": bags.LogitAdjusted(width, COUNTS),
        "balanced_sigmoid": bags.BalancedSigmoid(width, COUNTS),
        "drop_loss": bags.DropLoss(width, IMAGES),
        "acsl": bags.ACSL(width, IMAGES),
        "ecm": bags.EffectiveClassMargin(width, COUNTS),
        "gumbel": bags.Gumbel(width, IMAGES, drop=False),
        "iif": bags.InverseFrequency(width, COUNTS, "smooth"),
        "ldam": bags.LDAM(width, COUNTS),
        "bacl": bags.BACL(width, 8),
        "disalign": bags.DisAlign(width, COUNTS),
        "loce": bags.LOCE(width, 8, queue=3),
        "class_balanced_sigmoid": bags.ClassBalancedSigmoid(width, COUNTS),
    }
