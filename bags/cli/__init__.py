"""The command line: `bags VERB ...`. Each verb is a module with `main`, which parses arguments and calls a job."""

import importlib
import os
import sys

from bags.core.errors import run_script

VERBS = {
    "train": "train the rows of a dataset, and compare them",
    "choose": "find the best classifier for a dataset",
    "evaluate": "score a checkpoint or a results file, or compare two results files",
    "predict": "detect objects in any images",
    "export": "write a trained detector as ONNX, checked in ONNX Runtime",
    "prepare-data": "make, fetch and check datasets",
    "tables": "compare finished runs; the paper's tables",
    "report": "write a run as one HTML file",
    "sweep": "run a row for every combination of some keys' values",
    "import-weights": "import weights of other projects, and export ours",
}

AGAIN = {  # what the same command does after it was stopped; the other verbs start over
    "train": "goes on from the last checkpoint",
    "sweep": "goes on from the last checkpoint",
    "choose": "goes on from the last checkpoint, or the last mixture",
    "tables": "starts over, but rows in training go on from the last checkpoint",
    "evaluate": "starts over, but keeps the predictions of a checkpoint so far",
    "prepare-data": "starts over; what was made or downloaded so far is kept",
}


def main() -> None:
    """Run the verb that the first argument names. Exit code 2 for an unknown one."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb not in VERBS:
        lines = [f"  {name:<16}{words}" for name, words in VERBS.items()]
        print("\n".join(["usage: bags VERB ...; bags VERB --help shows the options of a verb", *lines]))
        sys.exit(0 if verb in ("--help", "-h") else 2)
    sys.argv[:2] = [f"bags {verb}"]
    run(verb)


def run(verb: str) -> None:
    """Run a verb on the arguments of this process, and end it with the exit code of `run_script`."""
    # Other encodings cannot name all files: begin anew in UTF-8 mode, unless the program came by stdin.
    if sys.getfilesystemencoding() != "utf-8" and sys.orig_argv[1:] and "-" not in sys.orig_argv:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    module = f"bags.cli.{verb.replace('-', '_')}"
    run_script(lambda: importlib.import_module(module).main(), AGAIN.get(verb, "starts over"))
