"""Run an exported detector with onnxruntime, numpy and pillow only: python scripts/run_onnx.py model.onnx photo.jpg"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) < 3:
    sys.exit("usage: run_onnx.py MODEL.onnx IMAGE [IMAGE ...]")
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
texts = session.get_modelmeta().custom_metadata_map
names = {c["id"]: c["name"] for c in json.loads(texts["categories"])}
outputs = [output.name for output in session.get_outputs()]  # boxes, scores, labels, category_ids, perhaps masks
unread = 0
for file in sys.argv[2:]:
    try:
        image: Image.Image = Image.open(file)
        if texts.get("exif") == "true":  # of images in training: turned as their EXIF orientation says
            image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F"):
            raise OSError("has more than 16 bits a pixel")
        if image.mode.startswith("I;16"):  # 16-bit grey: pillow would cut off values above 255
            image = Image.fromarray((np.asarray(image, np.float64) / 257).round().astype(np.uint8))
        pixels = np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    except (OSError, SyntaxError) as error:
        print(f"{file}: left out: {error}", file=sys.stderr)
        unread += 1
        continue
    found = dict(zip(outputs, session.run(None, {"image": pixels}), strict=True))
    if not len(found["scores"]):
        print(f"{file}: nothing found", file=sys.stderr)
    for box, score, category in zip(found["boxes"], found["scores"], found["category_ids"].tolist(), strict=True):
        print(f"{file}: {names[category]} {score:.3f} at {', '.join(f'{side:.1f}' for side in box)}")
sys.exit(2 if unread else 0)
