"""Configurations with a base: which files are read, how they merge, errors, and what Lightning prints and saves."""

import json
import math
import re
import sys
import time
from argparse import ArgumentError
from typing import Any

import pytest
import yaml
from jsonargparse import get_loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lightning_acu.cli import main
from lightning_acu.cli.config_files import ConfigFile, with_bases
from lightning_acu.cli.configs import configs_directory

pytestmark = pytest.mark.slow

CLASSIFIER = {"class_path": "lightning_acu.ImageClassifier", "init_args": {"model": "acu_plain", "num_classes": 3}}
DIGITS = {"class_path": "lightning_acu.data.DigitsDataModule", "init_args": {"batch_size": 50}}
LOGGER, SCHEDULE, ROUND = (
    {"class_path": f"lightning_acu.callbacks.{name}", "init_args": arguments}
    for name, arguments in {
        "OffsetLogger": {"every_n_steps": 7},
        "PositionLRSchedule": {"multiplier": 2.0},
        "RoundThenFinetune": {"at_step": 3},
    }.items()
)
SHIPPED = sorted(configs_directory().rglob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file below tmp_path; gives its path."""

    def to(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return to


@pytest.fixture(scope="module")
def parser():
    """Of what a configuration may say, without defaults: like that of ``lightning-acu fit``, and with other types."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("-c", "--config", action=ConfigFile)
    parser.add_argument("--seed_everything", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--name", type=str)
    parser.add_argument("--many", type=list[Any])
    parser.add_argument("--mapping", type=dict)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=False)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
    parser.add_lightning_class_args(Trainer, "trainer")
    return parser


@pytest.fixture
def load(parser):
    """What configurations say together, and nothing else."""

    def of(*paths):
        given = [text for path in paths for text in ("--config", str(path))]
        config = parser.parse_args(given, defaults=False).as_dict()
        del config["config"]
        return config

    return of


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lightning-acu", *map(str, arguments)])
    main()


def printed(monkeypatch, capsys, *arguments):
    """The whole configuration of ``lightning-acu fit`` with these arguments."""
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "fit", *arguments)
    written = capsys.readouterr()
    assert caught.value.code == 0, written.err
    return yaml.safe_load(written.out)


def test_mappings_merge_and_all_else_replaces(write, load):
    below = {"model": {**CLASSIFIER, "init_args": {"model": "acu_plain", "convert": {"kernel_sizes": [3, 5]}}}}
    write("below.yaml", {**below, "seed_everything": 1, "many": [1, 2], "trainer": {"max_steps": 5, "min_steps": 2}})
    said = {"convert": {"kernel_sizes": [3], "position_groups": 2}, "num_classes": 4}
    top = {"base": "below.yaml", "model": {"init_args": said}, "many": [3], "trainer": {"max_steps": 6}}
    config = load(write("top.yaml", top))
    assert config["model"]["class_path"] == "lightning_acu.ImageClassifier"
    assert config["model"]["init_args"] == {"model": "acu_plain", **said}
    assert {key: config[key] for key in ("seed_everything", "many")} == {"seed_everything": 1, "many": [3]}
    assert config["trainer"] == {"max_steps": 6, "min_steps": 2}
    none = load(write("none.yaml", {"base": "top.yaml", "model": {"init_args": {"convert": None}}}))
    assert none["model"]["init_args"] == {"model": "acu_plain", "num_classes": 4, "convert": None}


def test_a_base_is_looked_for_beside_its_file_and_may_have_one(write, load):
    a = write("a.yaml", {"trainer": {"max_steps": 1, "min_steps": 1, "max_epochs": 1}})
    b = write("folder/b.yaml", {"base": "../a.yaml", "trainer": {"min_steps": 2, "max_epochs": 2}})
    c = write("folder/deep/c.yaml", {"base": "../b.yaml", "trainer": {"max_epochs": 3}})
    assert load(c)["trainer"] == {"max_steps": 1, "min_steps": 2, "max_epochs": 3}
    assert [file.resolve() for file in with_bases(c)] == [a.resolve(), b.resolve(), c.resolve()]
    assert with_bases(str(a)) == [a]
    d = write("d.yaml", {"base": str(b), "trainer": {"max_steps": 4}})  # a whole path
    assert load(d)["trainer"] == {"max_steps": 4, "min_steps": 2, "max_epochs": 2}


