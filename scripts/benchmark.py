"""Measures ours against its peer, interleaved in one run: medians, and peer / ours as ratio (more is better).

python scripts/benchmark.py loss            # GroupSoftmax against plain cross entropy, forward + backward
python scripts/benchmark.py loss --json     # [{case, ours_s, peer, peer_s, ratio, identical}, ...]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.errors import UserError, run_script


def main() -> None:
    """Parses the command line; prints a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(BENCHMARKS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=31, help="interleaved repeats of each case (default 31)")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        raise UserError(f"--repeats {arguments.repeats}: expected 1 or more")
    results = BENCHMARKS[arguments.name](arguments.repeats)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{'case':<44} {'ours':>10} {'peer':>10} {'peer/ours':>9} {'ours/peer':>9}  identical  peer is")
    for r in results:
        times = f"{1e3 * r['ours_s']:>7.2f} ms {1e3 * r['peer_s']:>7.2f} ms"
        ratios = f"{r['ratio']:>9.2f} {1 / r['ratio']:>9.2f}"
        print(f"{r['case']:<44} {times} {ratios}  {r['identical']!s:<9}  {r['peer']}")


def measure(case: str, ours: Callable, peer_name: str, peer: Callable, repeats: int, identical=None) -> dict:
    """Times both in turn, `repeats` times, after two unmeasured calls of each."""
    times: dict[Callable, list[float]] = {ours: [], peer: []}
    for repeat in range(repeats + 2):
        for function in (ours, peer) if repeat % 2 else (peer, ours):
            start = time.perf_counter()
            function()
            if repeat >= 2:
                times[function].append(time.perf_counter() - start)
    ours_s, peer_s = (statistics.median(times[function]) for function in (ours, peer))
    return {"case": case, "ours_s": ours_s, "peer": peer_name, "peer_s": peer_s,
            "ratio": peer_s / ours_s, "identical": identical}  # fmt: skip


def loss(repeats: int) -> list[dict]:
    """GroupSoftmax on LVIS-like counts (1,230 categories, 4 groups, a quarter of the proposals foreground)."""
    import torch
    import torch.nn.functional as F

    import bags

    results = []
    counts = [max(1, round(12000 * 0.9935**rank)) for rank in range(1230)]
    classifier = bags.GroupSoftmax(4, bags.assign_groups(counts), others_ratio=8.0)
    for proposals in (512, 8192):
        torch.manual_seed(0)
        foreground = torch.multinomial(torch.tensor(counts, dtype=torch.float), proposals // 4, replacement=True) + 1
        labels = torch.cat([foreground, torch.zeros(proposals - len(foreground), dtype=torch.long)])
        grouped = torch.randn(proposals, 1236, requires_grad=True)
        plain = torch.randn(proposals, 1231, requires_grad=True)

        def ours(logits=grouped, labels=labels):
            return torch.autograd.grad(sum(classifier.loss(logits, labels).values()), logits)

        def peer(logits=plain, labels=labels):
            return torch.autograd.grad(F.cross_entropy(logits, labels), logits)

        results.append(measure(f"GroupSoftmax loss [{proposals}, 1236]", ours, "cross_entropy, 1231", peer, repeats))
    return results


BENCHMARKS = {"loss": loss}

if __name__ == "__main__":
    run_script(main)
