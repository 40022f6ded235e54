"""Shows what changed between finished runs: the paper's table, weight norms, example predictions.

    python scripts/tables.py runs/glyphs-100                       # all runs of a dataset
    python scripts/tables.py runs/seed*/glyphs-100                 # mean and deviation over seeds
    python scripts/tables.py runs/glyphs-100/softmax runs/glyphs-100/bags
    python scripts/tables.py --paper 1 configs/glyphs-100          # the paper's table; runs what is missing
    python scripts/tables.py --paper 1 configs/glyphs-100 --seeds 0,1,2 --save results/glyphs-100-table1.json
    python scripts/tables.py --render README.md RESULTS.md         # their tables anew, from results/*.json

`--paper` is 1, 2, 3, 4 or fig4, or methods: later ones beside BAGS, with the seconds of their training steps and the
published numbers that can be compared. It takes section.key=value overrides and --seeds as train.py does. Without
it, figures are written to `figures` beside the first seed's run folders: weight_norms.png (the paper's
Figures 1 and 3 for these runs) and predictions.png (validation images, every run's boxes).
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.errors import UserError, run_script
from bags.terminal import printable

CROWDED = 25  # in an image with more boxes only tail categories are named


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, or folders of them; with --paper a folder of configs")
    parser.add_argument("--no-figures", action="store_true", help="print the table only")
    parser.add_argument("--paper", help="a table of the paper: 1, 2, 3, 4 or fig4; or methods")
    parser.add_argument("--seeds", help="with --paper: comma-separated, for mean and deviation")
    parser.add_argument("--save", type=Path, metavar="JSON", help="keep the numbers, the command and the environment")
    parser.add_argument("--render", action="store_true", help="make the tables of pages (Markdown) anew")
    arguments = parser.parse_intermixed_args()
    if arguments.render:
        if arguments.save or arguments.paper or arguments.seeds:
            raise UserError("--render takes pages alone: what it shows was kept before, with --save")
        return render_pages([Path(path) for path in arguments.runs])
    if arguments.paper:
        return paper_table(arguments.paper, arguments.runs, arguments.seeds, arguments.save)
    if arguments.seeds or any("=" in run and not os.path.exists(run) for run in arguments.runs):
        raise UserError("--seeds and section.key=value go with --paper; finished runs are compared as they are")
    rows: dict[str, list[Path]] = {}
    for path in map(Path, arguments.runs):
        for folder in [path] if (path / "config.yaml").exists() else sorted(path.glob("*/")):
            known = [other.resolve() for other in rows.get(folder.name, [])]
            if (folder / "metrics.json").exists() and folder.resolve() not in known:
                rows.setdefault(folder.name, []).append(folder)
    if not rows:
        raise UserError(f"{', '.join(map(str, arguments.runs))}: no finished run (with a metrics.json) in there")
    compare(rows, not arguments.no_figures, arguments.save)


def render_pages(paths: list[Path]) -> None:
    """Tables of Markdown pages, from the files beside them that they name."""
    from bags.analysis.results import render_page
    from bags.files import write_text

    pages = {}
    for path in paths:
        if not path.is_file() or path.suffix != ".md":
            raise UserError(f"{path}: no such page (a Markdown file, *.md)")
        try:
            pages[path] = render_page(path.read_text(encoding="utf-8"), path.parent)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    for path, text in pages.items():
        write_text(path, text)


def paper_table(name: str, arguments: list[str], seeds: str | None, save: Path | None = None) -> None:
    """Runs the rows of a paper's table that are missing, and the rows that they start from; prints it."""
    from bags.analysis.paper import METHODS, PAPER
    from bags.analysis.results import save_results, this_command
    from bags.analysis.tables import read_metrics, read_seconds, render_paper_table
    from bags.config import load_config
    from scripts.train import in_order, run_jobs, seeds_of, split_arguments

    tables = {**PAPER, "methods": METHODS}
    if name not in tables:
        raise UserError(f"--paper {name}: expected one of {', '.join(tables)}")
    table = tables[name]
    paths, overrides = split_arguments(arguments)
    folders = [path for path in paths if path.is_dir()]
    if len(folders) != len(paths) or len(folders) != 1:
        raise UserError(f"--paper {name}: expected one folder of configurations, got {paths}")
    found = {row.config: _row_file(folders[0], row.config, table.optional) for row in table.rows}
    files = {stem: path for stem, path in found.items() if path}
    waiting = list(files.values())
    while waiting:
        source = load_config(waiting.pop(), overrides).init_row
        if source and source not in files and (path := _row_file(folders[0], source)):
            files[source] = path
            waiting.append(path)

    named = {stem: load_config(file, overrides).name for stem, file in files.items()}
    odd = next((stem for stem, name in named.items() if stem != name), None)
    if odd:
        raise UserError(f"{files[odd]}: name is {named[odd]}; a row of a table keeps its file's name: remove `name`")

    def show(rows: dict[str, list[Path]]) -> None:
        published = table.foreign or load_config(next(iter(files.values())), overrides).data.name.startswith("lvis")
        runs = {
            row: [read_metrics(run) | {"seconds": read_seconds(run)} for run in folders]
            for row, folders in rows.items()
        }
        print(f"\n{render_paper_table(table, runs, published)}")
        if save:
            chosen = {row.title: row.config for row in table.rows if row.config in rows}
            numbers = {title: runs[stem] for title, stem in chosen.items()}
            others = {row.title: table.published(row) for row in table.rows if row.published and row.title in chosen}
            folders = {title: rows[stem] for title, stem in chosen.items()}
            save_results(save, table.title, this_command(), folders, numbers, others)

    run_jobs([in_order(list(files.values()), overrides, seed) for seed in seeds_of(seeds)], show)


