"""What a folded network costs in the runtimes that ship it: latency over the plain one's, file size, difference.

    OMP_NUM_THREADS=1 python benchmarks/deployment.py --out docs/benchmarks

Each network has random weights and is converted, and its taps are moved by up to ``--by`` pixels: "fractional". The
same network with its taps rounded to whole pixels: "pixels"; to the nearest dilated convolutions: "dilation". RepVGG is
merged before it is converted. One image of 224x224, one thread; latencies are medians of calls in turns, in the
process's CPU time, which other programs on the machine disturb less. ONNX Runtime and OpenVINO run the file that
``export_model`` wrote, torch the model folded by the rule for it (``--form``: in another form).
"""

import argparse
import copy
import csv
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from timing import device_name, slug, versions
from timm.utils import reparameterize_model
from torch import nn

from lightning_acu import acu_layers, convert_to_acu, round_acu
from lightning_acu.export import export_model
from lightning_acu.surgery.fold import fold_by
from lightning_acu.surgery.fold_rule import cheapest_form
from lightning_acu.surgery.fold_times import in_turns
from lightning_acu.surgery.outputs import difference

MODELS = {
    "ResNet-50": "resnet50",
    "MobileNetV3": "mobilenetv3_large_100",
    "EfficientNet-B0": "efficientnet_b0",
    "RepVGG-A0": "repvgg_a0",
}
RUNTIMES = ("torch", "torch.compile", "onnxruntime", "openvino")
COLUMNS = ("network", "runtime", "variant", "form", "milliseconds", "ratio", "megabytes", "difference")


def variants(name, by):
    """{variant: network in eval mode}, before any fold."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=1000).eval()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):  # some start at 0, so that the branch would not count in the output
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    if name.startswith("repvgg"):
        plain = reparameterize_model(plain)
    found = {"plain": plain, "fractional": convert_to_acu(copy.deepcopy(plain))}
    for _, layer in acu_layers(found["fractional"]):
        nn.init.uniform_(layer.offsets, -by, by)
    found["pixels"] = round_acu(copy.deepcopy(found["fractional"]))
    found["dilation"] = round_acu(copy.deepcopy(found["fractional"]), to="dilation")
    return found


def folded(model, image, form):
    """A folded copy for torch."""
    choose = (lambda layer, arguments: cheapest_form(layer, arguments, "torch")) if form == "auto" else None
    return fold_by(copy.deepcopy(model), image, form, choose)


def torch_calls(models, image, form, compiled):
    for variant, model in models.items():
        network = folded(model, image, form)
        worst = difference([network(image)], [model(image)])
        run = torch.compile(network) if compiled else network
        yield variant, (lambda run=run: run(image)), 0.0, worst


def file_calls(models, image, form, runtime, folder):
    for variant, model in models.items():
        path = folder / f"{variant}.onnx"
        if not path.exists():
            export_model(model, path, input_size=tuple(image.shape[1:]), form=form, dynamic_batch=False)
        call = {"onnxruntime": onnxruntime_call, "openvino": openvino_call}[runtime](path, image)
        worst = difference([torch.from_numpy(call())], [model(image)])
        yield variant, call, path.stat().st_size / 1e6, worst


def onnxruntime_call(path, image):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"images": image.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino_call(path, image):
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    array = image.numpy()
    return lambda: next(iter(request.infer([array]).values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--form", default="auto", help="of the folds")
    parser.add_argument("--by", type=float, default=1.2, help="pixels that taps move at most")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--budget", type=float, default=10, help="seconds for a network in a runtime")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(device_name("cpu"), versions("torch", "onnxruntime", "openvino"))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"deployment_{slug(device_name('cpu'))}.csv"
    image = torch.randn(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    with path.open("w", newline="") as file, torch.no_grad():
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for network in options.models:
            models = variants(MODELS[network], options.by)
            with tempfile.TemporaryDirectory() as folder:
                for runtime in options.runtimes:
                    try:
                        if runtime.startswith("torch"):
                            found = [*torch_calls(models, image, options.form, runtime == "torch.compile")]
                        else:
                            found = [*file_calls(models, image, options.form, runtime, Path(folder))]
                        calls = {variant: call for variant, call, _, _ in found}
                        times = in_turns(calls, options.budget, time.process_time)
                    except ImportError as error:
                        print(f"{runtime} is left out: {error}")
                        continue
                    medians = {variant: statistics.median(each) * 1e3 for variant, each in times.items()}
                    for variant, _, megabytes, worst in found:
                        ratio = medians[variant] / medians["plain"]
                        row = (network, runtime, variant, options.form, f"{medians[variant]:.2f}", f"{ratio:.2f}")
                        writer.writerow((*row, f"{megabytes:.1f}" if megabytes else "", f"{worst:.1e}"))
                        print(*row, f"{megabytes:.1f} MB, {worst:.1e}", flush=True)
                    file.flush()
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
