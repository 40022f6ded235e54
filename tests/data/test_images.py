"""Image files: pixels are what the file says, only supported files are opened, and the limit of size has a key."""

import os
import struct
import zlib

import numpy as np
import orjson
import pytest
import torch
from conftest import run_script, write_configs
from PIL import Image
from torchvision import tv_tensors

import bags
from bags.core.errors import UnreadableImage, UserError
from bags.data.checks import STOP, check_images
from bags.data.dataset import DetectionDataset
from bags.data.images import FORMATS, SUFFIXES, check_pixels, name_hint, open_image, read_image
from bags.data.transforms import training_transform

WHITE_IS_ZERO, UNSIGNED, SIGNED, FLOAT = 0, 1, 2, 3


def tiff(path, data, bits, kind=UNSIGNED, black_or_white=1, order="<"):
    """Writes a grey, uncompressed TIFF of 2 x 1 pixels, as Pillow cannot: tags as in the TIFF 6.0 specification."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: black_or_white, 273: 0, 277: 1, 278: 1, 279: len(data), 339: kind}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the pixels are
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    path.write_bytes(header + entries + struct.pack(f"{order}I", 0) + data)
    return path


def grey_of(path, **settings):
    """The grey level of each pixel of an image that is read; its channels agree."""
    pixels = np.asarray(read_image(path, **settings))
    assert pixels.dtype == np.uint8 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


VALUES = [0, 1, 128, 129, 255, 257, 32767, 32768, 65278, 65279, 65535]
EXPECTED = [0, 0, 0, 1, 1, 1, 127, 128, 254, 254, 255]  # by hand: v / 257, rounded


@pytest.mark.parametrize(
    "name, kind, settings",
    [
        ("x.png", "<u2", {}),
        ("x.tif", "<u2", {}),
        ("x.tif", ">u2", {}),
        ("x.tif", "<u2", {"compression": "tiff_lzw"}),
        ("x.tif", ">u2", {"compression": "tiff_lzw"}),
    ],
)
def test_16_bit_grey_is_divided_by_257(tmp_path, name, kind, settings):
    Image.fromarray(np.array([VALUES], kind)).save(tmp_path / name, **settings)
    assert grey_of(tmp_path / name) == [EXPECTED]


def test_grey_tiffs_by_their_own_range(tmp_path):
    """12 bits reach 4095; 0 may be white; 16-bit colour keeps its upper bytes."""
    assert grey_of(tiff(tmp_path / "a.tif", bytes([0x80, 0x0F, 0xFF]), 12)) == [[128, 255]]  # 2048 and 4095
    for order in "<>":
        data = struct.pack(f"{order}HH", 257, 65535)
        assert grey_of(tiff(tmp_path / "b.tif", data, 16, order=order)) == [[1, 255]]
    assert grey_of(tiff(tmp_path / "c.tif", struct.pack("<HH", 257, 65535), 16, UNSIGNED, WHITE_IS_ZERO)) == [[254, 0]]
    assert grey_of(tiff(tmp_path / "d.tif", bytes([1, 255]), 8, UNSIGNED, WHITE_IS_ZERO)) == [[254, 0]]


UNDEFINED = {
    "float": (struct.pack("<ff", 0.5, 1), 32, FLOAT),
    "int32": (struct.pack("<ii", -5, 70000), 32, SIGNED),
    "uint32": (struct.pack("<II", 5, 70000), 32, UNSIGNED),
    "int16": (struct.pack("<hh", -5, 7), 16, SIGNED),
    "int8": (struct.pack("<bb", -5, 7), 8, SIGNED),
}


@pytest.mark.parametrize("kind", UNDEFINED)
def test_pixels_without_a_range_are_refused(tmp_path, kind):
    path = tiff(tmp_path / "x.tif", *UNDEFINED[kind])
    with pytest.raises(UnreadableImage, match=r"x\.tif: .* pixels \(Pillow's mode \w+\) have no defined range"):
        read_image(path)


def test_ordinary_images_are_what_pillow_makes_of_them(tmp_path):
    """8 bits of any mode, with and without transparency: the stored colours, to the last bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    rgba = Image.fromarray(pixels)
    images = {f"{mode}.png": rgba.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
    images |= {f"{mode}.jpg": rgba.convert(mode) for mode in ("L", "RGB", "CMYK")}
    images |= {f"{mode}.tif": rgba.convert(mode) for mode in ("1", "L", "RGB", "RGBA", "CMYK", "YCbCr")}
    images |= {"x.bmp": rgba.convert("RGB"), "x.webp": rgba}
    for name, image in images.items():
        image.save(tmp_path / name, **({"transparency": 3} if name == "P.png" else {}))
        expected = Image.open(tmp_path / name).convert("RGB")
        assert np.array_equal(read_image(tmp_path / name), expected), name
    assert np.array_equal(read_image(tmp_path / "RGBA.png"), pixels[..., :3])  # transparency is ignored


def test_the_first_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("x.tif", "x.png", "x.webp", "x.mpo"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert np.asarray(read_image(tmp_path / name))[0, 0, 0] > 200, name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_exif_turns_only_where_it_is_asked_for(tmp_path, orientation, suffix):
    """Pillow turns TIFFs by itself. By hand: where the top left corner of 4 x 2 pixels goes."""
    image, exif = Image.new("L", (32, 16), "black"), Image.Exif()
    image.paste("white", (0, 0, 8, 8))
    exif[0x0112] = orientation
    image.convert("RGB").save(tmp_path / f"x.{suffix}", exif=exif)

    def white(**settings):
        pixels = np.asarray(read_image(tmp_path / f"x.{suffix}", **settings))[..., 0]
        y, x = (index.mean() / side for index, side in zip(np.nonzero(pixels > 200), pixels.shape, strict=True))
        return pixels.shape, y > 0.5, x > 0.5

    assert white() == ((16, 32), False, False)
    corner = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1), (1, 1), (1, 0)][orientation - 1]
    assert white(exif=True) == ((16, 32) if orientation < 5 else (32, 16), *map(bool, corner))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def test_only_supported_formats_are_opened(tmp_path, monkeypatch):
    """Not by their names: a .jpg that holds EPS would be handed to Ghostscript."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("Ghostscript is called"))
    (tmp_path / "eps.jpg").write_bytes(EPS)
    for name, kind in (("gif.png", "GIF"), ("ppm.jpg", "PPM"), ("ico.bmp", "ICO"), ("tga.tif", "TGA")):
        Image.new("RGB", (16, 16)).save(tmp_path / name, kind)
    for path in tmp_path.iterdir():
        with pytest.raises(UnreadableImage, match=f"{path.name}: not a readable image; expected a JPEG, PNG"):
            read_image(path)
    Image.new("RGB", (4, 4)).save(tmp_path / "png.jpg", "PNG")
    assert read_image(tmp_path / "png.jpg").size == (4, 4)


def test_suffixes_are_those_of_the_formats():
    """As Pillow registers them; MPO is the JPEG of phones with two lenses."""
    registered = {s for s, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}
    assert registered == SUFFIXES


def png_header(side):
    """A PNG of side x side pixels, as far as its header tells."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"")


