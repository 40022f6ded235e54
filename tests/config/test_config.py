"""Configuration: what loads, what is refused and how clearly."""

import dataclasses

import pytest
import yaml

import bags
from bags.analysis.paper import PAPER
from bags.classifiers.group_softmax import GroupSoftmaxSettings
from bags.classifiers.softmax import SoftmaxSettings
from bags.config.load import config_from_dict, config_to_dict, override_config, save_config
from bags.config.typed_yaml import parse_yaml


def write(folder, name="row.yaml", **content):
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return path


def test_resolved_file_loads_back_equal(tmp_path):
    path = write(tmp_path, classifier={"name": "group_softmax", "others_ratio": "n"}, train={"lr": "1e-4"})
    config = bags.load_config(path, ["detector.rpn.anchor_sizes=[[8], [16]]", "seed=3"])
    assert config.name == "row" and config.train.lr == 1e-4 and config.seed == 3
    assert config.detector.rpn.anchor_sizes == ((8,), (16,))
    save_config(config, tmp_path / "config.yaml")
    assert bags.load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config_to_dict(config)) == config


def test_base_and_overrides(tmp_path):
    write(tmp_path, "_base.yaml", train={"lr": 0.5, "epochs": 3}, data={"name": "d"})
    path = write(tmp_path, base="_base.yaml", train={"epochs": 7})
    config = bags.load_config(path, ["train.lr=1e-4"])
    assert (config.train.lr, config.train.epochs, config.data.name) == (1e-4, 7, "d")


@pytest.mark.parametrize("section", ["null", "5", "!!omap [epochs: 1]", "[]"])
def test_no_layer_hides_a_section_that_is_no_mapping(tmp_path, section):
    write(tmp_path, "_base.yaml", train={"lr": 0.5}, detector={"rpn": {"batch_size": 8}})
    path = tmp_path / "row.yaml"
    (tmp_path / "_odd.yaml").write_text(f"train: {section}\ndetector: {{rpn: {section}}}")
    for text, override, key in [
        (f"train: {section}", "train.epochs=1", "row.yaml: train"),
        (f"base: _base.yaml\ntrain: {section}", "train.epochs=1", "row.yaml: train"),
        (f"base: _base.yaml\ndetector: {{rpn: {section}}}", "detector.rpn.batch_size=1", "row.yaml: detector.rpn"),
        (f"base: _base.yaml\nsampler: {section}", "sampler={name: uniform}", "row.yaml: sampler"),
        ("base: _odd.yaml\ntrain: {lr: 0.1}\ndetector: {rpn: {batch_size: 4}}", "seed=1", "_odd.yaml: train"),
        (f"classifier_stage: {{train: {section}}}\nrows: [softmax]", "seed=1", "row.yaml: classifier_stage.train"),
        (f"methods: {{softmax: {{train: {section}}}}}\nrows: [softmax]", "seed=1", "methods.softmax.train"),
    ]:
        path.write_text(text)
        with pytest.raises(bags.UserError, match=f"{key}: expected a section of keys"):
            bags.load_config(path, [override])
    path.write_text("base: _base.yaml")
    with pytest.raises(bags.UserError, match="row.yaml: train: expected a section of keys, got 5"):
        bags.load_config(path, ["train=5", "train.epochs=1"])


@pytest.mark.parametrize("number", ["010", "-010", "1:30", "1:30.5", "0_7"])
def test_numbers_that_yaml_reads_as_others_are_refused(tmp_path, number):
    for text, overrides in [(f"seed: {number}", []), ("", [f"seed={number}"]), ("", [f"test.bins=[{number}, 90]"])]:
        (tmp_path / "row.yaml").write_text(text)
        with pytest.raises(bags.UserError, match=f"YAML.*{number} is read as") as error:
            bags.load_config(tmp_path / "row.yaml", overrides)
        assert "\n" not in str(error.value)
    config = bags.load_config(tmp_path / "row.yaml", ["seed=0", f"data.name={number.replace(':', '-')}"])
    assert config.seed == 0 and config.data.name == number.replace(":", "-")


