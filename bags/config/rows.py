"""Rows: a dataset and a method composed into one configuration, or YAML files of one's own.

A row is written as a path, DATASET/METHOD without an ending: `configs/glyphs-100/bags` is
`configs/datasets/glyphs-100.yaml` with `configs/methods/bags.yaml` laid over it. The packaged configurations are
also known by name (`glyphs-100/bags`). A YAML file of one's own is a row, or with the key `rows` a dataset.

The keys of a dataset file beside those of a configuration:

rows              the methods of its job
classifier_stage  changes for every row that trains only the classifier (train.part cls), such as its schedule
methods           method -> changes for that method, and for those built on it
left_out          methods that the paper's tables leave out
without_gpu       the dataset that takes this one's place where there is no GPU
"""

import difflib
import functools
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bags.config.sections import Config
from bags.config.typed_yaml import merge, need_sections, parse_yaml, shown
from bags.core.errors import UserError, one_line, system_error
from bags.core.files import decode, read_bytes, read_text

_PLACES = [folder / "configs" for folder in Path(__file__).resolve().parents[1:3]]  # of the package, of a checkout
CONFIGS = next((folder for folder in _PLACES if folder.is_dir()), _PLACES[0])


class Dataset(NamedTuple):
    """A dataset file; its other keys are explained at the head of this file."""

    name: Path  # its path as written, without the ending; rows are `name`/METHOD
    file: Path
    rows: list[str]
    classifier_stage: dict
    methods: dict[str, dict]
    left_out: list[str]
    without_gpu: str
    settings: dict  # of a configuration, without the keys above


class Composed(NamedTuple):
    """The nested values of one row, and the files that they come from."""

    tree: dict  # section -> key -> value, with the row's `name`
    files: tuple[Path, ...]  # the dataset and the method, or the one file of the row


def compose(path: Path) -> Composed:
    """The values of a row: DATASET/METHOD, or a YAML file. Raises UserError for a dataset or a folder."""
    if path.is_file():
        tree = read_tree(path)
        if "rows" in tree:
            raise UserError(f"{path}: is a dataset; one of its rows is {path.with_suffix('') / tree['rows'][0]}")
        return Composed({"name": path.stem, **tree}, (path,))
    dataset = find_dataset(path.parent)
    if dataset is None:
        raise UserError(_unknown(path))
    return _lay(dataset, path.stem if path.suffix == ".yaml" else path.name)


def _lay(dataset: Dataset, method: str) -> Composed:
    """Lays the dataset's stage, then each method of the chain with the dataset's changes to it."""
    chain = _chain(_method_file(dataset, method))
    for name in read_file(dataset.file).get("methods", {}):  # those of a base may be known beside it only
        if not name.startswith("_"):
            _method_file(dataset, name, f"{dataset.file}: methods")
    layers: list[dict] = []
    for file, values in chain:
        layers += [values, dataset.methods.get(file.stem, {})]
    method_values: dict[str, Any] = {}
    for layer in layers:
        merge(method_values, deepcopy(layer))
    tree = deepcopy(dataset.settings)
    if method_values.get("train", {}).get("part") == "cls":
        merge(tree, deepcopy(dataset.classifier_stage))
    for layer in layers:
        merge(tree, deepcopy(layer))
    return Composed({**tree, "name": method}, (dataset.file, chain[-1][0]))


def rows_of(path: Path, methods: Sequence[str] = ()) -> list[Path]:
    """The rows that a path of the command line stands for.

    A dataset stands for its rows, or for those named by `methods`; a folder for its YAML files but those that begin
    with _; a row for itself. Raises UserError for a path that is none of these.
    """
    dataset = find_dataset(path)
    if dataset:
        return [dataset.name / method for method in methods or dataset.rows]
    if methods:
        raise UserError(f"{path}: is no dataset, so it takes no methods ({', '.join(methods)})")
    if path.is_dir():
        files = sorted(path.glob("[!_]*.yaml"))
        if not files:
            raise UserError(f"{path}: expected a folder of YAML files, a dataset, or DATASET/METHOD")
        return files
    if path.is_file() and path.name.startswith("_"):
        rows = ", ".join(row.name for row in sorted(path.parent.glob("[!_]*.yaml")))
        raise UserError(f"{path}: is a base of other files; its rows are {rows or 'still to be written'}")
    if path.is_file() or find_dataset(path.parent):
        return [path]
    raise UserError(_unknown(path))


