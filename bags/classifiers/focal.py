"""Sigmoid focal loss at proposal level (models (8) and (9) of Table 1; Lin et al. 2017)."""

from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.ops import sigmoid_focal_loss

from bags.classifiers.base import at_least_float32, need, need_not_negative
from bags.classifiers.softmax import Softmax


class SigmoidFocal(Softmax):
    """One sigmoid per label, the background's included, in training; softmax scores, as released.

    gamma >= 0: focus on hard elements; alpha in 0..1: weight of positive elements (1 - alpha for negatives).
    """

    def __init__(self, in_features: int, num_categories: int, gamma: float = 2.0, alpha: float = 0.25):
        super().__init__(in_features, num_categories)
        need_not_negative(gamma=gamma)
        need(0 <= alpha <= 1, "alpha", "0 to 1", alpha)
        self.gamma, self.alpha = gamma, alpha

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The mean over all R * (C+1) elements, the released normaliser; the target is the one-hot label.

        (The released CUDA operator misread that target; this is what its Python version computes.)
        """
        logits = at_least_float32(logits)
        targets = one_hot(labels, logits.shape[1]).to(logits.dtype)
        total = sigmoid_focal_loss(logits, targets, self.alpha, self.gamma, reduction="sum")
        return {"loss_classifier": total / max(logits.numel(), 1)}
