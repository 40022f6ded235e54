"""Compare finished runs, and make the paper's tables of them."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bags.analysis.paper import METHODS, PAPER, PaperTable
from bags.analysis.results import read_gains, save_results, this_command
from bags.analysis.run_files import read_metrics, read_seconds
from bags.analysis.tables import (
    GAINS,
    render_gains,
    render_norms,
    render_paper_table,
    render_table,
    spread,
    with_means_of_bins,
)
from bags.config.load import load_config, load_rows
from bags.config.rows import find_dataset, row_beside
from bags.core.errors import UserError
from bags.core.terminal import printable
from bags.jobs.folders import check_checkpoint, check_comparable, check_scored_on
from bags.jobs.preflight import validated_on_training
from bags.jobs.train import run_jobs

if TYPE_CHECKING:
    import numpy as np

    from bags.config.sections import Config
    from bags.data.statistics import CategoryStats

    Norms = dict[str, list[np.ndarray]]  # row -> [C+1] of each run

CROWDED = 25  # in an image with more boxes only tail categories are named


def render_pages(paths: list[Path]) -> None:
    """Tables of Markdown pages, from the files beside them that they name."""
    from bags.analysis.results import render_page
    from bags.core.files import decode, read_bytes, write_text

    pages = {}
    for path in paths:
        if not path.is_file() or path.suffix != ".md":
            raise UserError(f"{path}: no such page (a Markdown file, *.md)")
        try:
            before = decode(path, read_bytes(path))
            after = render_page(before, path.parent)
        except UserError as error:
            raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
        if after != before:
            pages[path] = after
    for path, text in pages.items():
        write_text(path, text)


def compare(
    rows: dict[str, list[Path]], figures: bool = True, save: Path | None = None, root: str | None = None
) -> None:
    """Prints the table of `rows` (method -> run folders, one per seed) and draws both figures.

    root: where their dataset is now; default: where it was when the last of them was trained.
    """
    numbers = {name: [read_metrics(f) for f in folders] for name, folders in rows.items()}
    check_comparable(rows)
    table = render_table(numbers)
    norms, correlations, stats, config = weight_norms(rows)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=root or config.data.root))
    print(f"\n{table}\n\nrank correlation of classifier weight norm and training instances:")
    print("\n".join(f"  {printable(name)}: {spread(of_row, '.2f')}" for name, of_row in correlations.items()))
    if words := validated_on_training(config):
        print(f"\nwarning: {words}")
    if save:
        for name, of_row in correlations.items():
            for folder, run, value in zip(rows[name], numbers[name], of_row, strict=True):
                run |= {"correlation": value, "seconds": read_seconds(folder)}
        save_results(save, config.data.name, this_command(), rows, numbers)
    if figures:
        from bags.analysis.plots import plot_weight_norms

        folder = next(iter(rows.values()))[0].parent / "figures"
        first = {name: values[0] for name, values in norms.items()}
        plot_weight_norms(folder / "weight_norms.png", first, stats.instance_counts, config.test.bins)
        _draw_predictions(folder / "predictions.png", {name: f[0] for name, f in rows.items()}, config, stats)
        print(f"figures: {folder / 'weight_norms.png'} {folder / 'predictions.png'}")


def weight_norms(rows: dict[str, list[Path]]) -> tuple["Norms", dict[str, list[float]], "CategoryStats", "Config"]:
    """Norms of every run's classifier, their correlation with the counts, by row; counts and the last configuration."""
    from bags.analysis.weight_norms import classifier_norms, rank_correlation
    from bags.assembly.models import load_detector

    norms: Norms = {}
    correlations: dict[str, list[float]] = {}
    stats: CategoryStats | None = None
    for name, folders in rows.items():
        norms[name], correlations[name] = [], []
        for folder in folders:
            detector, meta = load_detector(folder / "last.pth")
            check_checkpoint(folder, meta["config"])
            stats = stats or meta["stats"]
            if meta["stats"] != stats:
                raise UserError(f"{folder}: trained on another dataset than {next(iter(rows.values()))[0]}")
            norms[name].append(classifier_norms(detector))
            correlations[name].append(rank_correlation(norms[name][-1][1:], meta["stats"].instance_counts))
    assert stats is not None  # there are rows
    return norms, correlations, stats, meta["config"]


