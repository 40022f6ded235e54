"""Reading files of torch.save without running their code and without trusting the sizes that they declare.

torch's own `weights_only=True` keeps code from running. What it lets through, and is refused here: archives that
unpack to more than they hold, tensors that repeat a small storage, and kinds of tensors that no detector has
(sparse, quantised, complex, or without values).
"""

import contextlib
import io
import pickle
import pickletools
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from bags.core.errors import UserError

STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED = {  # all that a file may name; `weights_only=True` allows more
    *(f"torch {kind}Storage" for kind in STORAGES),
    "torch Size",
    "torch device",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.nn.parameter Parameter",
    "collections OrderedDict",
    "collections Counter",
    "collections defaultdict",
    "__builtin__ set",
    "_codecs encode",
}
LEGACY_PICKLES = 5  # at the beginning of a file of torch before 1.6


class Damaged(UserError):
    """A file whose checksums differ from its content."""


def load_tensors(path: Path, what: str, sealed: bool = False) -> Any:
    """Reads a file of tensors and plain values to CPU memory.

    what: the kind of file, for errors, as in "checkpoint". sealed: the whole file has been compared with a digest.
    Raises Damaged where a checksum of the archive differs, else UserError, for everything that is no such file.
    """
    odd = ""
    try:
        if zipfile.is_zipfile(path):
            odd = _check_archive(path, sealed)
        elif tarfile.is_tarfile(path):
            odd = "a tar archive, as torch wrote before 2017"
        else:
            with path.open("rb") as file, contextlib.suppress(ValueError):  # no pickle: torch.load says so
                odd = _foreign_name([file] * LEGACY_PICKLES)
        content = None if odd else torch.load(path, map_location="cpu", weights_only=True)
        size = path.stat().st_size
        odd = odd or ("tensors that repeat their storage" if _nbytes(all_tensors(content)) > size else "")
    except Damaged:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a {what}: it holds more than tensors and plain values") from None
    except Exception as error:  # whatever a file can do to a parser
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise UserError(f"{path}: not a {what}, or damaged ({type(error).__name__})") from None
    if odd:
        raise UserError(f"{path}: not a {what}: it holds more than tensors and plain values ({odd})")
    return content


def _check_archive(path: Path, sealed: bool) -> str:
    """The first thing that no archive of torch.save contains, or ""; nothing is unpacked for it."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            return "compressed members, which torch.save does not write"
        if sum(member.file_size for member in members) > path.stat().st_size:
            return "members that are larger than the file"
        pickles = [member for member in members if member.filename.endswith("data.pkl")]
        odd = _foreign_name(io.BytesIO(archive.read(member)) for member in pickles)
        if not odd and not sealed and archive.testzip() is not None:  # torch does not look at the checksums
            raise Damaged(f"{path}: damaged (its checksum differs)")
        return odd


def _foreign_name(pickles: Iterable[IO[bytes]]) -> str:
    """The first function or type that pickles name and that is not ALLOWED, or ""."""
    for file in pickles:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST") and argument not in ALLOWED:
                return str(argument).replace(" ", ".")[:100]
    return ""


def all_tensors(content: object) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples of any depth, each once."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor | dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Tensor):
                yield value
            else:
                waiting.extend(value.values() if isinstance(value, dict) else value)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, were each stored by itself."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_state(state: Mapping[Any, Any], path: Path, what: str) -> None:
    """Raises UserError unless `state` is a state dict whose tensors could all have been read from the file."""
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path}: not a {what}: expected a state dict of names and tensors, got {type(value).__name__}"
            )
    if _nbytes(state.values()) > path.stat().st_size:
        raise UserError(f"{path}: not a {what}: many names in its state dict share one tensor")


def check_finite(state: Mapping[str, Tensor], source: object) -> None:
    """Raises UserError for weights that are NaN or infinite in float32, and for variances below 0, naming the first.

    source: what holds the weights, for the error.
    """
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        if not value.to(torch.float32).isfinite().all():
            raise UserError(f"{source}: {name} holds numbers that are not finite: these weights cannot be used")
        if name.endswith("running_var") and (value < 0).any():
            raise UserError(f"{source}: {name} holds variances below 0: these weights cannot be used")
