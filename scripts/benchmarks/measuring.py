"""The tools of several benchmarks: two functions timed in turn, memory in processes of its own, made-up objects."""

import math
import operator
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measure(
    case: str, ours: Callable, peer_name: str, peer: Callable, repeats: int, identical: bool | None = None
) -> dict:
    """Times both in turn, `repeats` times, after two unmeasured calls of each.

    The ratio is the median of those of neighbours in time: what slows the machine for a while slows both.
    """
    times: dict[Callable, list[float]] = {ours: [], peer: []}
    for repeat in range(repeats + 2):
        for function in (ours, peer) if repeat % 2 else (peer, ours):
            start = time.perf_counter()
            function()
            if repeat >= 2:
                times[function].append(time.perf_counter() - start)
    ours_s, peer_s = (statistics.median(times[function]) for function in (ours, peer))
    ratio = statistics.median(map(operator.truediv, times[peer], times[ours]))
    return {"case": case, "ours_s": ours_s, "peer": peer_name, "peer_s": peer_s, "ratio": ratio, "identical": identical}


def in_mb(case: str, ours: float, peer_name: str, peer: float) -> dict:
    """A result in MB."""
    return {
        "case": case,
        "ours_s": None,
        "ours_mb": ours,
        "peer": peer_name,
        "peer_s": None,
        "peer_mb": peer,
        "ratio": peer / max(ours, 0.1),
        "identical": None,
    }


def in_process(function: Callable, *arguments: Any) -> Any:
    """Calls a function in a fresh process."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak(function: Callable) -> dict:
    """Seconds of a call, and how far it raised the process's peak memory, in MB.

    The kernel counts memory to some hundred KB, so a call that needs none could seem to need less than none.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_mb("VmRSS")
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    del result
    return {"s": seconds, "mb": max(0.0, status_mb("VmHWM") - before)}


def cost(function: Callable, repeats: int) -> dict:
    """Median seconds of `repeats` calls after one, and how far they raised the process's peak memory, in MB."""
    function()
    measured = [peak(function) for _ in range(repeats)]
    return {"s": statistics.median(one["s"] for one in measured), "mb": max(one["mb"] for one in measured)}


def growth(what: str, sizes: tuple[int, ...], values: list[float]) -> dict:
    """A line of a table of costs against sizes. The exponent is that of a power law from the second size to the last.

    An exponent of 1 means that what is ten times as large costs ten times as much; no cost at all gives 0.
    """
    first, last = max(values[1], 1e-9), max(values[-1], 1e-9)
    exponent = math.log(last / first) / math.log(sizes[-1] / sizes[1])
    shown = {f"{size:,}": float(f"{value:.3g}") for size, value in zip(sizes, values, strict=True)}
    return {"what": what, **shown, "exponent": round(exponent, 2)}


def status_mb(key: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def coco_object(number: int, image: int, category: int, box: list[float]) -> dict:
    """An annotation of COCO's format; box: x, y, width, height in pixels."""
    area = box[2] * box[3]
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0}