def test_a_new_name_replaces_the_section(tmp_path):
    write(tmp_path, "_base.yaml", classifier={"name": "group_softmax", "others_ratio": 2})
    path = write(tmp_path, base="_base.yaml", classifier={"name": "softmax"})
    assert bags.load_config(path).classifier == SoftmaxSettings()
    path = write(tmp_path, base="_base.yaml", classifier={"boundaries": [5]})
    assert bags.load_config(path).classifier == GroupSoftmaxSettings(boundaries=(5,), others_ratio=2.0)
    config = bags.load_config(path, ["classifier.name=softmax"])
    assert config.classifier == SoftmaxSettings()


@pytest.mark.parametrize(
    "content, words",
    [
        ({"train": {"learning_rate": 1}}, ["row.yaml", "train.learning_rate", "unknown key"]),
        ({"train": {"epoch": 1}}, ["did you mean train.epochs"]),
        ({"trian": {}}, ["did you mean train"]),
        ({"train": {"epochs": "many"}}, ["train.epochs", "whole number", "'many'"]),
        ({"train": {"epochs": True}}, ["train.epochs", "whole number"]),
        ({"train": {"lr": "fast"}}, ["train.lr", "a number"]),
        ({"train": {"lr": 0}}, ["train.lr", "above 0"]),
        ({"train": {"part": "neck"}}, ["train.part", "'cls'"]),
        ({"train": {"part": "cls"}}, ["detector.init_from"]),
        ({"train": 3}, ["train", "section"]),
        ({"classifier": {"name": "group_softmx"}}, ["classifier.name", "did you mean group_softmax"]),
        ({"classifier": "softmax"}, ["classifier: expected a section", "write classifier.name=softmax"]),
        ({"sampler": "bag"}, ["sampler: expected a section of keys, got 'bag'; names: uniform,"]),
        ({"classifier": {"name": "group_softmax", "boundaries": "10,100"}}, ["got '10,100'; write [10,100]"]),
        ({"classifier": {"name": "group_softmax", "group_weights": "1,2e-1"}}, ["or null", "write [1,2e-1]"]),
        ({"train": {"milestones": 5}}, ["got 5; write [5]"]),
        ({"classifier": {"name": "softmax", "others_ratio": 3}}, ["classifier.others_ratio", "unknown key"]),
        ({"classifier": {"name": "group_softmax", "others_ratio": "some"}}, ["others_ratio", "'n'"]),
        ({"classifier": {"name": "group_softmax", "boundaries": [10, 5]}}, ["classifier.boundaries", "rising"]),
        ({"classifier": {"name": "group_softmax", "group_weights": [1, 2]}}, ["classifier.group_weights", "5 numbers"]),
        ({"classifier": {"name": "ncm"}}, ["train.part", "ncm trains nothing"]),
        ({"classifier": {"name": "tau_norm", "tau": -1}}, ["classifier.tau", "0 or more"]),
        ({"classifier": {"name": "reweighted_softmax", "beta": 1}}, ["classifier.beta", "beta < 1"]),
        ({"classifier": {"name": "sigmoid_focal", "alpha": 2}}, ["classifier.alpha", "0 to 1"]),
        ({"sampler": {"name": "repeat_factor", "threshold": 0}}, ["sampler.threshold", "above 0"]),
        ({"sampler": {"name": "repeat_factor", "below": 3}}, ["sampler.below", "unknown key"]),
        ({"train": {"milestones": [3, 2]}}, ["train.milestones", "rising"]),
        ({"data": {"name": "../up"}}, ["data.name", "folder name"]),
        ({"detector": {"rpn": {"anchor_sizes": [8]}}}, ["anchor_sizes", "a list of"]),
        ({"base": 3}, ["base"]),
        ({"base": "none.yaml"}, ["none.yaml", "no such configuration"]),
        ({"base": "row.yaml"}, ["leads back to itself"]),
    ],
)
def test_refusals_name_file_and_key(tmp_path, content, words):
    with pytest.raises(bags.UserError) as error:
        bags.load_config(write(tmp_path, **content))
    message = str(error.value)
    assert "\n" not in message and str(tmp_path) in message
    for word in words:
        assert word in message


