"""report_acu: every convolution accounted for."""

import io

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

from lightning_acu import ACUConv2d, FoldedConv2d, convert_to_acu, fold_acu, report_acu
from lightning_acu.surgery import NoEffectWarning


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
    assert {row.reason for row in report_acu(net).skipped} == {"filter_fn returned False"}


def lines_of(report):
    """The printed lines by the first cell."""
    return {line.split("│")[1].strip(): line for line in str(report).splitlines() if line.startswith("│")}


def test_the_table_is_printed(net):
    convert_to_acu(net, position_groups=2)
    report = report_acu(net)
    assert "Sequential: 4 of 6 convolutions active, 208 parameters added" in str(report)
    lines = lines_of(report)
    assert "+36" in lines["stem"]
    assert "kernel size 1x1" in lines["layer1.0.conv2"]
    assert "2x2" in lines["layer1.1.conv10"]
    assert "8 -> 4" in lines["layer2.xconv1"]
    assert "MACs" not in str(report)


def test_skipped_layers_are_grouped_by_reason():
    report = report_acu(convert_to_acu(timm.create_model("resnet50")))
    text = str(report)
    assert "…" not in text
    assert text.count("kernel size 1x1 not among kernel_sizes=[3, 5]") == 1
    assert "36 layers:" in text
    named = {name for name in lines_of(report) if name.startswith(("layer", "conv"))}
    assert {row.name for row in report.converted} | {"conv1"} < named
    assert len(named) == 16 + 1 + 3

    console = Console(file=io.StringIO(), width=140)
    console.print(report.table(every=True))
    assert console.file.getvalue().count("kernel size 1x1 not among kernel_sizes=[3, 5]") == 36
    assert all(f"│{row.name} " in console.file.getvalue() for row in report.rows)


def test_long_names_stay_whole():
    report = report_acu(convert_to_acu(timm.create_model("coat_lite_tiny")), (3, 224, 224))
    text = str(report)
    assert all(f"= {alias}" in text for row in report.converted for alias in row.aliases)
    assert max(map(len, text.splitlines())) <= 140


def test_the_arithmetic_is_printed():
    model = convert_to_acu(timm.create_model("resnet50"))
    text = str(report_acu(model, (3, 224, 224)))
    assert (
        "convolutions: 4.09 GMACs at 3x224x224 before; folded at these positions 4.09 (1.00x); "
        "with fractional positions 7.38 (1.80x)"
    ) in text
    nn.init.constant_(model.layer1[0].conv2.offsets, 0.5)
    report = report_acu(model, (3, 224, 224))
    assert "2.78" in lines_of(report)["layer1.0.conv2"]
    assert "0.116" in lines_of(report)["layer1.0.conv2"]  # 64 * 64 * 9 * 56 * 56
    assert "1.00" in lines_of(report)["layer1.1.conv2"]
    nn.init.constant_(model.layer1[0].conv2.offsets, torch.nan)
    assert "folded at these positions impossible" in str(report_acu(model, (3, 224, 224)))
    assert "not finite" in lines_of(report_acu(model))["layer1.0.conv2"]


def test_without_an_image_the_table_says_what_folds_cost_each_layer(net):
    convert_to_acu(net)
    nn.init.constant_(net.layer1[1].conv1.offsets, 0.5)
    text = str(report_acu(net))
    assert "a fold at these positions costs 1.00x to 1.96x of a layer's arithmetic" in text
    assert "a fold of fractional positions would cost 2.78x for 3x3 layers, 1.96x for 5x5" in text
    dilated = convert_to_acu(nn.Conv2d(2, 2, 3, dilation=2, padding=2))
    assert "5.44x for 3x3 dilated 2x2 layers" in str(report_acu(dilated))


def test_a_plain_model_has_one_number(net):
    text = str(report_acu(net, (3, 33, 33)))
    assert "MMACs at 3x33x33 before" in text
    assert "folded" not in text
    assert "fold x" not in text