def _row_file(folder: Path, stem: str, optional: bool = False) -> Path | None:
    paths = [folder / inner / f"{stem}.yaml" for inner in ("", "paper", "more")]
    found = [path for path in paths if path.exists()]
    if not found and not optional:
        raise UserError(f"{folder}: no {stem}.yaml there, in paper or in more: this table needs that row")
    return found[0] if found else None


def compare(rows: dict[str, list[Path]], figures: bool = True, save: Path | None = None) -> None:
    """Prints the table of `rows` (method -> run folders, one per seed) and draws both figures."""
    from bags.analysis.results import save_results, this_command
    from bags.analysis.tables import read_metrics, read_seconds, render_table, spread

    numbers = {name: [read_metrics(f) for f in folders] for name, folders in rows.items()}
    table = render_table(numbers)
    norms, correlations, stats, config = weight_norms(rows)
    print(f"\n{table}\n\nrank correlation of classifier weight norm and training instances:")
    print("\n".join(f"  {printable(name)}: {spread(own, '.2f')}" for name, own in correlations.items()))
    if save:
        for name, own in correlations.items():
            for folder, run, value in zip(rows[name], numbers[name], own, strict=True):
                run |= {"correlation": value, "seconds": read_seconds(folder)}
        save_results(save, config.data.name, this_command(), rows, numbers)
    if figures:
        from bags.analysis.plots import plot_weight_norms

        folder = next(iter(rows.values()))[0].parent / "figures"
        first = {name: values[0] for name, values in norms.items()}
        plot_weight_norms(folder / "weight_norms.png", first, stats.instance_counts, config.test.bins)
        _draw_predictions(folder / "predictions.png", {name: f[0] for name, f in rows.items()}, config, stats)
        print(f"figures: {folder / 'weight_norms.png'} {folder / 'predictions.png'}")


def weight_norms(rows: dict[str, list[Path]]):
    """Norms of every run's classifier, and their correlation with the counts, by row."""
    from bags.analysis.weight_norms import classifier_norms, rank_correlation
    from bags.build import load_detector

    norms: dict[str, list] = {}
    correlations: dict[str, list[float]] = {}
    stats = None
    for name, folders in rows.items():
        norms[name], correlations[name] = [], []
        for folder in folders:
            detector, meta = load_detector(folder / "last.pth")
            stats = stats or meta["stats"]
            if meta["stats"] != stats:
                raise UserError(f"{folder}: trained on another dataset than {next(iter(rows.values()))[0]}")
            norms[name].append(classifier_norms(detector))
            correlations[name].append(rank_correlation(norms[name][-1][1:], meta["stats"].instance_counts))
    return norms, correlations, stats, meta["config"]


def _draw_predictions(path: Path, runs: dict[str, Path], config, stats, num_images: int = 4) -> None:
    """The validation images with most instances of tail categories, as each run sees them."""
    import numpy as np

    from bags.analysis.examples import LEAST_SCORE, TRUTH, by_image, judged, read_detections
    from bags.analysis.plots import plot_predictions
    from bags.analysis.tables import tail_below
    from bags.build import build_val_dataset, check_categories

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
        found = by_image(read_detections(folder, name_of))
        columns[run] = [judged(found.get(i, []), t, name_of) for i, t in zip(image_ids, truths, strict=True)]
    caption = f"scores of {LEAST_SCORE:.0%} or more; green: object and category are right, red: one of them is wrong"
    tail_names = {name for name, is_tail in zip(stats.names, tail[1:], strict=True) if is_tail}
    if any(len(drawing["names"]) > CROWDED for column in columns.values() for drawing in column):
        caption += "; only tail categories are named"
        for drawing in (drawing for column in columns.values() for drawing in column):
            drawing["names"] = [name if name in tail_names else "" for name in drawing["names"]]
    plot_predictions(path, images, columns, caption)


if __name__ == "__main__":
    run_script(main)
