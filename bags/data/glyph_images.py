"""Drawing for the embedded dataset: outlines of letters, and images of letters among clutter.

Everything that decides an annotation is computed equally on every machine: outlines are in integer font units, the scan
converter counts sample points, and random numbers come from `numpy.random.RandomState`, whose streams are frozen.
Pillow only changes colours.
"""

import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from fontTools.pens.basePen import BasePen
from fontTools.ttLib import TTFont
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFilter

TEXTURES = ("plain", "noise", "grain", "stripes", "checks", "dots", "waves", "rings")


def load_outlines(characters: list[str] | None = None) -> dict[str, list[np.ndarray]]:
    """Read the closed contours [K, 2] of letters: x and y, y downwards, the longer side of the letter is 1.

    `characters=None` reads every letter of the font.
    """
    font = TTFont(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), lazy=True)
    names, glyphs = font.getBestCmap(), font.getGlyphSet()
    outlines = {}
    for character in characters or map(chr, sorted(names)):
        if unicodedata.category(character)[0] != "L":
            continue
        pen = _ContourPen(glyphs)
        glyphs[names[ord(character)]].draw(pen)
        contours = [np.array(contour) for contour in pen.contours if len(contour) > 2]
        if contours:
            points = np.concatenate(contours)
            low, high = points.min(0), points.max(0)
            extent = (high - low).max()
            outlines[character] = [(c - (low + high) / 2) / extent * (1, -1) for c in contours]
    return outlines


CHORDS = [((1 - t) ** 2, 2 * t * (1 - t), t * t) for t in (0.25, 0.5, 0.75, 1.0)]  # weights of a curve's points


class _ContourPen(BasePen):
    """Collect a glyph's contours in font units; a quadratic curve becomes four chords."""

    def __init__(self, glyphs: Any) -> None:
        super().__init__(glyphs)
        self.contours: list[list[tuple[float, float]]] = []

    def _moveTo(self, point: tuple[float, float]) -> None:
        self.contours.append([point])

    def _lineTo(self, point: tuple[float, float]) -> None:
        self.contours[-1].append(point)

    def _qCurveToOne(self, control: tuple[float, float], end: tuple[float, float]) -> None:
        start = self.contours[-1][-1]
        for a, b, c in CHORDS:
            x, y = (a * start[axis] + b * control[axis] + c * end[axis] for axis in (0, 1))
            self.contours[-1].append((x, y))


def coverage(contours: list[np.ndarray], height: int, width: int, samples: int = 3) -> np.ndarray:
    """Rasterise contours by the non-zero winding rule: int [height, width] in 0..samples**2.

    Contours are in pixels. The result counts the points inside, of samples x samples points in each pixel. It is an
    integer, so it is equal on every machine.
    """
    start = np.concatenate(contours) * samples
    end = np.concatenate([np.roll(c, -1, axis=0) for c in contours]) * samples
    rows = np.arange(height * samples) + 0.5
    below_start, below_end = start[:, 1:] <= rows, end[:, 1:] <= rows
    segment, row = np.nonzero(below_start != below_end)
    (x0, y0), (x1, y1) = start[segment].T, end[segment].T
    x = x0 + (rows[row] - y0) * (x1 - x0) / (y1 - y0)
    column = np.clip(np.ceil(x - 0.5), 0, width * samples).astype(np.int64)
    direction = np.where(below_start[segment, row], 1.0, -1.0)
    stride = width * samples + 1
    winding = np.bincount(row * stride + column, direction, len(rows) * stride)
    inside = winding.reshape(len(rows), stride).cumsum(1)[:, :-1] != 0
    columns = inside.reshape(height, samples, -1).sum(1)
    return columns.reshape(height, width, samples).sum(2)


