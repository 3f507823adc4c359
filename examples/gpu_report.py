"""How active convolutions run on your GPU, as a small JSON file to attach to an issue of lightning_acu.

    python examples/gpu_report.py --out gpu_report.json

It measures 3x3 layers of ResNet and depthwise ones of EfficientNet, forward and backward, in a process of its own:
kernels that crash or hang do no harm. It takes some minutes, and sends nothing anywhere.
Without a GPU it reports the CPU.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from lightning_acu import __version__
from lightning_acu.geometry import ConvGeometry
from lightning_acu.ops.autoselect import Call, Selector, selector_of
from lightning_acu.ops.autoselect.verdicts import Store, device_key
from lightning_acu.tuning import tune_calls

#: (channels, side of the image, groups)
LAYERS = [(64, 56, 1), (128, 28, 1), (256, 14, 1), (512, 7, 1), (144, 56, 144), (480, 14, 480)]


def calls(device: torch.device, dtype: str, batch: int) -> list[Call]:
    """Both passes of each layer."""
    threads = 0 if device.type == "cuda" else torch.get_num_threads()
    return [
        Call(
            device.type, needs, dtype, (batch, channels, side, side), (channels, channels // groups, 3, 3), 1,
            ConvGeometry((3, 3), padding=(1, 1, 1, 1), groups=groups), channels_last=True, threads=threads,
        )
        for channels, side, groups in LAYERS
        for needs in (None, (True, True, True))
    ]  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_report.json"))
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    # Nothing of the user's cache is read or changed.
    selector = Selector(device, Store(None, device_key(device)), selector_of(device).measurement, "measure")
    rows = []
    for call, verdict in tune_calls(calls(device, dtype, options.batch), selector):
        print(f"{call.signature}: {verdict}", flush=True)
        rows.append({"call": call.signature, **asdict(verdict)})
    report = {"lightning_acu": __version__, "device": device_key(device), "batch": options.batch, "layers": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{options.out} written")


if __name__ == "__main__":
    main()
