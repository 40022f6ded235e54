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


MOST_DRAWS = 100_000


def check_draws(draws: int) -> None:
    """Raise UserError unless --draws can be drawn."""
    if not 0 <= draws <= MOST_DRAWS:
        raise UserError(f"--draws {draws}: expected 0 to {MOST_DRAWS}")


def check_output_folder(folder: Path) -> None:
    """Raise UserError if --output names the folder of a run, whose files would be overwritten."""
    if (folder / "config.yaml").is_file():
        raise UserError(f"--output {folder}: is the folder of a run (it has config.yaml); choose another --output")


def check_save(path: Path | None) -> None:
    """Raise UserError, before anything is trained, if --save names no place for a file, or a file of another kind."""
    if path is None:
        return
    if path.is_file():
        from bags.analysis.results import load_results

        try:
            load_results(path)
        except UserError:
            raise UserError(f"--save {path}: exists already, and is not what --save writes; choose another") from None
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"{parent} is not a folder"
        raise UserError(f"--save {path}: {problem}: expected a file, as in results/x.json")
