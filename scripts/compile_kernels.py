"""Compiles the Triton kernels as the layers of networks launch them, without a GPU, and reads what came out.

    python scripts/compile_kernels.py                                # sm_90
    python scripts/compile_kernels.py --targets sm_80 sm_90 gfx942 --dtypes bfloat16 float16 float32

A line for each kernel and set of compile-time numbers: registers, spilled bytes, shared memory, tensor-core
instructions. Exits with 1 where a kernel spills, where shared memory exceeds the chip's, or where a matrix product has
no tensor-core instruction. The launches are those of the backend itself, recorded instead of run.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lightning_acu.geometry import ConvGeometry
from lightning_acu.ops import triton_gpu

#: (C_in, C_out, size, kernel, stride, groups, position groups)
LAYERS = [
    (64, 64, 56, 3, 1, 1, 1),
    (256, 512, 14, 3, 2, 1, 1),
    (48, 64, 28, 5, 1, 1, 1),
    (128, 128, 28, 3, 1, 32, 1),
    (64, 96, 28, 3, 1, 1, 3),
    (144, 144, 56, 3, 1, 144, 1),
    (240, 240, 28, 5, 2, 240, 240),
]
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
PRODUCTS = {"_product_kernel", "triton_cells._input_kernel", "triton_cells._weight_kernel"}


def launches(dtype, layers=LAYERS):
    """{(name, what it is compiled for): (kernel, arguments, options)} of forward and backward of the layers."""
    found = {}

    def record(kernel, *given, grid, warmup, **named):
        arguments = dict(zip(kernel.arg_names, given, strict=False))
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        arguments |= named
        name = kernel.fn.__name__
        name = (
            f"{kernel.fn.__module__.rpartition('.')[2]}.{name}" if name in ("_input_kernel", "_weight_kernel") else name
        )
        signature, constants, divisible = specialise(kernel, arguments)
        key = name, str(signature), str(constants), str(options)
        found.setdefault(key, (kernel, name, signature, constants, divisible, options))

    with mock.patch.object(JITFunction, "run", record):
        for c_in, c_out, size, kernel, stride, groups, positions in layers:
            geometry = ConvGeometry((kernel, kernel), (stride, stride), (kernel // 2,) * 4, (1, 1), groups)
            input = torch.empty(16, c_in, size, size, dtype=dtype, memory_format=torch.channels_last)
            weight = torch.empty(c_out, c_in // groups, kernel, kernel, dtype=dtype)
            offsets = torch.zeros(positions, kernel * kernel, 2)
            output = triton_gpu.forward(input, weight, offsets, None, geometry)
            triton_gpu.backward(output, input, weight, offsets, geometry, [True] * 3)
    return list(found.values())


def specialise(kernel, arguments):
    """What Triton's launcher makes of the arguments: types, constants, and which are multiples of 16."""
    signature, constants, divisible = {}, {}, []
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            divisible.append(index)  # torch aligns to more than 16 bytes
        else:
            signature[name] = "i32"
            divisible += [index] * (value % 16 == 0)
    return signature, constants, {(index,): [["tt.divisibility", 16]] for index in divisible}


def resources(cubin):
    """Registers, spilled bytes and tensor-core instructions, by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = os.pathsep.join([str(tool.parent), os.environ["PATH"]])
        usage, code = (
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, env=os.environ | {"PATH": path}
            ).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    counts = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9_]+)", code, re.M))
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"]), counts["HGMMA"] + counts["HMMA"]


def main():
    """Compile, print, and exit with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["sm_90"], choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", type=int, nargs="+", default=range(len(LAYERS)), help="indices into LAYERS")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = True  # otherwise float32 products have no tensor cores
    failures = 0
    for target in options.targets:
        chip, most = TARGETS[target]
        for dtype in options.dtypes:
            for kernel, name, signature, constants, divisible, choice in launches(
                getattr(torch, dtype), [LAYERS[i] for i in options.layers]
            ):
                source = ASTSource(kernel, signature, constants, divisible)
                compiled = triton.compile(source, target=chip, options=choice)
                shared, wrong = compiled.metadata.shared, []
                line = f"{target} {dtype} {name}: shared {shared}"
                if shared > most:
                    wrong.append(f"more than {most} bytes of shared memory")
                if chip.backend == "cuda":
                    registers, spilled, products = resources(compiled.asm["cubin"])
                    line += f", registers {registers}, spilled {spilled}, tensor-core instructions {products}"
                    wrong += ["spills"] * (spilled > 0)
                else:
                    text = compiled.asm["amdgcn"]
                    products = text.count("v_mfma")
                    spilled = sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)))
                    line += f", spilled {spilled}, tensor-core instructions {products}"
                    wrong += ["spills"] * (spilled > 0)
                if name in PRODUCTS and products == 0:
                    wrong.append("no tensor-core instruction")
                blocks = {n: constants[(i,)] for i, n in enumerate(kernel.arg_names) if n.startswith("BLOCK")}
                print(line, blocks, *(f"<-- {what}" for what in wrong), flush=True)
                failures += len(wrong)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