def test_files_that_are_not_configurations(tmp_path):
    write(tmp_path, "softmax.yaml")
    with pytest.raises(bags.UserError, match=r"did you mean .*softmax\.yaml"):
        bags.load_config(tmp_path / "sofmax.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(bags.UserError, match="found list"):
        bags.load_config(tmp_path / "list.yaml")
    (tmp_path / "tag.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(bags.UserError, match="not valid YAML"):
        bags.load_config(tmp_path / "tag.yaml")
    with pytest.raises(bags.UserError, match="expected section.key=value"):
        bags.load_config(tmp_path / "softmax.yaml", ["train.lr"])


def test_a_schedule_without_milestones():
    assert bags.load_config("glyphs-100/softmax", ["train.milestones=[]"]).train.milestones == ()


TEXTS = [
    "exp #2",
    "- a",
    "[1, 2]",
    "{a: 1}",
    "&a",
    "*a",
    "!x",
    "'a'",
    '"a"',
    "2024",
    "1e5",
    "on",
    "null",
    "true",
    "é 🎈",
    " a ",
    "%",
    "a=b",
    "~x",
    "0x10",
    "2024-01-02",
    "a\tb",
]
TEXTS += ["a: b", "|", "\x1b[1m", "# a", "?", "`", "-"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_on_the_command_line_stays_text(tmp_path, text):
    """In a path, a name and a text that may be null; and the file that is written is read back equal."""
    overrides = [f"{key}={text}" for key in ("name", "data.name", "output", "data.root", "data.train", "store.folder")]
    optional = [] if text == "null" else [f"detector.init_from={text}", f"data.train_semantic=maps {text}"]
    config = bags.load_config(
        write(tmp_path, detector={"framework": "htc", "roi": {"class_agnostic": True}}), overrides[:-1]
    )
    assert {config.name, config.data.name, config.output, config.data.root, config.data.train} == {text}
    config = override_config(config, [*optional, *([] if text == "null" else overrides[-1:])])
    if optional:
        assert config.detector.init_from == config.store.folder == text and config.data.train_semantic == f"maps {text}"
    save_config(config, tmp_path / "config.yaml")
    assert bags.load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", ["a\nb", "a\n", "a\rb", "a\u2028b", "a\0b", "a\x85", "\udcff"])
def test_text_that_no_line_can_hold_is_refused(tmp_path, text):
    for key in ("output", "name", "detector.init_from", "data.train"):
        with pytest.raises(bags.UserError, match=f"{key}: a text must") as error:
            bags.load_config(write(tmp_path), [f"{key}={text}"])
        assert "\n" not in str(error.value)


def test_the_type_of_a_key_says_how_its_value_is_read(tmp_path):
    path = write(tmp_path, detector={"init_from": "x.pth"})
    cases = [
        ("detector.init_from=null", "detector.init_from", None),
        ("detector.init_from=", "detector.init_from", None),
        ("detector.init_from=row:softmax", "detector.init_from", "row:softmax"),
        ("detector.backbone_weights=~", "detector.backbone_weights", None),
        ("detector.frozen_batch_norm=statistics", "detector.frozen_batch_norm", "statistics"),
        ("detector.frozen_batch_norm=yes", "detector.frozen_batch_norm", True),
        ("train.features=null", "train.features", None),
        ("train.checkpoint_every=null", "train.checkpoint_every", None),
        ("train.lr=1e-4", "train.lr", 1e-4),
        ("data.exif=true", "data.exif", True),
        ("test.bins=[3, 4]", "test.bins", (3, 4)),
        ("data={name: '7', flip: 0}", "data.name", "7"),
        ("device=cpu", "device", "cpu"),
    ]
    for override, key, expected in cases:
        value = bags.load_config(path, [override])
        for part in key.split("."):
            value = getattr(value, part)
        assert value == expected and type(value) is type(expected), override
    grouped = ["classifier.name=group_softmax", "classifier.temperatures=learned", "classifier.others_ratio=n"]
    classifier = bags.load_config(path, grouped).classifier
    assert (classifier.temperatures, classifier.others_ratio) == ("learned", "n")
    assert bags.load_config(path, ["sampler={name: tail_only}", "sampler.below=7"]).sampler.below == 7


@pytest.mark.parametrize(
    "override, words",
    [
        ("output=", "output: expected a path, got ''"),
        ("data.name=", "data.name: expected a folder name"),
        ("detector.init_from=~/x.pth", "detector.init_from: expected a path without ~"),
        ("output=~", "output: expected a path without ~"),
        ("device='cpu'", "device: expected one of"),
        ("nothing=[", "nothing: unknown key"),
        ("data.nothing.more=: [", "data.nothing: unknown key"),
        ("data.name.more=3", "data.name: expected text"),
        ("classifier.others_ratio=[", "classifier.name: unknown name None"),
        ("train.lr=[", "override 'train.lr=\\[': the value is not YAML"),
        ("classifier=softmax", "write classifier.name=softmax"),
        ("seed=0x" + "f" * 9000, "seed: expected a whole number below 2.63, got one of 36000 bits"),
    ],
)
def test_overrides_that_cannot_be(tmp_path, override, words):
    with pytest.raises(bags.UserError, match=words) as error:
        bags.load_config(write(tmp_path), [override])
    assert len(str(error.value)) < 1000


def test_merge_keys(tmp_path):
    """A mapping's own keys come first, then those of the first mapping merged; merges of merges, and of lists."""
    (tmp_path / "x.yaml").write_text(
        "train: &short {epochs: 1, lr: 0.5, batch_size: 4}\n"
        "test: &test {batch_size: 3}\n"
        "detector: {rpn: &rpn {batch_size: 8, test_proposals: 9}, roi: {<<: [*test, *rpn], fc: 16}}\n"
    )
    with pytest.raises(bags.UserError, match="detector.roi.test_proposals: unknown key"):
        bags.load_config(tmp_path / "x.yaml")
    tree = parse_yaml("a: &a {long: 1, x: 1}\nb: &b {<<: *a, long: 2, y: 3}\nc: {z: 5, <<: [*a, *b]}\nd: {'<<': 1}")
    assert tree["b"] == {"long": 2, "x": 1, "y": 3} and tree["c"] == {"long": 1, "x": 1, "y": 3, "z": 5}
    assert tree["d"] == {"<<": 1}
    nested = parse_yaml("r: {l: {d: &a {<<: &base {long: 1}, long: 2}}, b: {<<: *a, other: 2}}")
    assert nested["r"] == {"l": {"d": {"long": 2}}, "b": {"long": 2, "other": 2}}
    base = parse_yaml("data: &d {name: x}\nstore: {mirrored: false}\n")
    assert base["data"]["name"] == "x"


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: {<<: {b: 1}, c: 1, c: 2}", "key 'c' is given twice"),
        ("{<<: {a: 1}, <<: {b: 1}}", "key '<<' is given twice"),
        ("<<: 3", "expected a mapping, or a list"),
        ("<<: [{a: 1}, 2]", "expected a mapping, or a list"),
        ("a: &a {<<: *a}", "not valid YAML"),
        ("? [1]\n: 2", "a key must not be a list"),
        (
            "a: &a {" + ", ".join(f"k{n}: 1" for n in range(200)) + "}\nb: {<<: [" + "*a, " * 200 + "]}",
            "add up to more",
        ),
    ],
)
def test_keys_and_merges_that_cannot_be(tmp_path, text, words):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(bags.UserError, match=words) as error:
        bags.load_config(tmp_path / "x.yaml")
    assert "\n" not in str(error.value)


def test_many_keys_are_looked_at_once(tmp_path, monkeypatch):
    """Twenty thousand keys: each is hashed a few times, not compared with all before it."""
    compared = []

    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(1)
            return str.__eq__(self, other)

    plain = yaml.SafeLoader.construct_object

    def construct(self, node, deep=False):
        value = plain(self, node, deep)
        return Key(value) if isinstance(value, str) else value

    monkeypatch.setattr(yaml.SafeLoader, "construct_object", construct)
    assert len(parse_yaml("\n".join(f"k{n}: 1" for n in range(2000)))) == 2000 and len(compared) < 20_000


def test_rows_differ_in_what_their_names_say():
    names = {row.config for table in PAPER.values() for row in table.rows}
    rows = {name: bags.load_config(f"lvis_v0.5/{name}") for name in names}
    classifiers = {name: config.classifier for name, config in rows.items()}
    ratios = {0: "bags_beta_0", "n": "bags_beta_n", 8: "bags", "all": "bags_beta_all"}
    assert all(classifiers[name].others_ratio == ratio for ratio, name in ratios.items())
    flags = {n: (classifiers[n].background_group, classifiers[n].others) for n in classifiers if n.startswith("groups")}
    assert flags == {"groups": (False, False), "groups_background": (True, False), "groups_others": (False, True)}
    assert len(classifiers["bags_2_groups"].boundaries) == 1 and len(classifiers["bags_8_groups"].boundaries) == 7
    parts = {name: config.train.part for name, config in rows.items()}
    assert {n for n in parts if parts[n] == "none"} == {"ncm_fc", "ncm_conv", "tau_norm", "tau_norm_select"}
    whole = {"softmax", "softmax_x2", "finetune_tail", "rfs", "rfs_finetune", "reweight", "focal"}
    whole |= {"large", "cascade", "mask", "htc", "htc_dcn"}
    assert {n for n in parts if parts[n] == "all"} == whole
    frameworks = {name: (c.detector.framework, c.detector.backbone) for name, c in rows.items()}
    x101 = "resnext101_64x4d"
    for suffix in ("", "_bags"):
        assert frameworks[f"large{suffix}"] == ("faster_rcnn", x101)
        assert frameworks[f"cascade{suffix}"] == ("cascade_rcnn", x101)
        assert frameworks[f"mask{suffix}"] == ("mask_rcnn", "resnet50")
        assert frameworks[f"htc{suffix}"] == frameworks[f"htc_dcn{suffix}"] == ("htc", x101)
        assert rows[f"htc_dcn{suffix}"].detector.deformable_stages == (2, 3, 4)
        assert rows[f"htc_dcn{suffix}"].data.short_sides == (400, 1400) and rows[f"htc{suffix}"].data.train_semantic
    tests = {n: (rows[n].test.score_threshold, rows[n].test.max_detections) for n in rows}
    released = {
        "large": (0, 300),
        "large_bags": (0.001, 300),
        "cascade": (0.001, 300),
        "cascade_bags": (0.001, 300),
        "mask": (0.05, 100),
        "mask_bags": (0.001, 300),
        "htc": (0.001, 100),
        "htc_bags": (0.001, 300),
        "htc_dcn": (0.001, 100),
        "htc_dcn_bags": (0.001, 300),
    }
    assert {n: tests[n] for n in released} == released
    assert rows["htc_bags"].train.lr == 0.005 and rows["htc"].train.milestones == (16, 19)
    assert rows["rfs"].sampler == rows["rfs_finetune"].sampler and rows["rfs"].init_row is None
    for field in ("data", "detector", "test", "train"):  # the control differs from BAGS in its classifier alone
        same = dataclasses.replace(rows["softmax_retrained"].detector, reset_classifier=False)
        control = dataclasses.replace(rows["softmax_retrained"], detector=same)
        assert getattr(control, field) == getattr(rows["bags"], field)
