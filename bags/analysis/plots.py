"""Figures of runs and comparisons, written as PNG to a path or an open binary file, or drawn on given axes."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, BinaryIO

import matplotlib
import numpy as np
from PIL import Image

from bags.analysis.weight_norms import rank_correlation
from bags.files import replacing

if "ipykernel" not in sys.modules:  # in a notebook, figures are shown below their cell
    matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d5a97", "#e08e45", "#555555")
DPI = 110
MARGINS = {"left": 0.1, "right": 0.98, "bottom": 0.11, "top": 0.97}  # a layout engine takes as long as drawing


def plot_weight_norms(
    path: Path | BinaryIO, norms: dict[str, np.ndarray], instance_counts: Sequence[int], boundaries: Sequence[int]
) -> None:
    """Figures 1 and 3 of the paper, as `draw_weight_norms` draws them."""
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    draw_weight_norms(axes, norms, instance_counts, boundaries)
    _save(figure, path)


def draw_weight_norms(
    axes, norms: dict[str, np.ndarray], instance_counts: Sequence[int], boundaries: Sequence[int]
) -> None:
    """Categories by falling count, their classifier norms, group borders, on one matplotlib axes.

    norms: method -> [C+1], entry 0 the background (drawn at index 0). instance_counts: [C]. The lines are running
    means within each group: across a border, a method's norms may well jump.
    """
    counts = np.asarray(instance_counts)
    order = np.argsort(-counts, kind="stable")
    index = np.arange(1, len(counts) + 1)
    borders = [int((counts >= border).sum()) for border in sorted(boundaries, reverse=True)]
    pieces = [piece for piece in np.split(np.arange(len(counts)), borders) if len(piece)]
    half = max(1, len(counts) // 40)
    for (name, values), colour in zip(norms.items(), COLOURS * (len(norms) // len(COLOURS) + 1), strict=False):
        correlation = rank_correlation(values[1:], counts)
        label = f"{plain(name)}  (rank correlation with count {correlation:.2f})"
        axes.plot(index, values[1:][order], ".", ms=4, alpha=0.45, color=colour)
        for piece in pieces:
            axes.plot(index[piece], _running_mean(values[1:][order][piece], half), color=colour, lw=1.8)
        axes.plot([], [], color=colour, lw=1.8, label=label)
        axes.plot(0, values[0], "D", ms=6, color=colour)
    for border in borders:
        axes.axvline(border + 0.5, color="0.5", ls="--", lw=1)
    axes.set(
        xlabel="category, by falling number of training instances (diamond: background)",
        ylabel="classifier weight norm",
        ylim=(0, 1.4 * max(float(np.nanmax(values)) for values in norms.values())),  # room for the legend
    )
    right = axes.twinx()
    right.plot(index, counts[order], color="0.75", lw=1.5, zorder=0)
    right.set(yscale="log", ylabel="training instances (grey)")
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.legend(loc="upper right", fontsize=8)


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Mean of each value and its `half` neighbours on both sides; beyond the ends, the last value again."""
    padded = np.pad(values, half, mode="edge")
    return np.convolve(padded, np.ones(2 * half + 1) / (2 * half + 1), mode="valid")


def plain(name: str) -> str:
    """A name of the user's as matplotlib shows it literally: no formula, no leading _ that hides a legend's line."""
    return f" {name}".replace("$", r"\$")


