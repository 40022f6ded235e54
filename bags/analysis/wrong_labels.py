"""Training objects whose label is likely wrong: they look like another category more than like their own.

The features of each object's own box are compared with the mean feature of every category. An object does not count in
the mean of its own category: otherwise it would look like itself. A classifier's scores serve less, because it has
learnt the wrong labels, too. With 2 % of the labels in the stored features of glyphs-100 exchanged at random, 94 to
96 % of the 385 objects at the head of the list were those; by the scores of a softmax trained on these labels 71 to
73 %, by ten nearest neighbours 46 %. On muscima (1,386): 87 to 92 %, against 84 % and 74 %.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bags.analysis import plots
from bags.analysis.examples import TRUTH, crop_window, cropped
from bags.analysis.page import drawn, figure, table, text

SHOWN, LISTED = 12, 100  # objects with a picture, and in the table
WEAK = 0.3  # share of all objects from which on the list says more of the detector than of the labels
CHUNK = 4096  # objects that are compared at a time


class Suspects(NamedTuple):
    """Objects, most suspicious first; each column is [K]."""

    objects: Tensor  # int64, positions among the objects that were compared
    guesses: Tensor  # int64 in 1..C, the category that each looks like
    similarity: Tensor  # float32 in -1..1: cosine with the mean of the guess
    own: Tensor  # float32 in -1..1: cosine with the mean of its own category
    nearer: int  # number of objects that look more like another category, of which these are the first


def suspects(features: Tensor, labels: Tensor, most: int = LISTED) -> Suspects:
    """Find the objects that another category's mean feature is nearest to, by cosine, ranked by the difference.

    features: [N, D], of any floating type; labels: int64 [N] in 1..C. A category with one object is compared with, but
    that object itself is not judged: nothing says what its category looks like.
    """
    number = int(labels.max()) + 1 if len(labels) else 1
    sums = torch.zeros(number, features.shape[1])
    for rows, of in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        sums.index_add_(0, of, F.normalize(rows.float(), dim=1))
    counts = labels.bincount(minlength=number)
    means = F.normalize(sums, dim=1)
    columns = []
    for rows, of in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        rows = F.normalize(rows.float(), dim=1)
        others = (rows @ means.T).masked_fill(counts == 0, -2).scatter(1, of[:, None], -2)
        best = others.max(1)
        own = F.cosine_similarity(sums[of] - rows, rows)
        columns.append((best.indices, best.values, own))
    if not columns:
        none = torch.zeros(0)
        return Suspects(none.long(), none.long(), none, none, 0)
    guesses, similarity, own = (torch.cat(column) for column in zip(*columns, strict=True))
    doubt = (similarity - own).masked_fill((counts[labels] == 1) | (guesses == 0), -4)
    order = doubt.argsort(descending=True, stable=True)
    order = order[doubt[order] > 0]
    chosen = order[:most]
    return Suspects(chosen, guesses[chosen], similarity[chosen], own[chosen], len(order))


class Doubted(NamedTuple):
    """A suspect as the page shows it."""

    annotation: int  # its id
    source: str  # the image's file name
    label: str
    guess: str
    similarity: float
    own: float
    picture: bytes | None  # a JPEG


def picture_of(dataset: Any, annotation: int, label: str) -> bytes:
    """Draw an object, a position in the dataset's index, with what surrounds it: a JPEG. Raises UserError."""
    image, _ = dataset.read(int(dataset.index.owners[annotation]))
    box = dataset.index.boxes[annotation]
    window = crop_window(box, image.size)
    drawing = cropped({"boxes": box[None], "names": [label], "colours": [TRUTH]}, window)
    return drawn(plots.save_drawing, image.crop(window), **drawing, width=300, format="jpg", pil_kwargs={"quality": 80})


def section(doubted: Sequence[Doubted], nearer: int, objects: int) -> str:
    """The section of the report. nearer: as of Suspects; objects: those that were compared."""
    if not doubted:
        return "<p>No training object looks more like another category than like its own.</p>"
    parts = [
        f"<p>Of {objects:,} training objects {nearer:,} look more like another category than like their own. The most "
        "striking are shown: wrong labels come first, and objects that are hidden or blurred. Look from the top until "
        "most labels are right; mend the file, and train again. In brackets: cosine of the object's feature and of the "
        "mean feature of the category, without the object itself. The only object of a category is not judged.</p>"
    ]
    if nearer > WEAK * objects:
        parts.append(
            "<p>These are so many that this detector tells the categories apart too poorly for a judgement: train it "
            "longer first.</p>"
        )
    figures = []
    for entry in doubted:
        if entry.picture is not None:
            pair = (entry.label, entry.own), (entry.guess, entry.similarity)
            label, guess = (f"\u2068{name}\u2069 ({cosine:.2f})" for name, cosine in pair)
            caption = f"annotation {entry.annotation} in {entry.source}: {label}; looks like {guess}"
            figures.append(figure(entry.picture, caption, caption, "jpeg"))
    rows = [figures[k : k + 3] for k in range(0, len(figures), 3)]
    parts += [f'<div class="side example">{"".join(row)}</div>' for row in rows]
    head = ["annotation", "image", "annotated as", "cosine", "looks like", "cosine"]
    cells = [[d.annotation, d.source, d.label, f"{d.own:.2f}", d.guess, f"{d.similarity:.2f}"] for d in doubted]
    listed = table(head, cells, f"The first {len(doubted)}", words=True)
    parts.append(f"<details><summary>{text(f'The first {len(doubted)} as a table')}</summary>{listed}</details>")
    return "".join(parts)
