"""Notebooks run from the command line, cell by cell in one process, without Jupyter."""

import base64
import io
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, start_script
from PIL import Image

import bags
from bags.analysis.weight_norms import classifier_norms, rank_correlation

SETTINGS = ["data.train_images=.", "data.val_images=.", "data.workers=0", "data.flip=0", "device=cpu"]
SETTINGS += ["detector.backbone=small", "detector.backbone_weights=null", "detector.frozen_stages=0"]
SETTINGS += ["detector.fpn_channels=16", "detector.frozen_batch_norm=false", "detector.min_size=64"]
SETTINGS += ["detector.max_size=64", "detector.rpn.anchor_sizes=[[16],[32]]", "detector.rpn.train_proposals=40"]
SETTINGS += ["detector.rpn.test_proposals=30", "detector.roi.fc=32", "detector.roi.batch_size=16"]
SETTINGS += ["detector.roi.sampling_ratio=1"]
SETTINGS += ["train.epochs=1", "train.batch_size=4", "train.milestones=[]", "train.warmup_iterations=2"]
SETTINGS += ["test.batch_size=4"]
BORDER = "=== next cell ==="


def read_cells(name: str) -> list[dict]:
    """The code cells of a notebook; `source` is one text."""
    notebook = json.loads((ROOT / "notebooks" / name).read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    return [cell | {"source": "".join(cell["source"])} for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(cells: list[dict], folder, **parameters) -> list[str]:
    """Runs the cells in a process of their own, with other parameters; what each of them prints."""
    sources = [cell["source"] for cell in cells]
    if parameters:
        [place] = [n for n, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", ())]
        values: dict = {}
        exec(sources[place], values)
        assert parameters.keys() <= values.keys()
        sources[place] += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    (folder / "cells.py").write_text(f"\n\nprint({BORDER!r})\n".join(sources))
    done = start_script(folder / "cells.py", cwd=ROOT / "notebooks", MPLBACKEND="Agg").wait()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done.stdout.split(f"{BORDER}\n")


def kept_texts(cells: list[dict]) -> list[str]:
    """What each cell printed when the notebook was written; its figures are small, and nothing names a machine."""
    texts = []
    for cell in cells:
        streams = [output for output in cell["outputs"] if output["output_type"] == "stream"]
        figures = [output["data"]["image/png"] for output in cell["outputs"] if output["output_type"] == "display_data"]
        assert len(streams) + len(figures) == len(cell["outputs"]) and all(s["name"] == "stdout" for s in streams)
        assert len(figures) == cell["source"].count("plt.show()")
        texts.append("".join(line for stream in streams for line in stream["text"]))
        for figure in map(base64.b64decode, figures):
            with Image.open(io.BytesIO(figure)) as image:
                assert image.width >= 600 and len(figure) < 150_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(re.search(r"(?<![\w.])/[a-z]+/", text) for text in texts), "an absolute path"
    return texts


@pytest.mark.slow
def test_custom_dataset(glyphs, tmp_path):
    """With another folder in its parameters: the check, three rows in its table, detections by name."""
    cells = read_cells("custom_dataset.ipynb")
    kept = kept_texts(cells)
    settings = [*SETTINGS, f"output={tmp_path / 'runs'}"]
    texts = run_cells(cells, tmp_path, ROOT=str(glyphs), SETTINGS=settings)
    assert [bool(text) for text in texts] == [bool(text) for text in kept]
    printed = "".join(texts)
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert set(rows) == {"method", "softmax", "softmax_retrained", "bags"}
    runs = tmp_path / "runs" / glyphs.name
    assert all(0 <= json.loads((runs / row / "metrics.json").read_text())["AP"] <= 1 for row in set(rows) - {"method"})
    assert "categories with 0 to 10 boxes" in printed
    names = {category["name"] for category in json.loads((glyphs / "train.json").read_text())["categories"]}
    last = printed.splitlines()[-1].split()
    assert last[0] in names and 0 <= float(last[1]) <= 1


def test_group_softmax(tmp_path):
    """By hand and library agree (its own assertions), and it prints what it printed when it was written."""
    cells = read_cells("group_softmax.ipynb")
    assert "assert" in "".join(cell["source"] for cell in cells)
    assert run_cells(cells, tmp_path) == kept_texts(cells)


def test_weight_norms(job, tmp_path):
    """Rows that are there are shown with their norms, the others named; without softmax it says what to train."""
    cells = read_cells("weight_norms.ipynb")
    kept = kept_texts(cells)
    rows = ["softmax", "rfs", "bags", "softmax_retrained"]
    printed = run_cells(cells, tmp_path, RUNS=str(job[1] / "tiny"), ROWS=rows)
    assert [bool(text) for text in printed] == [bool(text) for text in kept]
    text = "".join(printed)
    assert "rows: softmax, bags, softmax_retrained\nleft out, no finished run: rfs\n8 categories" in text
    table = {line.split()[0]: line.split()[1:] for line in printed[-1].splitlines()[3:]}
    assert list(table) == ["softmax", "bags", "softmax_retrained"]
    norms = classifier_norms(bags.load_detector(job[1] / "tiny" / "bags" / "last.pth")[0])
    counts = bags.load_detector(job[1] / "tiny" / "softmax" / "last.pth")[1]["counts"]
    assert float(table["bags"][2]) == pytest.approx(rank_correlation(norms[1:], counts), abs=0.006)
    with pytest.raises(AssertionError, match="no finished run softmax"):
        run_cells(cells, tmp_path, RUNS=str(tmp_path))


@pytest.mark.parametrize("name", ["custom_dataset.ipynb", "group_softmax.ipynb", "weight_norms.ipynb"])
def test_outside_a_checkout_a_notebook_ends_in_one_line(tmp_path, name):
    """Without the package; custom_dataset also with it, as after pip install: it needs the repository's scripts."""
    cells = read_cells(name)
    until = next(n for n, cell in enumerate(cells) if "raise SystemExit" in cell["source"])
    (tmp_path / "cells.py").write_text("\n".join(cell["source"] for cell in cells[: until + 1]))
    (tmp_path / "notebooks").mkdir()
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for environment in (plain, plain | {"PYTHONPATH": str(ROOT)})[: 2 if name == "custom_dataset.ipynb" else 1]:
        command, where = [sys.executable, tmp_path / "cells.py"], tmp_path / "notebooks"
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=where, env=environment)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert ("set CHECKOUT to one" if name == "custom_dataset.ipynb" else "pip install") in done.stderr


def test_a_notebook_elsewhere_is_told_its_checkout(tmp_path):
    cells = read_cells("custom_dataset.ipynb")[:2]
    told = f"CHECKOUT = {str(ROOT / 'notebooks')!r}"
    (tmp_path / "cells.py").write_text("\n".join([cells[0]["source"], told, cells[1]["source"], "print(os.getcwd())"]))
    done = subprocess.run([sys.executable, tmp_path / "cells.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == str(ROOT), done.stderr