def test_a_plus_appends_to_the_list_of_the_base(write, load):
    write("below.yaml", {"trainer": {"callbacks": [LOGGER], "max_steps": 9}})
    write("middle.yaml", {"base": "below.yaml", "trainer": {"callbacks+": [SCHEDULE, ROUND]}})
    top = write("top.yaml", {"base": "middle.yaml", "trainer": {"callbacks+": LOGGER, "max_steps": 3}})
    assert load(top)["trainer"] == {"callbacks": [LOGGER, SCHEDULE, ROUND, LOGGER], "max_steps": 3}
    write("bare.yaml", {"trainer": {"max_steps": 9}})
    alone = write("alone.yaml", {"base": "bare.yaml", "trainer": {"callbacks+": [SCHEDULE]}})
    assert load(alone)["trainer"] == {"callbacks": [SCHEDULE], "max_steps": 9}
    instead = write("instead.yaml", {"base": "below.yaml", "trainer": {"callbacks": [SCHEDULE]}})
    assert load(instead)["trainer"]["callbacks"] == [SCHEDULE]


def test_arguments_of_another_class_are_kept_where_it_has_them(write, load):
    def classifier(optimizer, **arguments):
        optimizer = {"class_path": f"torch.optim.{optimizer}", "init_args": arguments}
        return {**CLASSIFIER, "init_args": {"model": "acu_plain", "optimizer": optimizer}}

    write("below.yaml", {"model": classifier("SGD", lr=1.0, momentum=0.5, weight_decay=0.25)})
    same = write("same.yaml", {"base": "below.yaml", "model": classifier("SGD", lr=3.0)})
    other = write("other.yaml", {"base": "below.yaml", "model": classifier("Adam", lr=3.0)})
    same, other = (load(path)["model"]["init_args"]["optimizer"] for path in (same, other))
    assert same["init_args"] == {"lr": 3.0, "momentum": 0.5, "weight_decay": 0.25}
    assert other == {"class_path": "torch.optim.Adam", "init_args": {"lr": 3.0, "weight_decay": 0.25}}


def test_several_configurations_on_a_command_line(write, load):
    write("below.yaml", {"trainer": {"max_steps": 1, "callbacks": [LOGGER]}})
    top = write("top.yaml", {"base": "below.yaml", "trainer": {"min_steps": 2}})
    other = write("other.yaml", {"trainer": {"max_steps": 5, "callbacks+": [SCHEDULE]}})
    assert load(top, other)["trainer"] == {"max_steps": 5, "min_steps": 2, "callbacks": [LOGGER, SCHEDULE]}
    assert load(other, top)["trainer"] == {"max_steps": 1, "min_steps": 2, "callbacks": [LOGGER]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"top": "base: nowhere.yaml"}, r"nowhere\.yaml, the `base` of .*top\.yaml, does not exist or is not a file"),
        ({"top": "base: ."}, r"the `base` of .*top\.yaml, does not exist or is not a file"),
        ({"top": "base: b.yaml", "b": "base: nowhere.yaml"}, r"nowhere\.yaml, the `base` of .*b\.yaml, does not exist"),
        ({"top": "base: b.yaml", "b": "base: top.yaml"}, r"circle: .*top\.yaml -> .*b\.yaml -> .*top\.yaml"),
        ({"top": "base: top.yaml"}, r"circle: .*top\.yaml -> .*top\.yaml"),
        ({"top": "base: [b.yaml]"}, r"`base` \(=\['b.yaml'\]\) in .*top\.yaml must be the name of a file"),
        ({"top": "base: b.yaml", "b": "a: [1"}, r"b\.yaml is not a valid YAML file: (.|\n)*line 1"),
        ({"top": "a: [1"}, r"top\.yaml is not a valid YAML file: (.|\n)*line 1"),
        ({"top": "base: b.yaml", "b": "- 1"}, r"b\.yaml must hold a mapping of options, not list"),
        ({"top": ""}, r"top\.yaml must hold a mapping of options, not NoneType"),
        (
            {"top": "base: b.yaml\nmany+: [1]\nmany: [2]", "b": "many: [1]"},
            r"`many` and `many\+` both appear in .*top\.yaml; use one",
        ),
        (
            {"top": "base: b.yaml", "b": "x: [{y: 1, callbacks: [], callbacks+: []}]"},
            r"`callbacks` and `callbacks\+` both appear in .*b\.yaml; use one",
        ),
    ],
)
def test_errors_name_the_file(write, monkeypatch, capsys, files, message):
    paths = {name: write(f"{name}.yaml", content) for name, content in files.items()}
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        with_bases(paths["top"])
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "fit", "--config", paths["top"])
    assert caught.value.code == 2
    assert with_bases_message(paths["top"]) in capsys.readouterr().err


