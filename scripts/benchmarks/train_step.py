"""A training step of ours against one of torchvision's own model."""

import argparse
from collections.abc import Callable

from scripts.benchmarks.measuring import measure


def train_step(arguments: argparse.Namespace) -> list[dict]:
    """Forward, backward and SGD step of Faster R-CNN R50-FPN with 1,230 categories, 2 images of 320 x 480 pixels."""
    import torch
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    from bags.assembly.models import build_detector
    from bags.config.load import config_from_dict, override_config
    from bags.data.statistics import CategoryStats
    from bags.detectors.weights import translate

    torch.manual_seed(0)
    number, device = 1230, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = tuple(int(20000 / rank**1.2) + 1 for rank in range(1, number + 1))
    stats = CategoryStats(tuple(range(1, number + 1)), tuple(map(str, range(number))), counts, counts)
    keys = ["detector.conventions=torchvision", "detector.min_size=320", "detector.max_size=480"]
    config = override_config(config_from_dict({}), keys)
    grouped = override_config(config, ["classifier.name=group_softmax"])
    peer = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=number + 1, min_size=320, max_size=480
    )
    ours, bags_detector = build_detector(config, stats), build_detector(grouped, stats)
    state = translate(peer.state_dict(), "torchvision").state
    for detector in (ours, bags_detector):
        new = detector.state_dict()
        detector.load_state_dict({**new, **{k: v for k, v in state.items() if v.shape == new[k].shape}})
    corners = torch.rand(2, 8, 2) * 200
    boxes = torch.cat([corners, corners + 20 + torch.rand(2, 8, 2) * 100], 2).to(device)
    targets = [{"boxes": of_image, "labels": torch.randint(1, number + 1, (8,), device=device)} for of_image in boxes]
    images = list(torch.rand(2, 3, 320, 480).to(device))

    def step_of(detector: torch.nn.Module) -> Callable:
        """Make the training step of a detector."""
        detector.to(device).train()
        optimizer = torch.optim.SGD(detector.parameters(), lr=1e-5, momentum=0.9)

        def step() -> dict:
            """One optimisation step; its losses."""
            torch.manual_seed(1)
            losses = detector(images, targets)
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return losses

        return step

    ours_step, peer_step, grouped_step = map(step_of, (ours, peer, bags_detector))
    first, second = ours_step(), peer_step()
    same = all(torch.allclose(first[key], second[key], rtol=1e-5) for key in second)
    repeats = arguments.repeats
    return [
        measure("Softmax, Faster R-CNN R50-FPN", ours_step, "torchvision's own model", peer_step, repeats, same),
        measure("GroupSoftmax, Faster R-CNN R50-FPN", grouped_step, "our Softmax", ours_step, repeats),
    ]
