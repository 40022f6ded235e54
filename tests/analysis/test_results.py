"""Numbers that are kept, and the pages that show them."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, metrics, run_script
from PIL import Image

from bags.analysis.plots import plot_weight_norms
from bags.analysis.results import TABLE, load_results, render_page
from bags.analysis.tables import GAINS
from bags.core.errors import UserError
from bags.engine.checkpoint import load_checkpoint, save_checkpoint

PAGES = ["README.md", *sorted(f"docs/results/{page.name}" for page in (ROOT / "docs/results").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_what_is_kept(page):
    """Every table of a page is what its file says; the files say how they came about."""
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    assert render_page(text, folder) == text
    for file in {name for table in TABLE.finditer(text) for name in table["files"].split()}:
        content = load_results(folder / file)
        assert content["command"].startswith("python scripts/") and content["environment"]["packages"]["torch"]


def test_saved_and_rendered(job, tmp_path):
    """Two seeds of two rows: kept numbers are the runs', a page gets their table and nothing else changes."""
    _, runs, _ = job
    for seed in ("seed0", "seed1"):
        shutil.copytree(runs / "tiny", tmp_path / seed / "tiny")
    for config in (tmp_path / "seed1/tiny").glob("*/config.yaml"):  # runs of one seed are not averaged
        checkpoint = load_checkpoint(config.with_name("last.pth"))
        save_checkpoint(config.with_name("last.pth"), {**checkpoint, "config": {**checkpoint["config"], "seed": 1}})
        config.write_text(config.read_text().replace("\nseed: 0", "\nseed: 1"))
    path = tmp_path / "seed1/tiny/bags/metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "AP": 0.5, "AP50": None}))
    folders = [tmp_path / "seed0/tiny", tmp_path / "seed1/tiny"]
    done = run_script("tables", *folders, "--no-figures", "--save", tmp_path / "kept" / "tiny.json")
    assert done.returncode == 0, done.stderr
    kept = load_results(tmp_path / "kept" / "tiny.json")
    assert kept["command"].startswith("python scripts/tables.py") and "--save" not in kept["command"]
    first, second = kept["rows"]["bags"]
    assert first["AP"] == pytest.approx(metrics(runs, "bags")["AP"], abs=1e-5) and second["AP"] == 0.5
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- kept/tiny.json: AP AP50 correlation | softmax; bags -->\nold\n<!-- end -->\nbelow\n")
    for _ in range(2):  # rendering again changes nothing
        assert run_script("tables", "--render", page).returncode == 0
        lines = page.read_text().splitlines()
        assert [lines[0], lines[1][:4], *lines[-2:]] == ["above", "<!--", "<!-- end -->", "below"]
        table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:-2]]
        assert table[0] == ["method", "mAP", "AP50", "correlation"] and [row[0] for row in table[2:]] == [
            "softmax",
            "bags",
        ]
    mean, deviation = (first["AP"] + 0.5) / 2, abs(first["AP"] - 0.5) / 2**0.5
    assert table[3][1] == f"{100 * mean:.1f} ±{100 * deviation:.1f}"
    assert table[3][2] == f"{100 * first['AP50']:.1f}" and abs(float(table[3][3].split()[0])) <= 1


def test_published_numbers_stand_in_columns_of_their_own(tmp_path):
    rows = {"ours": [{"AP": 0.25}, {"AP": 0.35}], "no other": [{"AP": 0.1}]}
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows, "published": {"ours": {"AP": 0.2, "AP1": 0.05}}}))
    lines = render_page("<!-- x.json: AP / AP AP1 -->\n<!-- end -->", tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:-1]]
    assert cells[0] == ["method", "mAP", "published mAP", "published AP1"]
    assert cells[2:] == [["ours", "30.0 ±7.1", "20.0", "5.0"], ["no other", "10.0", "-", "-"]]


