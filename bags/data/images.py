"""Image files -> 8-bit RGB images: the formats that are read, their limit of size, and files that are missing.

Training, validation, `check` and prediction all read images here.
"""

import contextlib
import errno
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bags.core.errors import UnreadableImage, UserError
from bags.core.files import open_regular

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".webp", ".tif", ".tiff"}
MAX_PIXELS = 100_000_000
EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}  # Pillow's modes
SIXTEEN_BIT = {"I;16", "I;16B", "I;16L", "I;16N"}
COCO_2014 = re.compile(r"COCO_\w+2014_(\d{12}\.jpg)")  # how LVIS v0.5 names files of COCO 2017
ORIENTATION = 0x0112  # EXIF tag
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
UNSIGNED, WHITE_IS_ZERO = 1, 0  # values of the last two
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # errors of the machine, and not of the file


class MissingImage(UnreadableImage):
    """The image file does not exist."""


class TooManyPixels(UnreadableImage):
    """The image is larger than `data.max_pixels`."""


class UndefinedRange(UnreadableImage):
    """The values of the pixels have no defined range."""


def read_image(
    path: Path,
    exif: bool = False,
    max_pixels: int = MAX_PIXELS,
    check: Callable[[tuple[int, int]], None] | None = None,
) -> Image.Image:
    """Read one file as an RGB image with 8 bits per channel.

    Grey images of 9 to 16 bits are scaled by their own range (16 bits: divided by 257 and rounded); 16-bit colour
    keeps its upper 8 bits. Transparency is ignored: a transparent pixel keeps its stored colour. Of several frames or
    pages the first one is read.

    exif        turn the image as its EXIF orientation says; else the pixels stay as they are stored
    max_pixels  larger images are refused before their pixels are decoded
    check       called with (width, height), as stored, before the pixels are decoded; it may raise
    Raises UnreadableImage, naming the file, where it is missing, damaged, too large, or of another format.
    """
    with open_image(path, max_pixels) as image:
        if check:
            check(image.size)
        check_pixels(path, image, max_pixels)
        table = _eight_bit_table(image)
        if exif:
            turned = ImageOps.exif_transpose(image)
        else:
            turned = image
            if image.format == "TIFF":  # Pillow turns these by itself
                image.getexif()[ORIENTATION] = 1
        if table is None:
            return turned.convert("RGB")
        return Image.fromarray(table[np.asarray(turned)]).convert("RGB")


@contextlib.contextmanager
def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open one file as a Pillow image whose pixels are not decoded yet.

    Raises UnreadableImage for whatever goes wrong with the file, inside the `with` block too, and MissingImage where
    there is none.
    """
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, of which it tolerates the double
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        with open_regular(path) as file:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_pixels` refuses those
                image = Image.open(file, formats=FORMATS)
            with image:
                yield image
    except FileNotFoundError:
        raise MissingImage(f"{path}: no such image") from None
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UnreadableImage(f"{path}: not a readable image; expected a {formats} file") from None
    except Image.DecompressionBombError:
        raise _too_large(path, "its pixels", max_pixels) from None
    except Exception as error:  # whatever a damaged file can do to a decoder
        if isinstance(error, OSError) and error.errno in EXHAUSTED:
            raise
        if "out of memory" in str(error):  # Pillow's words for a decoder's error
            raise MemoryError(f"{path}: {error}") from None
        raise UnreadableImage(f"{path}: not a readable image ({error})") from None


def check_pixels(path: Path, image: Image.Image, max_pixels: int = MAX_PIXELS) -> None:
    """Raise UnreadableImage for too many pixels, and for those whose range of values the format does not define.

    These are floating-point, 32-bit and signed pixels. Only the header is looked at.
    """
    if image.width * image.height > max_pixels:
        raise _too_large(path, f"{image.width} x {image.height} pixels", max_pixels)
    signed = _tiff_tag(image, SAMPLE_FORMAT, UNSIGNED) != UNSIGNED
    if signed or image.mode not in EIGHT_BIT | SIXTEEN_BIT:
        kind = {"F": "floating-point", "I": "signed or 32-bit"}.get(image.mode, "signed" if signed else "unsupported")
        raise UndefinedRange(
            f"{path}: {kind} pixels (Pillow's mode {image.mode}) have no defined range; convert the image to 8 or 16 "
            "bits, unsigned"
        )


def _too_large(path: Path, size: str, max_pixels: int) -> UnreadableImage:
    mend = "raise that limit (predict.py: --max-pixels) or use a smaller image"
    return TooManyPixels(f"{path}: {size} are more than data.max_pixels={max_pixels}; {mend}")


def _eight_bit_table(image: Image.Image) -> np.ndarray | None:
    """The 8-bit value of each value of a pixel, uint8 [65536]; None for images that have 8 bits already."""
    if image.mode not in SIXTEEN_BIT:
        return None
    highest = 2 ** _tiff_tag(image, BITS, 16) - 1
    values = np.arange(2**16, dtype=np.uint32).clip(max=highest)
    table = ((values * 255 + highest // 2) // highest).astype(np.uint8)
    return 255 - table if _tiff_tag(image, PHOTOMETRIC, None) == WHITE_IS_ZERO else table


def _tiff_tag(image: Image.Image, tag: int, default: Any) -> Any:
    """The first value of a tag of a TIFF file; `default` for other formats, and where the tag is missing."""
    value = getattr(image, "tag_v2", {}).get(tag, default) if image.format == "TIFF" else default
    return value[0] if isinstance(value, tuple) else value


# --------------------------------------------------------------------------- file names


def image_path(folder: Path, name: str) -> Path:
    """The file of `name` below `folder`, also under COCO 2017's name where LVIS v0.5 gives the one of 2014."""
    path = inside(folder, name)
    old = COCO_2014.fullmatch(path.name)
    return path.with_name(old[1]) if old and not path.exists() else path


def inside(folder: Path, name: str) -> Path:
    """The path of `name` below `folder`; a name that leads out of it raises UserError."""
    if leads_out(name):
        raise UserError(f"file_name '{name}' leads out of the image folder {folder}; expected a path below it")
    return folder / name


def leads_out(name: str) -> bool:
    """Whether a file name is absolute or climbs. (Links that the user made inside the folder may lead anywhere.)"""
    return Path(name).is_absolute() or ".." in Path(name).parts


def name_hint(folder: Path, name: str) -> str:
    """Why an image is missing, as far as its name tells: "; did you mean ...?" or "".

    Looks for the same file with / for \\, without URL escapes such as %20, with composed or decomposed accents, with
    the suffix in the other case, without blanks around the name, and without its folders.
    """
    slashes = name.replace("\\", "/")
    forms: dict[str, None] = dict.fromkeys([slashes, unquote(name), unquote(slashes), name.strip()])
    forms |= dict.fromkeys(unicodedata.normalize(form, text) for form in ("NFC", "NFD") for text in list(forms))
    for text in list(forms):
        stem, suffix = os.path.splitext(text)
        forms |= dict.fromkeys([stem + suffix.lower(), stem + suffix.upper()])
    forms |= dict.fromkeys(text.rpartition("/")[2] for text in list(forms))
    for text in forms:
        if text not in ("", name) and not leads_out(text) and os.path.isfile(folder / text):
            return f"; did you mean {text}? Correct file_name in the annotations"
    return "; write / between folders, not \\" if "\\" in name else ""
