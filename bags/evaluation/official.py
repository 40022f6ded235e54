"""The official `lvis` and `pycocotools` as engines of `detection_ap`, imported only when they are asked for.

`lvis` 0.5.3 uses `np.float`, which NumPy has dropped, and imports OpenCV for drawing, which fails on servers
without libGL. Both are mended here, while it runs.
"""

import contextlib
import io
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import orjson

from bags.core.errors import UserError
from bags.evaluation.results_file import Results
from bags.evaluation.truth import Truth


def match(engine: str, truth: Truth, results: Results, iou_type: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """(precision [10, 101, C, areas], recall [10, C, areas]) of the official tool; -1 where there is no ground truth.

    engine: "lvis" or "pycocotools", which must be the protocol's own. limit: detections per image. Raises UserError
    for the other protocol, for an engine that is not installed, and where it cannot evaluate.
    """
    if truth.lvis != (engine == "lvis"):
        kind = "LVIS" if truth.lvis else "COCO"
        raise UserError(f"{truth.path}: holds {kind} annotations, which engine {engine} does not evaluate")
    if not len(results):
        raise UserError(f"no detections: {engine} cannot evaluate none; the default engine can")
    masks = iou_type == "segm"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "truth.json")
        path.write_bytes(orjson.dumps(truth.engine_content(masks)))
        return (_lvis if truth.lvis else _coco)(str(path), results.entries(masks), iou_type, limit)


def _coco(annotations: str, entries: list[dict], iou_type: Any, limit: int) -> tuple[np.ndarray, np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(annotations)
    evaluation = COCOeval(truth, truth.loadRes(entries), iou_type)
    evaluation.params.maxDets = [limit]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][..., -1], evaluation.eval["recall"][..., -1]


def _lvis(annotations: str, entries: list[dict], iou_type: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    with _lvis_mended():
        try:
            from lvis import LVIS, LVISEval, LVISResults
        except ImportError as error:
            raise UserError(f"engine lvis: not installed ({error}): pip install lvis") from None
        truth = LVIS(annotations)
        evaluation = LVISEval(truth, LVISResults(truth, entries, max_dets=limit), iou_type)
        evaluation.params.max_dets = limit
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


@contextlib.contextmanager
def _lvis_mended() -> Iterator[None]:
    drawing: Any = types.ModuleType("lvis.vis")
    drawing.LVISVis = None
    modules = {} if "lvis.vis" in sys.modules else {"lvis.vis": drawing}
    with mock.patch.dict(sys.modules, modules), mock.patch.object(np, "float", float, create=True):
        yield
