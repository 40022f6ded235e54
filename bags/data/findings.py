"""Findings about a dataset: which defects there are, what training does about each, and how they are shown."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

EXAMPLES = 5
STOP, DROP, NOTE = "stops", "dropped", "note"
REMAP = "prepare_data.py remap VAL.json --like TRAIN.json --output NEW.json matches categories by name"
ONE_FILE = "If you have one annotation file only, `prepare_data.py split` divides it into train and val"
DEFECTS = {  # kind -> (level, what training does)
    "file": (STOP, "training refuses the file"),
    "key given twice": (NOTE, "the last value of the key in an entry counts"),
    "bad id": (STOP, "training refuses the file: ids are whole numbers"),
    "duplicate id": (STOP, "training refuses the file"),
    "image size": (STOP, "training refuses the file: width and height are whole numbers above 0"),
    "file name": (STOP, "training refuses the file, or the image when it comes to it"),
    "dangling image_id": (STOP, "training refuses the file: there is no such image"),
    "dangling category_id": (STOP, "training refuses the file: there is no such category"),
    "bad box": (STOP, "training refuses the file: bbox is [x, y, width, height], finite"),
    "bad field": (STOP, "training refuses the file"),
    "bad segmentation": (STOP, "training refuses the file"),
    "nothing to train on": (STOP, "training refuses the file"),
    "nothing to evaluate on": (STOP, "training refuses the file"),
    "crowd region": (NOTE, "not trained on, and in evaluation neither found nor missed"),
    "no segmentation": (DROP, "the object is left out of training with masks, and masks of val are not scored"),
    "impossible area": (NOTE, "evaluation takes the area of the mask or box instead"),
    "empty box": (DROP, "not trained on; in val it counts as missed, as in the official tools"),
    "box outside image": (DROP, "not trained on; in val it counts as missed, as in the official tools"),
    "box across border": (NOTE, "the box is clipped to the image"),
    "polygon off the image": (NOTE, "none: what lies outside is not drawn"),
    "short polygon": (DROP, "the polygon, of fewer than three points, is left out"),
    "duplicated annotation": (NOTE, "the same object is learnt, and counted, more than once"),
    "duplicated file name": (NOTE, "the image is seen more than once"),
    "categories of one name": (NOTE, "they stay apart, but `remap` cannot match them, and predictions name both alike"),
    "ids with gaps": (NOTE, "none: labels are 1..C by ascending id"),
    "image without objects": (NOTE, "not trained on, unless data.empty_images is true"),
    "category without instances": (NOTE, "its classifier learns to say no"),
    "empty group": (NOTE, "the group's softmax has nothing but `others`"),
    "counts disagree": (NOTE, "training counts the annotations; only `evaluate` without --train reads these numbers"),
    "no such image folder": (STOP, "training refuses it"),
    "missing image": (STOP, "training stops when it comes to it"),
    "unreadable image": (STOP, "training stops when it comes to it"),
    "too many pixels": (STOP, "training stops when it comes to it; data.max_pixels is the limit"),
    "pixels without a range": (STOP, "training stops when it comes to it: convert them to 8 or 16 bits, unsigned"),
    "size differs": (STOP, "training stops when it comes to it"),
    "EXIF rotation": (NOTE, "ignored, as COCO does; data.exif=true turns the image"),
    "annotations split over entries": (
        NOTE,
        "the objects of one entry are background for the other: merge them",
    ),
    "normalised boxes": (NOTE, "boxes are read as pixels: multiply them by the image's size"),
    "corner boxes": (NOTE, "boxes are read as pixels of the images at hand: were they made on smaller copies?"),
    "boxes of two corners": (NOTE, "boxes are read as x, y, width, height: are these x1, y1, x2, y2?"),
    "train and val share images": (NOTE, "validation is too good"),
    "category lists differ": (STOP, f"training refuses the pair; {REMAP}"),
}


@dataclass
class Finding:
    """One kind of defect. level: "stops" training, makes it "dropped" the object, or is a "note"."""

    where: str  # the file
    kind: str  # heading of the defect
    level: str
    effect: str  # what follows from it
    count: int = 0  # places with the defect
    examples: list[str] = field(default_factory=list)  # the first of these places


class Findings:
    """Collects defects of one file."""

    def __init__(self, where: Path | str):
        self.where = str(where)
        self.by_kind: dict[str, Finding] = {}

    def add(self, kind: str, example: object) -> None:
        """Counts a defect; the first examples are kept."""
        level, effect = DEFECTS[kind]
        finding = self.by_kind.setdefault(kind, Finding(self.where, kind, level, effect))
        finding.count += 1
        if finding.count <= EXAMPLES:
            finding.examples.append(f"{example!s:.300}")

    def list(self) -> list[Finding]:
        """Worst first."""
        return sorted(self.by_kind.values(), key=lambda f: ([STOP, DROP, NOTE].index(f.level), -f.count))


def render(findings: Iterable[Finding]) -> str:
    """A text for people."""
    lines = []
    for f in findings:
        lines.append(f"[{f.level}] {f.where}: {f.kind}: {f.count}. {f.effect[0].upper()}{f.effect[1:]}.")
        lines += [f"    {example}" for example in f.examples]
        if f.count > len(f.examples):
            lines.append(f"    ... and {f.count - len(f.examples)} more")
    return "\n".join(lines)


def as_dicts(findings: Iterable[Finding]) -> list[dict]:
    """For machines."""
    return [asdict(finding) for finding in findings]
