"""The benchmarks run, say what could not, and notice a wrong result. What they measure is no test."""

import csv
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.fast_oracle import acu_conv2d_closed_form
from helpers.oracle import assert_close
from torch import nn

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHORT = ["--batch", "1", "--samples", "1", "--budget", "0.01", "--only", "GoogLeNet 16"]


@pytest.fixture
def modules(monkeypatch):
    """A function that imports a module of benchmarks/, where `layers` is another one than that of the tests."""
    names = [path.stem for path in BENCHMARKS.glob("*.py")]
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def run(modules, monkeypatch, capsys, tmp_path):
    """A function that runs a script: (what it printed, its exit status, the rows of its file)."""
    threads = torch.get_num_threads()

    def run(script, *options):
        monkeypatch.setattr(sys, "argv", [script, *options, "--threads", "1", "--out", str(tmp_path)])
        monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))  # for processes that it starts
        status = modules(script).main()
        (path,) = tmp_path.glob("*.csv")
        with path.open(newline="") as file:
            return capsys.readouterr().out, status, [*csv.DictReader(file)]

    yield run
    torch.set_num_threads(threads)


def test_every_method_is_measured_or_said_to_be_unable(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "DCLS.construct.modules", None)  # not installed
    printed, status, rows = run("bench_acu_conv2d", "--dtype", "bfloat16", *SHORT)
    assert status == 0
    assert {row["method"] for row in rows} == {"plain", "ours", "dense"}
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    for method in ("dcls", "dcls-autocast"):
        assert f"problem: {method} cannot run: ModuleNotFoundError: " in printed
    assert "problem: deform cannot run: " in printed
    assert "1 of 1 layers in bfloat16" in printed


def test_without_matplotlib_there_is_no_chart_and_a_line_says_so(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)  # not installed
    printed, status, rows = run("bench_acu_conv2d", "--methods", "plain", "ours", "deform", *SHORT)
    assert status == 0
    assert "no chart: ModuleNotFoundError: " in printed
    assert not [*tmp_path.glob("*.png")]
    assert len(rows) == 2 * 3
    assert all(float(row["difference"]) < 1e-4 for row in rows if row["method"] != "plain")


def test_memory_is_measured_and_what_fails_there_is_said(run):
    printed, status, rows = run("bench_acu_conv2d", "--memory", "--methods", "ours", "deform-autocast", *SHORT)
    assert status == 0
    assert [row["method"] for row in rows] == ["ours"]
    assert float(rows[0]["megabytes"]) >= 0
    assert "deform-autocast cannot run: RuntimeError: ValueError: autocast goes to bfloat16 or float16" in printed


def test_layers_without_time_are_named(run):
    printed, status, rows = run("bench_acu_conv2d", "--kind", "dense5x5", "--limit", "0", "--only", "GoogLeNet")
    assert status == 0
    assert not rows
    assert "no time (--limit 0) for GoogLeNet 16->32@28 5x5, GoogLeNet 32->96@28 5x5" in printed
    assert "0 of 2 layers" in printed


