"""What a call costs besides its arithmetic: a depthwise layer so small that nearly all of the time is overhead.

    python benchmarks/call_overhead.py

"direct" is acu_conv2d as it is called in a model; "operator" is the same through torch's dispatcher, as compiled or
profiled programs call it; "zero offsets" is a layer whose taps have not moved. Microseconds, medians of calls in turns.
"""

import argparse
import statistics

import torch
from timing import device_name, in_turns
from torch.nn.functional import conv2d

from lightning_acu import acu_conv2d
from lightning_acu.ops import acu_conv2d_op

CHANNELS, SIZE = 64, 7


def through_the_operator(input, weight, offsets):
    return acu_conv2d_op(input, weight, offsets[None], None, (1, 1), (1, 1, 1, 1), (1, 1), CHANNELS, "auto")


def step(call, wanted, grad):
    return lambda: torch.autograd.grad(call(), wanted, grad)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = options.device
    input = torch.randn(1, CHANNELS, SIZE, SIZE, device=device).to(memory_format=torch.channels_last)
    weight, offsets = torch.randn(CHANNELS, 1, 3, 3, device=device), torch.rand(9, 2, device=device) * 2 - 1
    grad, zeros = torch.randn_like(input), torch.zeros_like(offsets)
    tensors = [tensor.requires_grad_() for tensor in (input, weight, offsets)]
    calls = {
        "plain": lambda: conv2d(input, weight, padding=1, groups=CHANNELS),
        "direct": lambda: acu_conv2d(input, weight, offsets, padding=1, groups=CHANNELS),
        "operator": lambda: through_the_operator(input, weight, offsets),
        "zero offsets": lambda: acu_conv2d(input, weight, zeros, padding=1, groups=CHANNELS),
    }
    moving = {"direct", "operator"}
    steps = {name: step(call, tensors if name in moving else tensors[:2], grad) for name, call in calls.items()}
    print(f"{device_name(device)}, {options.threads} thread(s), {CHANNELS}@{SIZE}x{SIZE} depthwise 3x3, 1 image")
    for what, group in (("forward", calls), ("forward+backward", steps)):
        with torch.set_grad_enabled(group is steps):
            for call in group.values():
                call()
            times = in_turns(group, device, budget=2.0, most=200, least=dict.fromkeys(group, 50))
        found = "  ".join(f"{name} {statistics.median(values) * 1e6:.0f}" for name, values in times.items())
        print(f"{what}: {found}")


if __name__ == "__main__":
    main()
