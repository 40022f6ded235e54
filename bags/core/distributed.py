"""One process or many: rank, process group, device and random numbers. Everything else asks here.

Started by torchrun, `distributed()` joins the group that the environment describes (nccl on GPUs,
gloo on CPU); started plainly it is one process and every helper below is a no-op.
"""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bags.core import locks
from bags.core.errors import LostRank, UserError

Result = TypeVar("Result")
ALONE = datetime.timedelta(hours=1)  # that ranks wait while the main one makes a dataset, fetches weights or scores


@contextlib.contextmanager
def distributed(device: str = "auto") -> Iterator[torch.device]:
    """Joins and leaves the process group; gives this rank's device.

    A rank that fails leaves without ceremony, which ends the others: they raise LostRank.
    Raises UserError for device "cuda" where torch sees no GPU, and for more ranks than GPUs.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here; use device=auto or device=cpu")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)} ranks, but torch sees "
            f"{torch.cuda.device_count()} GPU(s) here: GPUS= takes at most as many"
        )
    if use_cuda:
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield chosen
        return
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=ALONE, device_id=chosen if use_cuda else None)
    try:
        yield chosen
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostRank(f"rank {rank()} ends: it has lost another rank") from error
        raise
    dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0..world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Waits until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block before the others do."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def on_main(action: Callable[[], Result]) -> Result:
    """Run `action` in the main process only; return its result, which can be pickled, on all ranks.

    Everything that depends on files is decided this way: ranks that looked for themselves could see different states.
    A UserError or an OSError of the action is raised on all ranks.
    """
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = action()
        except (UserError, OSError) as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def locked(folder: Path, mend: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder for all ranks inside the block; the main process has it.

    mend: completes "wait for it, or ..." in the UserError that all ranks raise where another command has the lock.
    wait: wait for the other command instead. Ranks ask together, so that none waits in one exchange for long.
    """
    told = False
    while holder := on_main(lambda: locks.take(folder)):
        if not wait:
            raise locks.refusal(folder, holder, mend)
        if is_main() and not told:
            print(f"note: {folder}: {holder} works in it: waiting for it", file=sys.stderr)
        told = True
        time.sleep(locks.INTERVAL)
    try:
        yield
    finally:
        if is_main():
            locks.release(folder)


def share_buffers(model: torch.nn.Module) -> None:
    """Gives all ranks the main process's buffers (batch normalisation statistics)."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def seed_rank(seed: int, device: torch.device) -> None:
    """Seeds torch's generators of this rank; each rank gets numbers of its own."""
    seed = seed * 1009 + rank()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would format a traceback each time
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def make_deterministic() -> None:
    """Choose implementations that give the same bits every time; torch raises where an operation has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """All ranks' rows, in rank order. rows: [R, ...], R may differ between ranks."""
    if not dist.is_initialized():
        return rows
    lengths = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(rows)], device=rows.device))
    padded = rows.new_zeros(int(max(lengths)), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(length)] for part, length in zip(gathered, lengths, strict=True)])


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_rank(flag: bool | torch.Tensor, device: torch.device | str = "cpu") -> bool:
    """Whether a flag is set on any rank; the same answer on all of them. A flag on a GPU is waited for once."""
    if not dist.is_initialized():
        return bool(flag)
    return bool(total(torch.as_tensor(flag, dtype=torch.float32, device=device)))


def gather_objects(value: object) -> list:
    """Every rank's plain value, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def average(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means of named scalars over all ranks, as floats (one synchronisation)."""
    stacked = torch.stack([v.detach().float() for v in values.values()])
    if dist.is_initialized():
        dist.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(values, stacked.tolist(), strict=True))
