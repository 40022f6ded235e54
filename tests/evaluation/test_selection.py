"""The choice of rows to average: by hand, against a slow version, against scored files, and on nothing but noise."""

import json
import math
import statistics

import numpy as np
import pytest
from conftest import run_script
from test_comparison import CATEGORIES, write_case

import bags
from bags.data.statistics import training_of
from bags.evaluation import selection
from bags.evaluation.comparison import Detections, ap_of, compare, matched, means
from bags.evaluation.results_file import read_results
from bags.evaluation.selection import Choice, Estimate, Validation, best_mixtures, choose, merge, single
from bags.evaluation.truth import read_truth


def table(known):
    """The function `values` of `best_mixtures` from a table: members -> [V]; the members of a mixture share equally."""

    def values(mixtures):
        shares = [[share for share in mixture if share] for mixture in mixtures]
        assert all(parts == [1 / len(parts)] * len(parts) for parts in shares)
        return [np.array(known["".join(str(k) for k, s in enumerate(m) if s)], float) for m in mixtures]

    return values


def members(mixture):
    return "".join(str(row) for row, share in enumerate(mixture) if share)


def test_the_best_mean_by_hand():
    """View 0 has the order 2 0 1, and the mean of 2 and 0 is best; view 1 has the order 1 2 0, and 1 alone is best."""
    known = {"0": [5, 1], "1": [4, 9], "2": [6, 2], "02": [7, 0], "12": [0, 8], "012": [6.5, 7]}
    assert list(map(members, best_mixtures(table(known), 3))) == ["02", "1"]


def test_only_means_of_the_best_rows_are_tried():
    """Of four rows: four alone, and three means. A mean that skips a better row is never looked at."""
    known = {"0": [1], "1": [4], "2": [3], "3": [2], "12": [4], "123": [5], "0123": [1]}
    assert list(map(members, best_mixtures(table(known), 4))) == ["123"]


def test_ties_go_to_the_earlier_row_and_the_smaller_mean():
    known = {"0": [2, -1], "1": [3, -1], "2": [3, -1], "12": [3, -1], "012": [3, -1], "01": [9, -1]}
    assert list(map(members, best_mixtures(table(known), 3))) == ["1", "0"]  # view 1: nothing is defined, the control


@pytest.mark.parametrize(("most", "best"), [(1, "0"), (2, "01"), (3, "012"), (9, "012")])
def test_most_members(most, best):
    known = {"0": [3], "1": [2], "2": [1], "01": [4], "012": [9]}
    assert list(map(members, best_mixtures(table(known), 3, most))) == [best]


@pytest.fixture(params=[True, False], ids=["lvis", "coco"])
def case(request, tmp_path):
    """(truth, results of two rows, Validation): 12 images whose ids fall, with ties between and within images."""
    _, results = write_case(tmp_path, request.param)
    for name, entries in zip("ab", results, strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps([{**e, "score": round(e["score"], 1)} for e in entries]))
    truth = read_truth(tmp_path / "truth.json")
    files = [read_results(tmp_path / f"{name}.json", truth) for name in "ab"]
    sets = {"AP": np.ones(CATEGORIES, bool), **training_of({"categories": truth.category_counts()}).sets()}
    order = np.array([image["id"] for image in truth.content["images"]])
    objects = matched(truth, files[0], max_detections=100).objects
    return truth, files, Validation(objects, len(order), sets, "AP", order)


def test_merged_detections_score_as_a_merged_file(case, tmp_path):
    """AP of what `merge` makes of two rows is that of a results file with the entries of each image's row.

    The score of an entry says its place among all entries of its row and category that the protocol looks at.
    """
    truth, files, validation = case
    second = np.random.default_rng(0).random(validation.images) < 0.5  # in the order of the file
    parts = [
        (matched(truth, file, max_detections=100).file, side)
        for file, side in zip(files, (~second, second), strict=True)
    ]
    merged = merge(parts, validation.order)
    for of_category, first in zip(merged, merge(parts, validation.order, 3), strict=True):
        assert (first is None) == (of_category is None)
        assert first is None or all(np.array_equal(a, b[..., :3]) for a, b in zip(first, of_category, strict=True))
    found = means(ap_of(merged, validation.objects, np.ones((1, validation.images), int)), validation.sets)
    content = json.loads((tmp_path / "truth.json").read_text())
    taken = dict(zip([image["id"] for image in content["images"]], np.where(second, "b", "a"), strict=True))
    looked_at = {(a["image_id"], a["category_id"]) for a in content["annotations"]}
    looked_at |= {(image["id"], key) for image in content["images"] for key in image.get("neg_category_ids", range(9))}
    entries = []
    for name in "ab":
        of_row = json.loads((tmp_path / f"{name}.json").read_text())
        of_row = [e for e in of_row if (e["image_id"], e["category_id"]) in looked_at]
        of_row.sort(key=lambda e: (-e["score"], e["image_id"], e["bbox"]))
        places = dict.fromkeys(range(9), 0)
        for entry in of_row:
            key = entry["category_id"]
            if taken[entry["image_id"]] == name:
                entries.append({**entry, "score": 1 - places[key] / 1000})
            places[key] += 1
    (tmp_path / "merged.json").write_text(json.dumps(entries))
    expected = bags.evaluate(tmp_path / "truth.json", tmp_path / "merged.json", max_detections=100)
    for name, value in found.items():
        assert value[0] == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name
    assert found["AP"][0] not in (
        0,
        means(ap_of(parts[0][0], validation.objects, np.ones((1, 12), int)), {"AP": validation.sets["AP"]})["AP"][0],
    )


