"""The loss of BAGS against plain cross entropy."""

import argparse
from typing import TYPE_CHECKING

from scripts.benchmarks.measuring import measure

if TYPE_CHECKING:
    from torch import Tensor


def loss(arguments: argparse.Namespace) -> list[dict]:
    """GroupSoftmax on LVIS-like counts (1,230 categories, 4 groups, a quarter of the proposals foreground)."""
    import torch
    import torch.nn.functional as F

    import bags

    results = []
    counts = [max(1, round(12000 * 0.9935**rank)) for rank in range(1230)]
    classifier = bags.GroupSoftmax(4, bags.assign_groups(counts), others_ratio=8.0)
    for proposals in (512, 8192):
        torch.manual_seed(0)
        foreground = torch.multinomial(torch.tensor(counts, dtype=torch.float), proposals // 4, replacement=True) + 1
        labels = torch.cat([foreground, torch.zeros(proposals - len(foreground), dtype=torch.long)])
        grouped = torch.randn(proposals, 1236, requires_grad=True)
        plain = torch.randn(proposals, 1231, requires_grad=True)

        def ours(logits: "Tensor" = grouped, labels: "Tensor" = labels) -> tuple["Tensor", ...]:
            """Loss and gradient of BAGS."""
            return torch.autograd.grad(sum(classifier.loss(logits, labels).values()), logits)

        def peer(logits: "Tensor" = plain, labels: "Tensor" = labels) -> tuple["Tensor", ...]:
            """Loss and gradient of a softmax."""
            return torch.autograd.grad(F.cross_entropy(logits, labels), logits)

        case = f"GroupSoftmax loss [{proposals}, 1236]"
        results.append(measure(case, ours, "cross_entropy, 1231", peer, arguments.repeats))
    return results
