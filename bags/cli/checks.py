"""Checks of options that several verbs have; without torch, which scoring does not need."""

from pathlib import Path

from bags.core.errors import UserError

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
    if (path.exists() and not path.is_file()) or not parent.is_dir():
        kind = "is a folder" if path.is_dir() else "is no regular file"
        problem = kind if path.exists() else f"{parent} is not a folder"
        raise UserError(f"--save {path}: {problem}: expected a file, as in results/x.json")