def bomb(levels, aliases, first="1"):
    """Each level holds that many aliases of the one before."""
    lines = [f"l0: &l0 [{first}]"]
    lines += [f"l{i}: &l{i} [{', '.join(aliases * [f'*l{i - 1}'])}]" for i in range(1, levels + 1)]
    return "\n".join(lines)


HOSTILE = {
    "nine to the eleventh": (bomb(11, 9), "has more than 1048576 characters when its aliases are written out"),
    "few aliases, many levels": (bomb(40, 2), "has more than 1048576 characters when its aliases"),
    "a long text, often": (
        f"a: &a {'x' * 9999}\nb: [{', '.join(999 * ['*a'])}]",
        "has more than 1048576 characters when",
    ),
    "merged mappings": (
        "a: &a {x: 1}\n"
        + "\n".join(f"k{i}: &{chr(98 + i)} {{<<: [{', '.join(9 * ['*' + chr(97 + i)])}]}}" for i in range(11)),
        "has more than 1048576 characters when its aliases",
    ),
    "levels by aliases": (bomb(100, 1), "is nested more than 64 levels deep"),
    "levels": ("a: " + 900 * "[" + 900 * "]", "is nested more than 64 levels deep"),
    "levels of mappings": ("".join(" " * i + "a:\n" for i in range(500)), "is nested more than 64 levels deep"),
    "itself": ("a: &a {b: *a}", r"never ends: the alias \*a is in what it stands for"),
    "itself, twice": ("a: &a [1, {b: &b [*a, *b]}]", r"never ends: the alias \*a is in"),
    "itself, after another of that name": ("a: &a 1\nb: &a [*a]", r"never ends: the alias \*a is in"),
    "the whole": ("&a {b: [*a]}", r"never ends: the alias \*a is in what"),
    "a long file": ("a: " + "1" * 2**18, "has more than 262144 characters, too many for a configuration"),
    "no such anchor": ("a: *b", "is not a valid YAML file: (.|\\n)*undefined alias"),
    "not closed": ("a: " + 60 * "[", "is not a valid YAML file"),
    "a tag that does not fit": ("a: !!bool x", "is not a valid YAML file: 'x'"),
    "another such tag": ("a: !!int ''", "is not a valid YAML file"),
    "a class": ("a: !!python/object/apply:os.getcwd []", "is not a valid YAML file"),
    "a number of many digits": ("a: " + "1" * 5000, "is not a valid YAML file"),
    "a key that cannot be one": ("? {a: 1}\n: 2", "is not a valid YAML file"),
    "no text": ("a: \x00", "is not a valid YAML file"),
}