def row_beside(row: Path, method: str) -> Path:
    """The row `method` of the dataset, or of the folder, that `row` belongs to."""
    return row.with_name(f"{method}.yaml" if row.is_file() else method)


def read_file(path: Path) -> dict:
    """The nested values of one YAML file, with its key `base` if there is one."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file; expected a YAML file")
    try:
        tree = deepcopy(_parsed(decode(path, read_bytes(path))))
    except UserError:
        raise
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise UserError(f"{path}: no such configuration file{hint}") from None
    except OSError as error:
        raise UserError(system_error(error, path)) from None
    except RecursionError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({one_line(error)})") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected `section: {{key: value}}`, found {type(tree).__name__}")
    _need_layers(path, tree)
    return tree


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """`parse_yaml`; the rows of a table read the same few files again and again."""
    return parse_yaml(text)


def _need_layers(path: Path, tree: dict) -> None:
    """Raise UserError for a section that is no mapping, in the settings, the classifier stage or a method's changes."""
    methods = tree.get("methods", {})
    if not isinstance(methods, dict):
        raise UserError(f"{path}: methods: expected a section of keys, got {shown(methods)}")
    for method in methods:
        if not isinstance(method, str):
            raise UserError(f"{path}: methods: expected names of methods, got {shown(method)}")
    changes = {f"methods.{method}": layer for method, layer in methods.items()}
    for key, layer in {"": tree, "classifier_stage": tree.get("classifier_stage", {}), **changes}.items():
        need_sections(layer, Config, key, str(path))