def compare_norms(paths: list[Path], figure: Path) -> None:
    """Figure 1 of the paper for any datasets: prints how the norms vary, and draws them over the counts.

    paths: folders of finished runs; and annotation files, or lists of categories with `instance_count` such as LVIS
    publishes, which show counts alone.
    """
    from bags.analysis.plots import plot_norms_and_counts

    _check_figure("norms", figure)
    shown: dict[str, tuple[Sequence[int], np.ndarray | None]] = {}
    for path in paths:
        name, counts, norms = _counts_and_norms(path)
        if name in shown:
            raise UserError(f"{path}: {name} is given twice")
        shown[name] = counts, norms
    print(f"\n{render_norms(shown)}")
    plot_norms_and_counts(figure, shown)
    print(f"figure: {figure}")


def compare_scale(paths: list[Path], figure: Path) -> None:
    """Draw how costs grow with sizes, of files of the benchmarks `scale_categories` and `scale_images`."""
    from bags.analysis.plots import plot_scale
    from bags.analysis.results import load_results

    _check_figure("scale", figure)
    costs: dict[str, dict[str, dict[int, float]]] = {}
    for path in paths:
        content = load_results(path)
        kind = str(content.get("command", "")).partition(" scale_")[2].partition(" ")[0]
        if kind in costs:
            raise UserError(f"{path}: costs against {kind} are given twice")
        costs[kind] = {}
        with contextlib.suppress(KeyError, ValueError, TypeError):
            costs[kind] = {
                case["what"]: {
                    int(size.replace(",", "")): float(cost) for size, cost in case.items() if size[:1].isdigit()
                }
                for case in content["cases"]
            }
        numbers = [cost for of in costs[kind].values() for cost in of.values()]
        if kind not in ("categories", "images") or not any(numbers) or not all(0 <= n < math.inf for n in numbers):
            raise UserError(f"{path}: expected a file that benchmark.py scale_categories or scale_images has saved")
    plot_scale(figure, costs)
    print(f"figure: {figure}")


def _check_figure(option: str, figure: Path) -> None:
    """Refuse what is no file to write a PNG to."""
    if figure.suffix != ".png" or figure.is_dir():
        raise UserError(f"--{option} {figure}: expected a file to write, as in {option}.png")


def compare_gains(paths: list[Path], figure: Path) -> None:
    """Print and draw what methods gain over the control in mAP, for datasets whose choices were saved."""
    from bags.analysis.plots import plot_gains

    _check_figure("gains", figure)
    gains = read_gains(paths)
    print(f"\n{render_gains(gains)}")
    plot_gains(figure, gains, GAINS)
    print(f"figure: {figure}")


def _counts_and_norms(path: Path) -> tuple[str, Sequence[int], "np.ndarray | None"]:
    """A title, training instances [C], and of a run the norms [C+1] of its classifier."""
    from bags.data.index import AnnotationIndex
    from bags.data.json_files import read_json
    from bags.data.statistics import CategoryStats

    if path.is_dir():
        name = path.name
        norms, _, stats, config = weight_norms({name: [path]})
        return f"{config.data.name}, {name}", stats.instance_counts, norms[name][0]
    content = read_json(path)
    if isinstance(content, dict):
        return path.stem, CategoryStats.from_index(AnnotationIndex.open(path)).instance_counts, None
    counts: list = [entry.get("instance_count") if isinstance(entry, dict) else None for entry in content or [None]]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise UserError(f"{path}: expected a list of categories with `instance_count`, or an annotation file")
    return path.stem, counts, None


def _draw_predictions(
    path: Path, runs: dict[str, Path], config: "Config", stats: "CategoryStats", num_images: int = 4
) -> None:
    """The validation images with most instances of tail categories, as each run sees them."""
    import numpy as np

    from bags.analysis.examples import BEST_FEW, LEAST_SCORE, TRUTH, by_image, judged, read_detections
    from bags.analysis.plots import plot_predictions
    from bags.analysis.tables import tail_below
    from bags.assembly.initialise import check_categories
    from bags.assembly.loaders import build_val_dataset

    dataset = build_val_dataset(config)
    index = dataset.index
    tail = np.array([0, *(count < tail_below(config.test.bins) for count in stats.instance_counts)])
    in_tail = np.bincount(index.owners, tail[index.labels], len(index))
    chosen = np.argsort(-in_tail, kind="stable")[:num_images]
    images, truths = [], []
    for position in chosen:
        image, target = dataset.read(position)
        names = [stats.names[label - 1] for label in target["labels"].tolist()]
        truths.append({"boxes": target["boxes"].numpy(), "names": names, "colours": [TRUTH] * len(names)})
        images.append(image)
    image_ids = index.image_ids[chosen].tolist()
    columns = {"ground truth": truths}
    name_of = dict(zip(stats.category_ids, stats.names, strict=True))
    check_categories(stats, index, next(iter(runs.values())))
    for run, folder in runs.items():
        check_scored_on(folder, config)
        detections = by_image(read_detections(folder, name_of))
        columns[run] = [
            judged(detections.get(i, []), truth, name_of, best=BEST_FEW)
            for i, truth in zip(image_ids, truths, strict=True)
        ]
    caption = (
        f"scores of {LEAST_SCORE:.0%} or more, and the best {BEST_FEW} of each image; "
        "green: object and category are right, red: one of them is wrong"
    )
    tail_names = {name for name, is_tail in zip(stats.names, tail[1:], strict=True) if is_tail}
    if any(len(drawing["names"]) > CROWDED for column in columns.values() for drawing in column):
        caption += "; only tail categories are named"
        for drawing in (drawing for column in columns.values() for drawing in column):
            drawing["names"] = [name if name in tail_names else "" for name in drawing["names"]]
    plot_predictions(path, images, columns, caption)


