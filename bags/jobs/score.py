"""Write the detections of a dataset, and score them."""

import hashlib
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from bags.assembly.loaders import build_val_loader
from bags.assembly.stored import images_digest
from bags.config.sections import Config
from bags.core import distributed
from bags.data.dataset import DetectionDataset
from bags.data.statistics import CategoryStats
from bags.detectors.faster_rcnn import FasterRCNN
from bags.detectors.from_features import FromFeatures
from bags.engine.checkpoint import weights_digest
from bags.engine.predict import predict
from bags.evaluation.detection_ap import Scores, score
from bags.evaluation.proposal_accuracy import ProposalAccuracy


def predict_and_evaluate(
    detector: FasterRCNN,
    config: Config,
    stats: CategoryStats,
    dataset: DetectionDataset,
    predictions: Path,
    device: torch.device,
    stored: DataLoader | None = None,
) -> tuple[dict[str, float], dict[str, Scores]]:
    """Writes the results file of a dataset, then scores it: (numbers of boxes, of masks as `mask_AP`, ..., and
    proposal accuracies; all that was found of "bbox" and "segm").

    Every rank takes its share of the images; only the main process scores, the others return nothing.
    Raises UserError if the annotations have changed since the dataset was opened.
    stored: batches of the images' kept features, if there are any.
    """
    accuracy = ProposalAccuracy(stats.num_categories)

    def observe(image: torch.Tensor, target: dict, detection: dict) -> list[list[int]]:
        """Judges one image's proposals, in its own pixels."""
        proposals = detection["proposals"].cpu()
        return accuracy.judge(proposals, detection["proposal_labels"], target["boxes"], target["labels"])

    detector.roi_heads.report_proposals = detector.transform.encode_masks = True
    model, batches = (FromFeatures(detector), stored) if stored else (detector, build_val_loader(config, dataset))
    index, image_ids = dataset.index, dataset.index.image_ids.tolist()
    objects = [hashlib.sha256(array.tobytes()).hexdigest() for array in (index.starts, index.boxes, index.labels)]
    sections = (config.data, config.detector, config.classifier, config.test)
    settings = (stored is None, *sections, image_ids, objects, images_digest(dataset))
    key = f"{weights_digest({'model': detector.state_dict()})} {hashlib.sha256(repr(settings).encode()).hexdigest()}"
    categories = stats.category_ids
    for judged in predict(model, batches, device, categories, image_ids, predictions, config.name, key, observe):
        accuracy.add(judged)
    detector.roi_heads.report_proposals = detector.transform.encode_masks = False
    accuracy.counts = distributed.total(accuracy.counts.to(device)).cpu()
    if not distributed.is_main():
        return {}, {}
    results: dict[str, float] = {}
    scores: dict[str, Scores] = {}
    for iou_type, prefix in (("bbox", ""), ("segm", "mask_")):
        if iou_type == "segm" and not (config.detector.has_masks and scores["bbox"].has_masks):
            continue
        scores[iou_type] = score(
            Path(config.data.root) / config.data.val,
            predictions,
            iou_type,
            instance_counts=stats.instance_counts,
            image_counts=stats.image_counts,
            boundaries=config.test.bins,
            max_detections=config.test.max_detections,
        )
        results |= {f"{prefix}{name}": value for name, value in scores[iou_type].numbers.items()}
    index.check_unchanged()  # scoring has read the file itself
    for note in scores["bbox"].notes:
        print(f"note: {note}", file=sys.stderr)
    return results | accuracy.summary(stats.instance_counts, config.test.bins), scores
