"""Scripts run in forks of a process that has imported everything and computed nothing.

Importing torch and torchvision takes four seconds of a core, a fork a few hundredths of one. A fork must not use
autograd or the threads of a scoring engine after its parent has used them. So the parent is a server of its own, which
is forked before the first test.
"""

import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import connection
from pathlib import Path

FORK = multiprocessing.get_context("fork")


class Script:
    """A running script, with the calls of `subprocess.Popen` that tests need."""

    def __init__(self, server: socket.socket, argv: list[str], cwd: Path, env: dict[str, str]):
        self.argv, self.returncode = argv, None
        self.streams = [tempfile.TemporaryFile("w+") for _ in range(2)]
        reader, writer = os.pipe()
        self.answer = os.fdopen(reader, "rb", buffering=0)
        descriptors = [*(stream.fileno() for stream in self.streams), writer]
        socket.send_fds(server, [json.dumps([argv, str(cwd), env]).encode()], descriptors)
        os.close(writer)
        self.pid = self._number()

    def _number(self) -> int:
        """The next number that the server says of the script."""
        line = self.answer.readline()
        assert line, f"the fork server has ended: {self.argv}"
        return int(line)

    def poll(self, timeout: float = 0) -> int | None:
        """The exit code, or None while the script runs."""
        if self.returncode is None and connection.wait([self.answer], timeout):
            self.returncode = self._number()
            self.answer.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As Popen's: nothing where the script has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess:
        """The exit code and what was printed; the script is killed where it takes longer."""
        if self.poll(timeout) is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.argv, timeout)
        printed = [(stream.seek(0), stream.read())[1] for stream in self.streams]
        return subprocess.CompletedProcess(self.argv, self.returncode, *printed)


def run_main(argv: list[str], cwd: str, env: dict[str, str], descriptors: list[int]) -> None:
    """As `python argv[0] ...` does, in this process; but modules are imported already, and nothing is done at exit."""
    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
    encoding = env.get("PYTHONIOENCODING", "utf-8").partition(":")[0]
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding=encoding, errors="backslashreplace", closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.orig_argv = argv, [sys.executable, *argv]
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


def wait_for(request: bytes, descriptors: list[int]) -> None:
    """Run a script in a fork; write its process number, then its exit code, to the last descriptor."""
    *streams, answer = descriptors
    process = FORK.Process(target=run_main, args=(*json.loads(request), streams))
    process.start()
    os.write(answer, f"{process.pid}\n".encode())
    process.join()
    os.write(answer, f"{process.exitcode}\n".encode())


@functools.cache
def import_package() -> None:
    """Import every module of the package, and with them torch and torchvision; find the fonts."""
    import bags
    from bags.analysis import plots

    for module in pkgutil.walk_packages(bags.__path__, "bags."):
        if module.name != "bags.evaluation.official":  # imports the lvis package, which few commands need
            importlib.import_module(module.name)
    plots.plot_ap_by_instances(io.BytesIO(), {"row": [{"training_instances": 1, "AP": 0.5}]}, [10])


def serve(requests: socket.socket) -> None:
    """Fork for each request, with the whole package imported, until the tests have ended."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not request:
            os._exit(0)
        import_package()
        if os.fork() == 0:
            requests.close()
            try:
                wait_for(request, descriptors)
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):  # none is left
            while any(os.waitpid(-1, os.WNOHANG)):
                pass


def start_server() -> socket.socket:
    """Fork the server; returns where to send requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        try:
            serve(theirs)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(1)
    theirs.close()
    return ours