def paper_table(
    name: str,
    path: Path,
    overrides: Sequence[str] = (),
    seeds: Sequence[int | None] = (None,),
    save: Path | None = None,
) -> None:
    """Run the rows of one of the paper's tables that are missing on a dataset, and print the table.

    name: 1, 2, 3, 4, fig4, coco_lt or methods. path: the dataset. save: a JSON file that keeps the numbers.
    """
    tables = {**PAPER, "methods": METHODS}
    if name not in tables:
        raise UserError(f"--paper {name}: expected one of {', '.join(tables)}")
    table, rows = tables[name], _rows_of_table(tables[name], name, path)
    configs = [load_config(row, overrides) for row in rows.values()]
    wrong = next((config.name for config in configs if config.name not in rows), None)
    if wrong is not None:
        raise UserError(f"{path}: name is {wrong}; a row of a table keeps the name of its method: remove `name`")
    waiting = list(configs)
    while waiting:
        for source in waiting.pop().source_rows:
            if source not in rows:
                rows[source] = row_beside(next(iter(rows.values())), source)
                waiting.append(load_config(rows[source], overrides))
    published = table.foreign or configs[0].data.name.startswith(table.data)
    jobs = [load_rows(list(rows.values()), overrides, seed) for seed in seeds]
    starts = {config.name: config.init_row for config in configs}
    run_jobs(jobs, lambda folders: _show_table(table, folders, starts, published, save))


def _rows_of_table(table: PaperTable, name: str, path: Path) -> dict[str, Path]:
    """Method -> row of the dataset, for the table's rows that the dataset does not leave out."""
    dataset = find_dataset(path)
    if dataset is None:
        raise UserError(f"--paper {name}: expected one dataset, as configs/glyphs-100, got {path}")
    wanted = [row.config for row in table.rows if not (table.optional and row.config in dataset.left_out)]
    return {method: dataset.name / method for method in wanted}


def _show_table(
    table: PaperTable,
    folders: dict[str, list[Path]],
    starts: dict[str, str | None],
    published: bool,
    save: Path | None,
) -> None:
    """Print a table of finished runs (method -> run folders, one per seed), and keep its numbers in `save`.

    starts: method -> the method that it starts from, which the column `gain` compares with.
    """
    check_comparable(folders)
    runs = {
        method: [with_means_of_bins(read_metrics(run)) | {"seconds": read_seconds(run)} for run in seeds]
        for method, seeds in folders.items()
    }
    if "gain" in table.columns:
        gains = {method: _gains(runs[method], runs[start]) for method, start in starts.items() if start}
        for method, of_row in gains.items():
            runs[method] = [run | gain for run, gain in zip(runs[method], of_row, strict=True)]
    print(f"\n{render_paper_table(table, runs, published)}")
    if save:
        chosen = {row.title: row for row in table.rows if row.config in folders}
        numbers = {title: runs[row.config] for title, row in chosen.items()}
        others = {title: table.published(row) for title, row in chosen.items() if row.published}
        kept = {title: folders[row.config] for title, row in chosen.items()}
        save_results(save, table.title, this_command(), kept, numbers, others)


def _gains(runs: list[dict[str, float]], starts: list[dict[str, float]]) -> list[dict[str, float]]:
    """AP minus that of the run with the same seed that it starts from; of masks, too, where both have them."""
    columns = {"gain": "AP", "mask_gain": "mask_AP"}
    return [
        {gain: run[ap] - start[ap] for gain, ap in columns.items() if ap in run and ap in start}
        for run, start in zip(runs, starts, strict=True)
    ]