def test_the_reference_equals_float64_loops(modules):
    case = _case(modules, torch.bfloat16)
    arrays = [t.detach().double() for t in (case.input, case.weight, case.offsets[None])]
    bias, grad = torch.zeros(4), case.grad.double()
    expected = acu_conv2d_closed_form(*arrays, bias, grad, stride=(2, 2), corner=(1, 1), dilation=(1, 1), groups=2)
    for found, exact in zip(modules("methods").reference(case), expected[:4], strict=True):
        assert_close(found.double(), torch.from_numpy(exact).reshape(found.shape), 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_methods_that_do_not_round_positions_agree(modules, dtype):
    methods, problems = modules("methods"), modules("tables").Problems()
    names = {"float32": ["plain", "ours", "dense", "dcls", "deform"]}.get(
        dtype, ["plain", "ours", "dense", "dcls-autocast"]
    )
    if importlib.util.find_spec("DCLS") is None:
        names = [name for name in names if not name.startswith("dcls")]
    case = _case(modules, getattr(torch, dtype))
    found, grads, differences = methods.prepare(case, names, "auto", methods.TOLERANCES[dtype], problems)
    assert [*problems.sentences()] == []
    assert [*found] == [*grads] == names
    assert [*differences] == names[1:]


@pytest.mark.parametrize(("wrong", "where"), [(1.01, "the output by 1.0e-02"), (torch.nan, "the output by nan")])
def test_a_wrong_result_is_a_serious_problem(modules, monkeypatch, wrong, where):
    methods, problems = modules("methods"), modules("tables").Problems()
    right = methods.acu_conv2d
    monkeypatch.setattr(methods, "_acu", lambda case, backend: _wrong(methods, case, right, wrong))
    methods.prepare(_case(modules, torch.float32), ["ours"], "auto", 1e-4, problems)
    (sentence,) = problems.sentences()
    assert sentence.startswith(f"ours differs from float32 in {where}")
    assert problems.serious()


def test_problems_of_peers_are_not_serious_and_are_told_once(modules):
    problems = modules("tables").Problems()
    for layer in "abc":
        problems.add("deform", "cannot run: no", layer)
    assert [*problems.sentences()] == ["deform cannot run: no (a and 2 more layers)"]
    assert not problems.serious()
    problems.add("plain", "cannot run: no", "a")
    assert problems.serious()


@pytest.mark.parametrize("name", ["resnet50", "resnet18"])
def test_all_3x3_layers_of_resnets_are_measured(modules, name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model, image, found = timm.create_model(name).eval(), torch.empty(1, 3, 224, 224), set()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(
                lambda m, given: found.add((m.in_channels, m.out_channels, given[0].shape[-1], m.stride[0]))
            )
    model(image)
    layers = modules("layers").LAYERS
    listed = {(at.c_in, at.c_out, at.size, at.stride) for at in layers if at.kind == "dense3x3"}
    assert len(found) == 7
    assert found <= listed


SMALL = ["--size", "32", "--batch", "2", "--samples", "1", "--warm-up", "1"]


def test_an_arm_that_fails_leaves_the_others(run):
    printed, status, rows = run("train_step", "--models", "test_resnet", *SMALL, "--compile", "nonsense")
    assert status == 1
    assert [(row["mode"], row["arm"]) for row in rows] == [("eager", arm) for arm in ("plain", "ours", "dense")]
    for arm in ("plain", "ours"):
        assert f"problem: test_resnet, compiled, {arm}: InvalidBackend: Invalid backend: 'nonsense'" in printed


def test_a_network_that_fails_leaves_the_others(run):
    given = ["--models", "no_such_net", "test_resnet", "--autocast", "bfloat16", "--compile", "eager"]
    printed, status, rows = run("train_step", *given, *SMALL)
    assert status == 1
    assert [(row["mode"], row["arm"]) for row in rows[3:]] == [("compiled", "plain"), ("compiled", "ours")]
    assert "problem: no_such_net, eager: RuntimeError: Unknown model" in printed
    assert re.search(r"test_resnet, autocast bfloat16, batch 2, compiled +1 .* ms .* ms \(\d", printed)
    assert "rows: 5, problems: 2" in printed


def test_depthwise_layers_are_measured_with_positions_for_each_channel(run):
    _, status, rows = run("depthwise", "--batch", "1", "--budget", "0.01", "--only", "480@14")
    assert status == 0
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert row["layer"] == "EfficientNet 480@14 3x3"
        assert all(float(row[name]) > 0 for name in ("one set", "channels", "dense", "shift", "shift+1x1"))


def test_displacement_at_the_rate_that_is_found_and_at_one_that_is_given(run):
    pytest.importorskip("mlxtend")
    printed, _, rows = run("displacement", "--steps", "12", "--target", "1", "--optimizers", "SGD")
    assert [row["pixels_per_step"] for row in rows] == ["0.241"]  # 8 * 1 ** 2 * (1 - 0.9) / sqrt(11 steps)
    assert 0 < float(rows[0]["mean_displacement"]) < 11 * 0.241 * 10
    assert "optimizer SGD, normalize gradient, steps 12, pixels_per_step 0.241" in printed
    _, _, rows = run("displacement", "--steps", "12", "--pixels", "0.003", "--normalize", "momentum")
    assert [(row["optimizer"], row["pixels_per_step"]) for row in rows] == [("SGD", "0.003"), ("AdamW", "0.003")]


def _case(modules, dtype):
    """A layer whose sizes all differ."""
    layers = modules("layers")
    layer = layers.Layer("dense3x3", "small", 6, 4, 7, stride=2, groups=2)
    return layers.Case(layer, 3, "cpu", dtype, torch.channels_last, seed=0)


def _wrong(methods, case, right, factor):
    def forward():
        return right(case.input, case.weight, case.offsets, **case.configuration) * factor

    return methods.Method(forward, [case.input, case.weight, case.offsets])


def test_accuracy_of_rounded_networks_has_a_row_for_each_arm(run):
    printed, status, rows = run("rounded_accuracy", "--seeds", "1", "--epochs", "1", "--batches", "10")
    assert status == 0
    arms = ["plain", "dilation 2", "fractional", "pixels", "dilations", "dilations, annealed", "found, from scratch"]
    assert [row["arm"] for row in rows] == arms
    assert all(0 <= float(row["accuracy"]) <= 100 for row in rows)
    assert all(f"| {arm} |" in printed for arm in arms)


def test_forms_of_a_fold_are_measured_and_a_rule_is_fitted(run):
    printed, status, rows = run(
        "fold_forms", "--only", "GoogLeNet 16", "--taps", "whole", "--runtimes", "torch", "--budget", "0.01"
    )
    assert status == 0
    assert [row["form"] for row in rows] == ["plain", "auto", "sum", "depthwise", "shifts"]
    assert float(rows[0]["ratio"]) == 1
    assert '"torch": (' in printed
    assert "1 layers: the rule's choice takes" in printed


def test_a_folded_network_is_measured_as_it_is_shipped(run, modules, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(modules("deployment"), "MODELS", {"tiny": "test_resnet"})
    _, status, rows = run(
        "deployment", "--models", "tiny", "--runtimes", "torch", "onnxruntime", "--size", "32", "--budget", "0.01"
    )
    assert status == 0
    assert {row["runtime"] for row in rows} == {"torch", "onnxruntime"}
    assert [row["variant"] for row in rows][:3] == ["plain", "fractional", "pixels"]
    assert all(float(row["difference"]) < 1e-4 for row in rows)
    assert all(float(row["megabytes"]) > 0 for row in rows if row["runtime"] == "onnxruntime")


def test_narrow_layers(modules, tmp_path, capsys, monkeypatch):
    threads = torch.get_num_threads()
    narrow = modules("narrow")
    try:
        narrow.main(["--only", "4 -> 8 @28", "--seconds", "0.01", "--out", str(tmp_path)])
        with pytest.raises(SystemExit):
            narrow.main(["--only", "no such layer"])
        assert "no layer is called so; there are 4 -> 4 @28, 3x3" in capsys.readouterr().err
        monkeypatch.setattr(narrow.dense, "forward", lambda *args: torch.ones(64, 8, 14, 14))
        with pytest.raises(RuntimeError, match="cython and dense differ"):
            narrow.main(["--only", "4 -> 8 @28", "--seconds", "0.01", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    with (tmp_path / "narrow.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["layer"] == "4 -> 8 @28, 3x3, stride 2"
    assert all(float(value) > 0 for name, value in line.items() if name.startswith(("cython", "dense")))