def test_totals_add_the_layers_up(net):
    report = report_acu(convert_to_acu(net), (3, 33, 33))
    assert report.input_size == (3, 33, 33)
    macs = {row.name: row.macs * row.pixels for row in report.rows}
    assert macs == {
        "stem": 4 * 3 * 9 * 16 * 16,
        "layer1.0.conv1": 4 * 4 * 15 * 16 * 16,
        "layer1.0.conv2": 8 * 4 * 16 * 16,
        "layer1.1.conv1": 8 * 25 * 16 * 16,
        "layer1.1.conv10": 8 * 8 * 9 * 8 * 8,
        "layer2.xconv1": 4 * 4 * 9 * 8 * 8,
    }
    assert report.macs == report.folded_macs == sum(macs.values())
    # 3x3 to 5x5, the 5x5 to 7x7; a stride leaves the kernel's padding as it is.
    grown = {"stem": 25 / 9, "layer1.1.conv1": 49 / 25, "layer1.1.conv10": 25 / 9, "layer2.xconv1": 25 / 9}
    assert report.fractional_fold_macs == pytest.approx(
        sum(macs[name] * grown.get(name, 1) for name in macs), rel=1e-12
    )
    for row in report.skipped:
        assert (row.folded_macs, row.fractional_fold_macs) == (None, None)


def test_without_an_image_there_are_no_totals(net):
    report = report_acu(convert_to_acu(net))
    assert (report.input_size, report.macs, report.folded_macs, report.fractional_fold_macs) == (None,) * 4
    assert {(row.output_sizes, row.pixels) for row in report.rows} == {((), None)}
    assert report.rows[0].macs == report.rows[0].folded_macs == 4 * 3 * 9


def test_transposed_convolutions_are_listed_in_their_place():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 4, 2, groups=2), nn.Conv2d(6, 2, 1))
    report = report_acu(convert_to_acu(model), (3, 10, 10))
    assert [row.kind for row in report.rows] == ["ACUConv2d", "ConvTranspose2d", "Conv2d"]
    row = report.rows[1]
    assert (row.reason, row.converted) == ("no rule for the class ConvTranspose2d", False)
    assert (row.kernel_size, row.channels, row.groups) == ((4, 4), (4, 6), 2)
    assert (row.output_sizes, row.macs, row.pixels) == (((18, 18),), 4 * 3 * 16, 8 * 8)
    assert "no rule for the class ConvTranspose2d" in str(report)


def test_a_conditional_convolution_has_arithmetic_but_no_fold():
    with pytest.warns(NoEffectWarning, match="8 of 17 selected convolutions of EfficientNet stay plain: 8 because"):
        model = convert_to_acu(timm.create_model("tf_efficientnet_cc_b0_4e"))
    report = report_acu(model, (3, 64, 64))
    rows = [row for row in report.rows if row.kind == "CondConv2d"]
    assert rows
    for row in rows:
        assert row.macs > 0 < row.pixels
        assert row.folded_macs is row.fractional_fold_macs is None
    assert report.macs == report.folded_macs < report.fractional_fold_macs


@pytest.mark.parametrize("pattern", ["stem[a-z]*", "stem|[/b]"])
def test_patterns_are_printed_as_they_were_written(net, pattern):
    convert_to_acu(net, exclude_modules=pattern)
    assert f"matches exclude_modules={pattern!r}" in str(report_acu(net))


def test_a_shared_convolution_has_one_row_and_its_other_names():
    conv = nn.Conv2d(4, 4, 3)
    model = convert_to_acu(nn.ModuleDict({"first": conv, "second": nn.Sequential(conv)}))
    [row] = report_acu(model).rows
    assert (row.name, row.aliases, row.added) == ("first", ("second.0",), 18)
    assert "= second.0" in str(report_acu(model))


def test_names_are_printed_as_they_are():
    model = nn.ModuleDict({"a[b]c": nn.Conv2d(4, 4, 3), ":smile:[/]": nn.Conv2d(4, 4, 1)})
    assert {"a[b]c", ":smile:[/]"} <= set(lines_of(report_acu(convert_to_acu(model))))


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
