"""Figures of runs and comparisons, written as PNG to a path or an open binary file, or drawn on given axes."""

import itertools
import sys
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import ArrayLike
from PIL import Image

from bags.analysis.weight_norms import rank_correlation
from bags.core.files import replacing

if "ipykernel" not in sys.modules:  # in a notebook, figures are shown below their cell
    matplotlib.use("Agg")
import matplotlib.pyplot as plt

# A name in letters that the font lacks is drawn as boxes; matplotlib would say so for each letter.
warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d5a97", "#e08e45", "#555555")
PALETTE = ("#1b9e9e", "#b5651d", "#6a51a3", "#c2185b", "#5b7f11", "#7a6a53", "#0f7fd6", "#a8324a", "#3f8f6b", "#c49000")
METHODS = {"softmax_retrained": "#e08e45", "bags": "#d1495b", "choose": "#2e933c"}
METHODS |= dict.fromkeys(("softmax", "baseline"), "#1b6ca8")
METHODS |= {"bags_cosine": PALETTE[0], "reweight_cls": PALETTE[1], "seesaw": PALETTE[2], "loce": PALETTE[9]}
BASELINES = ("softmax", "softmax_retrained")  # come first, in this order
LINES = (("-", 3.0), ("--", 1.8), ("-.", 1.8), (":", 2.2))  # a later curve leaves an earlier one visible
DPI = 110
LONGEST_SIDE = 4096  # pixels of the drawing of one image: it takes memory in proportion to its area
FAST = {"compress_level": 1}  # of PNG: half as long to write, a tenth larger
MARGINS = {"left": 0.1, "right": 0.98, "bottom": 0.11, "top": 0.97}  # a layout engine takes as long as drawing


def plot_weight_norms(
    path: Path | BinaryIO, norms: dict[str, np.ndarray], instance_counts: Sequence[int], boundaries: Sequence[int]
) -> None:
    """Save Figures 1 and 3 of the paper; see `draw_weight_norms`."""
    figure, axes = plt.subplots(figsize=(9, 4.5))
    draw_weight_norms(axes, norms, instance_counts, boundaries)
    figure.subplots_adjust(left=0.08, right=0.9, bottom=0.11, top=0.97)
    _save(figure, path)