def read_tree(path: Path, children: tuple[Path, ...] = ()) -> dict:
    """A file laid over its `base`, as nested values. `children` are the files that led here."""
    if path.resolve() in children:
        raise UserError(f"{path}: its `base` leads back to itself")
    tree = read_file(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base: expected the path of a YAML file, a dataset or a row, got {shown(base)}")
    below = _base_tree(path, base, (*children, path.resolve()))
    below.pop("without_gpu", None)  # stands for that file only
    return merge(below, tree)


def _base_tree(path: Path, base: str, children: tuple[Path, ...]) -> dict:
    """The values of a `base`: a file relative to the file that names it, a dataset or a row, packaged ones by name."""
    near = path.parent / base
    if near.is_file():
        return read_tree(near, children)
    for place in (near, Path(base)):
        dataset = find_dataset(place)
        if dataset:
            return read_tree(dataset.file, children)
        if find_dataset(place.parent):
            return {key: value for key, value in compose(place).tree.items() if key != "name"}
    if near.exists():
        return read_tree(near, children)  # which says why it cannot be read
    raise UserError(f"{path}: base: {_unknown(near)}")


def find_dataset(path: Path) -> Dataset | None:
    """The dataset of a path such as `configs/glyphs-100`, `glyphs-100` or `mine.yaml`; None if it is none."""
    for file in _candidates(path):
        if file.is_file():
            tree = read_tree(file)
            if "rows" in tree:
                return _dataset(path.with_suffix("") if path.suffix == ".yaml" else path, file, tree)
    return None


def without_gpu(path: Path) -> Path:
    """The path that takes the place of a dataset, or of a row of it, where there is no GPU; else the same path."""
    dataset, of_row = find_dataset(path), None if path.is_file() else find_dataset(path.parent)
    if dataset and dataset.without_gpu:
        return dataset.name.with_name(dataset.without_gpu)
    if not dataset and of_row and of_row.without_gpu:
        return of_row.name.with_name(of_row.without_gpu) / path.name
    return path


def _candidates(path: Path) -> list[Path]:
    """Where the file of a dataset may be, the nearest first."""
    if path.suffix == ".yaml":
        return [path]
    name = f"{path.name}.yaml"
    places = [path.parent / "datasets" / name, path.parent / name]
    if str(path.parent) in (".", "configs"):
        places.append(CONFIGS / "datasets" / name)
    return places


def _dataset(name: Path, file: Path, tree: dict) -> Dataset:
    kinds = {"rows": list, "classifier_stage": dict, "methods": dict, "left_out": list, "without_gpu": str}
    values = {key: tree.pop(key, kind()) for key, kind in kinds.items()}
    for key in ("rows", "left_out"):
        if not isinstance(values[key], list):
            raise UserError(f"{file}: {key}: expected a list of methods, got {values[key]!r:.60}")
        if not all(isinstance(method, str) for method in values[key]):
            raise UserError(f"{file}: {key}: expected names of methods, got {values[key]!r:.60}")
    if not isinstance(values["without_gpu"], str):
        raise UserError(f"{file}: without_gpu: expected the name of a dataset, got {values['without_gpu']!r:.60}")
    if not values["rows"]:
        raise UserError(f"{file}: rows: expected one method or more, got none")
    return Dataset(name, file, settings=tree, **values)


def _method_file(dataset: Dataset, method: str, where: str | None = None) -> Path:
    """The method's file. Raises UserError for an unknown method; the message names the place and the nearest one."""
    known = methods_of(dataset)
    if method in known:
        return known[method]
    near = difflib.get_close_matches(method, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    raise UserError(f"{where or dataset.name / method}: {method} is no method; {hint}")


def methods_of(dataset: Dataset) -> dict[str, Path]:
    """The methods that can be rows of a dataset, by name: their files beside the dataset's, or the packaged ones."""
    folders = [CONFIGS / "methods", dataset.file.parent.parent / "methods", dataset.file.parent / "methods"]
    files = {file.stem: file for folder in folders for file in folder.glob("[!_.]*.yaml") if file.is_file()}
    return dict(sorted(files.items()))


def summary(file: Path) -> str:
    """The comment in the first line of a YAML file, or nothing."""
    first = read_text(file, errors="replace").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _chain(file: Path, children: tuple[Path, ...] = ()) -> list[tuple[Path, dict]]:
    """A method's file and those it builds on, the deepest base first."""
    if file.resolve() in children:
        raise UserError(f"{file}: its `base` leads back to itself")
    values = read_file(file)
    base = values.pop("base", None)
    if base is None:
        return [(file, values)]
    if not isinstance(base, str):
        raise UserError(f"{file}: base: expected the name of a method, got {base!r:.60}")
    below = file.with_name(f"{base}.yaml")
    below = below if below.is_file() else CONFIGS / "methods" / f"{base}.yaml"
    if not below.exists():
        known = {path.stem for folder in (file.parent, CONFIGS / "methods") for path in folder.glob("*.yaml")}
        near = difflib.get_close_matches(base, sorted(known - {file.stem}), 1)
        raise UserError(f"{file}: base: {base} is no method" + (f"; did you mean {near[0]}?" if near else ""))
    return [*_chain(below, (*children, file.resolve())), (file, values)]


def _unknown(path: Path) -> str:
    """The message for a path that is neither a file nor a row; it names the nearest one."""
    if path.exists():
        return f"{path}: not a regular file; expected DATASET/METHOD or a YAML file"
    if path.suffix == ".yaml":
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        return f"{path}: no such configuration file{hint}"
    datasets = sorted(file.stem for file in (CONFIGS / "datasets").glob("*.yaml"))
    near = difflib.get_close_matches(path.name, datasets, 1) or difflib.get_close_matches(path.parent.name, datasets, 1)
    hint = f"did you mean {near[0]}?" if near else f"datasets: {', '.join(datasets)}"
    return f"{path}: no such dataset, DATASET/METHOD, folder or file; {hint}"
