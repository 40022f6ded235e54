"""The report as a user makes it: one file that needs nothing else, with the run's own numbers."""

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import metrics, run_script
from PIL import Image

from bags.analysis import report
from bags.analysis.choice import read_choice
from bags.analysis.examples import crop_window, judged, overlap
from bags.analysis.run_files import read_categories
from bags.analysis.run_results import read_run
from bags.analysis.tables import column_title, tail_below
from bags.analysis.wrong_labels import section
from bags.cli import evaluate
from bags.core.errors import UserError
from bags.evaluation.comparison import compare
from bags.jobs.report import gather_labels

HOSTILE = '<script>alert("1")</script> & \'$x_1$'


class Page(HTMLParser):
    """Checks that tags balance; keeps tables (rows of texts by caption), images and links."""

    def __init__(self, content: str):
        super().__init__()
        self.open, self.tags, self.images, self.links = [], set(), [], []
        self.tables, self.rows, self.cell, self.caption, self.texts = {}, [], None, None, []
        self.feed(content)
        self.close()
        assert not self.open
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        assert not any(name.startswith("on") for name in attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if tag == "a":
            self.links.append(attributes["href"])
        if tag == "table":
            self.rows, self.caption = [], ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "caption":
            self.caption += data
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def parsed(path) -> Page:
    """The page of a file, which must not need anything else."""
    content = path.read_text(encoding="utf-8")
    page = Page(content)
    style = content.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert not page.tags & {"script", "link", "iframe", "object", "base"} and len(content) < 3e6
    assert all(re.fullmatch(r"#s\d+", link) for link in page.links) and page.links
    for image in page.images:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", image["src"]).groups()
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as opened:
            opened.load()
            assert opened.format.lower() == kind and opened.width >= 300
        assert image["alt"]
    return page


@pytest.fixture(scope="module")
def folder(job, tmp_path_factory):
    """The runs of the tiny job, to be written to."""
    return shutil.copytree(job[1] / "tiny", tmp_path_factory.mktemp("report") / "tiny")


def test_report_of_a_run(job, folder):
    done = run_script("report", folder / "softmax")
    assert done.returncode == 0 and str(folder / "softmax/report.html") in done.stdout and not done.stderr
    assert not list((folder / "softmax").glob("*.tmp"))
    page = parsed(folder / "softmax/report.html")
    own = metrics(job[1], "softmax")
    columns, row = page.tables["Average precision of boxes"]
    assert columns[1] == "mAP" and row[0] == "softmax"
    by_title = {column_title(key): value for key, value in own.items()}
    for column, value in zip(columns[1:], row[1:], strict=True):
        assert value == ("-" if by_title[column] is None else f"{100 * by_title[column]:.1f}"), column
    assert page.tables["Accuracy of proposals, by bin"][1][1] == f"{100 * own['ACC']:.1f}"
    figures = [image for image in page.images if "image/png" in image["src"]]
    assert len(figures) == 4  # AP by instances, precision and recall, norms, training
    best = page.tables["Best"][1:]
    rows = {row["name"]: row for row in read_categories(folder / "softmax")}
    assert best and all(row[1] == str(rows[row[0]]["training_instances"]) for row in best)
    assert all(float(row[3]) == round(100 * rows[row[0]]["AP"], 1) for row in best)
    assert any("annotated, in val" in image["alt"] for image in page.images)
    entries = json.loads((folder / "softmax/predictions.json").read_text())
    found = {entry["category_id"] for entry in entries}
    never = sum(row["id"] not in found for row in rows.values() if not math.isnan(row["AP"]))
    assert f"softmax: {never} of" in page.text and "scripts/train.py" in page.text
    data = page.tables[next(caption for caption in page.tables if caption.startswith("Data: tiny"))]
    assert data[-1][1:3] == [str(len(rows)), str(sum(row["training_instances"] for row in rows.values()))]


def test_report_of_likely_wrong_labels(job, glyphs, folder):
    """The listed annotations are of the training file, as it says; without a store, or with another one, a note."""
    run = read_run(folder / "bags")
    findings = report.Findings()
    gather_labels(run, findings)
    assert not findings.notes and findings.compared[0] >= len(findings.doubted) > 0
    content = json.loads((glyphs / "train.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    annotations = {a["id"]: (names[a["category_id"]], files[a["image_id"]]) for a in content["annotations"]}
    assert findings.compared[1] == len(annotations)
    for entry in findings.doubted:
        assert annotations[entry.annotation] == (entry.label, entry.source) and entry.guess != entry.label
        assert entry.similarity > entry.own
    with Image.open(io.BytesIO(findings.doubted[0].picture)) as picture:
        assert picture.format == "JPEG"
    image = glyphs / findings.doubted[0].source
    content = image.read_bytes()
    image.write_bytes(bytes(len(content)))  # of the same size, so that the store is not stale
    findings = report.Findings()
    gather_labels(run, findings)
    image.write_bytes(content)
    assert f"no picture of annotation {findings.doubted[0].annotation}" in findings.notes[0]
    assert findings.doubted[0].picture is None and "looks like" in section(findings.doubted, *findings.compared)
    assert [("too poorly" in section(findings.doubted, nearer, 100)) for nearer in (30, 31)] == [False, True]
    findings = report.Findings()
    header = folder / "softmax/last.features/train/store.json"
    kept = header.read_text()
    header.write_text(kept.replace('"images": "', '"images": "0'))
    gather_labels(read_run(folder / "softmax"), findings)
    assert "of other images" in findings.notes[0] and findings.compared is None
    header.unlink()
    gather_labels(read_run(folder / "softmax"), findings)
    assert "not complete: no section about likely wrong labels" in findings.notes[1]
    header.write_text(kept)


def test_report_of_two_runs(job, glyphs, folder, tmp_path):
    output = tmp_path / "new/both.html"
    done = run_script("report", folder / "bags", folder / "softmax", "--output", output, "--draws", 50)
    assert done.returncode == 0, done.stderr
    page = parsed(output)
    assert "Change from softmax to bags" in page.text
    means = {row[0]: row[1:] for row in page.tables["Means of boxes"]}
    a, b = (100 * metrics(job[1], row)["AP"] for row in ("softmax", "bags"))
    assert means[""][:2] == ["softmax", "bags"]
    assert means["mAP"][:3] == [f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"]
    rows = read_categories(folder / "bags")
    assert rows == read_categories(folder / "bags" / "categories.csv")
    with pytest.raises(UserError, match="other.csv: cannot be read"):
        read_categories(folder / "bags" / "other.csv")
    files = (folder / run / "predictions.json" for run in ("softmax", "bags"))
    counts = {"instance_counts": [row["training_instances"] for row in rows]}
    low, high = compare(glyphs / "val.json", *files, draws=50, **counts, max_detections=30).intervals["AP"]
    assert means["mAP"][3] == f"{100 * low:+.2f} to {100 * high:+.2f}"
    for caption, sign in (("gained", 1), ("lost", -1)):
        for row in page.tables.get(f"Categories that {caption} most", [])[1:]:
            assert float(row[4]) * sign > 0 and float(row[4]) == pytest.approx(float(row[3]) - float(row[2]), abs=0.011)
    side = [image["alt"] for image in page.images if "image/jpeg" in image["src"]]
    assert len(side) % 3 == 0 and [alt.partition(":")[0] for alt in side[1:3]] == ["softmax", "bags"]
    differing = {row[0]: row[1:] for row in page.tables["Settings that differ"]}
    assert differing["classifier.name"] == ["group_softmax", "softmax"]


def test_scores_with_the_runs_training_counts(job, glyphs, tmp_path, monkeypatch, capsys):
    """The numbers of the run come back from its results file, wherever --train takes the counts from."""
    run = job[1] / "tiny/bags"
    expected = metrics(job[1], "bags")
    for source in (run, run / "categories.csv", run / "last.pth", glyphs / "train.json"):
        arguments = (run / "predictions.json", "--annotations", glyphs / "val.json", "--train", source)
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments), "--json", "--output", f"{tmp_path}"])
        capsys.readouterr()
        evaluate.main()
        numbers = json.loads(capsys.readouterr().out)
        assert (
            "AP_tail" in numbers and {k: v for k, v in numbers.items() if k != "AP_fixed"}.items() <= expected.items()
        )


def test_hostile_names_stay_text(folder, glyphs, tmp_path):
    """A category's, a run's and a file's name are shown letter by letter."""
    data, run = shutil.copytree(glyphs, tmp_path / "d"), tmp_path / "<b>run"
    shutil.copytree(folder / "softmax", run)
    shutil.rmtree(data / "val.json.index", ignore_errors=True)
    old = read_categories(run)[0]["name"]
    truth = json.loads((data / "val.json").read_text())
    truth["categories"][0]["name"] = HOSTILE
    for image in truth["images"]:
        shutil.move(data / image["file_name"], data / f"{image['file_name']}<i>")
        image["file_name"] += "<i>"
    (data / "val.json").write_text(json.dumps(truth))
    for old_name in ("last.pth", "scored_on.json"):
        (run / old_name).unlink()  # of the old names
    quoted = '"' + HOSTILE.replace('"', '""') + '"'
    text = (run / "categories.csv").read_text()
    (run / "categories.csv").write_text(text.replace(f"\n1,{old},", f"\n1,{quoted},", 1))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("name: softmax\ndata", "name: <b>$n\ndata"))
    done = run_script("report", run, f"data.root={data}")
    assert done.returncode == 0, done.stderr
    content = (run / "report.html").read_text()
    page = parsed(run / "report.html")
    assert "<script" not in content and "<b>$n" not in content and "<i>" not in content and "<b>run" not in content
    assert HOSTILE in page.text and "<b>$n" in page.text and "<b>run" in page.text
    assert "no weight norms of <b>$n" in done.stderr


