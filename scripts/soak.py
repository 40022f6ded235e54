"""Can training run unattended? Kills it at random moments, starts it again, and compares with an undisturbed run.

    python scripts/soak.py                 # one process, 50 kills (SIGKILL): about 8 minutes
    python scripts/soak.py --ranks 2       # two ranks; all of them are killed, or only one
    python scripts/soak.py --nodes 2 --kills 3    # two torchrun agents on this machine; one is killed and joins again
    python scripts/soak.py --together 20          # two equal commands at once: train, evaluate, predict, stores
    python scripts/soak.py --validate 20 --ranks 2    # whole jobs on several ranks that validate, store and compare

Everything is made in a temporary folder. Exit code 1 if a weight or a detection differs in a single bit, if
a rank outlives the death of another by more than a minute, or if one of two commands ends in another way than with
the right results or exit code 2.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.core.errors import UserError, run_script

PATIENCE = 60.0  # seconds in which the ranks that are left must end
START = 10.0  # seconds after a start in which a kill may fall anywhere, also before training
EPOCHS = 60  # of 6 steps
CONFIG = """
data: {name: tiny, root: ROOT, workers: 1}
detector:
  {backbone: small, fpn_channels: 16, min_size: 64, max_size: 64,
   rpn: {anchor_sizes: [[16], [32]], batch_size: 32, train_proposals: 40, test_proposals: 30},
   roi: {batch_size: 16, sampling_ratio: 1, fc: 32}}
classifier: {name: group_softmax, boundaries: [5, 15]}
train:
  {epochs: EPOCHS, batch_size: 4, lr: 0.01, milestones: [50], warmup_iterations: 30, log_every: 1, checkpoint_every: 3}
test: {batch_size: 4, max_detections: 30}
device: cpu
"""


def main() -> None:
    """Parses the command line; prints what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1, help="processes of a node")
    parser.add_argument("--nodes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--together", type=int, metavar="N", help="start two commands at once, N times of each kind")
    parser.add_argument("--validate", type=int, metavar="N", help="run a whole job N times, on --ranks")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    if arguments.kills < 1 or arguments.ranks not in (1, 2, 4):
        raise UserError(f"--kills {arguments.kills} --ranks {arguments.ranks}: expected 1 kill or more, and 1, 2 or 4")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.together or arguments.validate:
            pairs = Together(Path(folder), arguments.ranks, arguments.seed)
            good = pairs.commands(arguments.together) if arguments.together else pairs.jobs(arguments.validate)
        else:
            soak = Soak(Path(folder), arguments)
            good = soak.nodes() if arguments.nodes == 2 else soak.kills()
        sys.exit(0 if good else 1)


def make_data(folder: Path) -> Path:
    """A dataset of 8 categories in 64 x 64 pixels."""
    from bags.data.glyphs import Preset, make_glyphs

    return make_glyphs(folder / "data", Preset(8, 64, 30, 2, 2, (2, 4), (16, 30), 2, 0.7, 3, 3), workers=1)


def launcher(ranks: int) -> list[str]:
    """The beginning of a command that runs on some ranks of this machine."""
    alone = [sys.executable]
    return alone + ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] * (ranks > 1)


def script(name: str) -> str:
    """The path of one of the scripts."""
    return str(Path(__file__).with_name(f"{name}.py"))


