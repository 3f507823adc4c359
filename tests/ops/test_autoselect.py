"""The choice of a backend by measurement: with clocks, devices and candidates of the test."""

import json
import logging
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from lightning_acu import ACUConv2d, acu_conv2d, report_acu, warm_up
from lightning_acu.geometry import ConvGeometry
from lightning_acu.ops import autoselect, backends, dense
from lightning_acu.ops.autoselect import Call, Selector, Verdict, selector, verdicts
from lightning_acu.ops.autoselect.calls import call_from_json, call_of, call_to_json, synthetic
from lightning_acu.ops.autoselect.measure import measure
from lightning_acu.ops.autoselect.verdicts import Store
from lightning_acu.ops.autoselect.worker import Worker
from lightning_acu.ops.op import acu_conv2d_backward_op, acu_conv2d_op
from lightning_acu.ops.triton import backend as triton_backend
from lightning_acu.tuning import model_calls, tune_calls

CPU = torch.device("cpu")
GEOMETRY = ConvGeometry((3, 2), (2, 1), (1, 0, 1, 1), (1, 1), 2)
FORWARD = Call("cuda", None, "float32", (2, 4, 7, 6), (6, 2, 3, 2), 3, GEOMETRY, channels_last=True)
BACKWARD = FORWARD._replace(needs=(True, True, True))


def fake_clock(seconds):
    """A clock that takes the time of the backend which ran last from ``seconds``, by name; and a factory of those."""
    ran = []

    def clock(run, calls):
        run()
        return seconds[ran[-1]] * calls

    def candidate(name, change=lambda results: results):
        def forward(*arguments):
            ran.append(name)
            return change([dense.forward(*arguments)])[0]

        def backward(*arguments):
            ran.append(name)
            return change(list(dense.backward(*arguments)))

        return SimpleNamespace(forward=forward, backward=backward)

    return clock, candidate