def test_the_limit_of_pixels(tmp_path, monkeypatch):
    """13000 x 13000 is refused by default; above the limit of Pillow's own, the key still counts."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    path = tmp_path / "x.png"
    path.write_bytes(png_header(13_000))
    with pytest.raises(UnreadableImage, match="x.png: 13000 x 13000 pixels are more than data.max_pixels=100000000"):
        read_image(path)
    path.write_bytes(png_header(20_000))
    with pytest.raises(UnreadableImage, match="more than data.max_pixels=100000000"):
        read_image(path)
    with open_image(path, 10**9) as image:
        check_pixels(path, image, 10**9)
        assert image.size == (20_000, 20_000)
    with pytest.raises(UserError, match="data.max_pixels: expected 1 to"):
        bags.load_config(write_configs(tmp_path / "configs", tmp_path) / "softmax.yaml", ["data.max_pixels=0"])


def test_pipes_and_folders_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(UnreadableImage, match=f"{name}: not a readable image"):
            read_image(tmp_path / name)


def test_errors_of_the_machine_are_not_the_images(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    for error in (OSError(24, "Too many open files"), MemoryError()):
        with pytest.raises(type(error)), open_image(tmp_path / "x.png"):
            raise error
    with pytest.raises(MemoryError), open_image(tmp_path / "x.png"):
        raise OSError("out of memory error when reading image file")


# --------------------------------------------------------------------------- data sets


@pytest.fixture
def dataset(tmp_path):
    """(size, file names) -> a data set whose images, all of that size, are not made."""

    def make(size, names, **settings):
        width, height = size
        images = [{"id": k, "file_name": n, "width": width, "height": height} for k, n in enumerate(names, 1)]
        polygon = [0, 0, width, 0, width, height, 0, height]
        annotations = [
            {"id": k, "image_id": k, "category_id": 1, "bbox": [0, 0, width, height], "segmentation": [polygon]}
            for k in range(1, len(names) + 1)
        ]
        categories = [{"id": 1, "name": "a"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        for split in ("train", "val"):
            (tmp_path / f"{split}.json").write_bytes(orjson.dumps(content))
        return DetectionDataset(bags.AnnotationIndex.open(tmp_path / "train.json"), tmp_path, **settings)

    return make


def test_check_says_without_decoding_what_training_refuses(dataset, tmp_path):
    """Each image has its kind of finding, and training stops at each."""
    images = dataset((2, 1), ["float.tif", "gif.png", "pipe.png", "none.png", "good.tif"])
    tiff(tmp_path / "float.tif", *UNDEFINED["float"])
    tiff(tmp_path / "good.tif", struct.pack("<HH", 257, 65535), 16)
    Image.new("RGB", (2, 1)).save(tmp_path / "gif.png", "GIF")
    os.mkfifo(tmp_path / "pipe.png")
    for decode in (False, True):
        found = {f.kind: f for f in check_images(images.index, tmp_path, decode)}
        assert {kind: f.count for kind, f in found.items()} == {
            "pixels without a range": 1,
            "unreadable image": 2,
            "missing image": 1,
        }
        assert all(f.level == STOP for f in found.values())
    few = {f.kind: f.count for f in check_images(images.index, tmp_path, max_pixels=1)}
    assert few["too many pixels"] == 2
    for position in range(4):
        with pytest.raises(UnreadableImage):
            images[position]
    assert torch.equal(images[4][0], torch.tensor([1, 255]).expand(3, 1, 2).to(torch.uint8) / 255)
    done = run_script("prepare_data", "check", tmp_path / "train.json", "--images", tmp_path)
    assert done.returncode == 1 and "[stops]" in done.stdout and "float.tif" in done.stdout


def test_training_on_pixels_without_a_range_is_one_line(dataset, tmp_path):
    dataset((2, 1), ["x.tif"])
    tiff(tmp_path / "x.tif", *UNDEFINED["int32"])
    configs = write_configs(tmp_path / "configs", tmp_path)
    for limit, words in ((10**8, "have no defined range"), (1, "more than data.max_pixels=1")):
        done = run_script("train", configs / "softmax.yaml", f"output={tmp_path}/runs", f"data.max_pixels={limit}")
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


NAMES = [  # in the annotations, in the folder
    ("images\\001.png", "images/001.png"),
    ("C:\\data\\images\\001.png", "001.png"),
    ("a%20b.png", "a b.png"),
    ("x%2Fa.png", "x/a.png"),
    (" a.png ", "a.png"),
    ("a.JPG", "a.jpg"),
    ("a.png", "a.PNG"),
    ("train/a.png", "a.png"),
    ("caf\u00e9.png", "cafe\u0301.png"),
    ("cafe\u0301.png", "caf\u00e9.png"),
]


@pytest.mark.parametrize("name, file", NAMES)
def test_a_missing_image_is_explained(dataset, tmp_path, name, file):
    images = dataset((4, 4), [name])
    (tmp_path / file).parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(tmp_path / file)
    with pytest.raises(UnreadableImage) as error:
        images[0]
    assert f"no such image; did you mean {file}?" in str(error.value)
    (finding,) = check_images(images.index, tmp_path)
    assert finding.kind == "missing image" and f"did you mean {file}?" in finding.examples[0]


def test_hints_stay_in_the_folder_and_take_any_name(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    for name in ("..%2Fsecret.png", "..\\secret.png", "a" * 300, "%00.png", "%", "%ff.png"):
        assert "did you mean" not in name_hint(tmp_path / "inside", name)
    assert "write / between folders" in name_hint(tmp_path, "a\\b.png")


# --------------------------------------------------------------------------- strips


@pytest.mark.parametrize("size", [(1500, 3), (3, 1500), (1, 5000), (5000, 1), (1, 1)])
def test_multi_scale_training_on_strips(dataset, tmp_path, size):
    """No side vanishes, and boxes and masks follow the image: all are as large as it."""
    transform = training_transform(1.0, (32, 48), True, 400)
    Image.new("RGB", size).save(tmp_path / "x.png")
    image, target = dataset(size, ["x.png"], transform=transform, masks=True)[0]
    height, width = image.shape[1:]
    assert max(height, width) <= 400 and min(height, width) >= 1
    assert torch.allclose(target["boxes"], torch.tensor([[0.0, 0, width, height]]), atol=1e-3)
    assert target["masks"].shape == (1, height, width) and target["masks"].all()


def test_ordinary_images_are_resized_as_torchvision_does():
    from torchvision.transforms import v2

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    boxes = tv_tensors.BoundingBoxes([[1.0, 2, 30, 31]], format="XYXY", canvas_size=(40, 60))
    theirs = v2.Compose([v2.ToImage(), v2.RandomShortestSize([24, 32], 400), v2.ToDtype(torch.float32, scale=True)])
    for seed in range(4):
        results = []
        for transform in (training_transform(sides=(24, 32), long_side=400), theirs):
            torch.manual_seed(seed)
            results.append(transform(image, boxes))
        assert all(map(torch.equal, *results))
