"""Run an exported detector with onnxruntime, numpy and pillow only: python scripts/run_onnx.py model.onnx photo.jpg"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = {c["id"]: c["name"] for c in json.loads(session.get_modelmeta().custom_metadata_map["categories"])}
outputs = [output.name for output in session.get_outputs()]  # boxes, scores, labels, category_ids, perhaps masks
for file in sys.argv[2:]:
    image = np.asarray(Image.open(file).convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    found = dict(zip(outputs, session.run(None, {"image": image}), strict=True))
    for box, score, category in zip(found["boxes"], found["scores"], found["category_ids"].tolist(), strict=True):
        print(f"{file}: {names[category]} {score:.3f} at {', '.join(f'{side:.1f}' for side in box)}")