def verdict_of(change, call=FORWARD, seconds=(1.0, 2.0), **options):
    clock, candidate = fake_clock(dict(zip(("triton", "dense"), seconds, strict=True)))
    candidates = {"triton": candidate("triton", change), "dense": candidate("dense")}
    return measure(call, CPU, candidates, "dense", clock, **options)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of its own, and no selector from before."""
    monkeypatch.setenv("LIGHTNING_ACU_CACHE", str(tmp_path))
    monkeypatch.delenv("LIGHTNING_ACU_AUTO", raising=False)
    for cached in (selector.selector_of, selector._say_that_it_measures, verdicts._warn_once):
        cached.cache_clear()
    yield tmp_path / "backend_choices.json"
    selector.selector_of.cache_clear()


@pytest.mark.parametrize("call", [FORWARD, BACKWARD, FORWARD._replace(dtype="bfloat16", channels_last=False)])
def test_the_faster_of_right_backends_is_taken_from_a_gain_of_five_percent_on(call):
    assert verdict_of(lambda results: results, call) == Verdict("triton", "measured", {"triton": 1.0, "dense": 2.0})
    assert verdict_of(lambda results: results, call, seconds=(0.96, 1.0)).backend == "dense"
    assert verdict_of(lambda results: results, call, seconds=(0.94, 1.0)).backend == "triton"


def test_a_wrong_backend_is_not_taken_however_fast():
    verdict = verdict_of(lambda results: [results[0] * 1.001])
    assert (verdict.backend, verdict.outcome) == ("dense", "wrong")
    assert "triton: off by 1.0e-03 of the norm" in verdict.detail
    assert verdict.seconds == {"dense": 2.0}
    for spoil in (lambda r: r * torch.nan, torch.zeros_like):
        verdict = verdict_of(lambda results, spoil=spoil: [*results[:2], spoil(results[2])], BACKWARD)
        assert verdict.outcome == "wrong"


def test_results_are_checked_at_the_offsets_of_the_call_too():
    elsewhere = torch.full((3, 6, 2), 5.25).tolist()

    def wrong_far_out(results):  # (all taps outside the image)
        return [results[0] + 1] if not results[0].any() else results

    far = torch.full((3, 6, 2), 100.0).tolist()
    assert verdict_of(wrong_far_out, positions=elsewhere).outcome == "measured"
    assert verdict_of(wrong_far_out, positions=far).outcome == "wrong"


def test_an_exception_rules_a_backend_out_and_memory_leaves_it_open():
    def fail(error):
        def change(results):
            raise error

        return change

    verdict = verdict_of(fail(RuntimeError("no such instruction")))
    assert (verdict.backend, verdict.outcome) == ("dense", "failed")
    assert "no such instruction" in verdict.detail
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        verdict = verdict_of(fail(error))
        assert (verdict.backend, verdict.outcome, verdict.lasts) == (None, "out of memory", False)


def test_nothing_is_measured_at_zero_offsets_and_random_numbers_stay(monkeypatch):
    state = torch.get_rng_state()
    *_, offsets = synthetic(BACKWARD, CPU)
    assert offsets.shape == (3, 6, 2)
    assert offsets.abs().min() > 0
    assert offsets.abs().max() <= 1
    assert len(offsets.frac().unique()) == offsets.numel()
    timed = []

    def clock(run, calls):
        run()
        timed.append(seen[-1])
        return 1.0

    seen = []

    def forward(input, weight, offsets, bias, geometry):
        seen.append(bool(offsets.any()))
        return dense.forward(input, weight, offsets, bias, geometry)

    candidates = {"dense": SimpleNamespace(forward=forward)}
    measure(FORWARD, CPU, candidates, "dense", clock, positions=torch.zeros(3, 6, 2).tolist())
    assert all(timed)
    assert not all(seen)  # the check saw the zeros
    assert torch.equal(torch.get_rng_state(), state)


def test_signatures_part_what_differs_and_share_what_does_not():
    assert FORWARD.signature == FORWARD._replace(input=(2, 4, 6, 6)).signature  # 84 and 72 pixels
    others = [
        BACKWARD,
        FORWARD._replace(needs=(True, False, False)),
        FORWARD._replace(input=(4, 4, 7, 6)),
        FORWARD._replace(dtype="float16"),
        FORWARD._replace(position_groups=1),
        FORWARD._replace(channels_last=False),
        FORWARD._replace(tf32=True),
        FORWARD._replace(benchmark=True),
        FORWARD._replace(threads=4),
        FORWARD._replace(geometry=ConvGeometry((3, 2), (1, 1), (1, 0, 1, 1), (1, 1), 2)),
    ]
    assert len({call.signature for call in [FORWARD, *others]}) == 1 + len(others)
    for call in [FORWARD, *others]:
        assert call_from_json(json.loads(json.dumps(call_to_json(call)))) == call


# ---- The file.

FAST = Verdict("triton", "measured", {"triton": 1.0, "dense": 2.0})


def test_verdicts_are_kept_by_device_and_the_first_writer_decides(tmp_path):
    path = tmp_path / "new" / "choices.json"
    mine, other = Store(path, "H200 | torch 2"), Store(path, "A100 | torch 2")
    late = Store(path, "H200 | torch 2")
    mine.add("a", FAST)
    other.add("a", Verdict("dense", "crashed"))
    late.add("a", Verdict("dense"))
    assert late.verdicts["a"] == FAST
    assert Store(path, "H200 | torch 2").verdicts == {"a": FAST}
    assert Store(path, "A100 | torch 2").verdicts["a"].outcome == "crashed"
    assert Store(path, "H200 | torch 3").verdicts == {}
    late.add("a", Verdict("dense"), replace=True)
    assert Store(path, "H200 | torch 2").verdicts == {"a": Verdict("dense")}
    mine.add("b", Verdict(None, "out of memory"))
    assert set(Store(path, "H200 | torch 2").verdicts) == {"a"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "[" * 100_000,
        '{"sm_90": {"tiles": {}}}',
        '{"format": "lightning_acu backend choices 2", "devices": {}}',
        '{"format": "lightning_acu backend choices 1", "devices": {"key": {"a": {"backend": "os.system"}}}}',
        '{"format": "lightning_acu backend choices 1", "devices": {"key": 1}}',
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning_and_left_alone(tmp_path, caplog, text):
    path = tmp_path / "choices.json"
    path.write_text(text)
    verdicts._warn_once.cache_clear()
    for _ in range(2):
        store = Store(path, "key")
        store.add("a", FAST)
    assert store.verdicts == {"a": FAST}
    assert len(caplog.records) == 1
    assert f"{path} is ignored" in caplog.text
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "choices.json", "key")
    store.add("a", FAST)
    assert store.verdicts == {"a": FAST}
    assert "cannot be written" in caplog.text or "is ignored" in caplog.text


def test_two_processes_write_one_file(tmp_path):
    path = tmp_path / "choices.json"
    code = (
        "import sys; from pathlib import Path; from lightning_acu.ops.autoselect.verdicts import Store, Verdict\n"
        f"store = Store(Path({str(path)!r}), 'key')\n"
        "for i in range(20): store.add(f'{sys.argv[1]} {i}', Verdict('dense'))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(Store(path, "key").verdicts) == 40


# ---- The process that measures.


def worker(body, **limits):
    """A worker that speaks the protocol by hand."""
    code = (
        f"import os, sys, time\nprint('noise')\nprint('lightning_acu: ready', flush=True)\nsys.stdin.readline()\n{body}"
    )
    return Worker((sys.executable, "-c", code), **{"start_seconds": 60, "call_seconds": 60} | limits)


def test_a_crash_or_a_hang_of_the_worker_means_dense():
    verdict = worker("os.kill(os.getpid(), 11)").measure(FORWARD, CPU, "dense")
    assert (verdict.backend, verdict.outcome, verdict.lasts) == ("dense", "crashed", True)
    assert "status -11" in verdict.detail
    verdict = worker("time.sleep(60)", call_seconds=0.2).measure(FORWARD, CPU, "dense")
    assert (verdict.backend, verdict.outcome) == ("dense", "hung")


def test_a_worker_that_does_not_start_leaves_the_rule():
    for command in (("no-such-program",), (sys.executable, "-c", "raise SystemExit(3)")):
        verdict = Worker(command).measure(FORWARD, CPU, "dense")
        assert (verdict.backend, verdict.outcome, verdict.lasts) == (None, "not started", False)
    assert "status 3" in verdict.detail


def test_the_worker_measures_and_starts_again_after_it_was_idle():
    call = FORWARD._replace(device="cpu")
    one = Worker()
    verdict = one.measure(call, CPU, "cython", torch.zeros(3, 6, 2).tolist())
    assert verdict.outcome == "measured"
    assert set(verdict.seconds) == {"cython", "dense"}
    one._process.terminate()
    one._process.wait()
    assert one.measure(call, CPU, "cython").outcome == "measured"
    one.stop()


# ---- The choice.


def counting(verdict=FAST):
    asked = []

    def measure(call, device, rule, positions):
        asked.append((call, positions))
        return verdict

    return measure, asked


def test_a_call_is_measured_once_and_logged_once(caplog):
    caplog.set_level(logging.INFO, "lightning_acu")
    measure, asked = counting()
    chosen = Selector(CPU, Store(None, "key"), measure, "measure")
    for _ in range(3):
        assert chosen.choose(FORWARD, "dense", positions=lambda: [1.0]) == "triton"
    assert asked == [(FORWARD, [1.0])]
    assert sum(FORWARD.signature in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("outcome", ["measured", "wrong"])
def test_situations_and_modes_in_which_nothing_is_measured(outcome):
    measure, asked = counting()
    known = Store(None, "key")
    known.verdicts[FORWARD.signature] = Verdict("dense", outcome)
    for mode, situation, expected_new, expected_known in [
        ("rules", None, "rule", "dense"),
        ("off", None, "rule", "rule"),
        ("off", "capture", "rule", "rule"),
        ("measure", "deterministic", "rule", "rule"),
        ("measure", "sync debug", "rule", "dense"),
        ("measure", "capture", "triton", "triton" if outcome == "measured" else "dense"),
    ]:
        assert Selector(CPU, Store(None, "key"), measure, mode).choose(FORWARD, "rule", situation) == expected_new
        assert Selector(CPU, known, measure, mode).choose(FORWARD, "rule", situation) == expected_known
    assert not asked


def test_threads_measure_once():
    started = threading.Barrier(4)
    asked = []

    def measure(call, device, rule, positions):
        asked.append(call)
        threading.Event().wait(0.05)
        return FAST

    chosen = Selector(CPU, Store(None, "key"), measure, "measure")
    found = []

    def run():
        started.wait()
        found.append(chosen.choose(FORWARD, "dense"))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["triton"] * 4
    assert len(asked) == 1


def test_what_was_out_of_memory_is_not_tried_again_in_this_process():
    measure, asked = counting(Verdict(None, "out of memory"))
    chosen = Selector(CPU, Store(None, "key"), measure, "measure")
    assert [chosen.choose(FORWARD, "dense") for _ in range(2)] == ["dense"] * 2
    assert len(asked) == 1


def test_the_situation_is_torchs():
    assert selector.situation(CPU) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert selector.situation(CPU) == "deterministic"
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_environment_variable_is_checked(monkeypatch, cache):
    monkeypatch.setenv("LIGHTNING_ACU_AUTO", "fast")
    with pytest.raises(ValueError, match=r"LIGHTNING_ACU_AUTO \(='fast'\) must be one of measure, rules, off"):
        acu_conv2d(torch.randn(1, 3, 6, 5), torch.randn(4, 3, 3, 3), torch.rand(9, 2))


def test_a_cpu_measures_nothing_by_itself_and_follows_what_was_measured(cache, monkeypatch):
    layer = ACUConv2d(3, 8, 3, padding=1)
    torch.nn.init.uniform_(layer.offsets, -0.7, 0.7)
    image = torch.randn(1, 3, 12, 10)
    layer(image).sum().backward()
    assert not cache.exists()

    found = warm_up(layer, image)
    assert len(found) == 2  # forward; backward without the gradient of the image
    assert set(found.values()) <= {"cython", "dense"}
    assert cache.exists()

    text = json.loads(cache.read_text())
    for entries in text["devices"].values():
        for entry in entries.values():
            entry["backend"] = "dense"
    cache.write_text(json.dumps(text))
    selector.selector_of.cache_clear()
    assert backends.planned(image, layer.weight, layer.active_offsets(), layer.geometry) == "dense"
    (row,) = report_acu(layer, (3, 12, 10)).rows
    assert row.backends == ("dense", "cython")  # a backward pass with all gradients was not measured
    assert "dense / cython" in str(report_acu(layer, (3, 12, 10)))
    monkeypatch.setenv("LIGHTNING_ACU_AUTO", "off")
    selector.selector_of.cache_clear()
    assert backends.planned(image, layer.weight, layer.active_offsets(), layer.geometry) == "cython"
    assert warm_up(layer, image) == {}


def test_zero_offsets_stay_f_conv2d_whatever_was_measured(cache):
    layer = ACUConv2d(3, 8, 3, padding=1)
    image = torch.randn(1, 3, 12, 10)
    chosen = selector.selector_of(CPU)
    call = call_of(image, layer.weight, layer.active_offsets(), layer.geometry, None)
    chosen.store.verdicts[call.signature] = Verdict("cython")
    assert backends.planned(image, layer.weight, layer.active_offsets(), layer.geometry) == "dense"


def test_calls_of_a_model_are_seen_in_eval_mode_and_leave_it_as_it_was(cache):
    model = torch.nn.Sequential(ACUConv2d(3, 4, 3), torch.nn.BatchNorm2d(4), ACUConv2d(4, 4, 3), ACUConv2d(4, 4, 3))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = model_calls(model.train(), torch.randn(2, 3, 20, 18))
    assert [call.needs for call in calls[:4]] == [None, (False, True, True), None, (True, True, True)]
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not autoselect.selector._recorded

    measure, asked = counting(Verdict("dense"))
    verdicts = list(tune_calls(calls, Selector(CPU, Store(None, "key"), measure, "rules")))
    assert len(verdicts) == len(asked) == len(calls)


# ---- Other devices, and graphs.


def test_other_devices_take_dense_and_say_so_once(caplog):
    caplog.set_level(logging.INFO, "lightning_acu")
    selector.uses_dense_only.cache_clear()
    for device in ("mps", "xpu", "mps"):
        tensor = SimpleNamespace(is_cuda=False, device=torch.device(device))
        assert not triton_backend.prefers(tensor, tensor, tensor, None)
        assert "GPUs of NVIDIA and AMD" in triton_backend.why_not(tensor)
    assert [record.message.split()[1] for record in caplog.records] == ["mps", "xpu"]


def test_a_gpu_asks_the_selector_where_triton_can_run(monkeypatch):
    asked = []
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), numel=lambda: 1)
    monkeypatch.setattr(triton_backend, "measured", lambda input: False)
    monkeypatch.setattr(triton_backend, "choose", lambda *arguments: asked.append(arguments[-1]) or "triton")
    monkeypatch.setattr(triton_backend, "why_not", lambda input: "no compiler")
    assert not triton_backend.prefers(tensor, tensor, tensor, None)
    monkeypatch.setattr(triton_backend, "why_not", lambda input: None)
    assert triton_backend.prefers(tensor, tensor, tensor, None)
    assert asked == ["dense"]


@pytest.mark.parametrize("operator", [acu_conv2d_op, acu_conv2d_backward_op])
def test_cuda_graphs_of_torch_compile_leave_the_operators_out(operator):
    assert torch.Tag.cudagraph_unsafe in operator._opoverload.tags