def at_once(commands: list[list[str]], delay: float) -> list[tuple[int, str]]:
    """(exit code, what was printed) of commands that run at the same time. delay: seconds between two starts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]  # a pipe could fill up
        processes: list[subprocess.Popen] = []
        for command, file in zip(commands, files, strict=True):
            if processes:
                time.sleep(delay)
            processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))
        codes = [process.wait() for process in processes]
        return [(code, (file.seek(0), file.read())[1]) for code, file in zip(codes, files, strict=True)]


class Together:
    """A small detector, and commands that work on it at the same time.

    Each kind of command is run undisturbed first: afterwards its result files must be the same, byte for byte.
    """

    def __init__(self, folder: Path, ranks: int, seed: int):
        self.folder, self.ranks, self.dice = folder, ranks, random.Random(seed)
        root, configs = make_data(folder), folder / "configs"
        configs.mkdir()
        text = (
            CONFIG.replace("ROOT", str(root)).replace("EPOCHS", "3").replace("checkpoint_every: 3", "evaluate_every: 1")
        )
        (configs / "base.yaml").write_text(text)
        row = "base: base.yaml\ndetector: {init_from: SOURCE}\ntrain: {part: cls}\n"
        for name in ("first", "second"):  # both of one store
            own = (
                row.replace("SOURCE", "row:base") + f"classifier: {{boundaries: [{5 if name == 'first' else 6}, 15]}}\n"
            )
            (configs / f"{name}.yaml").write_text(own)
        [(code, said)] = at_once([self.train(folder / "base", "base")], 0)
        if code:
            raise UserError(f"the undisturbed run failed:\n{said[-3000:]}")
        self.checkpoint = str(folder / "base/tiny/base/last.pth")

    def train(self, output: Path, *rows: str, keys: tuple[str, ...] = ()) -> list[str]:
        """The command that trains some rows."""
        files = [str(self.folder / f"configs/{row}.yaml") for row in rows]
        return [*launcher(self.ranks), script("train"), *files, f"output={output}", *keys]

    def kinds(self, output: Path) -> dict[str, list[list[str]]]:
        """The commands of each kind, which write into `output`."""
        images, source = str(self.folder / "data/val"), f"detector.init_from={self.checkpoint}"
        store = (source, f"store.folder={output / 'store'}")
        return {
            "train": [self.train(output, "base")] * 2,
            "evaluate": [[*launcher(self.ranks), script("evaluate"), self.checkpoint, "--output", str(output)]] * 2,
            "predict": [[*launcher(1), script("predict"), self.checkpoint, images, "--output", str(output)]] * 2,
            "store": [self.train(output, name, keys=store) for name in ("first", "second")],
        }

    def commands(self, times: int) -> bool:
        """Starts two commands of each kind at once."""
        good = True
        for kind in self.kinds(self.folder):
            calm = self.folder / f"calm_{kind}"
            for command in self.kinds(calm)[kind]:
                at_once([command], 0)
            expected, refused = results(calm), 0
            for number in range(times):
                output = self.folder / f"{kind}_{number}"
                ends = at_once(self.kinds(output)[kind], self.dice.uniform(0, 2))
                refused += sum(code == 2 and "works in it" in said for code, said in ends)
                right = results(output) == expected and any(code == 0 for code, _ in ends)
                right &= all(code == 0 or (code == 2 and "works in it" in said) for code, said in ends)
                if not right or not expected:
                    codes, texts = [code for code, _ in ends], "\n".join(said[-1500:] for _, said in ends)
                    print(f"FAILED: two of {kind} ended with codes {codes}:\n{texts}", flush=True)
                good &= bool(right and expected)
            print(f"{kind}: {times} times two at once, {refused} refused, all others right: {good}", flush=True)
        return good

    def jobs(self, times: int) -> bool:
        """Runs a job of three rows, then an evaluation, on all ranks; the first one is what the others must equal."""
        expected: dict[str, bytes] = {}
        good = True
        for number in range(times):
            output = self.folder / f"job_{number}"
            ends = at_once([self.train(output, "base", "first", "second")], 0)
            checkpoint = str(output / "tiny/first/last.pth")
            ends += at_once([[*launcher(self.ranks), script("evaluate"), checkpoint]], 0)
            found = results(output)
            expected = expected or found
            right = found == expected and bool(found) and not any(code for code, _ in ends)
            right &= not list(output.rglob("*.rank*")) and not list(output.rglob("*.tmp"))
            if not right:
                print(f"FAILED: job {number}:\n" + "\n".join(said[-3000:] for _, said in ends), flush=True)
            good &= right
            shutil.rmtree(output)
        print(f"{times} jobs on {self.ranks} ranks, all equal: {good}")
        return good


def results(folder: Path) -> dict[str, bytes]:
    """The files of numbers and detections below a folder."""
    names = ("metrics.json", "predictions.json", "validation.json", "categories.csv")
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.name in names}


class Soak:
    """One undisturbed run, and one that is killed."""

    def __init__(self, folder: Path, arguments: argparse.Namespace):
        self.folder, self.arguments, self.dice = folder, arguments, random.Random(arguments.seed)
        root = make_data(folder)
        text = CONFIG.replace("ROOT", str(root)).replace("EPOCHS", str(EPOCHS))
        (folder / "soak.yaml").write_text(text)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        print("undisturbed run ...", flush=True)
        began = time.monotonic()
        calm = [self.start("calm", node) for node in range(arguments.nodes)]
        if any(process.wait() for process in calm):
            raise UserError(f"the undisturbed run failed:\n{self.output('calm')}")
        print(f"undisturbed run: {time.monotonic() - began:.0f} s", flush=True)

    def start(self, output: str, node: int = 0) -> subprocess.Popen:
        """Starts training, or one node of it, into a folder."""
        ranks, nodes = self.arguments.ranks, self.arguments.nodes
        script = [str(Path(__file__).with_name("train.py")), str(self.folder / "soak.yaml")]
        launch = [sys.executable]
        if ranks * nodes > 1:
            launch += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--nnodes={nodes}"]
            launch += (
                ["--standalone"]
                if nodes == 1
                else [
                    "--rdzv-backend=c10d",
                    f"--rdzv-endpoint=127.0.0.1:{self.port}",
                    f"--rdzv-id={output}",
                    "--local-addr=127.0.0.1",
                    "--max-restarts=1000",
                ]
            )
        # Else a node that has stayed does not tell one that joins again where rank 0 is (torch 2.14).
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with (self.folder / f"{output}.{node}.txt").open("a") as file:
            command = [*launch, *script, f"output={self.folder / output}"]
            return subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def output(self, name: str) -> str:
        """The end of what the processes of a run have printed."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob(f"{name}.*.txt")))

    def run(self, output: str) -> Path:
        """The run's folder."""
        return self.folder / output / "tiny/soak"

    def lines(self) -> int:
        """Steps in the disturbed run's log."""
        log = self.run("killed") / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def wait_for_steps(self, process: subprocess.Popen, more: int = 1) -> None:
        """Until the run has logged some steps, or ends."""
        log = self.run("killed") / "log.jsonl"
        before, lines = time.time(), None
        while process.poll() is None:
            if log.exists() and log.stat().st_mtime > before:
                lines = self.lines() if lines is None else lines
                if self.lines() >= lines + more - 1:
                    return
            time.sleep(0.01)

    def kills(self) -> bool:
        """Kills until there are enough, then lets the run end; several runs, if they end too soon."""
        killed, alone, early, runs, same, reached = 0, [], 0, 0, True, []
        while True:
            before = self.lines()
            process = self.start("killed")
            if killed < self.arguments.kills:
                if self.dice.random() < 0.2:
                    self.sleep(process, self.dice.uniform(0, START))
                    early += self.lines() <= before
                else:
                    self.wait_for_steps(process)
                    self.sleep(process, self.dice.uniform(0, 2))
            else:
                process.wait()
            if process.poll() is not None:
                if process.returncode:
                    print(f"FAILED with code {process.returncode}:\n{self.output('killed')}")
                    return False
                runs += 1
                same &= self.compare()
                if killed >= self.arguments.kills:
                    break
                shutil.rmtree(self.folder / "killed")
                continue
            killed += 1
            reached.append(self.lines())
            alone += self.kill(process)
        hung = sum(seconds is None for seconds in alone)
        ended = [seconds for seconds in alone if seconds is not None]
        steps = f"after {min(reached)} to {max(reached)} of {6 * EPOCHS} steps"
        print(
            f"{killed} kills {steps} ({early} outside training), {runs} runs ended: {'' if same else 'NOT '}identical"
        )
        if alone:
            print(
                f"one rank alone killed {len(alone)} times: all others ended within {max(ended, default=0):.1f} s, "
                f"{hung} hung"
            )
        return same and not hung

    def sleep(self, process: subprocess.Popen, seconds: float) -> None:
        """Waits, but not for what has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.005)

    def kill(self, process: subprocess.Popen) -> list[float | None]:
        """Kills everything, or one rank and then whatever is left; seconds that it took to end, None if it did not."""
        ranks = [pid for pid in descendants(process.pid) if is_rank(pid)]
        took: list[float | None] = []
        if self.arguments.ranks > 1 and len(ranks) >= self.arguments.ranks and self.dice.random() < 0.5:
            everything = descendants(process.pid)
            end(self.dice.choice(ranks))
            began = time.monotonic()
            while process.poll() is None and time.monotonic() < began + PATIENCE:
                time.sleep(0.05)
            took.append(time.monotonic() - began if process.poll() is not None else None)
        else:
            everything = descendants(process.pid)
        for pid in (process.pid, *everything):
            end(pid)
        process.wait()
        return took

    def compare(self) -> bool:
        """Whether both runs ended with the same weights, optimiser and detections, bit for bit."""
        import torch

        calm, killed = (torch.load(self.run(n) / "last.pth", weights_only=True) for n in ("calm", "killed"))
        same = calm["model"].keys() == killed["model"].keys()
        same &= all(torch.equal(value, killed["model"][key]) for key, value in calm["model"].items())
        momenta = [c["optimizer"]["state"] for c in (calm, killed)]
        same &= all(torch.equal(momenta[0][k]["momentum_buffer"], momenta[1][k]["momentum_buffer"]) for k in momenta[0])
        files = [(self.run(n) / "predictions.json").read_bytes() for n in ("calm", "killed")]
        return same and calm["iteration"] == killed["iteration"] and files[0] == files[1]

    def nodes(self) -> bool:
        """Kills the second node and starts it again; the first one waits for it, and both go on together."""
        nodes = [self.start("killed", 0)]
        time.sleep(3)  # the first one keeps the meeting place
        nodes.append(self.start("killed", 1))
        for number in range(self.arguments.kills):
            self.wait_for_steps(nodes[0], more=20)
            if nodes[0].poll() is not None:
                print(f"the run has ended before kill {number + 1}:\n{self.output('killed')}")
                break
            reached, began = self.lines(), time.monotonic()
            for pid in (nodes[1].pid, *descendants(nodes[1].pid)):
                end(pid)
            nodes[1].wait()
            nodes[1] = self.start("killed", 1)
            self.wait_for_steps(nodes[0])
            print(
                f"node 1 killed after {reached} steps; both train again after {time.monotonic() - began:.0f} s",
                flush=True,
            )
        codes = [node.wait() for node in nodes]
        if any(codes):
            print(f"FAILED with codes {codes}:\n{self.output('killed')}")
            return False
        same = self.compare()
        print(f"{self.arguments.kills} restarts of a node: {'' if same else 'NOT '}identical")
        return same


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on."""
    try:
        children = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:  # it has ended
        return []
    return [*children, *(other for child in children for other in descendants(child))]


def is_rank(pid: int) -> bool:
    """Whether a process is one that torchrun has started."""
    try:
        return b"\0LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes() and not is_loader(pid)
    except OSError:
        return False


def is_loader(pid: int) -> bool:
    """Whether a process is a rank's child: its parent has the same environment."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return b"\0LOCAL_RANK=" in Path(f"/proc/{parent}/environ").read_bytes()


def end(pid: int) -> None:
    """SIGKILL, if it is there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    run_script(main)
