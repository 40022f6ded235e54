"""Names that torchvision does not publish; no other file of the package imports one.

Checked with torchvision 0.26 to 0.29. If a later version moves or renames them, this file fails to import. The
detectors rely on these calls:

BalancedPositiveNegativeSampler  (batch_size_per_image, positive_fraction), called with labels [N] of each image; draws
                                 with `torch.randperm`, the foreground first
BoxCoder                         (weights, bbox_xform_clip), with `encode`, `decode` and `decode_single`
Matcher                          (high_threshold, low_threshold, allow_low_quality_matches), called with overlaps
                                 [objects, N]; BELOW_LOW_THRESHOLD and BETWEEN_THRESHOLDS mark unmatched boxes
"""

from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher

__all__ = ["BalancedPositiveNegativeSampler", "BoxCoder", "Matcher"]
