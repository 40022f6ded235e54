"""README and docs: links lead somewhere, tables can be read, the summary agrees with the saved numbers."""

import itertools
import re
import typing
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from bags.analysis.results import TABLE, load_results
from bags.analysis.tables import spread
from bags.classifiers import classifier_settings
from bags.config import sections
from bags.config.load import config_to_dict
from bags.config.rows import CONFIGS, summary

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LONGEST_CELL = 70
DATASETS = ["glyphs-100", "glyphs-1230", "muscima"]  # of the summary table, each with a file of all methods


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files exist, and anchors are headings."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {link}: no such file"
        assert not anchor or anchor in slugs(file), f"{page.name}: {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_cells_of_tables_are_short(page):
    """A cell takes no more than a line; rendered tables are left out."""
    text = re.sub(r"```.*?```", "", TABLE.sub("", page.read_text()), flags=re.S)
    for line in re.findall(r"^ *\|.*\|$", text, re.M):
        shown = [re.sub(r"\]\([^)]*\)|[\[`*]", "", cell) for cell in cells(line)]
        assert max(map(len, shown)) <= LONGEST_CELL, f"{page.name}: {max(shown, key=len)}"


def default_of(key: str) -> object:
    """The default of `section.key`, or of a key of Balanced Group Softmax."""
    tree = config_to_dict(sections.Config(classifier=classifier_settings()["group_softmax"]()))
    for part in (key if "." in key else f"classifier.{key}").split("."):
        tree = tree[part]
    return tree


def seeds_of(dataset: str, row: str) -> list[dict[str, float]]:
    """The numbers of each seed of a row; none if it was not run."""
    return load_results(ROOT / f"results/{dataset}-pool.json")["rows"].get(row.strip("`"), [])


def gain(dataset: str, row: str, above: str) -> str:
    """Mean and deviation of what a row has above another one in mAP, seed by seed; one baseline is that of all."""
    ours, theirs = seeds_of(dataset, row), seeds_of(dataset, above)
    theirs = theirs * len(ours) if len(theirs) == 1 else theirs
    return spread([100 * (a["AP"] - b["AP"]) for a, b in zip(ours, theirs, strict=True)], ".1f", "+")


@pytest.mark.parametrize(
    "page, before, columns",
    [("README", "seed by seed, and its deviation", 1), ("later_methods", "holds on a dataset", 3)],
)
def test_gains_are_what_was_saved(page, before, columns):
    """Tables of gains over the control, and over the row in the second column."""
    text = (ROOT / f"docs/results/{page}.md").read_text()
    table = re.search(rf"{before}[^|]*\n\n((?:\|.*\n)+)", text)[1].splitlines()
    assert cells(table[0])[columns : columns + 3] == DATASETS
    for line in table[2:]:
        row, above, *_ = cells(line)
        above = above if columns == 3 else "softmax_retrained"
        assert cells(line)[columns : columns + 3] == [gain(dataset, row, above) for dataset in DATASETS], line


def test_what_smaller_stores_lose_is_what_was_saved():
    """The table of results/stored_features: each row minus the same method from all features in half precision."""
    text = (ROOT / "docs/results/stored_features.md").read_text()
    head, _, *lines = re.search(r"((?:\| settings \| dataset .*\n)(?:\|.*\n)+)", text)[1].splitlines()
    methods = [name.strip("`") for name in cells(head)[3:]]
    for settings, place, _, *shown in map(cells, lines):
        dataset, _, longer = place.partition(", ")
        rows = load_results(ROOT / f"results/{dataset}-store-4bit.json")["rows"]
        for method, cell in zip(methods, shown, strict=True):
            full = f"{method}_{longer}".strip("_")
            pairs = zip(rows.get(f"{full}_{settings.strip('`')}", []), rows.get(full, []), strict=True)
            assert cell == spread([100 * (a["AP"] - b["AP"]) for a, b in pairs], ".1f", "+"), (settings, place, method)
    assert len(lines) > 9


@pytest.mark.parametrize("page, number", [("data", 11), ("training", 8), ("methods", 11)])
def test_defaults_in_tables_of_keys(page, number):
    """The second column of a table that begins with key and default."""
    text, seen = (ROOT / f"docs/{page}.md").read_text(), 0
    for table in re.findall(r"^\| key \| default \|.*\n\|-.*\n((?:\|.*\n)+)", text, re.M):
        for key, default, _ in map(cells, table.splitlines()):
            assert default_of(key.strip("`")) == yaml.safe_load(default), key
            seen += 1
    assert seen == number


def test_defaults_in_the_tables_of_methods():
    """Settings of classifiers and samplers, each with its default in brackets."""
    samplers = {kind.name: kind for kind in typing.get_args(sections.SamplerConfig)}
    seen = 0
    for name, settings in re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", (ROOT / "docs/methods.md").read_text(), re.M):
        for key, default in re.findall(r"`(\w+)` \[([^]]+)\]", settings):
            assert getattr((classifier_settings() | samplers)[name](), key) == yaml.safe_load(default), (name, key)
            seen += 1
    assert seen > 25


def test_the_list_of_methods_is_that_of_the_files():
    """Each method with the first line of its file, as `train.py --list` prints them."""
    files = sorted((CONFIGS / "methods").glob("*.yaml"))
    lines = [f"{file.stem:<25}{summary(file)}" for file in files]
    assert "```\n" + "\n".join(lines) + "\n```" in (ROOT / "docs/methods.md").read_text()
    assert max(map(len, lines)) <= 120 and all(line.endswith(".") for line in lines)


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_page_can_be_found():
    """README links to each page of docs/, docs/results/README.md to each page beside it."""
    for index, folder in ((ROOT / "README.md", "docs"), (ROOT / "docs/results/README.md", "docs/results")):
        links = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)\s#]+)", index.read_text())}
        missing = set((ROOT / folder).glob("*.md")) - links - {index}
        assert not missing, f"{index}: no link to {missing}"


def test_the_summary_is_what_was_saved():
    """Each number of the first table in docs/results: mean and deviation of mAP and tail over the seeds."""
    lines = (ROOT / "docs/results/README.md").read_text().splitlines()
    lines = list(
        itertools.takewhile(lambda line: line.startswith("|"), itertools.dropwhile(lambda x: x[:1] != "|", lines))
    )
    for row, *numbers in map(cells, lines[2:]):
        for dataset, shown in zip(DATASETS, zip(numbers[::2], numbers[1::2], strict=True), strict=True):
            runs = seeds_of(dataset, row)
            expected = [spread([100 * run[key] for run in runs], ".1f") for key in ("AP", "AP_tail")]
            assert list(shown) == expected, f"{row}, {dataset}"
    assert len(lines) > 30
