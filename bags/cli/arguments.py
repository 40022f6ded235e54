"""Arguments that several verbs share: paths among overrides, and seeds."""

import os
from pathlib import Path

from bags.config.load import KEY
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


def seeds_of(text: str | None) -> list[int | None]:
    """The seeds of a comma-separated text; without one, the seed of the configuration (None)."""
    try:
        return [None] if text is None else list(dict.fromkeys(int(s) for s in text.split(",")))
    except ValueError:
        raise UserError(f"--seeds {text}: expected whole numbers separated by commas, as in 0,1,2") from None
