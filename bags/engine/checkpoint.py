"""Checkpoints: self-contained, written atomically, read without unpickling code.

A checkpoint is a dict: `format`, `config` (resolved, plain), `stats` (category ids, names and
training counts), `model` (state dict), and in a run's own file `init` (digest of the weights that it
started from), `optimizer`, `iteration`, with fp16 `scaler`, and with train.ema `unaveraged` (the weights that the
optimiser goes on from; `model` then has their averages). The file ends with a digest of itself, as the
comment of the zip file that torch writes: zip's own checksums do not cover all bytes.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from bags.core.errors import UserError
from bags.core.files import open_regular, read_text, write_problem, write_text
from bags.core.tensor_files import Damaged, check_state, load_tensors

FORMAT = 2  # 1 had no seal
SEAL = b"sha256:"  # and the digest of all before it, as the comment that ends a zip file
SEALED = len(SEAL) + 64  # bytes


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a run's checkpoint and keep the former `last.pth` as `previous.pth`.

    Weights that are not finite are not written: nothing could be done with them. Raises UserError.
    """
    floats = {name: value for name, value in content["model"].items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in floats.values()]).tolist() if floats else []
    if not all(finite):
        name = list(floats)[finite.index(False)]
        raise UserError(
            f"{path}: not written, since training has made {name} infinite or NaN: lower train.lr or train.clip_norm; "
            "the checkpoint from before is kept"
        )
    write_checkpoint(path, content, path.with_name("previous.pth"))


def write_checkpoint(path: Path, content: dict, previous: Path | None = None) -> None:
    """`write_file` of a checkpoint's content."""
    write_file(path, {"format": FORMAT, **content}, previous)


def keep_best(folder: Path, content: dict, entry: dict) -> None:
    """Adds {epoch, AP, ...} of a validation to `validation.json`; if no AP before it was as high, writes `best.pth`.

    AP is None where there is none. A run that was killed repeats validations, which replace their former selves.
    """
    path, before = folder / "validation.json", []
    if path.exists():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # damaged: begun again
            before = [old for old in json.loads(read_text(path)) if old["epoch"] < entry["epoch"]]
    if (entry["AP"] or 0.0) > max((old["AP"] or 0.0 for old in before), default=-1.0):
        write_checkpoint(folder / "best.pth", content)
    write_text(path, json.dumps([*before, entry], indent=1))


def write_file(path: Path, content: dict, previous: Path | None = None) -> None:
    """Writes to a temporary file, then renames; what was there before goes to `previous`, if that is given."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("w+b") as file:
            torch.save(content, file)
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer hides a full disk behind a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({write_problem(error)}); older checkpoints are whole") from None
    folder = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # not every file system can put names on disk at once
        os.fsync(folder)
    os.close(folder)


def _seal(file: BinaryIO) -> None:
    """Makes the digest of a zip file its comment."""
    file.seek(-2, os.SEEK_END)  # the length of the comment, so far 0
    file.write(SEALED.to_bytes(2, "little"))
    file.write(SEAL + _digest(file, file.tell()).encode())


def _digest(file: BinaryIO, size: int) -> str:
    """SHA-256 of a file's first `size` bytes, in hexadecimal; the file's position is then after them."""
    digest = hashlib.sha256()
    file.seek(0)
    while size:
        block = file.read(min(size, 2**22))
        digest.update(block)
        size -= len(block)
        if not block:
            break
    return digest.hexdigest()


def check_seal(path: Path) -> bool | None:
    """Whether a file is what was written, byte for byte; None for one that has no seal."""
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END) - SEALED
        if size < 0:
            return None
        digest = _digest(file, size)
        seal = file.read()
    return seal[len(SEAL) :] == digest.encode() if seal.startswith(SEAL) else None


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint to CPU memory. Raises UserError that says what the file is not, or that it is damaged."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; train the model it belongs to first")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; expected a checkpoint")
    whole, content = check_seal(path), None
    damaged = f"{path}: damaged (its checksum differs); without it a run goes on from previous.pth"
    if whole is False:
        raise UserError(damaged)
    try:
        content = load_tensors(path, "checkpoint", sealed=whole is True)
    except Damaged:
        raise UserError(damaged) from None
    if whole is None and isinstance(content, dict) and content.get("format") == FORMAT:
        raise UserError(damaged)
    if not isinstance(content, dict) or not {"config", "stats", "model"} <= content.keys():
        raise UserError(f"{path}: not a checkpoint of this project (no config, stats and model in it)")
    if not all(isinstance(content[key], dict) for key in ("config", "stats", "model")):
        raise UserError(f"{path}: not a checkpoint of this project (config, stats and model are no mappings)")
    check_state(content["model"], path, "checkpoint of this project")
    version = content.get("format")
    if type(version) is not int or version not in (1, FORMAT):
        raise UserError(f"{path}: checkpoint format {version if type(version) is int else '?'}, expected {FORMAT}")
    return content


def load_latest(folder: Path, warn: bool = True) -> dict | None:
    """The run's `last.pth`; where that is missing or damaged, `previous.pth`; None for a new run.

    warn: say so on stderr; a job looks several times, and says it once.
    """
    files = [folder / name for name in ("last.pth", "previous.pth") if (folder / name).exists()]
    for file in files:
        try:
            return load_checkpoint(file)
        except UserError as error:
            if file == files[-1]:
                raise
            if warn:
                print(f"warning: {error}; going on from {files[-1].name}", file=sys.stderr)
    return None


def weights_digest(checkpoint: dict) -> str:
    """SHA-256 of a checkpoint's weights: names and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, value in sorted(checkpoint["model"].items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def sources_digest(checkpoints: Sequence[dict]) -> str | None:
    """Digest of the weights of checkpoints: of one its own (`weights_digest`), of several one of theirs, else None."""
    digests = [weights_digest(checkpoint) for checkpoint in checkpoints]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if len(digests) > 1 else next(iter(digests), None)


def load_weights(model: nn.Module, checkpoint: dict, skip: Sequence[str] = ()) -> list[str]:
    """Copies the parameters that fit by name and shape; returns the names of those that stay new.

    Names that begin with one of `skip` are left out.
    """
    state, saved = model.state_dict(), checkpoint["model"]
    fitting = {
        key: saved[key]
        for key, value in state.items()
        if key in saved
        and saved[key].shape == value.shape
        and saved[key].is_floating_point() == value.is_floating_point()
        and not key.startswith(tuple(skip))
    }
    model.load_state_dict(fitting, strict=False)
    return [key for key in state if key not in fitting]
