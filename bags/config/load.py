"""One YAML file -> one frozen, typed `Config`.

A file may name a `base` file (path relative to itself) and then holds only what differs from it;
`section.key=value` overrides any leaf. The classifier and the sampler are chosen by `name`, and a
new name replaces the whole section, so that no key of one method leaks into another. Unknown keys,
wrong types and impossible values raise `UserError` before any data is read.

The type of a key says how the value of an override is read:

- A text (a name, a folder, a file) is taken as it is: `output=exp #2`, `data.name=2024` and `name=on` need no quotes,
  and quotes are part of the text.
- Where null is allowed, `key=null` and `key=` are null; `~` is, too. A file of that name is written `./null`.
- A word from a list of words is taken as it is: `train.features=cached`, `classifier.temperatures=learned`.
- Everything else is YAML: `train.lr=1e-4`, `data.exif=true`, `test.bins=[10, 100]`, `classifier={name: softmax}`.

In a file all values are YAML, merge keys (`<<`) included. A text is a single line of valid UTF-8.
"""

import dataclasses
import re
import typing
from pathlib import Path

import yaml

from bags.config.rows import compose, row_beside, rows_of
from bags.config.sections import ClassBalancedConfig, Config
from bags.config.typed_yaml import convert, merge, need_sections, option_types, read_override
from bags.core.errors import UserError, one_line
from bags.core.files import write_text
from bags.core.settings import NO_RESULT, marks, need

# The key of an override.
KEY = re.compile(rf"({'|'.join(field.name for field in dataclasses.fields(Config))})(\.\w+)*(?<!\.yaml)(?<!\.yml)")


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a row (DATASET/METHOD, or a YAML file with its bases), then `section.key=value` overrides, left to right.

    Raises UserError, naming the file and the key, for anything that cannot be used.
    """
    return _resolve(compose(Path(path)).tree, overrides, str(path))


def load_rows(
    paths: typing.Sequence[Path],
    overrides: typing.Sequence[str],
    seed: int | None = None,
    methods: typing.Sequence[str] = (),
) -> list[Config]:
    """Load the configurations of datasets, rows, files and folders; each follows the row that it starts from.

    methods: rows of the datasets instead of their default ones; the rows that they start from are added.
    """
    rows = [row for path in paths for row in rows_of(path, methods)]
    if not rows:
        raise UserError("no configuration: expected a dataset, DATASET/METHOD, a YAML file or a folder of them")
    waiting = [load_config(row, overrides) for row in rows]
    for row, config in zip(rows, waiting, strict=False) if methods else ():  # grows with the rows that are added
        for name in config.source_rows:
            if name not in {other.name for other in waiting} and not _is_only_a_run(config, row, name):
                rows.append(row_beside(row, name))
                waiting.append(load_config(rows[-1], overrides))
    if seed is not None:
        seeded = [f"seed={seed}", f"output={waiting[0].output}/seed{seed}"]
        waiting = [load_config(row, [*overrides, *seeded]) for row in rows]
    ordered: list[Config] = []
    while waiting:
        names = {config.name for config in waiting}
        ready = [config for config in waiting if names.isdisjoint(config.source_rows)]
        if not ready:
            raise UserError(f"rows start from each other in a circle: {', '.join(sorted(names))}")
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return ordered


def _is_only_a_run(config: Config, row: Path, name: str) -> bool:
    """Whether a row to start from has been trained, but is no method of the dataset, such as the row `choose`."""
    if not config.source_file(f"row:{name}").exists():
        return False
    try:
        compose(row_beside(row, name))
    except UserError:
        return True
    return False


def check_config(config: Config, source: str) -> Config:
    """The same configuration. Raises UserError, which begins with `source`, for values that cannot work."""
    _check(config, source)
    return config


def override_config(config: Config, overrides: typing.Sequence[str]) -> Config:
    """Return the configuration with some leaves changed, checked as `load_config` does."""
    return _resolve(config_to_dict(config), overrides, config.name)


def _resolve(tree: dict, overrides: typing.Sequence[str], source: str) -> Config:
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override '{override}': expected section.key=value")
        try:
            value = read_override(text, option_types(Config, key, tree))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"override '{override}': the value is not YAML ({one_line(error)})") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        need_sections(value, Config, "", source)
        merge(tree, value)
    config = config_from_dict(tree, source)
    _check(config, source)
    return config


def config_from_dict(tree: dict, source: str = "config") -> Config:
    """Make a Config of nested plain values, checked section by section. `source` names the origin in errors."""
    return convert(tree, Config, "", source)


def config_to_dict(config: Config) -> dict:
    """Return the resolved configuration as plain values, as YAML and checkpoints hold it."""
    return _plain(config)


def result_settings(config: Config) -> dict:
    """Return, as plain values, the settings that can change a result: all keys but those marked NO_RESULT."""
    return _plain(config, without=NO_RESULT)


def _plain(value: typing.Any, without: object = None) -> typing.Any:
    """Turn dataclasses into dicts and tuples into lists. Fields with the mark `without` are left out."""
    if dataclasses.is_dataclass(value):
        fields = marks(type(value))
        names = [field.name for field in dataclasses.fields(value) if without not in fields[field.name]]
        return {name: _plain(getattr(value, name), without) for name in names}
    return [_plain(item, without) for item in value] if isinstance(value, tuple) else value


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved file; `load_config` of it gives an equal Config."""
    write_text(Path(path), yaml.safe_dump(config_to_dict(config), sort_keys=False))


