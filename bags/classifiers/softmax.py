"""Plain softmax over background and all categories (Eq. 1-2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import BoxFeatures, ProposalClassifier, new_linear


class Softmax(ProposalClassifier):
    """Logits [R, C+1]; column 0 is the background."""

    def __init__(self, in_features: int, num_categories: int):
        super().__init__()
        self.num_categories = num_categories
        self.linear = new_linear(in_features, num_categories + 1)

    def forward(self, features: BoxFeatures) -> Tensor:
        """Features -> logits [R, C+1]."""
        return self.linear(features.fc)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean cross entropy over the R proposals (Eq. 1), computed in float32; 0 for R = 0."""
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        return {"loss_classifier": total / max(len(labels), 1)}

    def probs(self, logits: Tensor) -> Tensor:
        """Softmax (Eq. 2): [R, C+1], rows sum to 1."""
        return torch.softmax(logits.float(), -1)

    def label_weights(self) -> Tensor:
        """[C+1, in_features]."""
        return self.linear.weight.detach()