NAUGHTY = "<script>alert(1)</script>"[:-9] + "$x$"  # without the slash, which no row's name has


def write_choice(run, **changes):
    """`choose.json` of a choice among the rows of `job` and one more, in a run's folder."""
    part = {"numbers": {"AP": 0.25}, "gain": {"AP": [0.0, 0.0, 0.0]}}
    better = {"numbers": {"AP": 0.3}, "gain": {"AP": [0.05, -0.01, 0.11]}, "seconds": 1.25}
    unknown = {"numbers": {"AP": None}, "gain": {"AP": [None, None, None]}, "seconds": None}
    rows = {"softmax_retrained": part | {"seconds": 2}, "bags": better, NAUGHTY: unknown}
    content = {
        "key": "0",
        "metric": "AP",
        "control": "softmax_retrained",
        "folds": 5,
        "draws": 500,
        "images": 8,
        "better_than_control": False,
        "rows": rows,
        "optimistic": {"numbers": {"AP": 0.32}, "gain": {"AP": [0.07, 0.01, 0.13]}},
        "honest": {"numbers": {"AP": 0.28}, "gain": {"AP": [0.03, None, None]}},
        "mixture": {"bags": 0.5, NAUGHTY: 0.5},
        "without_fold": [{"bags": 1.0}] * 5,
        "chosen": {"softmax_retrained": 1.0},
    }
    (run / "choose.json").write_text(json.dumps(content | changes))


