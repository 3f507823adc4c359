"""Times of the forms of a fold in the runtime that will compute them, on images of the layer's real size."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..checks import require_package
from ..conv import ACUConv2d
from .fold_rule import prices
from .outputs import Arguments, map_tensors

__all__ = ["fastest_form", "in_turns", "onnx_session", "quiet_export", "runner"]

#: Forms that the rule expects to take so many times longer than the cheapest are not measured.
_HOPELESS = 3.0

#: Seconds for the measurements of one layer, besides what preparing them takes.
_BUDGET = 0.3


def fastest_form(layer: ACUConv2d, arguments: Arguments, runtime: str) -> str:
    """The form that takes the least time in ``runtime``: median of calls in turns, of random images.

    Args:
        layer: an active convolution.
        arguments: what it is called with, on the meta device.
        runtime: "torch" (eager, with as many threads as torch has now, on the layer's device) or "onnxruntime" (on the
            CPU, with as many threads).

    Raises:
        ModuleNotFoundError: a package for ONNX Runtime is not installed.
    """
    expected = prices(layer, arguments, runtime)
    forms = [form for form, price in expected.items() if price <= _HOPELESS * min(expected.values())]
    if len(forms) == 1:
        return forms[0]
    generator = torch.Generator().manual_seed(0)
    args, kwargs = map_tensors(
        lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(layer.weight),
        arguments,
    )
    image = (*args, *kwargs.values())[0].detach()
    with torch.no_grad():
        calls = {form: runner(layer.fold(form).eval(), image, runtime) for form in forms}
        times = in_turns(calls, _BUDGET)
    medians = {form: statistics.median(values) for form, values in times.items()}
    return min(medians, key=medians.__getitem__)


def runner(module: nn.Module, image: Tensor, runtime: str) -> Callable[[], object]:
    """A call of ``module`` with ``image`` in ``runtime``.

    In ONNX Runtime it stands between two depthwise 1x1 convolutions, because inside a network images have that
    runtime's own layout, which some operations have to undo.
    """
    if runtime == "torch":

        def call() -> None:
            module(image)
            if image.is_cuda:
                torch.cuda.synchronize(image.device)

        return call
    image = image.cpu().float()
    module = module.cpu().float()
    before, after = (
        nn.Conv2d(channels, channels, 1, groups=channels, bias=False, device="cpu", dtype=torch.float32)
        for channels in (image.shape[-3], module(image).shape[-3])
    )
    network = nn.Sequential(before, nn.ReLU(), module, nn.ReLU(), after).eval()
    session = onnx_session(network, image)
    feed = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, feed)


def onnx_session(network: nn.Module, image: Tensor):  # type: ignore[no-untyped-def]
    """An ``onnxruntime.InferenceSession`` of ``network`` for one size of image, with as many threads as torch has."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require_package(name, "folding for ONNX Runtime")
    import onnxruntime

    with quiet_export(), torch.no_grad():
        # (ONNX Runtime does not fuse the padding that the older exporter writes.)
        program = torch.onnx.export(network, (image,), dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@contextmanager
def quiet_export() -> Iterator[None]:
    """Silence the exporters' warnings and log messages."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def in_turns(
    calls: Mapping[str, Callable[[], object]], budget: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call by ``clock``, many times, for ``budget`` seconds; in turns, after a call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, call in calls.items():
            began = clock()
            call()
            times[name].append(clock() - began)
    return times
