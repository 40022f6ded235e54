"""Detects objects in any image, or in all images of a folder.

    python scripts/predict.py runs/glyphs-100/bags/last.pth photo.jpg folder/ --output out

Writes one drawn PNG per image and predictions.json: a list of {file_name, category_id, category,
bbox (x, y, width, height in pixels), score, and segmentation (RLE) where the detector has masks}.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.errors import UnreadableImage, UserError, run_script
from bags.files import write_text

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def main() -> None:
    """Parses the command line; loads, detects, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", nargs="+", type=Path, help="image files or folders")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    parser.add_argument("--score", type=float, default=0.3, help="least score (default 0.3)")
    parser.add_argument("--min-size", type=int, help="shorter side in pixels (default: as trained)")
    parser.add_argument("--max-size", type=int, help="longer side in pixels (default: as trained)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    arguments = parser.parse_intermixed_args()
    for name in ("min_size", "max_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected pixels, 1 or more")
    if not 0 <= arguments.score <= 1:
        raise UserError(f"--score {arguments.score}: expected 0 to 1")
    files = _image_files(arguments.images)
    from bags import distributed

    sizes, output = (arguments.min_size, arguments.max_size), arguments.output
    with distributed.distributed(arguments.device) as device, distributed.locked(output, "choose another --output"):
        if distributed.world_size() > 1:
            raise UserError("predict.py works in one process: start it without torchrun")
        detect(arguments.checkpoint, files, arguments.output, arguments.score, *sizes, device)


def _image_files(paths: list[Path]) -> list[Path]:
    files = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such image")
    if not files:
        raise UserError(f"{', '.join(map(str, paths))}: no image in there ({' '.join(sorted(SUFFIXES))})")
    return files


def detect(checkpoint: Path, files: list[Path], output: Path, least_score: float, min_size, max_size, device) -> None:
    """Writes drawings and predictions.json to `output`."""
    import matplotlib
    import torch
    from torchvision.transforms.functional import to_tensor
    from tqdm import tqdm

    from bags.analysis.plots import save_drawing
    from bags.build import load_detector
    from bags.data.dataset import read_image
    from bags.engine.predict import results_entries

    detector, meta = load_detector(checkpoint, min_size, max_size)
    stats = meta["stats"]
    detector.to(device)
    detector.transform.encode_masks = True
    name_of = dict(zip(stats.category_ids, stats.names, strict=True))
    output.mkdir(parents=True, exist_ok=True)
    palette = [matplotlib.colors.to_hex(colour) for colour in matplotlib.colormaps["tab10"](range(10))]
    results, unreadable = [], 0
    for number, file in enumerate(tqdm(files, unit="image")):
        try:
            image = read_image(file)
        except UnreadableImage as error:
            tqdm.write(f"warning: left out: {error}", file=sys.stderr)
            unreadable += 1
            continue
        with torch.inference_mode():
            detection = detector([to_tensor(image).to(device)])[0]
        kept = torch.where(detection["scores"] >= least_score)[0]
        rles = detection.pop("rles", [])
        detection = {key: value[kept] for key, value in detection.items()}
        detection["rles"] = [rles[k] for k in kept.tolist()] if rles else []
        names = [stats.names[label - 1] for label in detection["labels"].tolist()]
        colours = [palette[label % len(palette)] for label in detection["labels"].tolist()]
        drawing = output / f"{number:06d}_{file.stem}.png"
        save_drawing(drawing, image, detection["boxes"].cpu(), names, colours, detection["scores"].tolist())
        for entry in results_entries(number, detection, stats.category_ids):
            del entry["image_id"]
            results.append({"file_name": str(file), "category": name_of[entry["category_id"]], **entry})
    if unreadable == len(files):
        raise UserError(f"{output}: nothing predicted: none of the {unreadable} images could be read")
    write_text(output / "predictions.json", json.dumps(results, indent=1))
    left_out = f" ({unreadable} more left out)" if unreadable else ""
    seen = f"{len(files) - unreadable} images{left_out}"
    print(f"{seen}, {len(results)} objects with a score of {least_score} or more: {output}")


if __name__ == "__main__":
    run_script(main)