def _check(config: Config, source: str) -> None:
    """Check what no section can know by itself. Raises UserError, naming the source and a key."""
    try:
        _check_sources(config)
        _check_classifier(config)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def _check_sources(config: Config) -> None:
    """Data and weights fit the detector and the trained part."""
    data, detector, train = config.data, config.detector, config.train
    for key, path in (("store.folder", config.store.folder), ("detector.init_from", detector.init_from)):
        need(path != "", key, "a path, got ''")
        need((path or "").split("/")[0] != "~", key, f"a path without ~, which only a shell expands, got {path!r}")
    words = f"detector.framework htc: {detector.framework} has no semantic branch"
    need(data.train_semantic is None or detector.framework == "htc", "data.train_semantic", words)
    words = f"a checkpoint: with train.part={train.part} the rest of the detector would stay random"
    need(train.part == "all" or detector.init_from is not None, "detector.init_from", words)
    masks = not detector.has_masks or detector.roi.class_agnostic_masks  # do not depend on categories
    parts = ("all", *(("head",) if masks else ()), *(("cls",) if masks and detector.roi.class_agnostic else ()))
    words = f"{' or '.join(parts)}: with detector.other_categories more starts new"
    need(not detector.other_categories or train.part in parts, "train.part", words, train.part)
    words = f"live: {data.redrawn} makes images anew each time, which cannot be stored"
    need(train.features != "cached" or not data.redrawn, "train.features", words)
    for key, off in (("jitter", "[]"), ("copy_paste", "0")):
        words = f"{off}: detector.conventions=released has the resizing of the paper's code"
        need(detector.conventions != "released" or not getattr(data, key), f"data.{key}", words)
    for path in config.classifier.sources:
        words = f"a path without ~, which only a shell expands, got {path!r}"
        need(path.split("/")[0] != "~", "classifier.of", words)
    row = config.init_row
    need(row != config.name, "detector.init_from", "another row than this one")
    need(row is None or (bool(row) and not set(row) & set("/\\")), "detector.init_from", f"row:NAME, got row:{row}")
    for row in config.source_rows:
        is_name = bool(row) and not set(row) & set("/\\")
        need(is_name and row != config.name, "classifier.of", f"row:NAME of another row, got row:{row}")


def _check_classifier(config: Config) -> None:
    """The classifier and the sampler fit the trained part."""
    classifier, part = config.classifier, config.train.part
    need(bool(classifier.sources) or not classifier.combines, "classifier.of", "one run or more, such as [row:bags]")
    if not classifier.trained:
        need(part == "none", "train.part", f"none: {classifier.name} trains nothing", part)
    elif classifier.on_softmax:
        need(part == "cls", "train.part", f"cls: {classifier.name} keeps the softmax of init_from", part)
    if isinstance(config.sampler, ClassBalancedConfig):
        words = "cached, and train.part=cls: sampler class_balanced draws from stored proposals"
        words += f", which {config.data.redrawn} rules out" * bool(config.data.redrawn)
        need(config.is_cached, "train.features", words)
