"""DropLoss (Hsieh et al., AAAI 2021): equalization loss whose background proposals are dropped, too, by chance."""

import torch
from torch import Tensor

from bags.classifiers.equalization import EqualizationLoss


class DropLoss(EqualizationLoss):
    """Rare categories are spared other categories' objects, and a share of the background.

        w_j = 1 - T(f_j) (1 - y_j)  for foreground,   w_j = 1 - T(f_j) d,  d ~ Bernoulli(1 - mu)  for background

    mu is the share of rare categories among the foreground proposals of the batch: the fewer they are, the less
    background they learn from. d is drawn for each proposal and category from torch's global generator. A batch
    without foreground drops nothing. tail_images: categories in at most so many training images are rare; the
    paper's are LVIS's rare and common ones, 100 images.
    """

    def element_weights(self, targets: Tensor, labels: Tensor) -> Tensor:
        """0 for what is dropped, else 1."""
        foreground = (labels > 0).to(targets.dtype)
        number = foreground.sum()
        rare = (targets * self.is_tail.to(targets.dtype)).sum()
        share = torch.where(number > 0, rare / number.clamp(min=1), 1)
        dropped = (torch.rand_like(targets) > share).to(targets.dtype)
        dropped = torch.where(foreground[:, None] > 0, 1 - targets, dropped)
        return 1 - dropped * self.is_tail.to(targets.dtype)