def test_nothing_is_merged_where_nothing_was_found():
    assert merge([([None], np.array([True, False])), ([None], np.array([False, True]))], np.arange(2)) == [None]


def noisy(images=9, categories=3, rows=4, seed=0):
    """(detect, Validation): random detections of each mixture in a few images; the last category has no objects."""
    random = np.random.default_rng(seed)
    holders = [random.integers(0, images, number) for number in (12, 5, 0)[:categories]]
    objects = [np.column_stack(np.unique(holder, return_counts=True)) for holder in holders]

    def detect(mixture):
        own = np.random.default_rng([seed, *(1 + np.flatnonzero(mixture))])
        file = []
        for holder in holders:
            image = np.concatenate([holder, own.integers(0, images, 6)])
            score = own.permutation(len(image)) / len(image)
            hit = (own.random(len(image)) < 0.7) & (np.arange(len(image)) < len(holder))
            rows = np.argsort(-score)
            hits = np.repeat(hit[None, rows], 10, 0)
            file.append(Detections(image[rows], hits, np.ones(hits.shape, bool), score[rows]))
        return file

    sets = {"AP": np.ones(categories, bool), "rare": np.arange(categories) == 1, "none": np.arange(categories) == 2}
    return detect, Validation(objects, images, sets, "AP", np.arange(images))


def slow_ap(file, objects, kept):
    """mAP of some images, from the definition: precision and recall after each detection, the official 101 recalls."""
    values = []
    for detections, held in zip(file, objects, strict=True):
        total = sum(number for image, number in held.tolist() if image in kept)
        if not total:
            continue
        precision, right, seen = [], 0, 0
        for image, hit in zip(detections.image.tolist(), detections.hit[0].tolist(), strict=True):
            if image in kept:
                right, seen = right + hit, seen + 1
                precision.append((right / total, right / seen))
        best = [max((p for r, p in precision if r >= recall), default=0) for recall in np.linspace(0, 1, 101).tolist()]
        values.append(statistics.mean(best))
    return statistics.mean(values)


def slow_choice(detect, validation, rows, kept):
    """The choice on some images, in plain loops."""
    alone = [slow_ap(detect(single(row, rows)), validation.objects, kept) for row in range(rows)]
    order = sorted(range(rows), key=lambda row: -alone[row])
    best, best_value = None, -1.0
    for m in range(1, rows + 1):
        mixture = tuple(1 / m if row in order[:m] else 0.0 for row in range(rows))
        value = slow_ap(detect(mixture), validation.objects, kept)
        if value > best_value + 1e-12:
            best, best_value = mixture, value
    return best


@pytest.mark.parametrize("seed", range(3))
def test_a_choice_equals_a_slow_one(seed):
    """Mixtures without each fold, the merged detections, and AP with each group left out."""
    detect, validation = noisy(seed=seed)
    found = choose(detect, 4, validation, folds=3, draws=10, seed=seed)
    places = np.random.default_rng(seed).permutation(9)
    everything = set(range(9))
    fold_of = {image: int(places[image]) % 3 for image in everything}
    expected = [slow_choice(detect, validation, 4, {i for i in everything if fold_of[i] != fold}) for fold in range(3)]
    assert found.without == expected and found.mixture == slow_choice(detect, validation, 4, everything)
    parts = [[], [], []]
    for category in range(3):
        for fold, mixture in enumerate(expected):
            of_category = detect(mixture)[category]
            rows = zip(of_category.score.tolist(), of_category.image.tolist(), of_category.hit[0].tolist(), strict=True)
            parts[category] += [row for row in rows if fold_of[row[1]] == fold]
    crossed = []
    for rows in parts:
        rows.sort(key=lambda row: (-row[0], row[1]))
        image, hit = (np.array([row[k] for row in rows], kind) for k, kind in ((1, int), (2, bool)))
        crossed.append(Detections(image, hit[None].repeat(10, 0), np.ones((10, len(hit)), bool), image))
    assert found.honest.values["AP"] == pytest.approx(slow_ap(crossed, validation.objects, everything))
    without = [slow_ap(crossed, validation.objects, everything - {image}) for image in np.argsort(places).tolist()]
    assert found.honest.without["AP"] == pytest.approx(np.array(without))  # nine groups of one image
    control = [slow_ap(detect(single(0, 4)), validation.objects, everything - {i}) for i in np.argsort(places).tolist()]
    assert found.rows[0].without["AP"] == pytest.approx(np.array(control))


