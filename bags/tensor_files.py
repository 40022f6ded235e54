"""Checks of files that hold tensors, before and after torch reads them: no bombs, no disguises, no NaN."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from bags.errors import UserError

PLAIN = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
}


def check_archive(path: Path) -> None:
    """Refuse a zip file that says it holds more than it can.

    torch stores tensors uncompressed, so the members together are never larger than the file. Reading only the
    file's directory, this takes neither time nor memory. Raises UserError; zipfile.BadZipFile if it is no zip file.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    packed = next((member for member in members if member.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise UserError(f"{path}: not a file of torch's: {packed.filename[:60]!r} in it is compressed")
    declared, size = sum(member.file_size for member in members), path.stat().st_size
    if declared > size:
        raise UserError(f"{path}: not a file of torch's: it declares {declared} bytes of content in {size} bytes")


def check_tensors(path: Path, tensors: dict) -> None:
    """Refuse what is not plain, whole and finite. Raises UserError that names the first such tensor.

    tensors: name -> Tensor. Each is a dense tensor of numbers in memory, as large as it says.
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: expected tensors by name, got {type(tensor).__name__} for {name!r:.60}")
        fault = _fault(tensor)
        if fault:
            raise UserError(f"{path}: {name:.100}: {fault}")


def _fault(tensor: Tensor) -> str | None:
    """What is wrong with a tensor."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return "expected a dense tensor, got a sparse, quantised or empty one"
    if tensor.dtype not in PLAIN:
        return f"expected whole or floating-point numbers, got {tensor.dtype}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims the shape {list(tensor.shape)}, which is more than the file holds"
    if tensor.is_floating_point() and not tensor.isfinite().all():
        return "holds numbers that are not finite (NaN or infinite); use a checkpoint from before training diverged"
    return None