def test_how_it_was_chosen(folder, tmp_path):
    """Rows by their number, the honest and the optimistic gain, shares, the figure; what is gone is a note."""
    runs = shutil.copytree(folder, tmp_path / "tiny")
    run = shutil.copytree(runs / "bags", runs / "choose")
    write_choice(run)
    done = run_script("report", run)
    assert done.returncode == 0 and not done.stderr, done.stderr
    page = parsed(run / "report.html")
    table = page.tables["Rows, on 8 validation images"]
    assert table[0] == ["row", "mAP", "mAP - softmax_retrained", "95 % interval", "seconds"]
    assert table[1:4] == [
        ["bags", "30.0", "+5.0", "-1.0 to +11.0", "1.2"],
        ["softmax_retrained", "25.0", "", "", "2.0"],
        [NAUGHTY, "-", "", "", "-"],
    ]
    assert [row[1:4] for row in table[4:]] == [["32.0", "+7.0", "+1.0 to +13.0"], ["28.0", "+3.0", "-"]]
    assert page.tables["The mean of scores that was chosen"][1:] == [["bags", "50.0%"], [NAUGHTY, "50.0%"]]
    assert "+3.0 (the objects are too few for an interval) against softmax_retrained" in page.text
    assert "<script" not in (run / "report.html").read_text() and "softmax_retrained, which is recommended" in page.text
    alts = [image["alt"] for image in page.images if image["alt"].startswith("AP over training instances: ")]
    assert alts == ["AP over training instances: softmax_retrained, bags, bags: chosen"]
    shutil.rmtree(runs / "softmax_retrained")
    (runs / "bags/categories.csv").write_text("id\n")
    done = run_script("report", run)
    assert done.returncode == 0 and done.stderr.count("is not in the figure of the choice") == 2
    assert "AP over training instances: bags: chosen" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    "change",
    [
        "{",
        "[" * 100_000,
        "null",
        {"rows": []},
        {"control": "gone"},
        {"metric": ["AP"]},
        {"metric": "AP_tail"},
        {"rows": {"../softmax": {}}, "control": "../softmax"},
        {"mixture": {"bags": 2.0}},
        {"mixture": {"other": 1.0}},
        {"honest": {"numbers": {"AP": float("nan")}, "gain": {"AP": [0, 0, 0]}}},
        {"optimistic": {"numbers": {"AP": "<b>"}, "gain": {"AP": [0, 0, 0]}}},
        {"honest": {"numbers": {"AP": 1}, "gain": {"AP": [0, 0]}}},
        {"test": {"annotations": "t.json", "sha256": "", "gain": {}}},
        {"images": "<b>"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_damaged_choice_is_refused(tmp_path, change):
    """By one line that names the file."""
    write_choice(tmp_path)
    assert read_choice(tmp_path / "choose.json")["images"] == 8
    if isinstance(change, dict):
        write_choice(tmp_path, **change)
    else:
        (tmp_path / "choose.json").write_text(change)
    with pytest.raises(UserError, match="choose.json: (damaged|is not a choice) .*remove it, and repeat") as error:
        read_choice(tmp_path / "choose.json")
    assert "\n" not in str(error.value)


def test_a_report_without_its_damaged_choice(folder, tmp_path):
    run = shutil.copytree(folder / "bags", tmp_path / "bags")
    (run / "choose.json").write_text("<b>")
    done = run_script("report", run)
    assert done.returncode == 0 and "choose.json: damaged" in done.stderr and done.stderr.count("note: ") == 1
    assert "How it was chosen" not in parsed(run / "report.html").text


def test_without_the_dataset(folder, glyphs, tmp_path):
    """The report is made without what needs it, and says so."""
    data = shutil.copytree(glyphs, tmp_path / "d")
    shutil.rmtree(data / "val")
    shutil.rmtree(data / "train")
    both = folder / "bags", folder / "softmax", "--draws", 0, "--output", tmp_path / "r.html"
    for change, message in (
        (lambda: None, "no example images; data.root=... says where"),
        (lambda: shutil.rmtree(data), "no comparison by images, no example images; data.root"),
    ):
        change()
        done = run_script("report", *both, f"data.root={data}")
        assert done.returncode == 0 and message in done.stderr and done.stderr.count("note: ") == 2
        assert "no section about likely wrong labels" in done.stderr
        page = parsed(tmp_path / "r.html")
        assert message in page.text and not any("jpeg" in image["src"] for image in page.images)
        assert len(page.tables["Average precision of boxes"]) == 3
        assert ("Means of boxes" in page.tables) == data.exists()


@pytest.mark.slow
def test_runs_with_masks_and_with_little(folder, job, tmp_path):
    """Columns and figures of masks where there are some; a run without a log, an environment or some numbers."""
    settings = "detector.framework=mask_rcnn", "train.epochs=1", f"output={tmp_path}", "test.figures=true"
    done = run_script("train", job[0] / "softmax.yaml", *settings)
    assert done.returncode == 0, done.stderr
    masks, poor = tmp_path / "tiny/softmax", shutil.copytree(folder / "bags", tmp_path / "poor")
    for name in ("log.jsonl", "environment.json", "figures/precision_recall.png"):
        (poor / name).unlink()
    values = json.loads((poor / "metrics.json").read_text())
    kept = {key: None if key == "AP2" else value for key, value in values.items() if not key.startswith("ACC")}
    (poor / "metrics.json").write_text(json.dumps(kept))
    done = run_script("report", masks, poor, "--draws", 5)
    assert done.returncode == 0, done.stderr
    page = parsed(masks / "report.html")
    own = json.loads((masks / "metrics.json").read_text())
    columns, other, row = page.tables["Average precision of masks"]
    assert columns[1] == "mAP" and row[1] == f"{100 * own['mask_AP']:.1f}" and set(other[1:]) == {"-"}
    boxes = page.tables["Average precision of boxes"]
    assert boxes[1][boxes[0].index("AP2")] == "-"
    assert "bags: no training steps of its own." in page.text and "Means of masks" not in page.tables
    assert sum("over recall of masks" in image["alt"] for image in page.images) == 1


def test_errors(folder, glyphs, tmp_path):
    """One line that names what is wrong, exit code 2, and nothing written."""
    bags, softmax = folder / "bags", folder / "softmax"
    (tmp_path / "empty").mkdir()
    renamed, copies = shutil.copytree(glyphs, tmp_path / "renamed"), {}
    truth = json.loads((renamed / "val.json").read_text())
    truth["categories"][0]["name"] = "renamed"
    (renamed / "val.json").write_text(json.dumps(truth))
    for name in ("other", "bins", "torn", "no_rows", "foreign"):
        copies[name] = shutil.copytree(softmax, tmp_path / name)
        (tmp_path / name / "report.html").unlink(missing_ok=True)
    for name, file, old, new in (
        ("other", "categories.csv", "\n2,", "\n99,"),
        ("bins", "config.yaml", "  - 1000\ndevice", "  - 999\ndevice"),
        ("foreign", "predictions.json", '"category_id":', '"category_id":9'),
    ):
        path = copies[name] / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    (copies["torn"] / "metrics.json").write_text("{")
    (copies["no_rows"] / "categories.csv").unlink()
    for arguments, message in (
        ([tmp_path / "missing"], "missing: no finished run (no such folder); expected a run folder"),
        ([tmp_path / "empty"], "empty: no finished run (no config.yaml in there)"),
        ([softmax / "last.pth"], "last.pth: no finished run (no such folder)"),
        ([bags, tmp_path / "empty"], "empty: no finished run"),
        ([bags, bags], "is the same run"),
        ([bags, softmax, bags], "expected one run folder or two, got 3"),
        ([bags, copies["other"]], "another dataset"),
        ([bags, copies["bins"]], "scored with test.bins=10,100,999"),
        ([copies["torn"]], "metrics.json: cannot be read"),
        ([copies["no_rows"]], "categories.csv: cannot be read"),
        ([copies["foreign"]], "predictions.json: not this run's results"),
        ([copies["other"]], "other/categories.csv: has other categories than last.pth"),
        ([softmax, f"data.root={renamed}"], "softmax/categories.csv: has 8 categories, not the 8 of"),
        ([softmax, "train.lr=1"], "override 'train.lr=1': a report takes data.* only"),
        ([softmax, "--output", tmp_path], "is a folder; --output names a file"),
        ([bags, softmax, "--draws", "-1"], "--draws -1: expected 0 to 100000"),
    ):
        done = run_script("report", *arguments)
        assert done.returncode == 2 and message in done.stderr, (arguments, done.stderr)
        assert done.stderr.strip().count("\n") == 0 and "Traceback" not in done.stderr
    assert not any((path / "report.html").exists() for path in copies.values())


def test_what_is_drawn():
    names = {1: "a", 2: "b"}
    truth = {"boxes": [[0, 0, 10, 10]], "names": ["a"]}
    boxes = [([0, 0, 10, 9], 1, 0.9), ([0, 0, 10, 10], 2, 0.8), ([20, 20, 5, 5], 1, 0.7), ([0, 0, 10, 10], 1, 0.1)]
    entries = [{"bbox": box, "category_id": category, "score": score} for box, category, score in boxes]
    found = judged(entries, truth, names)
    assert found["names"] == ["a", "b", "a"] and [c == found["colours"][0] for c in found["colours"]] == [
        True,
        False,
        False,
    ]
    assert judged([], truth, names)["boxes"].shape == (0, 4)
    weak = [{**entry, "score": 0.1} for entry in entries]
    assert judged(weak, truth, names)["names"] == [] and judged(weak, truth, names, best=2)["names"] == ["a", "b"]
    assert judged(entries, truth, names, best=4)["names"] == ["a", "b", "a", "a"]
    assert overlap(found["boxes"][:1], found["boxes"][1:2])[0, 0] == pytest.approx(0.9)
    assert crop_window(np.array([0, 0, 10, 10]), (300, 100)) == (0, 0, 120, 100)
    assert crop_window(np.array([290, 40, 300, 50]), (300, 200)) == (180, 0, 300, 120)
    assert [tail_below(bins) for bins in ((10, 100, 1000), (5, 15), (7,), (1, 2, 3, 4))] == [100, 5, 7, 2]


def test_a_run_is_read_as_it_was_written(folder):
    run = read_run(folder / "bags")
    assert run.label == "bags" and run.log and run.environment["ranks"] == 1
    assert {"id", "name", "bin", "AP", "AP50", "training_instances", "frequency"} <= run.rows[0].keys()


def test_an_end_that_is_shown_as_0_is_not_beyond_0():
    """A baseline that finds nothing differs from another by the last digits; that is no result."""
    ends = {"AP": (2e-6, 3e-4), "AP1": (6e-5, 1e-3), "AP2": (-0.02, -4e-5), "AP3": (-0.02, -6e-5)}
    nothing, new = dict.fromkeys(ends, 0.0), dict.fromkeys(ends, 1e-4)
    result = SimpleNamespace(first=nothing, second=new, intervals=ends, rows=[])
    runs = [SimpleNamespace(label=label) for label in ("new", "old")]
    page = Page(report._changes(runs, SimpleNamespace(comparison={"bbox": result})))
    table = page.tables["Means of boxes"]
    assert [row[-1] for row in table] == ["beyond 0", "", "higher", "", "lower"]
    assert [row[-2] for row in table[1:3]] == ["+0.00 to +0.03", "+0.01 to +0.10"]