def _background(size: int, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Draw textured regions: colours float32 [size, size, 3] in 0..255, semantic map uint8 [size, size]."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    centres = rng.uniform(0, size, (rng.randint(2, 5), 2))
    region = np.argmin([(y - a) ** 2 + (x - b) ** 2 for a, b in centres], axis=0)
    canvas = np.empty((size, size, 3), np.float32)
    semantic = np.empty((size, size), np.uint8)
    for index in range(len(centres)):
        kind = rng.randint(len(TEXTURES))
        where = region == index
        pattern = _texture(TEXTURES[kind], x, y, rng)[where, None]
        first = rng.uniform(40, 215, 3)
        second = np.clip(first + rng.uniform(-25, 25, 3), 0, 255)
        canvas[where] = first + (second - first) * pattern
        semantic[where] = kind + 1
    shade = Image.fromarray(rng.uniform(-15, 15, (4, 4)).astype(np.float32))
    canvas += np.asarray(shade.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    return canvas, semantic


def _texture(kind: str, x: np.ndarray, y: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Draw one of TEXTURES: float [size, size] in about 0..1."""
    angle, period = rng.uniform(0, math.pi), rng.uniform(6, 20)
    u = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
    v = (y * math.cos(angle) - x * math.sin(angle)) * (2 * math.pi / period)
    size = len(x)
    if kind in ("noise", "grain"):
        cells = size // 8 if kind == "noise" else size
        field = Image.fromarray(rng.uniform(0, 1, (cells, cells)).astype(np.float32))
        return np.asarray(field.resize((size, size), Image.Resampling.BILINEAR))
    return {
        "plain": lambda: np.full_like(x, 0.5),
        "stripes": lambda: (np.sin(u) > 0).astype(np.float32),
        "checks": lambda: ((np.sin(u) > 0) != (np.sin(v) > 0)).astype(np.float32),
        "dots": lambda: (np.sin(u) * np.sin(v) > 0.5).astype(np.float32),
        "waves": lambda: 0.5 + 0.5 * np.sin(u + 2 * np.sin(v / 2)),
        "rings": lambda: 0.5 + 0.5 * np.sin(np.hypot(u, v)),
    }[kind]()


def _draw_clutter(canvas: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Draw strokes and arcs that belong to no category."""
    size = len(canvas)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 5)):
        x, y = rng.uniform(0, size, 2)
        dx, dy = rng.uniform(-size / 4, size / 4, 2)
        colour = tuple(int(v) for v in rng.uniform(0, 255, 3))
        width = int(rng.randint(1, 4))
        if rng.random_sample() < 0.5:
            draw.line((x, y, x + dx, y + dy), fill=colour, width=width)
        else:
            box = (x, y, x + abs(dx) + 4, y + abs(dy) + 4)
            first = rng.uniform(0, 360)
            draw.arc(box, first, first + rng.uniform(60, 200), fill=colour, width=width)
    return np.asarray(image).astype(np.float32)


def _place(
    outline: list[np.ndarray],
    size_range: tuple[float, float],
    owner: np.ndarray,
    areas: np.ndarray,
    visible: np.ndarray,
    rng: np.random.RandomState,
    bold: int,
) -> tuple[int, int, np.ndarray]:
    """Find a random pose that leaves every earlier object 85 % of its area: (top, left, coverage).

    owner, bold: see draw_image. areas, visible: pixels of each earlier object, all and those that are not hidden.
    """
    extent, shrink = len(owner), 1.0
    for attempt in range(1000):
        size = rng.uniform(*size_range) * shrink
        angle, stretch = rng.uniform(-0.15, 0.15), math.exp(rng.uniform(-0.1, 0.1))
        cos, sin = math.cos(angle) * size, math.sin(angle) * size
        pose = np.array([[cos * stretch, sin / stretch], [-sin * stretch, cos / stretch]])
        contours = [contour @ pose for contour in outline]
        points = np.concatenate(contours)
        low, high = points.min(0), points.max(0)
        left, top = rng.uniform(1, np.maximum(extent - 1 - (high - low), 1.5))
        x0, y0 = max(int(left) - bold, 0), max(int(top) - bold, 0)
        width = min(math.ceil(high[0] - low[0]) + 2 + 2 * bold, extent - x0)
        height = min(math.ceil(high[1] - low[1]) + 2 + 2 * bold, extent - y0)
        shift = np.array([left - x0, top - y0]) - low
        ink = thickened(coverage([contour + shift for contour in contours], height, width), bold)
        covered = owner[y0 : y0 + height, x0 : x0 + width][ink >= 5]
        hidden = np.bincount(covered, minlength=len(areas) + 1)[1:]
        if len(covered) >= 12 and (visible - hidden >= 0.85 * areas).all():
            return y0, x0, ink
        if attempt % 20 == 19:
            shrink *= 0.85 if len(covered) >= 24 else 1.1
    raise RuntimeError("no room for an object: the preset asks for too many objects per image")


def thickened(ink: np.ndarray, by: int) -> np.ndarray:
    """Coverage [H, W] whose strokes are `by` pixels wider on each side: the maximum of a square around each pixel."""
    padded = np.pad(ink, by)
    height, width = ink.shape
    shifts = [(y, x) for y in range(2 * by + 1) for x in range(2 * by + 1)]
    return np.maximum.reduce([padded[y : y + height, x : x + width] for y, x in shifts])


def draw_image(
    size: int,
    object_size: tuple[float, float],
    outlines: list[list[np.ndarray]],
    rng: np.random.RandomState,
    bold: int = 0,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Draw an image of `size` (S) pixels with one object per outline, whose longer side is in `object_size`.

    bold: pixels that are added to each side of a stroke.

    Returns (pixels uint8 [S, S, 3], semantic map uint8 [S, S] of 1 + index in TEXTURES, visible masks bool [S, S], one
    per outline).
    """
    canvas, semantic = _background(size, rng)
    canvas = _draw_clutter(canvas, rng)
    owner = np.zeros(canvas.shape[:2], np.int64)  # 1 + the object that is visible at this pixel, or 0
    areas, visible = np.zeros((2, 0), np.int64)
    for outline in outlines:
        top, left, ink = _place(outline, object_size, owner, areas, visible, rng, bold)
        solid = ink >= 5
        height, width = ink.shape
        owners = owner[top : top + height, left : left + width]
        visible = visible - np.bincount(owners[solid], minlength=len(areas) + 1)[1:]
        owners[solid] = len(areas) + 1
        areas, visible = np.append(areas, solid.sum()), np.append(visible, solid.sum())
        patch = canvas[top : top + height, left : left + width]
        colour = _visible_colour(patch[solid].mean(0), rng)
        mask = Image.fromarray((ink * (255 / 9)).astype(np.uint8))
        mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))
        alpha = np.asarray(mask, np.float32)[..., None] / 255 * rng.uniform(0.85, 1.0)
        patch += alpha * (colour - patch)
    grain = rng.bytes(owner.size)  # much faster than normally distributed noise
    canvas += (np.frombuffer(grain, np.uint8).reshape(*owner.shape, 1) - 127.5) * rng.uniform(0.01, 0.07)
    masks = [owner == k + 1 for k in range(len(outlines))]
    return np.clip(canvas, 0, 255).astype(np.uint8), semantic, masks


def _visible_colour(behind: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Draw a random colour at least 140 grey levels (Euclidean) from the colour `behind`."""
    for _ in range(50):
        colour = rng.uniform(0, 255, 3)
        if np.linalg.norm(colour - behind) >= 140:
            break
    return colour