def test_the_same_again():
    detect, validation = noisy()
    first, second = (choose(detect, 4, validation, folds=3, draws=20, seed=5) for _ in range(2))
    assert first.mixture == second.mixture and first.without == second.without
    assert first.honest.gain(first.rows[0], "AP") == second.honest.gain(second.rows[0], "AP")
    assert first.rows[1].gain(first.rows[0], "AP")[0] == -first.rows[0].gain(first.rows[1], "AP")[0]
    assert all(
        np.array_equal(first.honest.draws[k], second.honest.draws[k], equal_nan=True) for k in first.honest.draws
    )


def test_a_metric_without_objects_takes_the_control():
    """Nothing can be chosen by it, and nothing is estimated."""
    detect, validation = noisy()
    found = choose(detect, 4, validation._replace(metric="none"), folds=3, draws=20)
    assert members(found.mixture) == "0" and set(map(members, found.without)) == {"0"}
    assert all(math.isnan(number) for number in found.honest.gain(found.rows[1], "none"))
    assert found.honest.gain(found.rows[0], "AP") == (0, 0, 0)


def test_values_may_be_remembered():
    """Whoever calls `value` may answer from what is known; each mixture is asked for before it is used."""
    detect, validation = noisy()
    known, calls = {}, []

    def values(mixtures, value):
        calls.extend(mixture for mixture in mixtures if mixture not in known)
        known.update({mixture: value(mixture) for mixture in mixtures if mixture not in known})
        return [known[mixture] for mixture in mixtures]

    first = choose(detect, 4, validation, folds=3, draws=20, values=values)
    asked = len(calls)
    second = choose(detect, 4, validation, folds=3, draws=20, values=values)
    assert len(calls) == asked == len(set(calls)) and {len(v) for v in known.values()} == {3 + 1}
    plain = choose(detect, 4, validation, folds=3, draws=20)
    assert first.without == second.without == plain.without
    assert first.honest.values["AP"] == second.honest.values["AP"] == plain.honest.values["AP"]


def estimate(without, draws=(0.0, 0.0), value=0.0, reach=2.0):
    return Estimate({"AP": value}, {"AP": np.array(draws)}, {"AP": np.array(without, float)}, reach)


def test_the_interval_by_hand():
    """Without one of 1 2 3 6, the means are 11/3 10/3 3 2: the standard error is that of a mean, s / sqrt(4)."""
    numbers = np.array([1, 2, 3, 6])
    without = (numbers.sum() - numbers) / 3
    error = numbers.std(ddof=1) / 2
    gain, low, high = estimate(without, value=3).gain(estimate(np.zeros(4)), "AP")
    assert gain == 3 and (low, high) == pytest.approx((min(0, 3 - 2 * error), 3 + 2 * error))
    wide = estimate(without, draws=np.linspace(-10, 10, 101), value=3).gain(estimate(np.zeros(4), np.zeros(101)), "AP")
    assert wide == pytest.approx((3, -9.5, 9.5))  # the bootstrap is the wider one
    unknown = estimate([1, 2, math.nan], value=3).gain(estimate(np.zeros(3)), "AP")
    assert unknown[0] == 3 and math.isnan(unknown[1]) and math.isnan(unknown[2])


