"""Arguments that several verbs share: paths among overrides, and seeds."""

import os
import sys
from pathlib import Path

from bags.config.load import KEY
from bags.config.rows import without_gpu
from bags.core.errors import UserError


def split_arguments(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Paths (whatever exists, or has no "=") and overrides. Raises UserError for a key apart from its value.

    An override may be longer than a path can be, which `Path.exists` would raise for.
    """
    for k, argument in enumerate(arguments):
        key = argument.removesuffix("=")
        if KEY.fullmatch(key) and not os.path.exists(argument):
            after = [text.removeprefix("=") for text in arguments[k + 1 : k + 3] if text != "="][:1]
            value = next((text for text in after if "=" not in text and not os.path.exists(text)), None)
            if value or (key == argument and "." in key):  # a bare `key=` is null, a bare word may be a folder
                raise UserError(f"{key}: write {key}={value or 'VALUE'}, without spaces")
    is_path = ["=" not in argument or os.path.exists(argument) for argument in arguments]
    pairs = list(zip(arguments, is_path, strict=True))
    return [Path(argument) for argument, path in pairs if path], [argument for argument, path in pairs if not path]


def for_this_machine(paths: list[Path], overrides: list[str]) -> list[Path]:
    """The paths, with other datasets where there is no GPU and a dataset names one; a line says so.

    An override `device=...` keeps the dataset as it is.
    """
    import torch

    if torch.cuda.is_available() or any(text.startswith("device=") for text in overrides):
        return paths
    chosen = [without_gpu(path) for path in paths]
    for path, other in zip(paths, chosen, strict=True):
        if other != path and os.environ.get("RANK", "0") == "0":
            print(f"{path}: torch sees no GPU here, so {other} takes its place; device=cpu keeps it", file=sys.stderr)
    return chosen


def seeds_of(text: str | None) -> list[int | None]:
    """The seeds of a comma-separated text; without one, the seed of the configuration (None)."""
    try:
        return [None] if text is None else list(dict.fromkeys(int(s) for s in text.split(",")))
    except ValueError:
        raise UserError(f"--seeds {text}: expected whole numbers separated by commas, as in 0,1,2") from None