def test_benchmarks_are_kept_and_rendered(tmp_path):
    done = run_script("benchmark", "loss", "--repeats", "1", "--save", tmp_path / "loss.json")
    assert done.returncode == 0, done.stderr
    content = load_results(tmp_path / "loss.json")
    assert content["command"] == "python scripts/benchmark.py loss --repeats 1" and content["environment"]["cores"] > 0
    text = render_page("<!-- loss.json -->\n<!-- end -->", tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[3:-1]]
    assert [row[0] for row in rows] == [case["case"] for case in content["cases"]]
    assert [float(row[3]) for row in rows] == pytest.approx([case["ratio"] for case in content["cases"]], abs=0.006)


@pytest.mark.parametrize(
    "marker, message",
    [
        ("none.json", "missing, or not the numbers"),
        ("x.json: APX", "column APX"),
        ("x.json: AP | b", "no row 'b'"),
        ("y.json", "not the numbers that"),
        ("z.json", "not the numbers that"),
        ("x.json: AP -->\n<!-- x.json", "x.json: AP --> has no <!-- end -->"),
    ],
)
def test_pages_that_ask_for_what_is_not_there(tmp_path, marker, message):
    (tmp_path / "x.json").write_text('{"rows": {"a": [{"AP": 0.5}]}}')
    (tmp_path / "y.json").write_text('{"rows": [1]}')
    (tmp_path / "z.json").write_text('{"rows": {"a": [{"AP": "x"}]}}')
    with pytest.raises(UserError, match=message):
        render_page(f"<!-- {marker} -->\n<!-- end -->", tmp_path)
    (tmp_path / "page.md").write_text(f"<!-- {marker} -->\n<!-- end -->\n")
    done = run_script("tables", "--render", tmp_path / "page.md")
    assert done.returncode == 2 and message in done.stderr


def test_weight_norms_are_drawn_without_a_background(tmp_path):
    """Methods of one sigmoid for each category have none: its norm is NaN."""
    norms = {"softmax": np.array([3.0, 2, 1]), "eql": np.array([np.nan, 5, 1])}
    plot_weight_norms(tmp_path / "norms.png", norms, [100, 5], [10])
    with Image.open(tmp_path / "norms.png") as image:
        assert image.size[0] > 500