def draw_weight_norms(
    axes: Axes, norms: dict[str, np.ndarray], instance_counts: Sequence[int], boundaries: Sequence[int]
) -> None:
    """Draw classifier norms of categories by falling count, and group borders, on matplotlib axes.

    norms: method -> [C+1], entry 0 is the background (drawn at index 0). instance_counts: [C]. The lines are running
    means within each group, because norms may jump at the borders.
    """
    counts = np.asarray(instance_counts)
    order = np.argsort(-counts, kind="stable")
    index = np.arange(1, len(counts) + 1)
    borders = [int((counts >= border).sum()) for border in sorted(boundaries, reverse=True)]
    pieces = [piece for piece in np.split(np.arange(len(counts)), borders) if len(piece)]
    half = max(1, len(counts) // 40)
    for name, colour, (style, width) in styles(norms):
        with_background = norms[name]
        background, foreground = with_background[0], with_background[1:]
        correlation = rank_correlation(foreground, counts)
        label = f"{plain(name)}  (rank correlation with count {correlation:.2f})"
        axes.plot(index, foreground[order], ".", ms=4, alpha=0.45, color=colour)
        for piece in pieces:
            axes.plot(index[piece], _running_mean(foreground[order][piece], half), style, color=colour, lw=width)
        axes.plot([], [], style, color=colour, lw=width, label=label)
        axes.plot(0, background, "D", ms=6, color=colour)
    for border in borders:
        axes.axvline(border + 0.5, color="0.5", ls="--", lw=1)
    axes.set(
        xlabel="category, by falling number of training instances (diamond: background)",
        ylabel="classifier weight norm",
        ylim=(0, 1.4 * max(float(np.nanmax(norm)) for norm in norms.values())),  # leaves room for the legend
    )
    right = axes.twinx()
    right.plot(index, counts[order], color="0.75", lw=1.5, zorder=0)
    right.set(yscale="log", ylabel="training instances (grey)")
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.legend(loc="upper right", fontsize=8)


def plot_norms_and_counts(
    path: Path | BinaryIO, datasets: Mapping[str, tuple[Sequence[int], np.ndarray | None]]
) -> None:
    """Save Figure 1 of the paper: training instances above, norms below, each dataset's categories by falling count.

    datasets: name -> (instance counts [C], norms [C+1] with the background first, or None). Datasets of different C
    are aligned: the most frequent category is at the left, the least frequent at the right. Lines are running means.
    """
    panels = 2 if any(norms is not None for _, norms in datasets.values()) else 1
    figure, grid = plt.subplots(panels, 1, figsize=(8, 1.5 + 2.6 * panels), sharex=True, squeeze=False)
    above, below = grid[0, 0], grid[-1, 0]
    for (name, (numbers, norms)), colour in zip(datasets.items(), _colours(len(datasets)), strict=True):
        counts = np.asarray(numbers)
        order = np.argsort(-counts, kind="stable")
        place = np.linspace(0, 1, len(counts))
        above.plot(place, np.maximum(counts[order], 0.5), color=colour, lw=1.8, label=plain(name))
        if norms is not None:
            below.plot(place, norms[1:][order], ".", ms=4, alpha=0.45, color=colour)
            below.plot(place, _running_mean(norms[1:][order], max(1, len(counts) // 40)), color=colour, lw=1.8)
            below.plot(-0.03, norms[0], "D", ms=6, color=colour)
    above.set(yscale="log", ylabel="training instances")
    above.legend(fontsize=8)
    if panels == 2:
        below.set(ylabel="classifier weight norm", ylim=(0, None))
    words = " (diamond: background)" if panels == 2 else ""
    below.set(xlabel=f"categories, from the most to the least frequent{words}", xticks=[])
    figure.subplots_adjust(**{**MARGINS, "bottom": 0.07}, hspace=0.06)
    _save(figure, path)


def plot_gains(path: Path | BinaryIO, gains: Mapping[str, Mapping[str, list[float]]], rows: Sequence[str]) -> None:
    """Save what rows gain over the control: a line for each dataset, a mark for each row, with the range of the seeds.

    gains: dataset -> row -> the difference in mAP of each seed, in -1..1.
    """
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.55 * len(gains)))
    shift = np.linspace(-0.27, 0.27, len(rows))
    for row, offset, mark in zip(rows, shift, itertools.cycle("osD^vP"), strict=False):
        places = [k for k, of_rows in enumerate(gains.values()) if row in of_rows]
        if not places:
            continue
        values = [100 * np.asarray(of_rows[row]) for of_rows in gains.values() if row in of_rows]
        colour = METHODS["choose"] if row.startswith("chosen") else method_colour(row)
        middle = [value.mean() for value in values]
        axes.plot(middle, np.add(places, offset), mark, ms=7, color=colour, label=plain(row))
        axes.hlines(np.add(places, offset), [v.min() for v in values], [v.max() for v in values], color=colour, lw=1.5)
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks(range(len(gains)), [plain(name) for name in gains])
    axes.set(xlabel="mAP above the control (points)", ylim=(len(gains) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.subplots_adjust(left=0.14, right=0.76, bottom=0.6 / (1.2 + 0.55 * len(gains)), top=0.97)
    _save(figure, path)


def plot_scale(path: Path | BinaryIO, costs: Mapping[str, Mapping[str, Mapping[int, float]]]) -> None:
    """Save costs against sizes, both on logarithmic axes: a row of panels for each kind of size, seconds beside memory.

    costs: the kind of size -> "what, unit" -> size -> cost. Units are s and MB; a cost of 0 is not drawn.
    """
    figure, grid = plt.subplots(len(costs), 2, figsize=(12, 4 * len(costs)), squeeze=False, layout="constrained")
    for (kind, curves), panels in zip(costs.items(), grid, strict=True):
        names = list(dict.fromkeys(what.rpartition(", ")[0] for what in curves))
        sizes = np.array(sorted({size for of in curves.values() for size in of}))
        for unit, axes in zip(("s", "MB"), panels, strict=True):
            for name, colour, mark in zip(names, itertools.cycle(COLOURS + PALETTE), itertools.cycle("osD^vP")):
                of = curves.get(f"{name}, {unit}", {})
                axes.plot(list(of), [cost or np.nan for cost in of.values()], f"{mark}-", color=colour, label=name)
            axes.set(xscale="log", yscale="log", xlabel=kind, ylabel={"s": "seconds", "MB": "memory (MB)"}[unit])
            low, high = axes.get_ylim()
            for start in 10.0 ** np.arange(-9, 9):  # as steep as what is in proportion to the size
                axes.plot(sizes, start * sizes / sizes[0], ":", color="black", lw=0.8, alpha=0.4, zorder=0)
            axes.set_ylim(low, high)
        panels[1].legend(*panels[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)


def method_name(label: str) -> str:
    """The method in the label of a run: a name, a folder, or either with a remark after a colon."""
    return label.split(":")[0].rstrip("/").rpartition("/")[2]


def method_colour(label: str) -> str:
    """The colour of a method, the same in every figure; it depends on nothing but its name."""
    name = method_name(label)
    return METHODS.get(name) or PALETTE[zlib.crc32(name.encode(errors="replace")) % len(PALETTE)]


def baseline_first(labels: Iterable[str]) -> list[str]:
    """Order labels of runs: the baseline, its control, then the others as given."""
    place = {name: number for number, name in enumerate(BASELINES)}
    return sorted(labels, key=lambda label: place.get(method_name(label), len(BASELINES)))


def styles(labels: Iterable[str]) -> list[tuple[str, str, tuple[str, float]]]:
    """(label, colour, (line style, width)) of each curve of a figure, in the order of drawing, the baseline first."""
    ordered = baseline_first(labels)
    return [(label, method_colour(label), LINES[k % len(LINES)]) for k, label in enumerate(ordered)]


def _colours(number: int) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(number)]


def _running_mean(series: np.ndarray, half: int) -> np.ndarray:
    """Means [N] of each entry and its `half` neighbours on both sides; the ends are repeated."""
    padded = np.pad(series, half, mode="edge")
    return np.convolve(padded, np.ones(2 * half + 1) / (2 * half + 1), mode="valid")


def plain(name: str) -> str:
    """Escape a user's name so that matplotlib shows it literally, even with $ or a leading _."""
    return f" {name}".replace("$", r"\$")


def plot_precision_recall(path: Path | BinaryIO, curves: dict[str, np.ndarray]) -> None:
    """Save mean precision over recall, both in 0..1, at IoU 0.5 (solid) and 0.75 (dashed).

    curves: set of categories ("AP", or "AP1", ...) -> precision [2, 101].
    """
    figure, axes = plt.subplots(figsize=(6, 4.8))
    recall = np.linspace(0, 1, 101)
    shown = [name for name in curves if name == "AP" or name[2:].isdigit()]
    for name, colour in zip(shown, ["black", *_colours(len(shown))], strict=False):
        if np.isnan(curves[name]).all():
            continue
        label = "all categories" if name == "AP" else f"bin {name[2:]}"
        axes.plot(recall, curves[name][0], color=colour, lw=1.8, label=label)
        axes.plot(recall, curves[name][1], color=colour, lw=1.2, ls="--")
    axes.set(xlabel="recall", ylabel="mean precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(title="IoU 0.5 solid, 0.75 dashed", fontsize=8, title_fontsize=8)
    figure.subplots_adjust(**MARGINS)
    _save(figure, path)


def plot_ap_by_instances(path: Path | BinaryIO, runs: dict[str, list[dict]], boundaries: Sequence[int]) -> None:
    """Save the AP of each category over its training instances, with running means and the borders of the bins.

    runs: name -> rows with AP in 0..1 and training_instances, as from `detection_ap.score`; other rows are left out.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for name, colour, (style, width) in styles(runs):
        known = [(r["training_instances"], 100 * r["AP"]) for r in runs[name] if "training_instances" in r]
        points = np.array(sorted(p for p in known if p[1] == p[1]), float).reshape(-1, 2)
        if not len(points):
            continue
        counts = np.maximum(points[:, 0], 0.5)  # categories without instances are left of 1
        half = max(1, len(points) // 40)
        axes.plot(counts, points[:, 1], ".", ms=5, alpha=0.4, color=colour)
        smooth = [_running_mean(side, half) for side in (counts, points[:, 1])]
        axes.plot(*smooth, style, color=colour, lw=width, label=plain(name))
    for border in boundaries:
        axes.axvline(border, color="0.5", ls="--", lw=1)
    axes.set(xscale="log", xlabel="training instances of the category", ylabel="AP", ylim=(0, None))
    axes.xaxis.set_minor_formatter(NullFormatter())  # powers of ten are labelled
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.subplots_adjust(**MARGINS)
    _save(figure, path)


def plot_training(path: Path | BinaryIO, logs: dict[str, list[dict]]) -> None:
    """Save losses over epochs, one panel for each run: the sum black, its parts coloured, the learning rate grey.

    logs: name -> objects of log.jsonl, with an epoch.
    """
    width = 9 if len(logs) == 1 else 12
    figure, panels = plt.subplots(1, len(logs), figsize=(width, 4), squeeze=False, layout="constrained")
    for axes, (name, steps) in zip(panels[0], logs.items(), strict=True):
        parts = list(dict.fromkeys(key for step in steps for key in step if key.startswith("loss_")))
        shown = parts if len(parts) > 1 else []
        for key, colour in zip(shown, _colours(len(shown)), strict=True):
            label = key.removeprefix("loss_").replace("_", " ")
            axes.plot(*_series(steps, key).T, color=colour, lw=1, alpha=0.8, label=label)
        axes.plot(*_series(steps, "loss").T, color="black", lw=1.6, label="sum")
        right = axes.twinx()
        right.plot(*_series(steps, "lr").T, color="0.75", lw=1.5, zorder=0)
        right.set(yscale="log", ylabel="learning rate (grey)")
        axes.set_zorder(right.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None), title=plain(name))
        axes.legend(fontsize=8)
    _save(figure, path)


def _series(steps: list[dict], key: str) -> np.ndarray:
    """Points [n, 2] of epoch and number; steps without finite numbers are left out."""
    points: list[tuple[Any, Any]] = [(step["epoch"], step.get(key)) for step in steps]
    points = [point for point in points if all(type(v) in (int, float) and abs(v) < 1e300 for v in point)]
    return np.array(points, float).reshape(-1, 2)


def plot_predictions(
    path: Path | BinaryIO, images: Sequence[Image.Image], columns: Mapping[str, Sequence[dict]], caption: str = ""
) -> None:
    """Save a grid of images with boxes: a row for each image, a column for each entry of `columns`.

    columns: title (ground truth, methods) -> for each image {"boxes": [K, 4] pixels, "names": K texts (empty: a box
    without a label), "scores": [K] in 0..1 or absent, "colours": K colours}.
    """
    size, edge = 4.2, 0.5  # inches; titles and caption are in the edges
    width, height = size * len(columns), size * len(images) + 2 * edge
    figure, grid = plt.subplots(len(images), len(columns), figsize=(width, height), squeeze=False)
    across = {"left": 0.05 / width, "right": 1 - 0.05 / width, "wspace": 0.02}
    figure.subplots_adjust(**across, bottom=edge / height, top=1 - edge / height, hspace=0.02)
    for row, image in enumerate(images):
        for axes, (title, drawings) in zip(grid[row], columns.items(), strict=True):
            draw_boxes(axes, image, **drawings[row])
            if row == 0:
                axes.set_title(title, fontsize=14)
    figure.supxlabel(caption, fontsize=13, y=0.15 / height)
    _save(figure, path)


def draw_boxes(
    axes: Axes,
    image: Image.Image,
    boxes: ArrayLike,
    names: Sequence[str],
    colours: Sequence[str],
    scores: Sequence[float] | None = None,
) -> None:
    """Draw an image with labelled boxes [K, 4] in pixels on matplotlib axes; see `plot_predictions`."""
    axes.imshow(image)
    axes.axis("off")
    taken: list[tuple[float, float, float, float]] = []  # by labels
    for k, (x1, y1, x2, y2) in enumerate(np.asarray(boxes).reshape(-1, 4).tolist()):
        width = 1.8 if names[k] else 1
        axes.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colours[k], lw=width))
        if not names[k]:
            continue
        text = names[k] if scores is None else f"{names[k]} {100 * scores[k]:.0f}"
        background = {"facecolor": colours[k], "pad": 0.8, "lw": 0}
        label = axes.text(x1, y1, text, fontsize=9, color="white", va="top", parse_math=False, clip_on=True)
        label.set_bbox(background)
        label.set_position(_free_place(axes, image, label, (x1, y1, x2, y2), taken))


def _free_place(
    axes: Axes,
    image: Image.Image,
    label: Any,
    box: tuple[float, float, float, float],
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float]:
    """The left upper corner in pixels for the label of a box: at the box, inside the image, off earlier labels.

    taken: rectangles of earlier labels (x1, y1, x2, y2); this one's is added.
    """
    x1, y1, x2, y2 = box
    axes.apply_aspect()
    extent = label.get_window_extent()
    pixel = abs(axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0])  # on the canvas
    width, height = (extent.width + 4) / pixel, (extent.height + 4) / pixel
    limits = max(0, image.width - width), max(0, image.height - height)
    rows = [y1 - height, y1, y2, y2 - height, *(y1 + n * height for n in range(1, 5))]
    places: list[tuple[float, int, float, float]] = []
    for y in rows:
        for x in (x1, x2 - width):
            left, top = min(max(x, 0), limits[0]), min(max(y, 0), limits[1])
            hidden = sum(
                max(0, min(left + width, r) - max(left, first)) * max(0, min(top + height, b) - max(top, upper))
                for first, upper, r, b in taken
            )
            places.append((hidden, len(places), left, top))
    _, _, left, top = min(places)
    taken.append((left, top, left + width, top + height))
    return left, top


def save_drawing(
    path: Path | BinaryIO,
    image: Image.Image,
    boxes: ArrayLike,
    names: Sequence[str],
    colours: Sequence[str],
    scores: Sequence[float] | None = None,
    width: int = 640,
    **settings: Any,
) -> None:
    """Draw one image with labelled boxes; settings: of matplotlib's savefig, such as the format.

    The image is enlarged to `width` pixels, if it is narrower, but no side of the drawing exceeds LONGEST_SIDE: larger
    images are reduced, and narrow ones are enlarged less.
    """
    scale = min(max(1.0, width / image.width), LONGEST_SIDE / max(image.size))
    if scale < 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        boxes = np.asarray(boxes).reshape(-1, 4) * np.tile(np.divide(size, image.size), 2)
        image, scale = image.resize(size), 1.0
    # Matplotlib rounds down, and half a pixel keeps 1 from becoming 0.
    figure = plt.figure(figsize=[max(1.5, side * scale) / DPI for side in image.size])
    axes = figure.add_axes((0, 0, 1, 1))
    draw_boxes(axes, image, boxes, names, colours, scores)
    _save(figure, path, **settings)


def _save(figure: Figure, path: Path | BinaryIO, **settings: Any) -> None:
    """Write a figure and close it; a file is replaced as a whole or not at all."""
    try:
        if not isinstance(path, Path):
            return figure.savefig(path, dpi=DPI, **settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb") as file:
            kind = path.suffix.removeprefix(".")
            fast = {"pil_kwargs": FAST} if kind == "png" else {}
            figure.savefig(file, dpi=DPI, **{"format": kind, **fast, **settings})
    finally:
        plt.close(figure)
