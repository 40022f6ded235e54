"""Half precision by autocast."""

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device_type: str, precision: str) -> torch.autocast:
    """A context that computes convolutions and matrix products in `precision`: fp32 (as they are), bf16 or fp16."""
    return torch.autocast(device_type, PRECISIONS[precision], enabled=precision != "fp32")
