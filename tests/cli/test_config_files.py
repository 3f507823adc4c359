"""Configurations with a base: merging, errors, and how the command line sees them."""

import json
import math
import sys

import pytest
import yaml
from jsonargparse import get_loader

from lightning_acu.cli import main
from lightning_acu.cli.config_files import base_of, expand_configs, load_config


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file below tmp_path; gives its path."""

    def to(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return to


def test_mappings_merge_and_all_else_replaces(write):
    write("below.yaml", {"model": {"init_args": {"model": "a", "sizes": [3, 5], "lr": 1}}, "seed": 0, "gone": {"x": 1}})
    top = write("top.yaml", {"base": "below.yaml", "model": {"init_args": {"sizes": [3], "lr": None}}, "gone": 2})
    expected = {"model": {"init_args": {"model": "a", "sizes": [3], "lr": None}}, "seed": 0, "gone": 2}
    assert load_config(top) == expected


def test_a_base_is_looked_for_beside_its_file_and_may_have_one(write):
    write("a.yaml", {"a": 1, "b": 1, "c": 1})
    write("folder/b.yaml", {"base": "../a.yaml", "b": 2, "c": 2})
    c = write("folder/deep/c.yaml", {"base": "../b.yaml", "c": 3})
    assert load_config(c) == {"a": 1, "b": 2, "c": 3}
    assert base_of(c).read_text() == (c.parent / "../b.yaml").read_text()
    assert base_of(c.parent / "../../a.yaml") is None


def test_a_plus_appends_to_the_list_of_the_base(write):
    write("below.yaml", {"trainer": {"callbacks": ["first"], "max_steps": 1}})
    top = write("top.yaml", {"base": "below.yaml", "trainer": {"callbacks+": ["second", "third"]}})
    assert load_config(top)["trainer"] == {"callbacks": ["first", "second", "third"], "max_steps": 1}


def test_arguments_of_another_class_are_not_kept(write):
    sgd = {"class_path": "SGD", "init_args": {"lr": 1, "momentum": 2}}
    write("below.yaml", {"optimizer": sgd})
    same = write("same.yaml", {"base": "below.yaml", "optimizer": {"class_path": "SGD", "init_args": {"lr": 3}}})
    other = write("other.yaml", {"base": "below.yaml", "optimizer": {"class_path": "Adam", "init_args": {"lr": 3}}})
    assert load_config(same)["optimizer"]["init_args"] == {"lr": 3, "momentum": 2}
    assert load_config(other)["optimizer"] == {"class_path": "Adam", "init_args": {"lr": 3}}


def test_numbers_are_read_as_lightning_reads_them(write):
    assert load_config(write("a.yaml", "lr: 1e-4\n")) == {"lr": 1e-4}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"top": "base: nowhere.yaml"}, r"no configuration file .*nowhere\.yaml, which is `base` in .*top\.yaml"),
        ({"top": "base: b.yaml", "b": "base: top.yaml"}, r"circle: .*top\.yaml -> .*b\.yaml -> .*top\.yaml"),
        ({"top": "base: [b.yaml]"}, r"`base` \(=\['b.yaml'\]\) in .*top\.yaml must be the name of a file"),
        ({"top": "base: b.yaml", "b": "a: [1"}, r"b\.yaml is no YAML file: (.|\n)*line 1"),
        ({"top": "base: b.yaml", "b": "- 1"}, r"b\.yaml must hold a mapping of options, and holds list"),
        ({"top": "base: b.yaml\nx+: [1]", "b": "y: 1"}, r"`x\+` in .*top\.yaml needs a list"),
        ({"top": "base: b.yaml\nx+: 1", "b": "x: [1]"}, r"`x\+` in .*top\.yaml needs a list"),
        ({"top": "base: b.yaml\ny: {x+: [1]}", "b": "z: 1"}, r"`x\+` in .*top\.yaml needs a list"),
        (
            {"top": "base: b.yaml\ny: {class_path: A, x+: [1]}", "b": "y: {x: [1]}"},
            r"`x\+` in .*top\.yaml needs a list",
        ),
        ({"top": "base: b.yaml\nx+: [1]\nx: [2]", "b": "x: [1]"}, r"`x` and `x\+` both stand in .*top\.yaml"),
    ],
)
def test_errors_name_the_file(write, files, message):
    paths = {name: write(f"{name}.yaml", content) for name, content in files.items()}
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_config(paths["top"])


def test_only_files_with_a_base_are_expanded(write):
    plain = write("plain.yaml", "a: 1\nname: 'base: none'\n")
    top = write("top.yaml", {"base": "plain.yaml", "a": 2})
    given = [
        "fit",
        "--config",
        str(plain),
        f"--config={top}",
        "-c",
        str(top),
        "--x=--config",
        "--config",
        "a: {base: 1}",
    ]
    merged = {"a": 2, "name": "base: none"}
    expanded = expand_configs(given)
    assert [expanded[i] for i in (0, 1, 2, 4, 6, 7, 8)] == [given[i] for i in (0, 1, 2, 4, 6, 7, 8)]
    assert get_loader("yaml")(expanded[3].removeprefix("--config=")) == merged
    assert get_loader("yaml")(expanded[5]) == merged


def test_values_reach_lightning_as_they_stand_in_the_file(write):
    lines = ["clip: .inf", "rate: 1e-4", "name: '1e-4'", "path: a/🙂 b/é", "day: '2020-01-02'", "none: null"]
    write("below.yaml", "\n".join([*lines, "long: " + "word " * 99]))
    (_, text) = expand_configs(["--config", str(write("top.yaml", "base: below.yaml\nmany: [1, [], {}, true]"))])
    assert "\n" not in text
    expected = {"clip": math.inf, "rate": 1e-4, "name": "1e-4", "path": "a/🙂 b/é", "day": "2020-01-02"}
    expected |= {"long": ("word " * 99).strip(), "none": None, "many": [1, [], {}, True]}
    assert get_loader("yaml")(text) == expected


@pytest.mark.parametrize("text", ["a: 1\nb: 2", json.dumps({"a": "x" * 5000}), "no/such/file.yaml", ""])
def test_what_is_no_file_is_left_to_lightning(text):
    assert expand_configs(["fit", "--config", text, f"-c={text}", "--config"]) == [
        "fit", "--config", text, f"-c={text}", "--config",
    ]  # fmt: skip


@pytest.mark.parametrize("by", ["command line", "argument"])
def test_the_command_line_says_what_is_wrong(write, monkeypatch, by):
    top = write("top.yaml", "base: nowhere.yaml")
    given = ["fit", "--config", str(top)]
    monkeypatch.setattr(sys, "argv", ["lightning-acu", *(given if by == "command line" else [])])
    with pytest.raises(SystemExit, match=r"lightning-acu: there is no configuration file .*nowhere\.yaml"):
        main(None if by == "command line" else given)


def test_a_wrong_key_of_a_merged_file_is_named(write, monkeypatch, capsys):
    write("below.yaml", {"model": {"class_path": "lightning_acu.ImageClassifier", "init_args": {"model": "resnet18"}}})
    top = write("top.yaml", {"base": "below.yaml", "trainer": {"max_stepz": 3}})
    monkeypatch.setattr(sys, "argv", ["lightning-acu", "fit", "--config", str(top)])
    with pytest.raises(SystemExit):
        main()
    assert "max_stepz" in capsys.readouterr().err
