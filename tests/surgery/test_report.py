"""report_acu: every convolution accounted for."""

import pytest
import timm
from torch import nn

from lightning_acu import ACUConv2d, FoldedConv2d, convert_to_acu, fold_acu, report_acu


def test_before_a_conversion_every_convolution_could_be_converted(net):
    report = report_acu(net)
    assert [row.name for row in report.rows] == [
        "stem", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv10", "layer2.xconv1",
    ]  # fmt: skip
    assert {(row.converted, row.reason, row.added) for row in report.rows} == {(False, "not converted yet", 0)}
    assert (report.converted, report.skipped, report.added) == ((), report.rows, 0)


def test_a_row_holds_the_geometry(net):
    row = report_acu(net).rows[1]
    assert (row.kind, row.kernel_size, row.stride, row.dilation) == ("Conv2d", (3, 5), (1, 1), (1, 1))
    assert (row.groups, row.channels, row.aliases) == (1, (4, 4), ())
    assert report_acu(net).rows[3].groups == 8


def test_after_a_conversion_rows_say_what_was_added_or_why_not(net):
    convert_to_acu(net, exclude_modules=["stem"], position_groups=4)
    rows = {row.name: row for row in report_acu(net).rows}
    assert {name: row.added for name, row in rows.items() if row.converted} == {
        "layer1.1.conv1": 25 * 2 * 4,
        "layer1.1.conv10": 9 * 2 * 4,
        "layer2.xconv1": 9 * 2 * 4,
    }
    assert {name: row.reason for name, row in rows.items() if not row.converted} == {
        "stem": "matches exclude_modules=['stem']",
        "layer1.0.conv1": "kernel size 3x5 not among kernel_sizes=[3, 5]",
        "layer1.0.conv2": "kernel size 1x1 not among kernel_sizes=[3, 5]",
    }
    assert all(row.kind == "ACUConv2d" and not row.reason for row in rows.values() if row.converted)


def test_what_was_added_is_the_number_of_new_parameters(net):
    before = sum(parameter.numel() for parameter in net.parameters())
    convert_to_acu(net, position_groups=2)
    assert report_acu(net).added == sum(parameter.numel() for parameter in net.parameters()) - before > 0


def test_a_later_conversion_replaces_the_reason(net):
    convert_to_acu(net, exclude_modules=["stem"])
    convert_to_acu(net)
    assert [row.name for row in report_acu(net).skipped] == ["layer1.0.conv1", "layer1.0.conv2"]
    convert_to_acu(net, kernel_sizes=[1], filter_fn=lambda module, name: False)
    assert {row.reason for row in report_acu(net).skipped} == {"filter_fn said no"}


def test_the_table_is_printed(net):
    convert_to_acu(net, position_groups=2)
    text = str(report_acu(net))
    assert "Sequential: 4 of 6 convolutions active, 208 parameters added" in text
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "yes, +36" in lines["stem"]
    assert "no: kernel size 1x1" in lines["layer1.0.conv2"]
    assert "2x2" in lines["layer1.1.conv10"]
    assert "8 -> 4" in lines["layer2.xconv1"]


@pytest.mark.parametrize("pattern", ["stem[a-z]*", "stem|[/b]"])
def test_patterns_are_printed_as_they_were_written(net, pattern):
    convert_to_acu(net, exclude_modules=pattern)
    assert f"no: matches exclude_modules={pattern!r}" in str(report_acu(net))


def test_a_shared_convolution_has_one_row_and_its_other_names():
    conv = nn.Conv2d(4, 4, 3)
    model = convert_to_acu(nn.ModuleDict({"first": conv, "second": nn.Sequential(conv)}))
    [row] = report_acu(model).rows
    assert (row.name, row.aliases, row.added) == ("first", ("second.0",), 18)
    assert "= second.0" in str(report_acu(model))


def test_a_model_of_timm_that_shares_convolutions():
    model = timm.create_model("coat_lite_tiny")
    convolutions = {id(module) for module in model.modules() if isinstance(module, nn.Conv2d)}
    convert_to_acu(model)
    report = report_acu(model)
    assert len(report.rows) == len(convolutions)
    shared = [row for row in report.converted if row.aliases]
    assert shared
    for row in shared:
        assert {id(model.get_submodule(name)) for name in row.aliases} == {id(model.get_submodule(row.name))}
        assert row.added == 2 * row.kernel_size[0] * row.kernel_size[1]
    offsets = [parameter.numel() for name, parameter in model.named_parameters() if name.endswith("offsets")]
    assert (len(offsets), sum(offsets)) == (len(report.converted), report.added)


def test_the_model_itself_and_folded_layers_are_reported():
    layer = ACUConv2d(2, 4, 3, dilation=9)
    assert "(the model)" in str(report_acu(layer))
    nn.init.constant_(layer.offsets, 0.5)
    assert type(fold_acu(layer)) is FoldedConv2d
    assert [row.name for row in report_acu(layer).rows] == [f"convs.{tap}" for tap in range(9)]


def test_a_model_without_convolutions_has_an_empty_report():
    report = report_acu(nn.Linear(2, 2))
    assert report.rows == ()
    assert "Linear: 0 of 0 convolutions active" in str(report)