def test_what_is_taken_instead():
    """Control 30, baseline 32, another row unknown; the interval of a gain is ±1.9.

    Of a worse row 20 nothing is known for certain, since its draws vary: it is not taken instead of a better one.
    """
    rows = [estimate((0, 0), (value, value), value) for value in (0.30, 0.32, math.nan)]
    rows.append(estimate((0, 0), (0, 0.6), 0.2))

    def instead(value, simple=(0, 1)):
        """The row that is taken instead of a choice with an AP."""
        honest = estimate((0, 0), (value - 0.02, value + 0.02), value)
        return Choice((1.0,), [], rows, honest, honest).instead("AP", simple)

    assert instead(0.35) is None  # better than both
    assert instead(0.35, (0, 3)) is None and instead(0.31, (3, 0)) == 0
    assert instead(0.33) == 1  # than the control only
    assert instead(0.31) == 1  # than neither: the better one is taken
    assert instead(0.31, (0,)) == 0 and instead(0.33, (0,)) is None  # no baseline among the rows
    assert instead(0.2, (0, 2)) == 0  # what is not known is not taken


def test_students_quantiles():
    """Against tables; with one or two degrees of freedom it is only wide."""
    known = {4: 2.776, 5: 2.571, 10: 2.228, 19: 2.093, 29: 2.045, 49: 2.010, 10**9: 1.960}
    assert {freedom: selection.student(freedom) for freedom in known} == pytest.approx(known, rel=0.005)
    assert selection.student(1) > 9 and selection.student(2) > 4


def test_parts_of_images():
    fold_of, group_of = selection._parts(np.arange(7), 3)
    assert fold_of.tolist() == [0, 1, 2, 0, 1, 2, 0] and group_of.tolist() == [0, 1, 2, 3, 4, 5, 6]
    for images, folds in ((2, 2), (147, 5), (1000, 7), (60, 60)):
        fold_of, group_of = selection._parts(np.random.default_rng(0).permutation(images), folds)
        numbers = np.unique(group_of)
        assert len(numbers) == max(folds, min(images, 50 // folds * folds)) and (group_of % folds == fold_of).all()
        assert np.ptp(np.bincount(fold_of)) <= 1 and np.ptp(np.unique(group_of, return_counts=True)[1]) <= 1


@pytest.mark.parametrize("folds, about", [(2, 2.1), (5, 2.5), (10, 2.8)])
def test_the_reach_of_a_cross_fitted_gain(folds, about):
    """Against plain loops over worlds in which sixteen rows have independent gains in each fold."""
    random, errors = np.random.default_rng(7), []
    for _ in range(4000):
        luck = random.normal(size=(folds, 16))
        gain, chosen_rows = 0.0, 0
        for fold in range(folds):
            chosen = int(np.delete(luck, fold, 0).sum(0).argmax())
            gain += luck[fold, chosen] - luck[fold, 0]
            chosen_rows += chosen != 0
        errors.append(abs(gain) / math.sqrt(2 * chosen_rows) if chosen_rows else 0)
    found = selection.reach_of_folds(folds)
    assert found == pytest.approx(np.percentile(errors, 95), abs=0.08) and found == pytest.approx(about, abs=0.1)


def test_compare_agrees_on_a_row(case):
    """The values of a row are those of `compare`."""
    truth, files, validation = case
    expected = compare(truth, *files, draws=0, max_detections=100)
    found = choose(
        lambda mixture: matched(truth, files[int(mixture[0] < 1)], max_detections=100).file, 2, validation, draws=10
    )
    for row, numbers in zip(found.rows, (expected.first, expected.second), strict=True):
        assert row.values == pytest.approx(numbers, nan_ok=True)
    assert members(found.mixture) == "1" and found.honest.values == pytest.approx(expected.second, nan_ok=True)


def test_nothing_but_noise():
    """A few data sets of equal rows; scripts/noise.py with its defaults takes 200 of each of four shapes."""
    done = run_script("noise", "--shapes", "20x3", "--data-sets", "20", "--rows", "3", "--draws", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    cells = done.stdout.splitlines()[1].split()
    assert cells[:2] == ["20x3", "20"] and float(cells[2].rstrip("%")) >= 95
    honest, error, optimistic = float(cells[4]), float(cells[5][1:]), float(cells[6])
    assert abs(honest) < 3 * error and optimistic > 3 * float(cells[7][1:])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shapes", "4x5"], "--shapes 4x5: expected IMAGESxCATEGORIES"),
        (["--shapes", "x"], "--shapes x: expected IMAGESxCATEGORIES"),
        (["--data-sets", "0"], "--data-sets 0: expected 1 or more"),
        (["--rows", "1"], "--rows 1: expected 2 or more"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--draws", "99999999999"], "--draws 99999999999: expected 0 to"),
        (["--shapes", "9999999999x5"], "--shapes 9999999999x5: expected at most 100000 images and categories"),
    ],
)
def test_noise_refuses(arguments, words):
    done = run_script("noise", *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {words}"), done.stderr