def test_groups_by_confusion(job, glyphs, tmp_path):
    """The script of docs/results/options.md: four groups of equal size; `apart` confuses least."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/results/options.md").read_text(), re.S)
    script = tmp_path / "confusion.py"
    script.write_text(code[1])
    done = run_script(script, job[1] / "tiny/softmax", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = {name: float(share) for name, share in re.findall(r"(\w+): (\d\.\d+) of the", done.stdout)}
    assert kept["together"] >= kept["apart"] and kept.keys() == {"together", "apart", "drawn"}
    ids = sorted(c["id"] for c in json.loads((glyphs / "train.json").read_text())["categories"])
    for name in kept:
        groups = json.loads((tmp_path / f"{name}.txt").read_text())
        assert sorted(itertools.chain(*groups)) == ids and [len(group) for group in groups] == [2] * 4


def test_costs_against_sizes_are_drawn(tmp_path):
    """From what benchmarks save; a cost of 0 has no place on a logarithmic axis, and leaves a gap."""
    case = {"what": "index: open, s", "1,000": 0.0, "10,000": 0.2, "100,000": 1.5, "exponent": 0.9}
    about = {"title": "", "environment": {}, "command": "python scripts/benchmark.py scale_images --full"}
    (tmp_path / "images.json").write_text(json.dumps(about | {"cases": [case, case | {"what": "store, MB"}]}))
    (tmp_path / "loss.json").write_text(
        json.dumps(about | {"command": "python scripts/benchmark.py loss", "cases": [case]})
    )
    (tmp_path / "odd.json").write_text(json.dumps(about | {"cases": [case | {"1,000": "slow"}]}))
    (tmp_path / "low.json").write_text(json.dumps(about | {"cases": [case | {"1,000": -2}]}))
    figure = tmp_path / "scale.png"
    done = run_script("tables", "--scale", figure, tmp_path / "images.json")
    assert done.returncode == 0 and figure.read_bytes()[:4] == b"\x89PNG", done.stderr
    refused = {
        "loss.json: expected a file that benchmark.py scale_categories": ["new.png", "loss.json"],
        "odd.json: expected a file that benchmark.py scale_categories": ["new.png", "odd.json"],
        "low.json: expected a file that benchmark.py scale_categories": ["new.png", "low.json"],
        "costs against images are given twice": ["new.png", "images.json", "images.json"],
        "--scale new.pdf: expected a file to write, as in scale.png": ["new.pdf", "images.json"],
    }
    for words, arguments in refused.items():
        done = run_script("tables", "--scale", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and not (tmp_path / arguments[0]).exists()


def test_gains_of_choices(tmp_path):
    """By hand: seeds are paired with their own control; what is no choice is refused, and nothing is written."""
    about = {"command": "", "environment": {}, "revisions": [], "published": {}}
    rows = {"softmax_retrained": [0.2, 0.4], "bags": [0.25, 0.41], "chosen, on others": [0.3, 0.5], "knn": [0.1, 0.1]}
    content = about | {"title": "a: choose", "rows": {row: [{"AP": v} for v in values] for row, values in rows.items()}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    one = {row: [{"AP": values[0]}] for row, values in rows.items() if row != "bags"}
    one["baseline"] = [{"AP": 0.21}]
    (tmp_path / "b.json").write_text(json.dumps(content | {"title": "b: choose", "rows": one}))
    done = run_script("tables", "--gains", tmp_path / "g.png", tmp_path / "a.json", tmp_path / "b.json")
    assert done.returncode == 0 and (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG", done.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    assert lines[0] == ["dataset", "control", *GAINS]
    assert lines[2] == ["a", "30.0 ±14.1", "-", "-", "+3.0 ±2.8", *"----", "+10.0 ±0.0"]
    assert lines[3] == ["b", "20.0", "+1.0", *"------", "+10.0"]
    page = tmp_path / "page.md"
    page.write_text("<!-- a.json b.json -->\nold\n<!-- end -->\n")
    done_page = run_script("tables", "--render", page)
    assert done_page.returncode == 0, done_page.stderr
    with pytest.raises(UserError, match="several files has no columns"):
        render_page("<!-- a.json b.json: AP -->\n<!-- end -->\n", tmp_path)
    assert page.read_text().splitlines()[1:-1] == [line for line in done.stdout.splitlines() if line[:1] == "|"]
    (tmp_path / "c.json").write_text(json.dumps(content | {"rows": {"bags": [{"AP": 0.1}]}}))
    fixed = {row: [{"AP_fixed": 0.1}] for row in rows}  # of choose.py --metric AP_fixed
    (tmp_path / "d.json").write_text(json.dumps(content | {"rows": fixed}))
    (tmp_path / "e.json").write_text(json.dumps(content | {"rows": one | {"bags": [{"AP": 0.1}, {"AP": 0.2}]}}))
    (tmp_path / "f.json").write_text(json.dumps(content | {"published": [1]}))
    (tmp_path / "g.json").write_text(json.dumps(about | {"title": "", "cases": []}))
    cases = [(["c.json"], "c.json: expected a file that"), (["a.json", "a.json"], "a is given twice")]
    cases += [([f"{name}.json"], f"{name}.json: expected AP of as many runs") for name in "de"]
    cases += [([f"{name}.json"], f"{name}.json: missing, or not the numbers") for name in "fg"]
    cases.append((["a.json", "--scale", "new.png"], "--gains and --scale: expected one of them"))
    for files, words in cases:
        done = run_script("tables", "--gains", "new.png", *files, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and not (tmp_path / "new.png").exists()