def plot_precision_recall(path: Path | BinaryIO, curves: dict[str, np.ndarray]) -> None:
    """Mean precision [2, 101] of sets of categories at IoU 0.5 (solid) and 0.75 (dashed), over recall 0 to 1."""
    figure, axes = plt.subplots(figsize=(6, 4.8))
    recall = np.linspace(0, 1, 101)
    shown = [name for name in curves if name == "AP" or name[2:].isdigit()]
    for name, colour in zip(shown, ("black", *COLOURS * len(shown)), strict=False):
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
    """AP of each category over its training instances; a line through the mean of neighbours; bins' borders dashed.

    runs: name -> rows with AP and training_instances, as `detection_ap.score` gives them; rows without are left out.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for (name, rows), colour in zip(runs.items(), COLOURS * (len(runs) // len(COLOURS) + 1), strict=False):
        known = [(r["training_instances"], 100 * r["AP"]) for r in rows if "training_instances" in r]
        points = np.array(sorted(p for p in known if p[1] == p[1]), float).reshape(-1, 2)
        if not len(points):
            continue
        counts = np.maximum(points[:, 0], 0.5)  # none at all: left of 1
        half = max(1, len(points) // 40)
        axes.plot(counts, points[:, 1], ".", ms=5, alpha=0.4, color=colour)
        smooth = [_running_mean(side, half) for side in (counts, points[:, 1])]
        axes.plot(*smooth, color=colour, lw=1.8, label=plain(name))
    for border in boundaries:
        axes.axvline(border, color="0.5", ls="--", lw=1)
    axes.set(xscale="log", xlabel="training instances of the category", ylabel="AP", ylim=(0, None))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.subplots_adjust(**MARGINS)
    _save(figure, path)


def plot_training(path: Path | BinaryIO, logs: dict[str, list[dict]]) -> None:
    """Losses over epochs, one panel for each run: their sum black, its parts coloured; the learning rate grey.

    logs: name -> objects of log.jsonl, with an epoch.
    """
    width = 9 if len(logs) == 1 else 12
    figure, panels = plt.subplots(1, len(logs), figsize=(width, 4), squeeze=False, layout="constrained")
    for axes, (name, steps) in zip(panels[0], logs.items(), strict=True):

        def series(key: str, steps=steps) -> np.ndarray:
            """Points [steps, 2] of epoch and value; those without a number are left out."""
            points = [(step["epoch"], step.get(key)) for step in steps]
            return np.array([p for p in points if type(p[1]) in (int, float)], float).reshape(-1, 2)

        parts = dict.fromkeys(key for step in steps for key in step if key.startswith("loss_"))
        for key, colour in zip(parts if len(parts) > 1 else (), COLOURS * len(parts), strict=False):
            axes.plot(*series(key).T, color=colour, lw=1, alpha=0.8, label=key.removeprefix("loss_").replace("_", " "))
        axes.plot(*series("loss").T, color="black", lw=1.6, label="sum")
        right = axes.twinx()
        right.plot(*series("lr").T, color="0.75", lw=1.5, zorder=0)
        right.set(yscale="log", ylabel="learning rate (grey)")
        axes.set_zorder(right.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None), title=plain(name))
        axes.legend(fontsize=8)
    _save(figure, path)


def plot_predictions(
    path: Path | BinaryIO, images: Sequence[Image.Image], columns: Mapping[str, Sequence[dict]], caption: str = ""
) -> None:
    """One row per image, one column per entry of `columns` (ground truth, methods).

    An entry of a column is {"boxes": [K, 4] pixels, "names": K texts (empty: a box without a label),
    "scores": [K] or absent, "colours": K colours}.
    """
    size = 4.2
    figure, grid = plt.subplots(
        len(images),
        len(columns),
        figsize=(size * len(columns), size * len(images)),
        squeeze=False,
        layout="constrained",
    )
    for row, image in enumerate(images):
        for axes, (title, drawings) in zip(grid[row], columns.items(), strict=True):
            draw_boxes(axes, image, **drawings[row])
            if row == 0:
                axes.set_title(title, fontsize=14)
    figure.supxlabel(caption, fontsize=13)
    _save(figure, path)


def draw_boxes(axes, image: Image.Image, boxes, names, colours, scores=None) -> None:
    """An image with labelled boxes on one matplotlib axes."""
    axes.imshow(image)
    axes.axis("off")
    for k, (x1, y1, x2, y2) in enumerate(np.asarray(boxes).reshape(-1, 4).tolist()):
        width = 1.8 if names[k] else 1
        axes.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colours[k], lw=width))
        if not names[k]:
            continue
        text = names[k] if scores is None else f"{names[k]} {100 * scores[k]:.0f}"
        side = "bottom" if y1 > 0.06 * image.height else "top"  # above the box, where there is room
        axes.text(x1, y1, text, fontsize=9, color="white", va=side, parse_math=False, clip_on=True,
                  bbox={"facecolor": colours[k], "pad": 0.8, "lw": 0})  # fmt: skip


def save_drawing(
    path: Path | BinaryIO, image: Image.Image, boxes, names, colours, scores=None, width: int = 640, **settings
) -> None:
    """One image with labelled boxes, at least `width` wide; settings: of matplotlib's savefig, such as the format."""
    scale = max(1.0, width / image.width)
    figure = plt.figure(figsize=(image.width * scale / DPI, image.height * scale / DPI))
    axes = figure.add_axes((0, 0, 1, 1))
    draw_boxes(axes, image, boxes, names, colours, scores)
    _save(figure, path, **settings)


def _save(figure, path: Path | IO[bytes], **settings) -> None:
    """Write a figure, as a whole or not at all, and close it."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb") as file:
            return _save(figure, file, **{"format": path.suffix[1:], **settings})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks is drawn as boxes
        figure.savefig(path, dpi=DPI, **settings)
    plt.close(figure)