@pytest.mark.parametrize("place", ["file", "base"])
@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(write, parser, text, message, place):
    hostile = write("hostile.yaml", text)
    path = hostile if place == "file" else write("top.yaml", "base: hostile.yaml")
    start = time.process_time()
    with pytest.raises(ArgumentError, match=rf"(?s){re.escape(str(hostile))} {message}"):
        parser.parse_args(["--config", str(path)])
    assert time.process_time() - start < 2


@pytest.mark.parametrize("text", [bomb(11, 9), "{a: &a {b: *a}}", "a: " + 500 * "[" + 500 * "]"])
def test_hostile_text(parser, text):
    message = r"the text '.*'\.\.\. (has more than|never ends|is nested)"
    with pytest.raises(ArgumentError, match=message):
        parser.parse_args([f"--config={text}"])


@pytest.mark.parametrize("count", [33, 1200])
def test_many_bases(write, parser, count):
    for i in range(count):
        write(f"{i}.yaml", {"base": f"{i + 1}.yaml", "rate": i})
    top = write(f"{count}.yaml", {"rate": 1.0}).with_name("0.yaml")
    start = time.process_time()
    with pytest.raises(ArgumentError, match=rf"{top} has more than 32 bases, each .*; the last is .*33\.yaml"):
        parser.parse_args(["--config", str(top)])
    assert time.process_time() - start < 2
    assert parser.parse_args(["--config", str(top.with_name(f"{count - 32}.yaml"))]).rate == count - 32


def test_a_file_that_cannot_be_read(write, parser, monkeypatch):
    path = write("top.yaml", "rate: 1")

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(ArgumentError, match=rf"Permission denied: '{path}'"):
        parser.parse_args(["--config", str(path)])


def test_ordinary_anchors(write, load):
    text = """
    many: &many [&one 1, *one, {deep: &deep {a: b}}, *deep]
    mapping: {again: *many, merged: {<<: *deep, c: d}}
    """
    config = load(write("top.yaml", text))
    many = [1, 1, {"deep": {"a": "b"}}, {"a": "b"}]
    assert (config["many"], config["mapping"]) == (many, {"again": many, "merged": {"a": "b", "c": "d"}})
    large = {"mapping": {"long": [[i, "x" * 20] for i in range(3000)], "deep": nested(60)}}
    config = load(write("large.yaml", yaml.dump(large, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))))
    assert config["mapping"] == large["mapping"]


def nested(levels):
    return [nested(levels - 1)] if levels else 1


def with_bases_message(path):
    try:
        with_bases(path)
    except (FileNotFoundError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize("by", ["command line", "argument"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {max_stepz: 3}", "max_stepz"),
        ("trainer: {max_steps+: [3]}", "max_steps+"),
        ("trainer: {max_steps: three}", "trainer.max_steps"),
        ("trainer: {callbacks+: 3}", "trainer.callbacks"),
        ("model: {init_args: {model+: [a]}}", "model+"),
        ("model: {init_args: {convert: {kernel: 3}}}", "kernel"),
        ("nothing: {like: this}", "nothing"),
    ],
)
def test_a_wrong_key_or_value_is_named(write, monkeypatch, capsys, by, text, message):
    write("below.yaml", {"model": CLASSIFIER, "data": DIGITS, "trainer": {"callbacks": [LOGGER]}})
    given = ["fit", "--config", str(write("top.yaml", f"base: below.yaml\n{text}"))]
    monkeypatch.setattr(sys, "argv", ["lightning-acu", *(given if by == "command line" else [])])
    with pytest.raises(SystemExit) as caught:
        main(None if by == "command line" else given)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_is_named(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "fit", "--config", "no/such/file.yaml")
    assert "no/such/file.yaml" in capsys.readouterr().err


def test_values_arrive_as_they_stand_in_the_file(write, load):
    lines = ["rate: 1e-4", "name: '1e-4'", "seed_everything: null"]
    lines += ["mapping: {clip: .inf, path: a/🙂 b/é, day: '2020-01-02', switch: 'off', long: '" + "word " * 999 + "'}"]
    write("below.yaml", "\n".join(lines))
    config = load(write("top.yaml", "base: below.yaml\nmany: [1, [], {}, true]"))
    mapping = {"clip": math.inf, "path": "a/🙂 b/é", "day": "2020-01-02", "switch": "off", "long": "word " * 999}
    expected = {"rate": 1e-4, "name": "1e-4", "seed_everything": None, "mapping": mapping, "many": [1, [], {}, True]}
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["base", "x" * 5000])
def test_text_that_is_not_a_file_is_left_to_jsonargparse(parser, name):
    text = json.dumps({"name": name, "many": [1]})
    config = parser.parse_args(["--config", text, f"--config={json.dumps({'many+': [2]})}"])
    assert (config.name, config.many) == (name, [1, 2])


