"""Sigmoid focal loss at proposal level (models (8) and (9) of Table 1; Lin et al. 2017)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor
from torch.nn.functional import one_hot

from bags.classifiers.base import ClassifierSettings, TrainingCounts, at_least_float32
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range


@dataclass(frozen=True)
class SigmoidFocalSettings(ClassifierSettings):
    """Sigmoid focal loss at proposal level."""

    name: Literal["sigmoid_focal"] = "sigmoid_focal"
    is_softmax = True
    gamma: Annotated[float, Range(ge=0)] = 2.0
    alpha: Annotated[float, Range(ge=0, le=1)] = 0.25

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "SigmoidFocal":
        """Make the untrained classifier."""
        return SigmoidFocal(in_features, training.num_categories, self.gamma, self.alpha)


class SigmoidFocal(Softmax):
    """One sigmoid per label, the background's included, in training; softmax scores, as released.

    gamma >= 0: focus on hard elements; alpha in 0..1: weight of positive elements (1 - alpha for negatives).
    """

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        gamma: float = SigmoidFocalSettings.gamma,
        alpha: float = SigmoidFocalSettings.alpha,
    ):
        super().__init__(in_features, num_categories)
        settings = SigmoidFocalSettings(gamma=gamma, alpha=alpha)
        self.gamma, self.alpha = settings.gamma, settings.alpha

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Average over all R * (C+1) elements, the released normaliser; the target is the one-hot label.

        (The released CUDA operator misread that target; its Python version computes this.)
        """
        from torchvision.ops import sigmoid_focal_loss  # here, as configurations are read without torchvision

        logits = at_least_float32(logits)
        targets = one_hot(labels, logits.shape[1]).to(logits.dtype)
        total = sigmoid_focal_loss(logits, targets, self.alpha, self.gamma, reduction="sum")
        return {"loss_classifier": total / max(logits.numel(), 1)}