def test_the_command_line_has_the_last_word(write, monkeypatch, capsys):
    write("below.yaml", {"model": CLASSIFIER, "data": DIGITS, "trainer": {"max_steps": 1, "min_steps": 1}})
    top = write("top.yaml", {"base": "below.yaml", "trainer": {"max_steps": 2}})
    for given in (["-c", top], [f"--config={top}"]):
        config = printed(monkeypatch, capsys, *given, "--trainer.min_steps=0", "--print_config")
        assert (config["trainer"]["max_steps"], config["trainer"]["min_steps"]) == (2, 0)


def test_what_is_printed_and_saved_has_no_base_and_runs_again(write, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    classifier = {**CLASSIFIER, "init_args": {"model": "test_resnet", "in_chans": 1, "num_classes": 10}}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_steps": 1}
    quiet["limit_val_batches"] = 0
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "first"}}
    write("below.yaml", {"model": classifier, "data": DIGITS, "trainer": {**quiet, "logger": logger}})
    convert = {"model": {"init_args": {"convert": {"kernel_sizes": [3]}}}}
    top = write("top.yaml", {"base": "below.yaml", **convert, "trainer": {"callbacks+": [LOGGER]}})
    whole = printed(monkeypatch, capsys, "--print_config", "--config", top)
    assert not {"base", "config"} & whole.keys()
    again = printed(monkeypatch, capsys, "--config", write("printed.yaml", whole), "--print_config")
    assert again == whole
    run(monkeypatch, "fit", "--config", top)
    saved = next(tmp_path.glob("first/*/*/config.yaml"))
    assert yaml.safe_load(saved.read_text()) == whole
    run(monkeypatch, "fit", "--config", saved, "--trainer.logger.init_args.save_dir=second")
    again = yaml.safe_load(next(tmp_path.glob("second/*/*/config.yaml")).read_text())
    again["trainer"]["logger"]["init_args"]["save_dir"] = "first"
    assert again == whole


def merged(path):
    """What a shipped file says, merged without jsonargparse: they never change a class."""
    config = get_loader("yaml")(path.read_text())
    base = config.pop("base", None)
    return config if base is None else _merged(merged(path.parent / base), config)


def _merged(below, above):
    result = dict(below)
    for key, value in above.items():
        if key.endswith("+"):
            result[key[:-1]] = result.get(key[:-1], []) + value
        else:
            mappings = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = _merged(result[key], value) if mappings else value
    return result


def _said(config, whole):
    """``whole`` reduced to what ``config`` mentions."""
    if isinstance(config, dict) and isinstance(whole, dict):
        return {key: _said(value, whole.get(key)) for key, value in config.items()}
    if isinstance(config, list) and isinstance(whole, list) and len(config) == len(whole):
        return [_said(*pair) for pair in zip(config, whole, strict=True)]
    return whole


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_means_what_it_says(path, monkeypatch, capsys):
    config, whole = merged(path), printed(monkeypatch, capsys, "--config", path, "--print_config")
    assert config.keys() <= whole.keys()
    assert _said(config, whole) == config
